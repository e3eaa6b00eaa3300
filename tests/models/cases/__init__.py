"""Settings of tiny checkpoints, family by family: a name -> a Case. One module a group of kin, merged here."""

from __future__ import annotations

from collections.abc import Mapping

from tests.models.cases import llama, mistral, qwen
from tests.models.cases.base import Case

CASES: Mapping[str, Case] = {**llama.CASES, **mistral.CASES, **qwen.CASES}
