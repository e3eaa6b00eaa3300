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
    """Learns seconds = base + cost * tokens and solves for tokens.

    The base is that of steps without prompts, kept by doublings of the number of sequences, and never more than a step
    has taken; the cost is the latest, since it grows with the context that a prompt's tokens see.
    """

    def __init__(self, target: float | None) -> None:
        """`target`: seconds that a step may take; None: as many as `_USUAL` steps without prompts, more where more
        wait for their first token than for their next."""
        self._target = target
        self._bases: dict[int, float] = {}
        self._cost: float | None = None

    def learn(self, sequences: int, tokens: int, seconds: float) -> None:
        """A step of so many sequences read so many tokens beyond one each, and took so long."""
        doublings = sequences.bit_length()
        base = self._bases.get(doublings)
        if base is None:
            base = self._nearest(doublings)
            if base is None:
                base = seconds
            elif self._cost is not None:
                base = max(base, seconds - self._cost * tokens)
        elif not tokens:
            base += (1 - _MEMORY) * (seconds - base)
        self._bases[doublings] = base = min(base, seconds)
        if tokens and seconds > base:
            latest = (seconds - base) / tokens
            self._cost = latest if self._cost is None else max(latest, (latest + self._cost) / 2)

    def room(self, streams: int, others: int) -> int | None:
        """Tokens beyond one a sequence that the next step may read, where so many wait for their next token and so
        many for their first; None as long as it is not known what tokens cost."""
        base = self._nearest(streams.bit_length())
        if base is None or self._cost is None:
            return None
        target = base + (_USUAL - 1) * base * max(1.0, others / streams) if self._target is None else self._target
        return max(_LEAST, int((target - base) / self._cost))

    def _nearest(self, doublings: int) -> float | None:
        """What is known of a step with so many sequences, else with fewer, else with more."""
        fewer = [known for known in self._bases if known <= doublings]
        return self._bases[max(fewer) if fewer else min(self._bases)] if self._bases else None
