"""Settings of tiny checkpoints, family by family: a name -> a Case. One module a group of kin, merged here."""

from __future__ import annotations

from collections.abc import Mapping

from tests.models.cases import (
    alibi,
    cohere,
    deepseek,
    gemma,
    glm,
    gpt,
    gpt_oss,
    granite,
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
from tests.models.cases.base import Case

CASES: Mapping[str, Case] = {
    **alibi.CASES,
    **cohere.CASES,
    **deepseek.CASES,
    **gemma.CASES,
    **glm.CASES,
    **gpt.CASES,
    **gpt_oss.CASES,
    **granite.CASES,
    **kin.CASES,
    **layernorm.CASES,
    **llama.CASES,
    **mistral.CASES,
    **olmo.CASES,
    **phi.CASES,
    **phimoe.CASES,
    **qwen.CASES,
    **recurrent.CASES,
    **remote.CASES,
}
