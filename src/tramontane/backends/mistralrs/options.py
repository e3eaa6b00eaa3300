"""What a user may set of mistral.rs, checked before anything is read.

Owns the names of the options, their ranges, the environment variables and the rules of devices. Must not know: files
of models, the wheel's own classes.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tramontane.errors import DeviceNotAvailable, InvalidRequest, ModelNotFound
from tramontane.records import dataclass

log = logging.getLogger("tramontane.mistralrs")

DType = Literal["auto", "float32", "float16", "bfloat16"]
Kind = Literal["auto", "text", "multimodal", "embedding"]

ISQ_NAMES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2K", "Q3K", "Q4K", "Q5K", "Q6K", "Q8K",
    "HQQ4", "HQQ8", "FP8", "AFQ2", "AFQ3", "AFQ4", "AFQ6", "AFQ8", "F8Q8", "MXFP4",
)  # fmt: skip
"""As the wheel spells them."""
_ISQ_BITS = {2: "Q2K", 3: "Q3K", 4: "Q4K", 5: "Q5K", 6: "Q6K", 8: "Q8_0"}
_ISQ_BITS_METAL = {2: "AFQ2", 3: "AFQ3", 4: "AFQ4", 6: "AFQ6", 8: "AFQ8"}

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|metal")
_ENVIRONMENT = {
    "MISTRALRS_ISQ": "quantization",
    "MISTRALRS_PAGED_ATTN": "paged_attention",
    "MISTRALRS_PAGED_ATTN_BLOCK_SIZE": "block_size",
    "MISTRALRS_PREFIX_CACHE_N": "prefix_cache_n",
    "MISTRALRS_NO_STREAM": "stream",
    "MISTRALRS_DEVICE": "device",
}
"""Variable -> the option that it sets where the option is not given."""


@dataclass(frozen=True)
class Options:
    """The options of this backend. None leaves a thing to the wheel."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:0 or metal: what the installed wheel was built for; see `resolve_device`."""
    device_fallback: bool = False
    """Whether a missing explicit device becomes what the wheel has (logged) instead of an error."""
    dtype: DType = "auto"
    kind: Kind = "auto"
    """How a folder is loaded; auto reads it from its config.json."""
    architecture: str | None = None
    """The wheel's name of an architecture (`Llama`, `Qwen3`, ...); None lets it read the checkpoint."""
    tokenizer: Path | None = None
    """A tokenizer.json instead of the model's own."""
    quantization: str | int | None = None
    """In place, while loading: Q4K (also Q4_K, q4k), Q8_0, HQQ4, ..., or a number of bits."""
    topology: Path | None = None
    """A YAML file: which layers are quantized how, on which device."""
    imatrix: Path | None = None
    """A .imatrix of llama.cpp's or a .cimatrix, to weigh the quantization by."""
    calibration_file: Path | None = None
    """A text to collect such a matrix from while loading."""
    write_uqff: Path | None = None
    """Where to write the quantized model as UQFF."""
    mmproj: Path | None = None
    """The GGUF file of a multimodal model's encoder, beside that of its language model."""
    gqa: int = 1
    """Query heads a key head, which ggjt files do not tell."""
    max_edge: int | None = None
    """Longest edge of an image, in pixels; larger ones are scaled down."""
    max_num_seqs: int = 32
    prefix_caching: bool = True
    prefix_cache_n: int = 16
    """Sequences whose keys are kept for later requests that begin alike; 0: none."""
    kv_cache: bool = True
    paged_attention: bool | None = None
    """None: where the wheel has it, which is on CUDA and Metal."""
    block_size: int | None = None
    """Tokens a page of paged attention; None: 32."""
    memory_goal: str | float | None = None
    """Of paged attention: a part of the device's memory, or "4GiB", or "65536tokens"."""
    engine_seed: int | None = None
    """Of the whole run: the wheel has no seed a request."""
    adapters: Mapping[str, Path] | None = None
    """LoRA adapters by name, loaded at the start; {} only makes room for later ones."""
    max_adapters: int = 16
    max_adapter_rank: int = 256
    max_adapter_bytes: int = 8 << 30
    xlora: Path | None = None
    """A folder with an X-LoRA checkpoint for the model."""
    xlora_order: Path | None = None
    """Its ordering file (JSON)."""
    tgt_non_granular_index: int | None = None
    """From so many generated tokens on, reuse the scalings."""
    stream: bool = True
    """False: each answer comes as one chunk."""

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise InvalidRequest(name, f"{value!r} is not of type {wanted}")
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise InvalidRequest(name, f"{value!r} is out of range", f"It must be at least {low}.")
        for name, choices in (("dtype", get_args(DType)), ("kind", get_args(Kind))):
            if getattr(self, name) not in choices:
                raise InvalidRequest(name, f"{getattr(self, name)!r} is unknown", f"Use one of {', '.join(choices)}.")
        if not _DEVICE.fullmatch(self.device):
            raise InvalidRequest("device", f"{self.device!r} is unknown", "Use auto, cpu, cuda, cuda:N or metal.")
        self._check_files()
        if (self.xlora is None) != (self.xlora_order is None):
            raise InvalidRequest("xlora", "a checkpoint and its ordering file go together", "Give xlora_order as well.")
        if self.xlora is not None and self.adapters is not None:
            raise InvalidRequest("adapters", "an X-LoRA model mixes its own", "Leave out one of adapters and xlora.")
        if self.tgt_non_granular_index is not None and self.xlora is None:
            raise InvalidRequest("tgt_non_granular_index", "it is X-LoRA's", "Give xlora as well, or leave it out.")

    def _check_files(self) -> None:
        """Paths become `Path`; those that are read must be there."""
        for name in _FILES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _existing(value, name))
        if self.write_uqff is not None:
            object.__setattr__(self, "write_uqff", Path(os.path.expanduser(self.write_uqff)))
        if self.adapters is not None:
            found = {str(alias): _existing(path, "adapters") for alias, path in self.adapters.items()}
            object.__setattr__(self, "adapters", found)


_FILES = ("tokenizer", "topology", "imatrix", "calibration_file", "mmproj", "xlora", "xlora_order")
_PATH: tuple[type, ...] = (str, Path)
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys((*_FILES, "write_uqff"), _PATH),
    **dict.fromkeys(("device", "dtype", "kind", "architecture"), (str,)),
    **dict.fromkeys(
        ("gqa", "max_edge", "max_num_seqs", "prefix_cache_n", "block_size", "engine_seed", "max_adapters",
         "max_adapter_rank", "max_adapter_bytes", "tgt_non_granular_index"), (int,),
    ),
    **dict.fromkeys(("device_fallback", "prefix_caching", "kv_cache", "paged_attention", "stream"), (bool,)),
    "quantization": (str, int),
    "memory_goal": (str, float, int),
    "adapters": (Mapping,),
}  # fmt: skip
_AT_LEAST: Mapping[str, float] = {
    "gqa": 1,
    "max_edge": 1,
    "max_num_seqs": 1,
    "prefix_cache_n": 0,
    "block_size": 1,
    "engine_seed": 0,
    "max_adapters": 1,
    "max_adapter_rank": 1,
    "max_adapter_bytes": 1,
    "tgt_non_granular_index": 0,
}
ALIASES = {"isq": "quantization"}
OPTION_NAMES = frozenset(option.name for option in fields(Options)) | ALIASES.keys()


@dataclass(frozen=True)
class Settings:
    """Options and environment resolved against what the installed wheel can do."""

    options: Options
    device: str
    """What the wheel computes on: cpu, cuda or metal."""
    isq: str | None
    """The wheel's name of the in-place quantization."""
    paged: bool
    prefix_cache_n: int
    environment: frozenset[str] = field(default_factory=frozenset)
    """The options that the environment set."""


def settle(options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Options over the environment's, checked. Raises InvalidRequest, DeviceNotAvailable or ModelNotFound."""
    told = _from_environment(os.environ if environ is None else environ)
    given: dict[str, Any] = {}
    for name, value in options.items():
        own = ALIASES.get(name, name)
        if value is None:
            continue
        if own in given:
            raise InvalidRequest(name, f"{own} is already given under another name", "Give one of them.")
        given[own] = value
    merged = Options(**{**told, **given})
    device = resolve_device(merged.device, merged.device_fallback)
    paged = _paged(merged, device)
    return Settings(
        merged,
        device,
        isq_name(merged.quantization, device),
        paged,
        merged.prefix_cache_n if merged.prefix_caching else 0,
        frozenset(told) - frozenset(given),
    )


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The options that MISTRALRS_* set; an empty variable sets none."""
    told: dict[str, Any] = {}
    for variable, name in _ENVIRONMENT.items():
        value = environ.get(variable, "").strip()
        if not value:
            continue
        if name == "paged_attention":
            told[name] = _yes(variable, value)
        elif name == "stream":
            told[name] = not _yes(variable, value)
        elif name in ("block_size", "prefix_cache_n"):
            told[name] = _count(variable, value)
        else:
            told[name] = value if name != "device" else value.lower()
    return told


def _yes(variable: str, value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise InvalidRequest(variable, f"{value!r} is neither yes nor no", "Set it to true or false.")


def _count(variable: str, value: str) -> int:
    if value.lower() == "false" and variable == "MISTRALRS_PREFIX_CACHE_N":
        return 0
    if not value.isdecimal():
        raise InvalidRequest(variable, f"{value!r} is not a number")
    return int(value)


def isq_name(given: str | int | None, device: str = "cpu") -> str | None:
    """The wheel's name of a quantization: `Q4_K`, `q4k` and 4 are Q4K. Raises InvalidRequest for one it has not."""
    if given is None:
        return None
    if isinstance(given, int) or given.isdecimal():
        bits = _ISQ_BITS_METAL if device == "metal" else _ISQ_BITS
        if int(given) not in bits:
            raise InvalidRequest("quantization", f"{given} bits", f"Use one of {', '.join(map(str, bits))}.")
        return bits[int(given)]
    plain = given.upper().replace("_", "")
    for name in ISQ_NAMES:
        if name.replace("_", "") == plain:
            return name
    raise InvalidRequest(
        "quantization", f"{given!r} is none of mistral.rs's", f"Use one of {', '.join(ISQ_NAMES)}, or a number of bits."
    )


def built_for() -> str:
    """What the installed wheel computes on, by its distribution's name or local version: cpu, cuda or metal."""
    for device, mark in (("cuda", "cu"), ("metal", "metal")):
        if _version(f"mistralrs-{device}") or mark in _version("mistralrs").partition("+")[2]:
            return device
    return "cpu"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def resolve_device(device: str, fallback: bool = False, has: str | None = None, platform: str = sys.platform) -> str:
    """The device that the wheel will use: it takes the one that it was built for (`has`), and lets nobody choose.

    On Windows that is the CPU. Raises DeviceNotAvailable for another one, unless `fallback` (which is logged).
    """
    has = "cpu" if platform == "win32" else has or built_for()
    if device in ("auto", has, f"{has}:0"):
        return has
    error = DeviceNotAvailable(device, *_why(device, has, platform))
    if not fallback:
        raise error
    log.warning("%s Falling back to %s.", error, has)
    return has


def _why(device: str, has: str, platform: str) -> tuple[str, str]:
    if device.startswith("cuda") and platform == "win32":
        return "mistral.rs has no CUDA on Windows", "Use WSL2 or Linux, or device='cpu'."
    if device.startswith("cuda:") and has == "cuda":
        index = device.partition(":")[2]
        return "mistral.rs takes the first GPU that it sees", f"Set CUDA_VISIBLE_DEVICES={index} and use device='cuda'."
    if device == "cpu":
        return f"the installed mistralrs wheel computes on {has}", "Install the wheel for CPUs: pip install mistralrs."
    return (
        f"the installed mistralrs wheel is built for {has}",
        f"Install mistral.rs's wheel for {device.partition(':')[0]}, or use device='auto'.",
    )


def _paged(options: Options, device: str) -> bool:
    supported = device in ("cuda", "metal")
    paged = supported if options.paged_attention is None else options.paged_attention
    asked = ["paged_attention"] * bool(options.paged_attention)
    asked += [name for name in ("block_size", "memory_goal") if getattr(options, name) is not None]
    if asked and not supported:
        raise InvalidRequest(
            asked[0], f"mistral.rs pages its cache on CUDA and Metal alone, and this wheel runs on the {device}",
            "Leave it out, or use the native backend, which pages everywhere.",
        )  # fmt: skip
    return paged


def _existing(path: str | Path, name: str) -> Path:
    found = Path(os.path.expanduser(path))
    if not found.exists():
        raise ModelNotFound(str(path), f"{name} names it, and there is no such file or folder", "Check the path.")
    return found
