"""Stop strings: find the first in a stream of text, and never let go of half of one.

Owns the search. Must not know: tokens, requests, why a stream ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.errors import InvalidRequest


class _Automaton:
    """Knuth-Morris-Pratt: after each character, how many characters of `word` the text ends with."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.matched = 0
        self._fallback = [0] * len(word)
        for i in range(1, len(word)):
            self._fallback[i] = self._next(self._fallback[i - 1], word[i])

    def _next(self, matched: int, char: str) -> int:
        while matched and self.word[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self.word[matched] == char)

    def feed(self, char: str) -> bool:
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.word)


class StopMatcher:
    """Watches a text that comes in pieces, cut anywhere, for the stop string that is completed first.

    Of several completed by the same character the longest (which began first) wins. Time is linear in the text and
    in the number of stop strings. Raises InvalidRequest("stop") for an empty stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if "" in stops:
            raise InvalidRequest("stop", "an empty stop string would stop at once", "Leave it out.")
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._held = ""
        self._found: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece; return the text safe to show, and the stop string once it is complete.

        The text ends before the stop string, or with it if `include`. What follows a stop string is dropped.
        """
        if self._found is not None:
            return "", self._found
        if not self._automata:
            return text, None
        start = len(self._held)
        text = self._held + text
        for end in range(start, len(text)):
            # Every automaton takes the character: the first to finish ends the search, so none lags behind.
            done = [automaton.word for automaton in self._automata if automaton.feed(text[end])]
            if done:
                self._found = done[0]
                self._held = ""
                return text[: end + 1 - (0 if self._include else len(done[0]))], self._found
        keep = max(automaton.matched for automaton in self._automata)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What is still held, at the end of the stream; empty after a match."""
        held, self._held = self._held, ""
        for automaton in self._automata:
            automaton.matched = 0
        return held
