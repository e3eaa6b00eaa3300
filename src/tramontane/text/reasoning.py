"""Reasoning: the marks between which models think before they answer.

Owns which marks there are, and how a text between them is told from the answer. Must not know: templates' variables,
tokens. Sources: the templates that these models are published with.
"""

from __future__ import annotations

from tramontane.records import dataclass
from tramontane.text.toolcalls.output import Output
from tramontane.text.toolcalls.reader import Reader, Reading


@dataclass(frozen=True)
class Reasoning:
    """The marks of one kind."""

    open: str
    close: str

    @property
    def marks(self) -> tuple[str, ...]:
        return self.open, self.close


KINDS = {
    "think": Reasoning("<think>", "</think>"),
    "mistral": Reasoning("[THINK]", "[/THINK]"),
    "gemma": Reasoning("<|channel>thought\n", "<channel|>"),
    "seed": Reasoning("<seed:think>", "</seed:think>"),
    "cohere": Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
    "granite": Reasoning("Here is my thought process:", "Here is my response:"),
}
"""By the name that a user may give; the first whose marks stand in a model's template is the model's."""


def reasoning_of(template: str) -> Reasoning | None:
    """The kind that a template's text shows, by the mark that ends it."""
    return next((kind for kind in KINDS.values() if kind.close in template), None)


def is_open(kind: Reasoning, prompt: str) -> bool:
    """Whether a prompt ends within reasoning that it has begun itself."""
    return prompt.rstrip().endswith(kind.open.rstrip())


def is_over(kind: Reasoning, prompt: str) -> bool:
    """Whether a prompt ends with reasoning that is done, so that the answer has none."""
    return prompt.rstrip().endswith(kind.close)


def read_reasoning(reader: Reader, out: Output, kind: Reasoning, opened: bool) -> Reading[None]:
    """Read what stands between the marks at the beginning, if anything does. `opened`: the prompt ends within it."""
    reader.save()
    if not opened:
        yield from reader.space()
        if not (yield from reader.starts(kind.open)):
            reader.back()
            return
    reader.forget()
    yield from reader.space()
    if opened:
        yield from reader.starts(kind.open)  # some models begin it again
        yield from reader.space()
    yield from reader.until((kind.close,), out.think)
    yield from reader.space()
