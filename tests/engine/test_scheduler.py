"""Scheduler: random walks over a shadow of physical memory, and one test a promise."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.engine.shadow import EOS, ShadowExecutor, expected, truth_of
from tramontane.config import CacheConfig, SchedulerConfig
from tramontane.engine.blocks import BlockPool, make_pool
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import EngineRequest, Event, Stretch, choice_seed
from tramontane.engine.step import SequenceResult, Step, StepResult, TokenInfo
from tramontane.errors import ContextLengthExceeded, InvalidRequest, OutOfMemory
from tramontane.types import SAMPLING_DEFAULTS, SamplingParams


@dataclass(frozen=True)
class Setup:
    windows: tuple[int | None, ...] = (None,)
    block_size: int = 4
    num_blocks: int = 24
    context_length: int = 40
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 16
    prefix_caching: bool = True
    paged_attention: bool = True
    stretch: Stretch | None = None
    num_states: int = 0
    state_interval: int = 1
    max_waiting: int | None = None
    clock: Callable[[], float] = time.monotonic
    priorities: tuple[int, ...] = ()
    """Of a random walk's requests, which are then of several tenants too."""

    def build(self) -> tuple[Scheduler, ShadowExecutor]:
        cache = CacheConfig(
            block_size=self.block_size, prefix_caching=self.prefix_caching, paged_attention=self.paged_attention
        )
        pool = make_pool(cache, self.num_blocks, self.windows, self.context_length, self.num_states)
        if self.num_states and self.paged_attention:
            pool = BlockPool(
                *(self.num_blocks, self.block_size, self.windows, self.prefix_caching),
                *(self.num_states, self.state_interval),
            )
        config = SchedulerConfig(self.max_num_seqs, self.max_num_batched_tokens, self.max_waiting)
        executor = ShadowExecutor(self.windows, self.block_size, self.stretch, self.num_states > 0)
        return Scheduler(config, pool, self.context_length, self.stretch, self.clock), executor


def request(
    id: str,
    prompt: list[int],
    seed: int = 0,
    salt: str = "",
    priority: int = 0,
    tenant: str = "",
    timeout: float | None = None,
    **params: Any,
) -> EngineRequest:
    resolved = SamplingParams(**params).over(SAMPLING_DEFAULTS)
    return EngineRequest(id, tuple(prompt), resolved, frozenset({EOS}), seed, salt, priority, tenant, timeout)


def turn(scheduler: Scheduler, executor: ShadowExecutor) -> tuple[Step, list[Event]]:
    step = scheduler.schedule()
    assert step is not None
    executor.learn(scheduler.sequences())
    events = scheduler.update(step, executor.submit(step))
    scheduler.check()
    return step, events


def drain(scheduler: Scheduler, executor: ShadowExecutor) -> list[Event]:
    events: list[Event] = []
    while scheduler.has_work:
        events += turn(scheduler, executor)[1]
    return events


def outputs(events: list[Event]) -> dict[tuple[str, int], list[int]]:
    out: dict[tuple[str, int], list[int]] = {}
    for event in events:
        out.setdefault((event.request_id, event.index), []).extend(t.token_id for t in event.tokens)
    return out


class Ledger:
    """An allocation listener that keeps count."""

    def __init__(self) -> None:
        self.held: Counter[tuple[str, int]] = Counter()

    def allocated(self, request_id: str, index: int, blocks: int) -> None:
        assert blocks > 0
        self.held[request_id, index] += blocks

    def released(self, request_id: str, index: int, blocks: int) -> None:
        assert 0 < blocks <= self.held[request_id, index]
        self.held[request_id, index] -= blocks


@dataclass
class Walk:
    """Arrivals, cancels and failures at random moments; every answer is compared with the one known beforehand."""

    setup: Setup
    seed: int
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    got: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    final: dict[tuple[str, int], Event] = field(default_factory=dict)
    refused: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.scheduler, self.executor = self.setup.build()
        self.ledger = Ledger()
        self.scheduler.add_listener(self.ledger)

    def arrive(self) -> None:
        rng = self.rng
        prompt = [rng.randrange(2)] * rng.choice([0, 0, 4, 9, 14]) + [rng.randrange(2)] * rng.randint(1, 6)
        prompt += [rng.randrange(3) for _ in range(rng.randint(0, 12))]
        max_tokens = rng.choice([None, 1, 2, 5, 9, 20])
        new = request(
            str(len(self.requests) + self.refused),
            prompt,
            seed=rng.randrange(3),
            salt=rng.choice(["", "", "a"]),
            priority=rng.choice(self.setup.priorities) if self.setup.priorities else 0,
            tenant=rng.choice(["", "", "other"]) if self.setup.priorities else "",
            n=rng.choice([1, 1, 1, 2, 3]),
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, 0, 3]) if max_tokens is None or max_tokens > 3 else 0,
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=rng.choice([(), (), (3,), (EOS,)]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
        )
        try:
            self.scheduler.add(new)
            self.requests[new.id] = new
        except (ContextLengthExceeded, OutOfMemory):
            self.refused += 1

    def take(self, events: list[Event]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            assert key not in self.final, "an event after the last"
            tokens = self.got.setdefault(key, [])
            self.check_prompt_logprobs(event, first=not tokens)
            tokens.extend(t.token_id for t in event.tokens)
            if event.finish_reason is not None:
                self.final[key] = event

    def check_prompt_logprobs(self, event: Event, first: bool) -> None:
        asked = self.requests[event.request_id]
        if asked.params.prompt_logprobs is None or event.index or not event.tokens or not first:
            assert event.prompt_logprobs is None
            return
        truth = truth_of(asked, asked.prompt_ids, self.setup.stretch)
        want = [None, *map(TokenInfo, asked.prompt_ids[1:], map(float, truth))]
        assert list(event.prompt_logprobs or ()) == want

    def cancel(self) -> None:
        if self.rng.random() < 0.04 and (live := sorted({s.request.id for s in self.scheduler.sequences()})):
            id = self.rng.choice(live)
            index = self.rng.choice([None, *range(self.requests[id].num_choices)])
            self.take(self.scheduler.abort(id, index))

    def step(self) -> None:
        self.cancel()
        running = {s.id for s in self.scheduler.sequences() if s.status == "running"}
        step = self.scheduler.schedule()
        assert (step is not None) == self.scheduler.has_work
        if step is None:
            return
        self.executor.learn(self.scheduler.sequences())
        still = {s.id for s in self.scheduler.sequences() if s.status == "running"}
        assert running & still <= {s.sequence_id for s in step.sequences}, "a running sequence was passed over"
        assert len(step.sequences) <= self.setup.max_num_seqs
        assert step.num_tokens <= self.setup.max_num_batched_tokens
        self.scheduler.check()
        self.cancel()
        result = self.executor.submit(step)
        self.cancel()
        if self.rng.random() < 0.01:
            self.take(self.scheduler.fail(step, ValueError("the device is gone")))
        else:
            self.take(self.scheduler.update(step, result))
        self.scheduler.check()
        held: Counter[tuple[str, int]] = Counter()
        for sequence in self.scheduler.sequences():
            held[sequence.request.id, sequence.index] += sequence.tables.held
        assert +held == +self.ledger.held

    def run(self, steps: int, load: int) -> None:
        for _ in range(steps):
            if self.rng.random() < 0.5 and len(self.scheduler._open) < load:
                self.arrive()
            self.step()
        # The oldest sequence computes at least a token a step, so this bounds what is left.
        bound = sum(len(s.choices) * self.setup.context_length for s in self.scheduler.sequences())
        bound *= 2 if self.setup.stretch else 1  # a sequence that outgrows its stretch starts over once
        for _ in range(bound):
            self.step()
        assert not self.scheduler.has_work, "a request starves"
        self.finish()

    def finish(self) -> None:
        assert self.scheduler.pool.used == 0
        assert not +self.ledger.held
        for asked in self.requests.values():
            for index in range(asked.num_choices):
                event = self.final[asked.id, index]
                tokens, reason, stop = expected(asked, index, self.setup.context_length, self.setup.stretch)
                got = self.got[asked.id, index]
                if event.finish_reason in ("cancelled", "error"):
                    assert got == tokens[: len(got)]
                    assert (event.error is None) == (event.finish_reason == "cancelled")
                else:
                    assert (got, event.finish_reason, event.stop_reason) == (tokens, reason, stop)
        counters = self.scheduler.counters
        assert len(self.requests) == counters.finished + counters.failed + counters.cancelled
        assert counters.generated_tokens == sum(map(len, self.got.values()))


SETUPS: dict[str, Setup] = {
    "full": Setup(),
    "full, no prefix cache": Setup(prefix_caching=False),
    "tight": Setup(num_blocks=9),
    "blocks of one token": Setup(block_size=1, num_blocks=60),
    "full, window": Setup((None, 8), num_blocks=30),
    "full, window, no prefix cache": Setup((None, 8), num_blocks=20, prefix_caching=False),
    "windows, full": Setup((5, None, 5), block_size=3, num_blocks=40),
    "windows only": Setup((3, 9), block_size=2, num_blocks=24, max_num_batched_tokens=40),
    "few tokens a step": Setup((None, 8), num_blocks=30, max_num_seqs=8, max_num_batched_tokens=5),
    "full, state": Setup(num_states=16, num_blocks=16),
    "full, window, state": Setup((None, 8), num_blocks=26, num_states=9, state_interval=2),
    "as many states as seats": Setup(num_blocks=16, num_states=6),
    "few tokens a step, states": Setup(num_blocks=24, num_states=8, max_num_seqs=8, max_num_batched_tokens=5),
    "contiguous, states": Setup(paged_attention=False, num_blocks=60, num_states=3, max_num_seqs=3),
    "stretched whole, states": Setup(num_states=10, stretch=Stretch(14, whole=True)),
    "stretched whole": Setup(stretch=Stretch(14, whole=True)),
    "stretched whole, window, few blocks": Setup((None, 8), num_blocks=22, stretch=Stretch(11, whole=True)),
    "stretched token by token": Setup(stretch=Stretch(14, whole=False)),
    "contiguous, stretched whole": Setup(paged_attention=False, num_blocks=40, stretch=Stretch(14, whole=True)),
    "priorities": Setup(num_blocks=16, priorities=(0, 0, 1, 5)),
    "priorities, states": Setup(num_blocks=30, num_states=8, max_num_batched_tokens=7, priorities=(0, 1)),
    "priorities, contiguous": Setup(paged_attention=False, num_blocks=40, priorities=(0, 1)),
    "contiguous": Setup(paged_attention=False, num_blocks=40),
    "contiguous, windows": Setup((5, None, 5), paged_attention=False, num_blocks=100, max_num_seqs=8),
}


@pytest.mark.parametrize("name", SETUPS)
def test_random_walks(name: str) -> None:
    preemptions = cached = 0
    for seed in range(3):
        walk = Walk(SETUPS[name], seed)
        walk.run(steps=900, load=10)
        preemptions += walk.scheduler.counters.preemptions
        cached += walk.scheduler.counters.cached_tokens
        assert len(walk.requests) > 3 * walk.refused
    setup = SETUPS[name]
    # what starts over has lost its room, and what waits with a lower priority is given some
    gives_back = setup.paged_attention or setup.stretch is not None or bool(setup.priorities)
    assert (preemptions > 0) == gives_back, "the walk must meet preemption"
    assert (cached > 0) == (setup.paged_attention and setup.prefix_caching), "the walk must meet prefix hits"


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUPS)
def test_many_random_walks(name: str) -> None:
    for seed in range(100, 124):
        Walk(SETUPS[name], seed).run(steps=2000, load=3 + seed % 12)


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_rows() -> None:
    scheduler, executor = Setup(max_num_batched_tokens=8).build()
    scheduler.add(request("a", [1, 2], max_tokens=6, ignore_eos=True))
    turn(scheduler, executor)
    scheduler.add(request("b", [0] * 20, max_tokens=1))
    sizes = [[len(s.tokens) for s in turn(scheduler, executor)[0].sequences] for _ in range(3)]
    assert sizes == [[1, 7], [1, 7], [1, 6]]


def test_a_cached_prefix_is_not_computed_again_and_is_reported() -> None:
    scheduler, executor = Setup().build()
    prompt = [0, 1, 2, 3] * 3
    scheduler.add(request("a", prompt, max_tokens=1))
    drain(scheduler, executor)
    scheduler.add(request("b", prompt, max_tokens=1))
    step, events = turn(scheduler, executor)
    assert (step.sequences[0].start, step.num_tokens, events[0].cached_tokens) == (8, 4, 8)
    scheduler.add(request("c", prompt, max_tokens=1, salt="other"))
    step, events = turn(scheduler, executor)
    assert (step.num_tokens, events[0].cached_tokens) == (12, 0)


def test_prompt_logprobs_take_no_prefix_hits() -> None:
    scheduler, executor = Setup().build()
    for id in "ab":
        scheduler.add(request(id, [1] * 13, max_tokens=1, prompt_logprobs=2))
        step, events = turn(scheduler, executor)
        assert step.sequences[0].prompt_logprobs == 2
        assert step.sequences[0].targets == (1,) * 12
        assert events[0].prompt_logprobs is not None
        assert len(events[0].prompt_logprobs) == 13


def test_choices_share_the_prompt_computed_once() -> None:
    scheduler, executor = Setup(num_blocks=10).build()
    scheduler.add(request("a", [1] * 14, seed=7, n=3, max_tokens=4, ignore_eos=True))
    step, events = turn(scheduler, executor)
    assert step.num_tokens == 14
    assert [d.seed for d in step.sequences[0].draws] == [choice_seed(7, i) for i in range(3)]
    assert [e.index for e in events] == [0, 1, 2]
    assert scheduler.pool.used == 4
    step, events = turn(scheduler, executor)
    assert len(step.copies) == 2
    assert scheduler.pool.used == 6
    drain(scheduler, executor)


def test_choice_seeds_differ_and_the_first_is_the_requests_own() -> None:
    seeds = [choice_seed(42, i) for i in range(100)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 100
    assert choice_seed(43, 1) != choice_seed(42, 1) == choice_seed(42, 1)


def test_out_of_blocks_the_youngest_is_preempted_and_nothing_changes() -> None:
    scheduler, executor = Setup(num_blocks=9, prefix_caching=False).build()
    requests = [request(id, [i] * 6, seed=i, max_tokens=20, ignore_eos=True) for i, id in enumerate("abc")]
    for r in requests:
        scheduler.add(r)
    events, order = [], []
    while scheduler.has_work:
        events += turn(scheduler, executor)[1]
    order = [e.request_id for e in events if e.finish_reason]
    assert order == ["a", "b", "c"]
    assert scheduler.counters.preemptions > 0
    for r in requests:
        assert outputs(events)[r.id, 0] == expected(r, 0, 40)[0]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler, executor = Setup(num_blocks=12).build()
    for i, id in enumerate("ab"):
        scheduler.add(request(id, [i] * 12, max_tokens=20, ignore_eos=True))
    computed = 0
    while scheduler.has_work:
        computed += turn(scheduler, executor)[0].num_tokens
    assert scheduler.counters.preemptions > 0
    assert computed < 2 * 31 + 31


def test_ends() -> None:
    def end(**params: Any) -> tuple[list[int], str | None, str | int | None]:
        scheduler, executor = Setup().build()
        asked = request("a", [1, 2, 3], **params)
        scheduler.add(asked)
        events = drain(scheduler, executor)
        assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
        tokens, reason, stop = expected(asked, 0, 40)
        got = outputs(events)["a", 0]
        assert (got, events[-1].finish_reason, events[-1].stop_reason) == (tokens, reason, stop)
        return got, events[-1].finish_reason, events[-1].stop_reason

    by_eos = next(end(seed=seed) for seed in range(100) if end(seed=seed)[1] == "stop")
    assert by_eos[0][-1] == EOS
    assert by_eos[2] is None
    assert end(ignore_eos=True)[1] == "length"
    assert len(end(ignore_eos=True)[0]) == 37, "up to the context"
    assert end(ignore_eos=True, max_tokens=3)[1:] == ("length", None)
    tokens, reason, stop = end(stop_token_ids=tuple(range(EOS)), seed=2)
    assert (len(tokens), reason) == (1, "stop")
    assert stop == (None if tokens[0] == EOS else tokens[0])
    least = end(stop_token_ids=tuple(range(EOS - 1)), min_tokens=5)[0]
    assert len(least) == 6
    assert set(least[:5]) == {EOS - 1}, "no end is drawn before min_tokens"


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler, _ = Setup(num_blocks=4, max_num_seqs=3).build()
    with pytest.raises(ContextLengthExceeded, match="40 tokens leave no room in a context of 40"):
        scheduler.add(request("a", [1] * 40))
    with pytest.raises(OutOfMemory, match=r"25 tokens .* need 6 cache blocks of 4 tokens, and there are 4"):
        scheduler.add(request("a", [1] * 5, max_tokens=20))
    with pytest.raises(OutOfMemory, match="40 tokens"):
        scheduler.add(request("a", [1] * 5))
    with pytest.raises(InvalidRequest, match="n: 4 choices"):
        scheduler.add(request("a", [1], n=4, max_tokens=1))
    with pytest.raises(InvalidRequest, match="prompt"):
        scheduler.add(request("a", []))
    assert not scheduler.has_work
    scheduler.add(request("a", [1] * 5, max_tokens=12))
    with pytest.raises(InvalidRequest, match="open already"):
        scheduler.add(request("a", [1], max_tokens=1))
    contiguous, _ = Setup(num_blocks=9, paged_attention=False).build()
    with pytest.raises(OutOfMemory, match="10 cache blocks"):
        contiguous.add(request("a", [1], max_tokens=1))


def test_of_a_window_only_what_it_holds_counts() -> None:
    scheduler, executor = Setup((8,), num_blocks=3, prefix_caching=False).build()
    asked = request("a", [1] * 20, ignore_eos=True)
    scheduler.add(asked)
    assert outputs(drain(scheduler, executor))["a", 0] == expected(asked, 0, 40)[0]


def test_no_request_waits_behind_a_younger_one() -> None:
    scheduler, executor = Setup(max_num_seqs=2).build()
    scheduler.add(request("a", [1], max_tokens=9, ignore_eos=True))
    scheduler.add(request("wide", [2], n=2, max_tokens=2, ignore_eos=True))
    scheduler.add(request("b", [3], max_tokens=1))
    assert [e.request_id for e in drain(scheduler, executor) if e.finish_reason] == ["a", "wide", "wide", "b"]


@pytest.mark.parametrize("moment", ["queued", "scheduled", "computed", "running"])
@pytest.mark.parametrize("index", [None, 0, 1])
def test_a_request_or_choice_can_be_cancelled_at_any_moment(moment: str, index: int | None) -> None:
    scheduler, executor = Setup().build()
    asked = request("a", [1] * 9, n=2, max_tokens=5, ignore_eos=True)
    scheduler.add(asked)
    events: list[Event] = []
    if moment == "running":
        events += turn(scheduler, executor)[1]
    if moment in ("queued", "running"):
        events += scheduler.abort("a", index)
    else:
        step = scheduler.schedule()
        assert step is not None
        executor.learn(scheduler.sequences())
        events += scheduler.abort("a", index) if moment == "scheduled" else []
        result = executor.submit(step)
        events += scheduler.abort("a", index) if moment == "computed" else []
        events += scheduler.update(step, result)
    scheduler.check()
    events += drain(scheduler, executor)
    assert scheduler.abort("a") == []
    final = {e.index: e.finish_reason for e in events if e.finish_reason}
    cancelled = [0, 1] if index is None else [index]
    assert final == {i: "cancelled" if i in cancelled else "length" for i in (0, 1)}
    assert len([e for e in events if e.finish_reason]) == 2
    for i in {0, 1} - set(cancelled):
        assert outputs(events)["a", i] == expected(asked, i, 40)[0]
    assert scheduler.pool.used == 0


def test_a_result_that_answers_something_else_is_refused_and_the_step_can_still_fail() -> None:
    scheduler, _ = Setup().build()
    scheduler.add(request("a", [1, 2], max_tokens=2, ignore_eos=True))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(RuntimeError, match="again"):
        scheduler.schedule()
    answer = SequenceResult(step.sequences[0].sequence_id, ())
    for wrong in (StepResult(step.id, ()), StepResult(step.id + 1, (answer,)), StepResult(step.id, (answer,))):
        with pytest.raises(RuntimeError, match="does not answer"):
            scheduler.update(step, wrong)
    (event,) = scheduler.fail(step, ValueError("gone"))
    assert (event.finish_reason, str(event.error)) == ("error", "gone")
    assert not scheduler.has_work
    with pytest.raises(RuntimeError, match="not in flight"):
        scheduler.fail(step, ValueError())


def test_a_listener_that_comes_late_hears_of_what_is_held() -> None:
    scheduler, executor = Setup().build()
    scheduler.add(request("a", [1] * 9, max_tokens=2, ignore_eos=True))
    turn(scheduler, executor)
    ledger = Ledger()
    scheduler.add_listener(ledger)
    assert ledger.held == {("a", 0): 3}
    drain(scheduler, executor)
    assert not +ledger.held


def test_a_listener_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def allocated(self, request_id: str, index: int, blocks: int) -> None:
            raise ValueError("oops")

        released = allocated

    scheduler, executor = Setup().build()
    ledger = Ledger()
    scheduler.add_listener(Broken())
    scheduler.add_listener(ledger)
    scheduler.add(request("a", [1, 2], max_tokens=2, ignore_eos=True))
    turn(scheduler, executor)
    assert ledger.held == {("a", 0): 1}
    drain(scheduler, executor)
    assert not +ledger.held
    assert "oops" in caplog.text
