"""Settings: what a user may configure of an engine, checked once and then frozen.

Owns EngineConfig, its groups, their ranges and the environment variables. One spelling inside; the aliases that
callers know from elsewhere are taken only at the facade (`EngineConfig.from_options`).
Must not know: models, arrays, how memory is measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, Literal, get_args

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass

DType = Literal["auto", "float32", "float16", "bfloat16"]
CacheDType = Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8"]

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|metal")


def _check(
    name: str, value: object, kind: type | tuple[type, ...], low: float | None = None, high: float | None = None
) -> None:
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InvalidRequest(name, f"{value!r} is not of type {expected}")
    if isinstance(value, (int, float)) and (
        value != value or (low is not None and value < low) or (high is not None and value > high)
    ):
        bounds = f"at least {low}" + (f" and at most {high}" if high is not None else "")
        raise InvalidRequest(name, f"{value!r} is out of range", f"It must be {bounds}.")


def _check_optional(
    name: str, value: object, kind: type | tuple[type, ...], low: float, high: float | None = None
) -> None:
    if value is not None:
        _check(name, value, kind, low, high)


def _check_dtype(name: str, value: str, known: Any = DType) -> None:
    if value not in get_args(known):
        raise InvalidRequest(name, f"{value!r} is not a dtype", f"Use one of {', '.join(get_args(known))}.")


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache. At most one of `num_blocks`, `memory_bytes` and `memory_fraction` (of free memory) sets its size;
    with none of them it holds what `max_num_seqs` full contexts need, but at most a quarter of the free memory."""

    block_size: int = 16
    num_blocks: int | None = None
    memory_bytes: int | None = None
    memory_fraction: float | None = None
    prefix_caching: bool = True
    paged_attention: bool = True
    """False: each sequence reserves the blocks of a whole context, contiguous, and shares nothing."""
    dtype: CacheDType = "auto"
    """auto: float32 where the model computes in float32 weights, else float16. int8 and fp8 (e4m3) keep a scale a token
    and head."""

    def __post_init__(self) -> None:
        _check("block_size", self.block_size, int, 1, 1024)
        _check_optional("num_blocks", self.num_blocks, int, 1)
        _check_optional("memory_bytes", self.memory_bytes, int, 1)
        _check_optional("memory_fraction", self.memory_fraction, (int, float), 0.001, 1.0)
        _check("prefix_caching", self.prefix_caching, bool)
        _check("paged_attention", self.paged_attention, bool)
        _check_dtype("cache_dtype", self.dtype, CacheDType)
        sized = [n for n in ("num_blocks", "memory_bytes", "memory_fraction") if getattr(self, n) is not None]
        if len(sized) > 1:
            raise InvalidRequest(sized[1], f"the cache's size is already set by {sized[0]}", "Give one of them.")


@dataclass(frozen=True)
class SchedulerConfig:
    """How much runs at once: sequences, and tokens a step; and how much may wait for that."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int | None = None
    """Sequences that may wait beyond those that there are seats for; what comes then is refused with Overloaded."""
    step_target: float | None = None
    """Seconds that a step may take while answers are streamed, others' prompts being read in portions accordingly;
    None: about as long as two and a half steps without prompts, longer where more wait for their first token than for
    their next."""

    def __post_init__(self) -> None:
        _check("max_num_seqs", self.max_num_seqs, int, 1, 65536)
        _check("max_num_batched_tokens", self.max_num_batched_tokens, int, 1, 1 << 20)
        _check_optional("step_target", self.step_target, (int, float), 0.0)
        _check_optional("max_waiting", self.max_waiting, int, 0)


@dataclass(frozen=True)
class EngineConfig:
    """All that shapes an engine, besides the model itself."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or metal."""
    device_fallback: bool = False
    """Whether a missing explicit device falls back to the best present one (logged) instead of raising."""
    kernels: Literal["auto", "cpu", "torch", "reference"] = "auto"
    """Which implementation of the ops; auto takes the fastest that the device has."""
    threads: int | None = None
    """CPU threads; None: as many as this process may use."""
    pin_threads: bool = False
    """Whether each of these threads stays on one processor of those that this process may use."""
    dtype: DType = "auto"
    """Of dense weights; auto keeps the checkpoint's. Quantized weights stay as they are."""
    architecture: str = "auto"
    """A model family's name to load the checkpoint as; auto reads it from the checkpoint."""
    context_length: int | None = None
    """Longest sequence, prompt and answer together; None: the model's, or as much of it as the cache holds."""
    deterministic: bool = False
    """One arithmetic: a row's result never depends on the batch or the number of threads."""
    tool_format: str | None = None
    """How the model writes calls of tools (hermes, mistral, ...); None reads it from the chat template."""
    reasoning_format: str | None = None
    """Which marks its reasoning stands between (think, mistral, ..., or none); None reads it from the template."""
    profile: str | None = None
    """A file to write a trace to, of steps, ops, waiting and requests; see `tracing`. Ops then run one by one."""
    keep_packed: bool | str = False
    """Whether the CPU's packed weights are kept on disk for the next start: True, beside the model; or a folder."""
    arithmetic: Literal["fast", "exact"] = "fast"
    """fast: kernels may round the activations that meet quantized weights (to 8 bits, a scale for 32), for many rows
    both to bfloat16, and what attention multiplies to that; exact: never."""

    def __post_init__(self) -> None:
        _check("device", self.device, str)
        if not _DEVICE.fullmatch(self.device):
            raise InvalidRequest("device", f"{self.device!r} is unknown", "Use auto, cpu, cuda, cuda:N or metal.")
        _check_optional("threads", self.threads, int, 1, 1024)
        _check("pin_threads", self.pin_threads, bool)
        _check_dtype("dtype", self.dtype)
        _check("architecture", self.architecture, str)
        _check_optional("context_length", self.context_length, int, 2)
        _check("device_fallback", self.device_fallback, bool)
        _check("deterministic", self.deterministic, bool)
        for name in ("tool_format", "reasoning_format", "profile"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), str)
        _check("keep_packed", self.keep_packed, str if isinstance(self.keep_packed, str) else bool)
        if self.keep_packed == "":
            raise InvalidRequest("keep_packed", "an empty name is no folder", "Use true, false or a folder.")
        if self.arithmetic not in ("fast", "exact"):
            raise InvalidRequest("arithmetic", f"{self.arithmetic!r} is unknown", "Use fast or exact.")
        if self.kernels not in ("auto", "cpu", "torch", "reference"):
            raise InvalidRequest("kernels", f"{self.kernels!r} is unknown", "Use auto, cpu, torch or reference.")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """A config from flat keyword options, aliases included; None leaves an option at its default.

        Raises InvalidRequest naming the option for one that is unknown, given twice or out of range.
        """
        known = set(option_names())
        left: dict[str, Any] = {}
        for given, value in options.items():
            name = ALIASES.get(given, given)
            if name not in known:
                raise InvalidRequest(given, "no such option", f"Options are: {', '.join(sorted(known))}.")
            if value is None:
                continue
            if name in left:
                raise InvalidRequest(given, f"{name} is already given under another name", "Give one of them.")
            left[name] = value
        cache_dtype = {"dtype": left.pop("cache_dtype")} if "cache_dtype" in left else {}
        cache = CacheConfig(**_take(left, CacheConfig, skip=("dtype",)), **cache_dtype)
        scheduler = SchedulerConfig(**_take(left, SchedulerConfig))
        return cls(cache=cache, scheduler=scheduler, **left)


ALIASES: Mapping[str, str] = {
    "max_num_blocks": "num_blocks",
    "max_blocks": "num_blocks",
    "max_pages": "num_blocks",
    "enable_prefix_caching": "prefix_caching",
    "gpu_memory_fraction": "memory_fraction",
    "paged_attn": "paged_attention",
    "max_seqs": "max_num_seqs",
    "max_model_len": "context_length",
}


def _take(options: dict[str, Any], group: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [f.name for f in fields(group) if f.name not in skip]
    return {name: options.pop(name) for name in names if name in options}


def option_names() -> list[str]:
    """The flat options that `EngineConfig.from_options` knows, aliases apart."""
    groups = (CacheConfig, SchedulerConfig, EngineConfig)
    names = {f.name for g in groups for f in fields(g)} - {"cache", "scheduler"}
    return sorted(names | {"cache_dtype"})


def flag(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether an environment variable is set to something that means yes."""
    value = (os.environ if environ is None else environ).get(name, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise InvalidRequest(name, f"{value!r} is neither yes nor no", "Set it to 1 or 0.")
