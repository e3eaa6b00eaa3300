"""Families: what a checkpoint says of itself, as a ModelSpec; one small function a family and source.

Owns `FAMILIES`, the table of all of them, each in a file with its kin. Must not know: arrays, files, how a spec is
computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tramontane.errors import UnsupportedModel
from tramontane.models.families import (
    alibi,
    cohere,
    deepseek,
    encoders,
    gemma,
    glm,
    gpt,
    gpt_oss,
    granite,
    hybrid,
    kin,
    layernorm,
    llama,
    mistral,
    olmo,
    phi,
    phimoe,
    qwen,
    recurrent,
    remote,
)
from tramontane.models.families.base import Family, GGUFTensors
from tramontane.models.families.gguf import KEYS
from tramontane.models.fields import Fields
from tramontane.models.names import NameMap
from tramontane.models.spec import ModelSpec

__all__ = ["FAMILIES", "Family", "GGUFTensors", "gguf_names", "hf_names", "spec_from_gguf", "spec_from_hf"]

FAMILIES: Mapping[str, Family] = {
    **alibi.FAMILIES,
    **cohere.FAMILIES,
    **deepseek.FAMILIES,
    **encoders.FAMILIES,
    **gemma.FAMILIES,
    **glm.FAMILIES,
    **gpt.FAMILIES,
    **gpt_oss.FAMILIES,
    **granite.FAMILIES,
    **hybrid.FAMILIES,
    **kin.FAMILIES,
    **layernorm.FAMILIES,
    **llama.FAMILIES,
    **mistral.FAMILIES,
    **olmo.FAMILIES,
    **phi.FAMILIES,
    **phimoe.FAMILIES,
    **qwen.FAMILIES,
    **recurrent.FAMILIES,
    **remote.FAMILIES,
}
"""By `model_type` of config.json and `general.architecture` of GGUF."""


def spec_from_hf(config: Mapping[str, Any], architecture: str = "auto", source: str = "config.json") -> ModelSpec:
    """The spec that a `config.json` describes, read as `architecture` ("auto": its `model_type`).

    Raises CorruptCheckpoint for missing or impossible values and UnsupportedModel for what this build lacks, both
    naming the key.
    """
    fields = Fields(config, source)
    family, name = _hf_family(fields, architecture)
    if family.from_hf is None:
        raise _unknown(name, source, "safetensors")
    spec = family.from_hf(fields)
    if architecture != "auto" or _of_class(config, "ForCausalLM", "LMHeadModel"):
        return spec
    if not _of_class(config, *_HEADLESS):
        raise fields.unsupported("architectures", f"Pass architecture={name!r} to load it as a causal language model.")
    return replace(spec, head=False)


_HEADLESS = ("Model", "ForSequenceClassification", "ForMaskedLM")
"""Endings of the classes of which the states of tokens are all that a decoder computes."""


def _of_class(config: Mapping[str, Any], *endings: str) -> bool:
    """Whether all the classes that the checkpoint says it is of end so."""
    classes = config.get("architectures") or []
    return isinstance(classes, list) and all(str(kind).endswith(endings) for kind in classes)


def hf_names(config: Mapping[str, Any], architecture: str = "auto", source: str = "config.json") -> NameMap:
    """What the checkpoint calls its tensors; raises as `spec_from_hf`."""
    fields = Fields(config, source)
    told = _hf_family(fields, architecture)[0].names
    names = told if isinstance(told, NameMap) else told(fields)
    if _of_class(config, "ForSequenceClassification"):
        return replace(names, ignored=rf"{names.ignored}|score\.weight")
    return names


def spec_from_gguf(
    metadata: Mapping[str, Any], tensors: GGUFTensors, architecture: str = "auto", source: str = "GGUF metadata"
) -> ModelSpec:
    """The spec that a GGUF file's metadata and tensors describe; raises as `spec_from_hf`."""
    stored = Fields(metadata, source).text("general.architecture")
    name = stored if architecture == "auto" else architecture
    family = _family(name, source)
    if family.from_gguf is None:
        raise _unknown(name, source, "GGUF")
    fields = Fields(metadata, source, f"{stored}.")
    fields.known(KEYS | family.gguf_keys)
    return family.from_gguf(fields, tensors)


def gguf_names(metadata: Mapping[str, Any], architecture: str = "auto", source: str = "GGUF metadata") -> NameMap:
    """What the file calls its tensors; raises as `spec_from_gguf`."""
    stored = Fields(metadata, source).text("general.architecture")
    return _family(stored if architecture == "auto" else architecture, source).gguf_names


def _hf_family(fields: Fields, architecture: str) -> tuple[Family, str]:
    name = fields.text("model_type") if architecture == "auto" else architecture
    return _family(name, fields.source), name


def _family(name: str, source: str) -> Family:
    if name not in FAMILIES:
        raise _unknown(name, source)
    return FAMILIES[name]


def _unknown(name: str, source: str, form: str = "") -> UnsupportedModel:
    where = f" in {form} form" if form else ""
    return UnsupportedModel(
        f"{source} is of architecture {name[:60]!r}, which this build does not have{where}.",
        f"It has {', '.join(FAMILIES)}; architecture= reads a checkpoint as one of them.",
    )
