"""Tiny random checkpoints, made and computed by transformers, in which every feature moves the logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models.cases import CASES
from tests.models.cases.base import VOCAB

__all__ = ["CASES", "VOCAB", "Tiny", "TinyModels", "tokens"]


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, count)]


class Tiny:
    """One of CASES: the transformers model, and the folder it is saved in."""

    def __init__(self, name: str, folder: Path) -> None:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        self.case = case = CASES[name]
        self.torch, self.path = torch, folder / name
        config = transformers.AutoConfig.for_model(case.model_type, **case.settings)
        self.model = (
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation=case.attention).float().eval()
        )
        randomize(torch, self.model, seed=len(name))
        if case.save is None:
            self.model.save_pretrained(self.path)
        else:
            case.save(self.model, self.path)

    def logits(self, ids: Sequence[int], model: Any = None) -> NDArray[Any]:
        """float32 [len(ids), V] of this model, or of a changed copy of it."""
        model, batch = model or self.model, self.torch.tensor([list(ids)])
        with self.torch.no_grad():
            logits = self.case.forward(model, batch) if self.case.forward else model(batch).logits
        values: NDArray[Any] = logits[0].float().numpy()
        return values

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` likeliest tokens, each computed from scratch."""
        out = list(ids)
        for _ in range(count):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(ids) :]


def randomize(torch: Any, model: Any, seed: int) -> None:
    """Values that leave nothing neutral: norms, biases and learned numbers of buffers included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():  # with the buffers
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key and value.dim() == 1:
                value.add_(0.4 * noise)  # to 1, or to 0 where what is stored is less one
            elif value.dim() == 1:
                value.copy_(0.5 * noise)
            else:
                value.copy_(noise * (1.6 / value.shape[-1] ** 0.5))


class TinyModels:
    """CASES by name, each made once."""

    def __init__(self, folder: Path) -> None:
        self.get = cache(lambda name: Tiny(name, folder))
