"""Output: what an answer's parser has made out so far: text, reasoning, calls.

Owns white space at the seams, the numbering and naming of calls, and what is new since it was last asked. Must not
know: how any model writes.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterable

from tramontane.records import dataclass
from tramontane.types import ToolCallDelta

_SPACE = " \t\r\n"


class Enough(Exception):
    """Raised by `Output.close` when the answer may make no more calls: what follows is not read."""


@dataclass(frozen=True)
class Piece:
    """What became certain since the last piece."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class _Prose:
    """Text whose last white space waits until it is known to be within, not at the end."""

    def __init__(self) -> None:
        self.new: list[str] = []
        self.begun = False
        self.held = ""

    def write(self, text: str) -> None:
        text = self.held + text
        shown = text.rstrip(_SPACE)
        self.held = text[len(shown) :]
        if shown:
            self.begun = True
            self.new.append(shown)

    def break_(self) -> None:
        """What comes next is another paragraph."""
        self.held = "\n\n" if self.begun else ""

    def take(self) -> str:
        text = "".join(self.new)
        self.new.clear()
        return text


class Output:
    """Gathers what one answer says. `single`: one call at most; `ids` makes the calls' ids."""

    def __init__(self, ids: Callable[[], str], single: bool = False) -> None:
        self._ids, self._single = ids, single
        self._prose, self._thoughts = _Prose(), _Prose()
        self._new: list[tuple[int, str | None, str | None, list[str]]] = []
        self._used: set[str] = set()
        self.calls = 0

    def text(self, text: str) -> None:
        self._prose.write(text)

    def think(self, text: str) -> None:
        self._thoughts.write(text)

    def paragraph(self) -> None:
        """What was said and thought so far stands apart from what follows."""
        self._prose.break_()
        self._thoughts.break_()

    def call(self, name: str, id_: str | None = None) -> None:
        """A call begins; its arguments follow."""
        if not self._prose.begun:
            self._prose.held = ""
        while not id_ or id_ in self._used:
            id_ = self._ids()
        self._used.add(id_)
        self._new.append((self.calls, id_, name, []))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        if not self._new:
            self._new.append((self.calls - 1, None, None, []))
        self._new[-1][3].append(text)

    def close(self) -> None:
        """The call is whole."""
        if self._single:
            raise Enough

    def take(self, ended: bool = False) -> Piece:
        """What is new; at the end, with the white space that the text ends with, unless calls were made."""
        if ended and not self.calls:
            self._prose.new.append(self._prose.held)
            self._prose.held = ""
        calls = tuple(ToolCallDelta(index, id_, name, "".join(arguments)) for index, id_, name, arguments in self._new)
        self._new = []
        return Piece(self._prose.take(), self._thoughts.take(), calls)


def merged(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """The same calls in one piece each, in the order of their indices."""
    parts: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        parts.setdefault(delta.index, []).append(delta)
    return tuple(
        ToolCallDelta(
            index,
            next((part.id for part in of if part.id is not None), None),
            next((part.name for part in of if part.name is not None), None),
            "".join(part.arguments for part in of),
        )
        for index, of in sorted(parts.items())
    )


def call_id() -> str:
    """As OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """Nine letters and digits, as Mistral's templates demand."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
