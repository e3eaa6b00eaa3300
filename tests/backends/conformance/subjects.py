"""The backends under test, each with a model that it opens, and how a test asks one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import missing, model_path
from tests.engine import checkpoints
from tramontane.backends.base import Backend, Capabilities, Tokenizing
from tramontane.backends.declared import Declared
from tramontane.backends.registry import declared, open_backend, those_that
from tramontane.errors import InvalidRequest
from tramontane.gather import answer_all, closing_after
from tramontane.types import SAMPLING_DEFAULTS, Chunk, Grammar, Request, Result, SamplingParams

REFUSED = "refused by capability: "
PROMPT = "The wind that comes over the mountains"
SCRIPTS = [
    "The tramontane is a cold wind — naïve ☃ 🙂 — from beyond the mountains, and it blows.",
    "Other winds are the mistral, the sirocco and the bora; none of them is as clear and as dry.",
    "It is said to last for three days, six or nine; and nobody who has felt it will forget it.",
]


@dataclass
class Subject:
    """One backend with a model; `backend` is opened once and shared by the tests."""

    name: str
    options: dict[str, Any]
    model: Callable[[Path], str | Path | None]
    """From a folder to write to."""
    folder: Path = Path()
    shared: Backend | None = None

    def open(self) -> Backend:
        if absent := self.declared.missing():
            missing(f"{', '.join(absent)} not installed")
        model = self.model(self.folder)
        return open_backend(model, self.options, SamplingParams(), backend=self.name)

    @property
    def declared(self) -> Declared:
        return declared(self.name)

    @property
    def backend(self) -> Backend:
        if self.shared is None:
            self.shared = self.open()
        return self.shared

    @property
    def can(self) -> Capabilities:
        return self.backend.capabilities()

    @property
    def thinks(self) -> bool:
        """Whether there is a model, whose probabilities mean something."""
        return self.declared.takes_model

    @property
    def tokenizer(self) -> Tokenizing:
        if "tokenize" not in self.declared.abilities:
            pytest.skip(f"{REFUSED}tokenize")
        assert isinstance(self.backend, Tokenizing)
        return self.backend

    # ---- asking

    def ask(self, prompt: str = PROMPT, **sampling: Any) -> Result:
        """The answer to a text, greedy and of 24 tokens unless said otherwise; ends the test where the backend lacks
        a field, and says so."""
        return self.answer(self.request(prompt, **sampling))

    def request(
        self, prompt: str | None = PROMPT, *, messages: Any = None, ids: Any = None, **sampling: Any
    ) -> Request:
        usual: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
        if "seed" in self.can.sampling_fields:
            usual["seed"] = 0  # by which the mock chooses its script
        params = SamplingParams(**{**usual, **sampling})
        if messages is not None or ids is not None:
            prompt = None
        return Request(prompt, None if ids is None else tuple(ids), messages, sampling=params)

    def answer(self, request: Request) -> Result:
        return self.answers([request])[0]

    def answers(self, requests: list[Request]) -> list[Result]:
        """All at once."""
        self.needs(*asked(requests))
        return asyncio.run(answer_all(self.backend, requests, None))

    def chunks(self, request: Request) -> list[Chunk]:
        async def read() -> list[Chunk]:
            async with closing_after(self.backend.generate(request)) as chunks:
                return [chunk async for chunk in chunks]

        self.needs(*asked([request]))
        return asyncio.run(read())

    def first(self, request: Request, count: int = 1) -> list[Chunk]:
        """The first chunks; then the reader goes away."""

        async def read() -> list[Chunk]:
            async with AsyncExitStack() as stack:
                chunks = await stack.enter_async_context(closing_after(self.backend.generate(request)))
                return [await chunks.__anext__() for _ in range(count)]

        return asyncio.run(read())

    def needs(self, *names: str) -> None:
        """Go on where the backend honours these sampling fields. Else see that it refuses them by name, and stop."""
        lacking = sorted(set(names) - self.can.sampling_fields)
        for name in lacking:
            request = self.request(**{name: EXAMPLES[name]})
            with pytest.raises(InvalidRequest) as caught:
                self.first(request)
            assert caught.value.field == name
            for able in those_that(lambda one, name=name: name in one.sampling_fields):  # type: ignore[misc]
                assert able in caught.value.remedy
        if lacking:
            pytest.skip(REFUSED + ", ".join(lacking))


EXAMPLES: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "dry_multiplier": 0.8,
    "dry_base": 2.0,
    "dry_allowed_length": 3,
    "dry_range": 50,
    "dry_sequence_breakers": (":", ";"),
    "bad_words": ("never to be seen",),
    "allowed_token_ids": tuple(range(40, 90)),
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {40: 1.5},
    "seed": 7,
    "n": 2,
    "best_of": 2,
    "beam_width": 2,
    "length_penalty": 0.5,
    "early_stopping": True,
    "logprobs": 2,
    "prompt_logprobs": 2,
    "stop": ("never to be seen",),
    "stop_token_ids": (3,),
    "include_stop": True,
    "min_tokens": 2,
    "max_tokens": 4,
    "ignore_eos": True,
    "echo": True,
    "skip_special_tokens": False,
    "grammar": Grammar("choice", ("cold", "dry")),
    "logits_processors": (lambda prompt, output, logits: logits,),
}
"""For each field a value that asks for something; a new field needs one."""


def asked(requests: Iterable[Request]) -> set[str]:
    """The sampling fields by which these requests ask for something."""
    return {
        field.name
        for request in requests
        for field in fields(SamplingParams)
        if getattr(request.sampling, field.name) not in (None, getattr(SAMPLING_DEFAULTS, field.name))
    }


def tiny(folder: Path) -> Path:
    path = folder / "tiny"
    return path if path.exists() else checkpoints.write(path)


def smollm2(folder: Path) -> Path:
    return model_path("SmolLM2-135M-Instruct.Q4_1.gguf")


def stories15m(folder: Path) -> Path:
    return model_path("stories15m")


def nothing(folder: Path) -> None:
    """The mock's model."""


_CASES = (
    ("mock", Subject("mock", {"script": SCRIPTS, "context_length": 400}, nothing), False),
    ("native", Subject("native", {"threads": 1, "num_blocks": 400}, tiny), False),
    ("native, SmolLM2", Subject("native", {"threads": 2}, smollm2), True),
    ("mistralrs, stories15m", Subject("mistralrs", {}, stories15m), True),
    ("mistralrs, SmolLM2", Subject("mistralrs", {}, smollm2), True),
    ("transformers", Subject("transformers", {"threads": 1}, tiny), True),
    ("transformers, stories15m", Subject("transformers", {"threads": 2}, stories15m), True),
)
SUBJECTS = [pytest.param(one, id=name, marks=pytest.mark.slow if slow else ()) for name, one, slow in _CASES]
