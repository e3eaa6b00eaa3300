"""Pace: how many tokens of prompts a step may read while others wait for their next token.

Owns what steps have cost, and the bound that follows. Must not know: sequences, blocks, clocks, what a step computes.
"""

from __future__ import annotations

_MEMORY = 0.95
"""Of what steps cost, from one to the next: a few dozen steps are remembered."""
_USUAL = 2.5
"""A step with prompts may take so many times one without: below three, to leave room for what cannot be foreseen."""
_LEAST = 8
"""Tokens that a step may always read, so that prompts get on whatever a step takes."""


class Pace:
    """Learns seconds = base + cost * tokens, by least squares over steps of fading weight, and solves for tokens."""

    def __init__(self, target: float | None) -> None:
        """`target`: seconds that a step may take; None: as many as `_USUAL` steps without prompts."""
        self._target = target
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._cost: float | None = None

    def learn(self, tokens: int, seconds: float) -> None:
        """A step read so many tokens beyond one a sequence, and took so long."""
        self._weight = _MEMORY * self._weight + 1
        self._x = _MEMORY * self._x + tokens
        self._y = _MEMORY * self._y + seconds
        self._xx = _MEMORY * self._xx + tokens * tokens
        self._xy = _MEMORY * self._xy + tokens * seconds
        spread = self._weight * self._xx - self._x * self._x
        if spread > self._weight * self._weight:  # steps of about one size say nothing of another's cost
            self._cost = max(0.0, (self._weight * self._xy - self._x * self._y) / spread)

    def room(self) -> int | None:
        """Tokens beyond one a sequence that the next step may read; None as long as no steps of two sizes are known,
        or where tokens cost nothing."""
        if not self._cost:
            return None
        base = max(0.0, (self._y - self._cost * self._x) / self._weight)
        target = _USUAL * base if self._target is None else self._target
        return max(_LEAST, int((target - base) / self._cost))
