"""Which of the wheel's ways of loading fits a model, from the files that our own loader found.

Owns the wheel's `Which` and the arguments of its `Runner`. Must not know: requests, how the wheel is called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tramontane.backends.mistralrs.options import Options, Settings
from tramontane.backends.mistralrs.xlora import staged
from tramontane.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from tramontane.loading.ggml import is_old_ggml
from tramontane.records import dataclass

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_DTYPES = {"auto": "Auto", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_EMBEDDERS = ("Gemma3TextModel", "Qwen3ForCausalLM", "Qwen3Model")
_MEDIA = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower")


@dataclass(frozen=True)
class Found:
    """A model's files, and what they are."""

    path: Path
    layout: str
    """gguf, ggml, uqff or folder."""
    kind: str
    """text, multimodal or embedding."""


def find(path: Path, options: Options) -> Found:
    """Tell what `path` (of `loading.sources.resolve`) is. Raises InvalidRequest for options that it has no use for."""
    if path.is_dir():
        layout = "uqff" if any(path.glob("*.uqff")) else "folder"
    elif path.suffix.lower() == ".uqff":
        layout = "uqff"
    elif path.suffix.lower() == ".safetensors":
        layout, path = "folder", path.parent
    else:
        layout = "ggml" if is_old_ggml(path) else "gguf"
    found = Found(path, layout, _kind(path, layout, options))
    if (layout, found.kind) not in _TAKEN:
        raise InvalidRequest("kind", f"{_LABELS[layout]} is not loaded as {found.kind}", "Leave it out.")
    for name in _useless(found, options):
        raise InvalidRequest(name, f"mistral.rs has no use for it with {_LABELS[layout]}", "Leave it out.")
    return found


_LABELS = {"gguf": "a GGUF file", "ggml": "a ggjt file", "uqff": "a UQFF model", "folder": "this folder"}


def _kind(path: Path, layout: str, options: Options) -> str:
    if options.kind != "auto":
        return options.kind
    if layout in ("gguf", "ggml"):
        return "multimodal" if options.mmproj is not None else "text"
    folder = path if path.is_dir() else path.parent
    config = _config(folder)
    if any(config.get(key) for key in _MEDIA):
        return "multimodal"
    named = config.get("architectures") or [""]
    if (folder / "modules.json").is_file() and named[0] in _EMBEDDERS:
        return "embedding"
    return "text"


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # params.json of Mistral's layout, say: the wheel's to judge
        return {}
    return config if isinstance(config, dict) else {}


def _useless(found: Found, options: Options) -> list[str]:
    """The options that are set and that the wheel does not take for such a model."""
    unset = Options()
    useless = {name for name in _TAKEN_BY_SOME if getattr(options, name) != getattr(unset, name)}
    return sorted(useless - _TAKEN[found.layout, found.kind] - (_XLORA_TAKES if options.xlora is not None else set()))


_COMMON = {"topology", "tokenizer", "quantization"}
_CALIBRATED = {"imatrix", "calibration_file", "write_uqff"}
_ADAPTED = {"adapters", "max_adapters", "max_adapter_rank", "max_adapter_bytes"}
_XLORA_TAKES = {"xlora", "xlora_order", "tgt_non_granular_index"}
_FOLDER = {
    "text": _COMMON | _CALIBRATED | _ADAPTED | _XLORA_TAKES | {"architecture"},
    "multimodal": _COMMON | _CALIBRATED | {"architecture", "max_edge"},
    "embedding": _COMMON | _CALIBRATED | {"architecture"},
}
_GGUF = _COMMON | _CALIBRATED | _ADAPTED | {"mmproj", "max_edge"}
_TAKEN: dict[tuple[str, str], set[str]] = {
    **{("folder", kind): taken for kind, taken in _FOLDER.items()},
    **{("uqff", kind): taken - {"imatrix", "calibration_file"} for kind, taken in _FOLDER.items()},
    ("gguf", "text"): _GGUF | _XLORA_TAKES,
    ("gguf", "multimodal"): _GGUF,
    ("ggml", "text"): {"topology", "tokenizer", "gqa"} | _XLORA_TAKES,
}
_TAKEN_BY_SOME = set[str]().union(*_TAKEN.values())


def runner_arguments(wheel: Any, found: Found, settings: Settings, template: Path, stage: Path) -> dict[str, Any]:
    """The keyword arguments of the wheel's `Runner`. `template`: a Jinja file that it renders every request with;
    `stage`: an empty folder for files that it must find under other names. Both are needed until it is built."""
    options = settings.options
    if options.xlora is not None and options.xlora_order is not None:
        options = replace(options, xlora=staged(options.xlora, options.xlora_order, stage))
    arguments: dict[str, Any] = {
        "which": which(wheel, found, options, stage),
        "max_seqs": options.max_num_seqs,
        "no_kv_cache": not options.kv_cache,
        "prefix_cache_n": settings.prefix_cache_n,
        "token_source": "none",  # the files are here
        "jinja_explicit": str(template),
        "in_situ_quant": isq_for(found, settings),
        "seed": options.engine_seed,
    }
    if settings.device != "cpu":
        arguments["no_paged_attn"] = not settings.paged
        arguments["paged_attn"] = bool(options.paged_attention)
        if settings.paged:
            arguments["pa_blk_size"] = options.block_size or 32
            arguments["memory_goal"] = options.memory_goal
    return {name: value for name, value in arguments.items() if value is not None}


def isq_for(found: Found, settings: Settings) -> str | None:
    """The quantization in place: the environment's is for models that are not quantized yet."""
    if found.layout != "folder" and "quantization" in settings.environment:
        return None
    return settings.isq


def which(wheel: Any, found: Found, options: Options, stage: Path) -> Any:
    """The wheel's description of the model."""
    if found.layout == "gguf":
        return _gguf(wheel, found, options)
    if found.layout == "ggml":
        return _ggml(wheel, found, options, stage)
    return _folder(wheel, found, options)


def _words(tokenizer: Path, stage: Path) -> Path:
    """A folder with the files that the wheel wants beside a tokenizer.json, and takes nothing from."""
    folder = stage / "words"
    folder.mkdir()
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def _folder(wheel: Any, found: Found, options: Options) -> Any:
    folder = found.path if found.path.is_dir() else found.path.parent
    common = _given(
        tokenizer_json=_text(options.tokenizer),
        topology=_text(options.topology),
        write_uqff=_text(options.write_uqff),
        from_uqff=_uqff_files(found.path) if found.layout == "uqff" else None,
        dtype=_dtype(wheel, options),
    )
    kinds = {"text": "Architecture", "multimodal": "MultimodalArchitecture", "embedding": "EmbeddingArchitecture"}
    common |= _given(arch=_architecture(wheel, kinds[found.kind], options.architecture))
    if options.xlora is not None:
        return wheel.Which.XLora(
            xlora_model_id=str(options.xlora),
            order=str(options.xlora_order),
            model_id=str(folder),
            **_given(tgt_non_granular_index=options.tgt_non_granular_index),
            **common,
        )
    if options.adapters is not None:
        for name in ("imatrix", "calibration_file"):
            if getattr(options, name) is not None:
                raise InvalidRequest(name, "mistral.rs takes it for models without adapters", "Leave out one of them.")
        return wheel.Which.Lora(model_id=str(folder), **_adapters(wheel, options), **common)
    calibrated = _given(imatrix=_text(options.imatrix), calibration_file=_text(options.calibration_file))
    if found.kind == "multimodal":
        return wheel.Which.MultimodalPlain(
            model_id=str(folder), **_given(max_edge=options.max_edge), **calibrated, **common
        )
    kind = wheel.Which.Embedding if found.kind == "embedding" else wheel.Which.Plain
    return kind(model_id=str(folder), **calibrated, **common)


def _gguf(wheel: Any, found: Found, options: Options) -> Any:
    files = [file.name for file in _split_files(found.path)]
    common = {
        "quantized_model_id": str(found.path.parent),
        "quantized_filename": files if len(files) > 1 else files[0],
        "dtype": _dtype(wheel, options),
        **_given(topology=_text(options.topology)),
    }
    if options.xlora is not None:
        return wheel.Which.XLoraGGUF(
            xlora_model_id=str(options.xlora),
            order=str(options.xlora_order),
            **_given(tgt_non_granular_index=options.tgt_non_granular_index),
            **common,
        )
    return wheel.Which.GGUF(
        **common,
        **_given(
            tokenizer_json=_text(options.tokenizer),
            mmproj_filename=_text(options.mmproj),
            write_uqff=_text(options.write_uqff),
            imatrix=_text(options.imatrix),
            calibration_file=_text(options.calibration_file),
            max_edge=options.max_edge,
        ),
        **_adapters(wheel, options),
    )


def _ggml(wheel: Any, found: Found, options: Options, stage: Path) -> Any:
    tokenizer = options.tokenizer or found.path.parent / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelNotFound(
            str(found.path),
            "mistral.rs needs a tokenizer.json for a ggjt file",
            "Pass tokenizer=, or put one beside it.",
        )
    common = {
        "quantized_model_id": str(found.path.parent),
        "quantized_filename": found.path.name,
        "tok_model_id": str(_words(tokenizer, stage)),
        "tokenizer_json": str(tokenizer),
        "gqa": options.gqa,
        "dtype": _dtype(wheel, options),
        **_given(topology=_text(options.topology)),
    }
    if options.xlora is None:
        return wheel.Which.GGML(**common)
    return wheel.Which.XLoraGGML(
        xlora_model_id=str(options.xlora),
        order=str(options.xlora_order),
        **_given(tgt_non_granular_index=options.tgt_non_granular_index),
        **common,
    )


def _adapters(wheel: Any, options: Options) -> dict[str, Any]:
    if options.adapters is None:
        return {}
    return {
        "adapters": [wheel.LoraAdapter(alias, str(path)) for alias, path in options.adapters.items()],
        "max_adapters": options.max_adapters,
        "max_rank": options.max_adapter_rank,
        "max_bytes": options.max_adapter_bytes,
    }


def _architecture(wheel: Any, kind: str, name: str | None) -> Any:
    if name is None:
        return None
    known = {one.lower(): one for one in dir(getattr(wheel, kind)) if not one.startswith("_")}
    if name.lower() not in known:
        raise InvalidRequest("architecture", f"{name!r} is none of mistral.rs's", f"Use one of {', '.join(known)}.")
    return getattr(getattr(wheel, kind), known[name.lower()])


def _dtype(wheel: Any, options: Options) -> Any:
    return getattr(wheel.ModelDType, _DTYPES[options.dtype])


def _split_files(path: Path) -> list[Path]:
    """All files of a GGUF model that is split into several, else the one."""
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    files = [path.with_name(f"{split[1]}-{i:05d}-of-{split[3]}.gguf") for i in range(1, int(split[3]) + 1)]
    for file in files:
        if not os.path.exists(file):
            raise ModelNotFound(str(file), f"{path.name} is one of {split[3]} files", "Fetch them all.")
    return files


def _uqff_files(path: Path) -> str | list[str]:
    """A UQFF model's shards, by their names within its folder."""
    if path.is_dir():
        files = sorted(path.glob("*.uqff"))
        stems = {re.sub(r"-\d+$", "", file.stem) for file in files}
        if len(stems) > 1:
            raise UnsupportedModel(
                f"{path} holds several UQFF models: {', '.join(sorted(stems))}.", "Pass one of the files."
            )
    else:
        stem = re.sub(r"-\d+$", "", path.stem)
        files = sorted(path.parent.glob(f"{stem}-*.uqff")) or [path]
    names = [file.name for file in files]
    return names[0] if len(names) == 1 else names


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
