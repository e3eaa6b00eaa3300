"""Step and StepResult: what crosses between the scheduler and the executor, as plain picklable host data.

Owns the dataclasses only. Must not know: arrays, blocks' bookkeeping, how a step is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.errors import TramontaneError
from tramontane.records import dataclass
from tramontane.types import SamplingParams


@dataclass(frozen=True)
class Draw:
    """One token to draw after the last token of a scheduled sequence."""

    params: SamplingParams
    """Resolved: nothing that `SAMPLING_DEFAULTS` sets is None."""
    seed: int
    """Of this choice; the uniform number comes from (seed, len(output)) alone, so recomputing changes nothing."""
    prompt: Sequence[int]
    output: Sequence[int]
    banned: tuple[int, ...] = ()
    """Tokens that may not be drawn: the ends, while min_tokens is not reached."""
    ends: tuple[int, ...] = ()
    """With a grammar: tokens that end the choice, which are allowed just where the grammar lets it end."""
    candidates: int = 0
    """Of a beam: nothing is drawn, and so many of the likeliest tokens are wanted, best first, each with its score."""


@dataclass(frozen=True)
class ScheduledSequence:
    """The tokens that one sequence computes in this step."""

    sequence_id: int
    start: int
    """Tokens whose keys and values are in the cache already."""
    tokens: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    """A table a cache group, covering start + len(tokens) tokens; -1 where a window freed the block."""
    state: int = -1
    """Where the model keeps one: the place of the sequence's state, read unless `start` is 0, and written."""
    draws: tuple[Draw, ...] = ()
    """Empty until the sequence has caught up; several when choices fork here."""
    prompt_logprobs: int | None = None
    """Report each of these rows' log probability of the next prompt token (targets), with so many alternatives."""
    rope_length: int = 0
    """Where rotary positions depend on the length of a sequence: each token is rotated as in one of so many tokens, or
    of those up to itself if they are more."""
    targets: tuple[int, ...] = ()
    """With prompt_logprobs: the token that follows each of `tokens` within the prompt (one fewer at its end)."""


@dataclass(frozen=True)
class Step:
    id: int
    sequences: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """Blocks to copy before anything is written: (source, target)."""
    state_copies: tuple[tuple[int, int], ...] = ()
    """The same of states."""

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)

    def rows(self) -> list[Row]:
        """All tokens to draw, in the order of sequences and their draws."""
        return [
            Row(index, (sequence.sequence_id, choice), draw)
            for index, sequence in enumerate(self.sequences)
            for choice, draw in enumerate(sequence.draws)
        ]


@dataclass(frozen=True)
class Row:
    """A token to draw: the index of its sequence in the step, a name that it keeps across steps, and how."""

    index: int
    key: tuple[int, int]
    draw: Draw


@dataclass(frozen=True)
class TokenInfo:
    """A token, its natural-log probability before processors, its rank (1: likeliest), alternatives (id, logprob)."""

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()
    complete: bool = False
    """The choice matches its grammar with this token, and nothing can follow."""
    error: TramontaneError | None = None
    """Why no token could be drawn; then `token_id` means nothing."""
    score: float | None = None
    """Of a beam's candidate: the natural-log probability after processors."""


@dataclass(frozen=True)
class SequenceResult:
    sequence_id: int
    tokens: tuple[TokenInfo, ...]
    """One a draw, in the order of the draws, or a draw's candidates; logprob is None where logprobs were not asked
    for."""
    prompt_logprobs: tuple[TokenInfo, ...] = ()
    """One a target."""


@dataclass(frozen=True)
class StepResult:
    step_id: int
    sequences: tuple[SequenceResult, ...]
