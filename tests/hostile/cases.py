"""2,000 hostile models, each made from its number alone: `make(number)`.

Owns which kinds there are and how many of each. A kind may have a catalogue of lies that somebody thought of; the
numbers beyond it damage at random, with the number as the seed. Must not know: what reads them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.hostile import folder_cases, gguf_cases, sound
from tests.hostile.values import Case, Link

_KINDS: Mapping[str, tuple[int, Callable[[int, random.Random], Case]]] = {
    "gguf": (400, gguf_cases.gguf("llama")),
    "gguf-bpe": (100, lambda number, rng: gguf_cases.gguf("gpt2")(number + 10_000, rng)),
    "ggjt": (90, gguf_cases.ggjt),
    "folder": (150, folder_cases.folder("folder", "config.json", "model.safetensors")),
    "links": (130, folder_cases.links),
    **{method: (35, folder_cases.folder(method, "model.safetensors", "config.json")) for method in sound.QUANTIZED},
    "uqff": (120, folder_cases.folder("uqff", ".uqff", "residual")),
    "tokenizer.json": (110, folder_cases.folder("folder", "tokenizer.json")),
    "tokenizer.model": (50, folder_cases.folder("tokenizer.model", "tokenizer.model")),
    "spiece.model": (50, folder_cases.folder("spiece.model", "spiece.model")),
    "mistral": (90, folder_cases.folder("mistral", "tekken.json", "params.json", "consolidated")),
    "template": (430, folder_cases.template),
}
"""Kind -> how many cases, and how one is made."""

COUNT = sum(count for count, _ in _KINDS.values())


def name_of(number: int) -> str:
    """A case's kind, and its number within."""
    for kind, (count, _) in _KINDS.items():
        if number < count:
            return f"{kind}/{number}"
        number -= count
    raise IndexError(number)


def make(number: int) -> Case:
    """The files of case `number`, from 0 to COUNT - 1."""
    kind, _, within = name_of(number).rpartition("/")
    return _KINDS[kind][1](int(within), random.Random(f"{kind} {within}"))


def write(case: Case, folder: Path) -> None:
    for name, content in case.items():
        if isinstance(content, Link):
            (folder / name).symlink_to(content.to)
        else:
            (folder / name).write_bytes(content)
