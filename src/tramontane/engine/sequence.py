"""A request as the engine sees it, the state of one of its sequences, and what it reports.

Owns these dataclasses and what follows from one sequence alone: its seeds, its ends. Must not know: arrays, blocks'
bookkeeping, other sequences.
"""

from __future__ import annotations

from dataclasses import field
from functools import cached_property
from hashlib import blake2b
from typing import Literal

from tramontane.engine.blocks import BlockTables
from tramontane.engine.step import Draw, TokenInfo
from tramontane.records import dataclass
from tramontane.types import FinishReason, SamplingParams

Status = Literal["waiting", "running", "parked", "finished"]
"""Parked: a beam that has lost its blocks and needs none before the other beams of its request are as far."""


@dataclass(frozen=True)
class Stretch:
    """Rotary positions that depend on how long a sequence is, from `length` tokens on."""

    length: int
    whole: bool
    """All of a sequence's tokens are rotated alike, by its length now; one that outgrows `length` is computed anew.
    Otherwise a prompt's tokens are rotated by the prompt's length, and each later one by the length that it makes."""

    def state(self, prompt: int, total: int) -> int:
        """Sequences share keys only where this is the same; 0 while nothing is stretched."""
        if self.whole:
            return int(total > self.length)
        return prompt if prompt > self.length else 0

    def rope_length(self, prompt: int, total: int) -> int:
        """As in `ScheduledSequence`."""
        return total if self.whole else prompt


@dataclass(frozen=True)
class EngineRequest:
    """One prompt and its `params.n` choices."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    """Resolved: nothing that `SAMPLING_DEFAULTS` sets is None."""
    eos_ids: frozenset[int]
    seed: int
    cache_salt: str = ""
    priority: int = 0
    """Lower ones go first."""
    tenant: str = ""
    """Among equal priorities, who has had least goes first."""
    timeout: float | None = None
    """Seconds from `Scheduler.add` on."""
    streamed: bool = False
    """Whether somebody waits for each token."""
    held: object = None
    """What must live as long as the request: its grammar, compiled."""

    @property
    def num_choices(self) -> int:
        return self.params.n or 1

    @property
    def beam_width(self) -> int:
        return self.params.beam_width or 1

    @property
    def seats(self) -> int:
        """Sequences that it may become."""
        return max(self.num_choices, self.beam_width)

    @property
    def candidates(self) -> int:
        """Of beams: continuations to look at, so that enough can go on even if ends come first; else 0."""
        return self.beam_width * max(2, 1 + len(self.ends)) if self.beam_width > 1 else 0

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a choice: the stop tokens, and those of the model unless they are ignored."""
        own = frozenset(self.params.stop_token_ids or ())
        return own if self.params.ignore_eos else own | self.eos_ids

    def ending(self, info: TokenInfo, num_output: int, num_tokens: int, context_length: int) -> Ending | None:
        """Whether the choice ends with a token, the last of `num_output` drawn and of `num_tokens` in all."""
        token_id = info.token_id
        if info.error is not None:
            return Ending("error", error=info.error)
        if info.complete:  # sooner than min_tokens where it must be: there is nothing else to say
            return Ending("stop", token_id if token_id in self.ends - self.eos_ids else None)
        if token_id in self.ends and num_output > (self.params.min_tokens or 0):
            is_eos = token_id in self.eos_ids and not self.params.ignore_eos
            return Ending("stop", None if is_eos else token_id)
        if num_output == self.params.max_tokens or num_tokens >= context_length:
            return Ending("length")
        return None


@dataclass(frozen=True)
class Ending:
    """Why a choice ended."""

    reason: FinishReason
    stop_reason: str | int | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Event:
    """What a step brought to one choice. Each choice gets exactly one event with a finish_reason, its last."""

    request_id: str
    index: int
    tokens: tuple[TokenInfo, ...] = ()
    """The tokens drawn; one that ended the choice is among them."""
    prompt_logprobs: tuple[TokenInfo | None, ...] | None = None
    """On the first tokens of choice 0, where asked for: one a prompt token, None for the first."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop token or string; None for the model's own end."""
    cached_tokens: int = 0
    """Prompt tokens that came out of the prefix cache."""
    error: BaseException | None = None
    """With finish_reason "error": what the executor raised, or RequestTimeout."""
    score: float | None = None
    """Of a beam search's choice."""


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the request's own for choice 0, else 64 bits derived from both."""
    if index == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")


@dataclass(eq=False)
class Sequence:
    """Tokens being computed. Until the prompt is computed one sequence stands for all choices; then they fork."""

    id: int
    request: EngineRequest
    arrival: int
    """Requests are numbered as they come."""
    choices: list[int]
    """Choices that this sequence draws for; one, once it has drawn."""
    tables: BlockTables
    token_ids: list[int]
    """Prompt and output."""
    output_ids: list[int] = field(default_factory=list)
    status: Status = "waiting"
    cached_tokens: int | None = None
    """None until first admitted."""
    prompt_infos: list[TokenInfo] = field(default_factory=list)
    """Log probabilities of prompt tokens 1, 2, ... as far as they are computed."""
    stretched: int = 0
    """The `Stretch.state` that its tables are for."""
    told: tuple[int, int] = (0, 0)
    """The index and the number of blocks that the allocation listeners know of."""
    infos: list[TokenInfo] = field(default_factory=list)
    """Of a beam: the output."""
    total: float = 0.0
    """Of a beam: the sum of the output's scores."""
    candidates: tuple[TokenInfo, ...] = ()
    """Of a beam that is as far as its request: what could come next. It has nothing to compute then."""

    @property
    def index(self) -> int:
        return self.choices[0] if self.choices else self.told[0]

    @property
    def age(self) -> tuple[int, int]:
        """Orders sequences from the oldest to the youngest."""
        return (self.arrival, self.index)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Orders running sequences from the first to be served to the first to give way."""
        return (self.request.priority, *self.age)

    @property
    def num_computed(self) -> int:
        return self.tables.num_tokens

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next draw."""
        return len(self.token_ids) - self.tables.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and len(self.prompt_infos) < len(self.request.prompt_ids) - 1

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)

    def draws(self) -> tuple[Draw, ...]:
        """One a choice. `output` is the live list: it changes only after the step's result is in."""
        request = self.request
        early = len(self.output_ids) < (request.params.min_tokens or 0)
        ends = tuple(sorted(request.ends)) if early or request.params.grammar is not None else ()
        if request.candidates:
            banned = ends if early else ()
            return (
                Draw(request.params, 0, request.prompt_ids, self.output_ids, banned, candidates=request.candidates),
            )
        return tuple(
            Draw(
                request.params,
                choice_seed(request.seed, index),
                request.prompt_ids,
                self.output_ids,
                banned=ends if early else (),
                ends=ends,
            )
            for index in self.choices
        )

    def targets(self, count: int) -> tuple[int, ...]:
        """The prompt tokens that follow each of the next `count` tokens."""
        at = self.num_computed + 1
        return self.request.prompt_ids[at : at + count]
