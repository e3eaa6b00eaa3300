"""Settings of tiny checkpoints, family by family: a name -> a Case. One module a group of kin, merged here."""

from __future__ import annotations

from collections.abc import Mapping

from tests.models.cases import (
    alibi,
    cohere,
    gemma,
    gpt,
    layernorm,
    llama,
    mistral,
    phi,
    qwen,
)
from tests.models.cases.base import Case

CASES: Mapping[str, Case] = {
    **alibi.CASES,
    **cohere.CASES,
    **gemma.CASES,
    **gpt.CASES,
    **layernorm.CASES,
    **llama.CASES,
    **mistral.CASES,
    **phi.CASES,
    **qwen.CASES,
}
