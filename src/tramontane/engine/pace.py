"""Pace: how many tokens of prompts a step may read while others wait for their next token.

Owns what steps have cost, and the bound that follows. Must not know: sequences, blocks, clocks, what a step computes.
"""

from __future__ import annotations

_MEMORY = 0.9
"""Of what a step without prompts takes, from one to the next."""
_USUAL = 2.5
"""A step with prompts may take so many times one without: below three, to leave room for what cannot be foreseen."""
_LEAST = 8
"""Tokens that a step may always read, so that prompts get on whatever a step takes."""


class Pace:
    """Learns seconds = base + cost * tokens and solves for tokens. The base is that of steps without prompts, and never
    more than a step has taken; the cost is the latest, since it grows with the context that a prompt's tokens see."""

    def __init__(self, target: float | None) -> None:
        """`target`: seconds that a step may take; None: as many as `_USUAL` steps without prompts."""
        self._target = target
        self._base: float | None = None
        self._cost: float | None = None

    def learn(self, tokens: int, seconds: float) -> None:
        """A step read so many tokens beyond one a sequence, and took so long."""
        if self._base is None or seconds < self._base:
            self._base = seconds
        elif not tokens:
            self._base += (1 - _MEMORY) * (seconds - self._base)
        if tokens and seconds > self._base:
            latest = (seconds - self._base) / tokens
            self._cost = latest if self._cost is None else max(latest, (latest + self._cost) / 2)

    def room(self) -> int | None:
        """Tokens beyond one a sequence that the next step may read; None as long as it is not known what they cost."""
        if self._base is None or not self._cost:
            return None
        target = _USUAL * self._base if self._target is None else self._target
        return max(_LEAST, int((target - self._base) / self._cost))
