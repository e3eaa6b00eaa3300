"""Quantized safetensors checkpoints: from a method's tensors to the matrices they stand for.

Owns which method a configuration names, and which tensors belong to a quantized module. One file a method. Must not
know: how files are opened, architectures, how coded weights are computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.loading.quantized import (
    afq,
    awq,
    bitsandbytes,
    compressed_tensors,
    eight_bits,
    gptq,
    hqq,
    mxfp4,
)
from tramontane.loading.quantized.base import REMEDY, Matrix, Method, Module
from tramontane.loading.tensors import TensorEntry
from tramontane.models.fields import Fields

__all__ = ["METHODS", "Matrix", "Method", "collect", "method_of", "mistral_method"]

METHODS: Mapping[str, Callable[[Fields], Method]] = {
    "gptq": gptq.method,
    "awq": awq.method,
    "compressed-tensors": compressed_tensors.method,
    "fp8": eight_bits.fp8,
    "fbgemm_fp8": eight_bits.fp8,
    "mxfp8": eight_bits.fp8,
    "bitsandbytes": bitsandbytes.method,
    "hqq": hqq.method,
    "mxfp4": mxfp4.method,
}
"""`quant_method` of a configuration -> its reader."""


def method_of(config: Mapping[str, Any], source: str) -> Method | None:
    """The method that a config.json names, None for plain weights. Raises UnsupportedModel or CorruptCheckpoint."""
    fields = Fields(config, source)
    settings = fields.mapping("quantization_config")
    # MLX writes its settings under a key of its own, newer versions under both, without the name of a method.
    own = fields.mapping("quantization")
    if own and "quant_method" not in settings:
        return afq.method(Fields(own, f"quantization of {source}"))
    if not settings:
        return None
    quantization = Fields(settings, f"quantization_config of {source}")
    name = quantization.text("quant_method", _old_name(settings))
    if name not in METHODS:
        raise UnsupportedModel(
            f"{source} is quantized with {name[:40]!r}, which this build does not read.",
            f"It reads {', '.join(METHODS)} and MLX. {REMEDY}",
        )
    return METHODS[name](quantization)


def mistral_method(params: Mapping[str, Any], source: str) -> Method | None:
    """The method that Mistral's own params.json names: under `quantization` in its own words, or as a config.json."""
    own = Fields(params, source).mapping("quantization")
    if own:
        return eight_bits.mistral_fp8(Fields(own, f"quantization of {source}"))
    return method_of(params, source)


def _old_name(settings: Mapping[str, Any]) -> str | None:
    """bitsandbytes did not always write its name."""
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else None


def collect(
    method: Method, tensors: Mapping[str, TensorEntry], read: Callable[[str], NDArray[Any]], source: str
) -> tuple[dict[str, TensorEntry], dict[str, Matrix]]:
    """The checkpoint's tensors with each quantized module as one matrix `MODULE.weight`, and these matrices.

    `read` gives a tensor by its name. Raises CorruptCheckpoint or UnsupportedModel.
    """
    entries: dict[str, TensorEntry] = {}
    modules: dict[str, dict[str, str]] = {}
    for name, entry in tensors.items():
        module, ending = _split(name, method)
        if ending:
            modules.setdefault(module, {})[ending] = name
        elif not f".{name}".endswith(tuple(f".{ending}" for ending in method.ignored)):
            entries[name] = entry
    matrices: dict[str, Matrix] = {}
    for name, endings in modules.items():
        own = {ending: tensors[tensor] for ending, tensor in endings.items()}
        module_ = Module(source, name, own, lambda ending, endings=endings: read(endings[ending]))  # type: ignore[misc]
        if not method.quantized(module_):
            entries.update({tensor: tensors[tensor] for tensor in endings.values()})
            continue
        matrix = method.plan(module_)
        weight = f"{name}.weight"
        if matrix is None:
            entries[weight] = tensors[weight]
            continue
        if weight in tensors and weight not in endings.values():
            raise CorruptCheckpoint(source, f"module {name!r} has quantized tensors and a plain weight")
        entries[weight] = TensorEntry(matrix.shape, matrix.format, matrix.nbytes)
        matrices[weight] = replace(matrix, sources=tuple(endings.values()))
    return entries, matrices


def _split(name: str, method: Method) -> tuple[str, str]:
    """(module, ending) of a tensor that the method may use; ("", "") of any other."""
    for ending in sorted(method.tensors, key=len, reverse=True):
        for joint in method.joints:
            if name.endswith(joint + ending):
                return name[: -len(joint + ending)], ending
    return "", ""
