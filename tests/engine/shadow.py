"""Physical memory as a dict, and a model that can only be right when it reads exactly what it should.

The content of a slot is (cache group, position, digest of the salt and all tokens up to there), as a key and a value
of a real model depend on the whole prefix. Before drawing, every slot that the step's rows see is compared with the
truth: a wrong copy, hash, eviction or freed window shows as a difference. A state is the digest of all tokens that it
stands for, and is checked before a step advances it. The next token is a function of that digest,
the seed and the length of the output, so that the answer to a request is known beforehand.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

from tramontane.engine import sequence
from tramontane.engine.sequence import EngineRequest, Stretch, choice_seed
from tramontane.engine.step import Draw, SequenceResult, Step, StepResult, TokenInfo

VOCAB = 16
EOS = VOCAB - 1


def digests(salt: str, tokens: Iterable[int]) -> list[int]:
    """One digest a token: of the salt, the token and all before it."""
    state = zlib.crc32(salt.encode())
    return [state := hash((state, token)) for token in tokens]


def truth_of(request: EngineRequest, tokens: Sequence[int], stretch: Stretch | None) -> list[int]:
    """What the cache must hold of each token: its digest, and the length that its position is stretched for."""
    plain, prompt = digests(request.cache_salt, tokens), len(request.prompt_ids)
    if stretch is None:
        return plain
    lengths = [len(tokens) if stretch.whole else max(prompt, position + 1) for position in range(len(tokens))]
    beyond = [length > stretch.length for length in lengths]
    kinds = [int(far) if stretch.whole else far * length for far, length in zip(beyond, lengths, strict=True)]
    return [hash(pair) for pair in zip(plain, kinds, strict=True)]


def next_token(digest: int, seed: int, num_output: int, banned: Sequence[int] = ()) -> int:
    first = hash((digest, seed, num_output)) % VOCAB
    order: list[int] = [*range(first, VOCAB), *range(first)]
    return next(token for token in order if token not in banned)


def expected(
    request: EngineRequest, index: int, context_length: int, stretch: Stretch | None = None
) -> tuple[list[int], str, int | None]:
    """The output, finish reason and stop reason of a choice, computed alone, by rules written a second time."""
    params, output = request.params, list[int]()
    while True:
        tokens = [*request.prompt_ids, *output]
        stops = set(params.stop_token_ids or ())
        ends = stops if params.ignore_eos else stops | request.eos_ids
        banned = sorted(ends) if len(output) < (params.min_tokens or 0) else []
        digest = truth_of(request, tokens, stretch)[-1]
        token = next_token(digest, choice_seed(request.seed, index), len(output), banned)
        output.append(token)
        if token in ends:
            return output, "stop", None if token in request.eos_ids and not params.ignore_eos else token
        if len(output) == params.max_tokens or len(tokens) + 1 == context_length:
            return output, "length", None


def candidates(digest: int, draw: Draw) -> list[TokenInfo]:
    """A beam's continuations, best first."""
    scored = [(-(hash((digest, token)) % 997) / 100 - 0.1, token) for token in range(VOCAB) if token not in draw.banned]
    return [TokenInfo(token, score=score) for score, token in sorted(scored, reverse=True)[: draw.candidates]]


class Memory:
    """Slots by (block, offset), and what a step does with them."""

    def __init__(self, windows: Sequence[int | None], block_size: int) -> None:
        self.windows = windows
        self.block_size = block_size
        self.slots: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.states: dict[int, tuple[int, int]] = {}

    def copy(self, copies: Sequence[tuple[int, int]], state_copies: Sequence[tuple[int, int]] = ()) -> None:
        for pairs in (copies, state_copies):
            targets = [target for _, target in pairs]
            assert len(set(targets)) == len(targets), "a block is copied over twice"
            assert not {source for source, _ in pairs} & set(targets), "a copy's source is overwritten by another"
        self.states.update({target: self.states[source] for source, target in state_copies if source in self.states})
        for source, target in copies:
            for offset in range(self.block_size):
                if (source, offset) in self.slots:
                    self.slots[target, offset] = self.slots[source, offset]

    def write(
        self, tables: Sequence[Sequence[int]], start: int, end: int, truth: Sequence[int]
    ) -> set[tuple[int, int]]:
        written = set()
        for group, table in enumerate(tables):
            for position in range(start, end):
                slot = (table[position // self.block_size], position % self.block_size)
                assert slot[0] >= 0, "a write behind the window"
                written.add(slot)
                self.slots[slot] = (group, position, truth[position])
        return written

    def advance(self, state: int, start: int, end: int, truth: Sequence[int]) -> None:
        """A state goes from what stands for `start` tokens to what stands for `end`."""
        assert state >= 0, "a sequence has no state"
        assert not start or self.states.get(state) == (start, truth[start - 1]), f"state {state} is another's"
        self.states[state] = (end, truth[end - 1])

    def verify(self, tables: Sequence[Sequence[int]], start: int, end: int, truth: Sequence[int]) -> None:
        """What rows start .. end - 1 see is there, in every group."""
        for group, (table, window) in enumerate(zip(tables, self.windows, strict=True)):
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, end):
                slot = (table[position // self.block_size], position % self.block_size)
                assert self.slots.get(slot) == (group, position, truth[position]), f"slot {slot} holds another's token"


class ShadowExecutor:
    def __init__(
        self,
        windows: Sequence[int | None],
        block_size: int,
        stretch: Stretch | None = None,
        has_states: bool = False,
    ) -> None:
        self.memory = Memory(windows, block_size)
        self.stretch = stretch
        self.has_states = has_states
        self.sequences: dict[int, sequence.Sequence] = {}

    def learn(self, sequences: Iterable[sequence.Sequence]) -> None:
        """Whose ids these are."""
        self.sequences.update({s.id: s for s in sequences})

    def submit(self, step: Step) -> StepResult:
        self.memory.copy(step.copies, step.state_copies)
        states = [scheduled.state for scheduled in step.sequences if self.has_states]
        assert len(set(states)) == len(states), "two sequences write one state"
        written: set[tuple[int, int]] = set()
        truths = []
        for scheduled in step.sequences:
            owner = self.sequences[scheduled.sequence_id]
            truth = truth_of(owner.request, owner.token_ids, self.stretch)
            truths.append(truth)
            end = scheduled.start + len(scheduled.tokens)
            if self.stretch is not None:
                whole, prompt = self.stretch.whole, len(owner.request.prompt_ids)
                assert scheduled.rope_length == (len(owner.token_ids) if whole else prompt)
            assert list(scheduled.tokens) == owner.token_ids[scheduled.start : end]
            assert {len(t) for t in scheduled.block_tables} <= {-(-end // self.memory.block_size)}
            if self.has_states:
                self.memory.advance(scheduled.state, scheduled.start, end, truth)
            own = self.memory.write(scheduled.block_tables, scheduled.start, end, truth)
            assert not own & written, "two sequences write one slot"
            written |= own
        results = []
        for scheduled, truth in zip(step.sequences, truths, strict=True):
            end = scheduled.start + len(scheduled.tokens)
            self.memory.verify(scheduled.block_tables, scheduled.start, end, truth)
            draws = tuple(
                info
                for draw in scheduled.draws
                for info in (
                    candidates(truth[end - 1], draw)
                    if draw.candidates
                    else [TokenInfo(self.draw(draw, truth[end - 1]))]
                )
            )
            prompt = tuple(
                TokenInfo(target, float(truth[scheduled.start + i])) for i, target in enumerate(scheduled.targets)
            )
            results.append(SequenceResult(scheduled.sequence_id, draws, prompt))
        return StepResult(step.id, tuple(results))

    @staticmethod
    def draw(draw: Draw, digest: int) -> int:
        return next_token(digest, draw.seed, len(draw.output), draw.banned)
