"""The policy: which sequences compute how many tokens in the next step, and what a step's result means for them.

Owns admission, preemption, forks, ends, timeouts and the allocation listeners. Must not know: arrays, text, how a step
is computed.

There are no phases. A sequence has tokens and a count of those computed; each step spends a budget of tokens letting
the counts catch up, and a sequence that has caught up draws. Decoding is catching up by one, a chunked prefill by
many, a prefix hit starts further on, and a preempted sequence starts again from nothing: one rule for all.

What waits is admitted by priority, then fairly between tenants, then by age (`engine/waiting.py`); what runs is served
by priority and age, and gives way in the opposite order: when blocks run out, and to a lower priority that waits.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import field

from tramontane.config import SchedulerConfig
from tramontane.engine.beams import BeamSearch, Continuation, Hypothesis
from tramontane.engine.blocks import BlockTables, Pool
from tramontane.engine.pace import Pace
from tramontane.engine.sequence import Ending, EngineRequest, Event, Sequence, Stretch
from tramontane.engine.step import Draw, ScheduledSequence, SequenceResult, Step, StepResult, TokenInfo
from tramontane.engine.waiting import Shares, WaitingLine
from tramontane.errors import ContextLengthExceeded, InvalidRequest, OutOfMemory, Overloaded, RequestTimeout
from tramontane.records import dataclass
from tramontane.types import AllocationListener, FinishReason

_log = logging.getLogger(__name__)


@dataclass
class Counters:
    """Since the scheduler was built."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass
class _Open:
    """A request that has not ended."""

    open: set[int]
    """Choices without a final event."""
    sequences: list[Sequence]
    request: EngineRequest
    deadline: float | None = None
    begun: float | None = None
    """When it was first admitted."""
    beams: BeamSearch | None = None
    """Then the sequences are beams, and the choices are known at the end."""
    reasons: set[FinishReason] = field(default_factory=set)


@dataclass(frozen=True)
class _Flight:
    """A scheduled sequence, as it was when its step left."""

    sequence: Sequence
    choices: tuple[int, ...]
    """Those that draw in the step, or end with it where nothing is to be drawn."""
    scheduled: ScheduledSequence


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


_LEAST_WAIT, _GUESS, _MEMORY = 1.0, 1.0, 0.1
"""Of an estimated wait: its least, what a request takes before any has ended, how much one more tells of the next."""


def _answered(draws: tuple[Draw, ...], answer: SequenceResult) -> bool:
    if any(draw.candidates for draw in draws):
        return 0 < len(answer.tokens) <= draws[0].candidates
    return len(answer.tokens) == len(draws)


class Scheduler:
    """Host-side state of all open requests. One step is in flight at a time: `schedule`, then `update` or `fail`.

    `add`, `abort` and `finish` may come at any moment, between the two as well. The running sequences are kept in the
    order in which they are served, and the first can always be served by preempting the others: so all requests end,
    those of a high priority number once nothing lower comes.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: Pool,
        context_length: int,
        stretch: Stretch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._stretch = stretch
        self._budget = config.max_num_batched_tokens
        # no more sequences than tokens a step: each running one can draw in every step
        self._seats = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._context_length = context_length
        self._pace = Pace(config.step_target)
        self._left = 0.0
        """When the step in flight left."""
        self._max_waiting = config.max_waiting
        self._shares = Shares()
        self._waiting = WaitingLine(self._shares)
        self._running: list[Sequence] = []
        self._open: dict[str, _Open] = {}
        self._flights: list[_Flight] | None = None
        self._listeners: list[AllocationListener] = []
        self._lasted = _GUESS
        """Seconds that requests lately took once they were admitted."""
        self._arrivals = 0
        self._sequence_ids = 0
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def pool(self) -> Pool:
        return self._pool

    def sequences(self) -> Iterable[Sequence]:
        """All that have not ended."""
        return [*self._running, *self._waiting]

    def add_listener(self, listener: AllocationListener) -> None:
        """It hears at once of what is held already."""
        self._listeners.append(listener)
        for sequence in self._running:
            self._report([listener], sequence.request.id, *sequence.told)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that could never be served is refused here: ContextLengthExceeded, OutOfMemory or
        InvalidRequest; so is one too many: Overloaded."""
        self._refuse_the_impossible(request)
        self._refuse_the_superfluous()
        sequence = self._new_sequence(request, self._arrivals, list(range(request.seats)))
        self._arrivals += 1
        deadline = None if request.timeout is None else self._clock() + request.timeout
        state = _Open(set(range(request.num_choices)), [sequence], request, deadline)
        self._open[request.id] = state
        if request.beam_width > 1:
            left = self._context_length - len(request.prompt_ids)
            state.beams = BeamSearch(request, min(request.params.max_tokens or left, left))
        self._shares.enter(request.tenant)
        self._waiting.add(sequence)

    def _refuse_the_superfluous(self) -> None:
        waiting = len(self._waiting)
        if self._max_waiting is None or waiting < self._max_waiting + self._free_seats():
            return
        begun = sum(state.begun is not None for state in self._open.values())
        raise Overloaded(waiting, max(_LEAST_WAIT, self._lasted * waiting / max(1, begun)))

    def _free_seats(self) -> int:
        return self._seats - sum(len(s.choices) for s in self._running)

    def _refuse_the_impossible(self, request: EngineRequest) -> None:
        prompt = len(request.prompt_ids)
        if request.id in self._open:
            raise InvalidRequest("id", f"a request {request.id!r} is open already", "Give each request its own id.")
        if not prompt:
            raise InvalidRequest("prompt", "it has no tokens", "Give at least one token to start from.")
        longest = request.params.max_tokens  # of the answer; None: what the context leaves
        if prompt + (longest != 0) > self._context_length:
            raise ContextLengthExceeded(prompt, self._context_length)
        if request.seats > self._seats:
            field, what = ("n", "choices") if request.beam_width == 1 else ("beam_width", "beams")
            raise InvalidRequest(
                field,
                f"{request.seats} {what} exceed the {self._seats} sequences that run at once",
                "Ask for fewer, or raise max_num_seqs (and max_num_batched_tokens, which bounds it).",
            )
        tokens = min(prompt + (self._context_length if longest is None else longest), self._context_length)
        needed = self._pool.peak_blocks(max(prompt, tokens - 1))  # the last token drawn is never computed
        if needed > self._pool.num_blocks:
            raise OutOfMemory(
                f"{tokens} tokens (a prompt of {prompt} and its answer) need {needed} cache blocks of "
                f"{self._pool.block_size} tokens, and there are {self._pool.num_blocks}",
                "Lower max_tokens, shorten the prompt, or give the cache more room (num_blocks, memory_bytes or "
                "memory_fraction; with paged_attention=False also a smaller context_length).",
            )

    def _new_sequence(self, request: EngineRequest, arrival: int, choices: list[int]) -> Sequence:
        self._sequence_ids += 1
        prompt = len(request.prompt_ids)
        state = self._stretch.state(prompt, prompt) if self._stretch else 0
        tables = self._pool.new_tables(self._salt(request, state))
        sequence = Sequence(self._sequence_ids, request, arrival, choices, tables, list(request.prompt_ids))
        sequence.told, sequence.stretched = (choices[0], 0), state
        return sequence

    def _salt(self, request: EngineRequest, state: int) -> str:
        return f"{state}\0{request.cache_salt}" if self._stretch else request.cache_salt

    def _append(self, sequence: Sequence, token_id: int) -> None:
        """One more token; where that stretches all of the sequence's positions, its keys are computed anew."""
        sequence.append(token_id)
        if self._stretch is None:
            return
        state = self._stretch.state(len(sequence.request.prompt_ids), len(sequence.token_ids))
        if state != sequence.stretched:
            self._pool.release(sequence.tables)
            sequence.tables, sequence.stretched = self._pool.new_tables(self._salt(sequence.request, state)), state

    # ---- before a step

    def schedule(self) -> Step | None:
        """The next step; None when there is nothing to do."""
        if self._flights is not None:
            raise RuntimeError("schedule() called again before update() or fail()")
        if not self._open:
            return None
        flights: list[_Flight] = []
        ahead = self._make_way()
        budget = self._tokens()
        served = 0
        while served < len(self._running):
            sequence = self._running[served]
            served += 1
            if sequence.candidates:  # the other beams are not as far
                continue
            behind = len(self._running) - served  # each keeps a token, so none starves
            left = budget - behind
            if ahead is not None and ahead.request.priority < sequence.request.priority:
                left = max(1, left - ahead.remaining)
            wanted = self._pool.until_state(sequence.tables, min(sequence.remaining, left))
            count = self._make_room(sequence, wanted)
            if count:
                flights.append(self._flight(sequence, count))
                budget -= count
        self._admit(flights, budget)
        if not flights:  # then all that runs are beams, in the way of those that they wait for
            for sequence in list(self._running):
                self._preempt(sequence)
            self._admit(flights, budget)
        if not flights:
            raise RuntimeError(f"the scheduler is stuck: {self.waiting} waiting, {self._pool.used} blocks in use")
        self._flights = flights
        self._left = self._clock()
        self.counters.steps += 1
        copies, state_copies = self._pool.take_copies(), self._pool.take_state_copies()
        return Step(self.counters.steps, tuple(f.scheduled for f in flights), copies, state_copies)

    def _tokens(self) -> int:
        """What the next step may compute: where answers are streamed, not so much that they falter."""
        streams = sum(bool(s.output_ids) and s.request.streamed for s in self._running)
        room = self._pace.room(streams, self._beginning()) if streams else None
        return self._budget if room is None else min(self._budget, len(self._running) + room)

    def _beginning(self) -> int:
        """Sequences that have yet to draw their first token, as far as there are seats."""
        begun = sum(bool(s.output_ids) for s in self._running)
        return min(self._seats, len(self._running) + len(self._waiting)) - begun

    def _make_way(self) -> Sequence | None:
        """Preempt what runs with a higher priority number than the first that waits, until that one fits; returns
        it."""
        ahead = self._waiting.first()
        while ahead is not None and self._running and self._running[-1].request.priority > ahead.request.priority:
            if len(ahead.choices) <= self._free_seats() and self._has_room(ahead):
                break
            self._preempt(self._running[-1])
        return ahead

    def _has_room(self, sequence: Sequence) -> bool:
        return self._pool.has_room(sequence.tables, len(sequence.token_ids), len(self._running))

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """Reserve for up to `count` tokens of a running sequence, preempting from the last on; 0 when that was the
        sequence itself."""
        while not (granted := self._reserve(sequence, count)):
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return 0
        self._tell(sequence)
        return granted

    def _reserve(self, sequence: Sequence, count: int) -> int:
        """Reserve for as many of `count` tokens as fit, found by halving."""
        while count and not self._pool.reserve(sequence.tables, count):
            count //= 2
        return count

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks away; the sequence computes its tokens again later. What it has drawn stays drawn."""
        self._running.remove(sequence)
        self._pool.release(sequence.tables)
        self._tell(sequence)
        if sequence.candidates:
            sequence.status = "parked"
        else:
            self._wait(sequence)
        self.counters.preemptions += 1

    def _admit(self, flights: list[_Flight], budget: int) -> None:
        """In turn: stops at the first that does not fit."""
        seats = self._free_seats()
        while budget and (sequence := self._waiting.first()) is not None:
            if len(sequence.choices) > seats:
                return
            hit = 0 if sequence.wants_prompt_logprobs else self._pool.attach(sequence.tables, sequence.token_ids)
            wanted = self._pool.until_state(sequence.tables, min(sequence.remaining, budget))
            room = not self._running or self._has_room(sequence)
            count = self._reserve(sequence, wanted) if room else 0
            if not count:
                self._pool.release(sequence.tables)
                return
            self._waiting.remove(sequence)
            self._run(sequence)
            self._tell(sequence)
            self._count_admission(sequence, hit)
            flights.append(self._flight(sequence, count))
            seats -= len(sequence.choices)
            budget -= count
            if count < wanted:
                return

    def _count_admission(self, sequence: Sequence, hit: int) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = hit
            self._open[sequence.request.id].begun = self._clock()
            self.counters.prompt_tokens += len(sequence.request.prompt_ids)
            self.counters.cached_tokens += hit

    def _flight(self, sequence: Sequence, count: int) -> _Flight:
        self._shares.charge(sequence.request.tenant, count)
        start, end = sequence.num_computed, sequence.num_computed + count
        caught_up = count == sequence.remaining
        draws = sequence.draws() if caught_up and sequence.request.params.max_tokens != 0 else ()
        logprobs = sequence.wants_prompt_logprobs
        scheduled = ScheduledSequence(
            sequence_id=sequence.id,
            start=start,
            tokens=tuple(sequence.token_ids[start:end]),
            block_tables=sequence.tables.covering(end, self._pool.block_size),
            state=sequence.tables.state,
            draws=draws,
            prompt_logprobs=sequence.request.params.prompt_logprobs if logprobs else None,
            rope_length=self._rope_length(sequence),
            targets=sequence.targets(count) if logprobs else (),
        )
        return _Flight(sequence, tuple(sequence.choices) if caught_up else (), scheduled)

    def _rope_length(self, sequence: Sequence) -> int:
        if self._stretch is None:
            return 0
        return self._stretch.rope_length(len(sequence.request.prompt_ids), len(sequence.token_ids))

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = "waiting"
        self._waiting.add(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = "running"
        insort(self._running, sequence, key=_rank)

    # ---- after a step

    def update(self, step: Step, result: StepResult) -> list[Event]:
        """Take in what the executor computed. What belongs to choices ended meanwhile is dropped.

        Raises RuntimeError, changing nothing, when the result does not answer the step; then call `fail`.
        """
        flights = self._in_flight(step)
        answers = self._answers(flights, step, result)
        self._flights = None
        tokens = sum(len(s.tokens) - 1 for s in step.sequences)
        self._pace.learn(len(step.sequences), tokens, self._clock() - self._left)
        return [event for flight, answer in answers for event in self._advance(flight, answer)]

    def _in_flight(self, step: Step) -> list[_Flight]:
        if self._flights is None or step.id != self.counters.steps:
            raise RuntimeError(f"step {step.id} is not in flight")
        return self._flights

    def _answers(self, flights: list[_Flight], step: Step, result: StepResult) -> list[tuple[_Flight, SequenceResult]]:
        by_id = {answer.sequence_id: answer for answer in result.sequences}
        answers = []
        for flight in flights:
            if flight.sequence.status == "finished":
                continue
            answer = by_id.get(flight.sequence.id)
            asked = flight.scheduled
            if (
                result.step_id != step.id
                or answer is None
                or not _answered(asked.draws, answer)
                or len(answer.prompt_logprobs) != len(asked.targets)
            ):
                raise RuntimeError(
                    f"the executor's result does not answer step {step.id}, sequence {asked.sequence_id}"
                )
            answers.append((flight, answer))
        return answers

    def _advance(self, flight: _Flight, answer: SequenceResult) -> list[Event]:
        sequence, asked = flight.sequence, flight.scheduled
        self._pool.commit(sequence.tables, sequence.token_ids, len(asked.tokens))
        self._tell(sequence)
        # what is computed again after a preemption has been reported: the first report stands
        known = len(sequence.prompt_infos) - asked.start
        sequence.prompt_infos.extend(answer.prompt_logprobs[max(0, known) :])
        if sequence.request.beam_width > 1:
            return self._advance_beam(sequence, answer) if asked.draws else []
        if flight.choices and not asked.draws:  # the prompt was all that was asked for
            return self._end(sequence, [i for i in flight.choices if i in sequence.choices], Ending("length"))
        events = []
        survivors = []
        for index, info in zip(flight.choices, answer.tokens, strict=True):
            if index not in sequence.choices:
                continue
            self.counters.generated_tokens += 1
            ending = sequence.request.ending(
                info, len(sequence.output_ids) + 1, len(sequence.token_ids) + 1, self._context_length
            )
            events.append(self._event(sequence, index, (info,), ending))
            if ending is None:
                survivors.append((index, info.token_id))
        for index, token_id in survivors[1:]:
            self._fork(sequence, index, token_id, self._pool.fork(sequence.tables))
        if survivors:
            self._append(sequence, survivors[0][1])
            self._assign(sequence, [survivors[0][0]])
        elif events:
            self._assign(sequence, [])
        return events

    def _event(
        self, sequence: Sequence, index: int, tokens: tuple[TokenInfo, ...] = (), ending: Ending | None = None
    ) -> Event:
        """Report to choice `index`; with an ending, close it."""
        request = sequence.request
        prompt_logprobs: tuple[TokenInfo | None, ...] | None = None
        first = not sequence.output_ids and (tokens or (ending is not None and ending.reason == "length"))
        if request.params.prompt_logprobs is not None and first and index == 0:
            prompt_logprobs = (None, *sequence.prompt_infos)
        cached = sequence.cached_tokens or 0
        if ending is None:
            return Event(request.id, index, tokens, prompt_logprobs, cached_tokens=cached)
        self._close(request.id, index, ending.reason)
        return Event(
            request.id, index, tokens, prompt_logprobs, ending.reason, ending.stop_reason, cached, ending.error
        )

    def _close(self, request_id: str, index: int, reason: FinishReason) -> None:
        state = self._open[request_id]
        state.open.remove(index)
        state.reasons.add(reason)
        if state.open:
            return
        del self._open[request_id]
        self._shares.leave(state.request.tenant)
        if state.begun is not None:
            self._lasted += _MEMORY * (self._clock() - state.begun - self._lasted)
        if "error" in state.reasons:
            self.counters.failed += 1
        elif "cancelled" in state.reasons:
            self.counters.cancelled += 1
        else:
            self.counters.finished += 1

    def _fork(self, parent: Sequence, index: int, token_id: int, tables: BlockTables | None) -> Sequence:
        """Choice `index` goes its own way with this token, out of `tables`, the parent's; where there is no room for
        that, it waits and computes all itself."""
        child = self._new_sequence(parent.request, parent.arrival, [index])
        child.token_ids, child.output_ids = list(parent.token_ids), list(parent.output_ids)
        child.cached_tokens, child.prompt_infos = parent.cached_tokens, parent.prompt_infos
        child.stretched = parent.stretched
        child.tables = tables or self._pool.new_tables(self._salt(parent.request, parent.stretched))
        self._open[parent.request.id].sequences.append(child)
        self._append(child, token_id)
        if tables is None:
            self._wait(child)
        else:
            self._run(child)
            self._tell(child)
        return child

    def _advance_beam(self, sequence: Sequence, answer: SequenceResult) -> list[Event]:
        """A beam's candidates are in; with the last beam's, the search goes on, or ends."""
        state = self._open[sequence.request.id]
        sequence.candidates = answer.tokens
        self.counters.generated_tokens += 1
        if state.beams is None or not all(beam.candidates for beam in state.sequences):
            return []
        found = [one for beam in state.sequences for one in state.beams.continuations(beam, self._context_length)]
        going = state.beams.advance(found)
        if going:
            self._branch(state, going)
            return []
        best = dict(enumerate(state.beams.finished))
        events = [self._beam_event(state, index, best.get(index)) for index in sorted(state.open)]
        self._drop(state)
        return events

    def _branch(self, state: _Open, going: list[Continuation]) -> None:
        """Each beam becomes those that continue it: the first in its place, the others as forks."""
        heirs: dict[int, list[Continuation]] = {}
        for one in going:
            heirs.setdefault(one.parent.id, []).append(one)
        parents = list(state.sequences)
        for parent in parents:  # first, to make room
            self._assign(parent, parent.choices[:1] if parent.id in heirs else [])
        taken = {parent.index for parent in state.sequences}
        free = iter([index for index in range(state.request.beam_width) if index not in taken])
        for parent in [parent for parent in parents if parent.id in heirs]:
            first, *others = heirs[parent.id]
            for other in others:
                may_run = parent.status == "running" and self._free_seats() > 0
                tables = self._pool.fork(parent.tables) if may_run else None
                child = self._fork(parent, next(free), other.info.token_id, tables)
                child.infos, child.total = [*parent.infos, other.info], other.total
            self._append(parent, first.info.token_id)
            parent.infos.append(first.info)
            parent.total, parent.candidates = first.total, ()
            if parent.status == "parked":
                self._wait(parent)

    def _beam_event(self, state: _Open, index: int, found: Hypothesis | None) -> Event:
        """The one event of a choice; where bans left fewer beams than choices, it is empty."""
        sequence, request = state.sequences[0], state.request
        logprobs = index == 0 and request.params.prompt_logprobs is not None
        ending = found.ending if found else Ending("length")
        self._close(request.id, index, ending.reason)
        return Event(
            *(request.id, index, found.tokens if found else ()),
            (None, *sequence.prompt_infos) if logprobs else None,
            *(ending.reason, ending.stop_reason, sequence.cached_tokens or 0),
            score=found.score if found else None,
        )

    def _drop(self, state: _Open) -> None:
        for sequence in list(state.sequences):
            self._assign(sequence, [])

    def _assign(self, sequence: Sequence, choices: list[int]) -> None:
        """Change which choices a sequence draws for; with none left it ends."""
        sequence.choices = choices
        if choices:
            self._tell(sequence)
            return
        if sequence.status != "parked":
            (self._running if sequence.status == "running" else self._waiting).remove(sequence)
        sequence.status = "finished"
        self._pool.release(sequence.tables)
        self._tell(sequence)
        if state := self._open.get(sequence.request.id):
            state.sequences.remove(sequence)

    def fail(self, step: Step, error: BaseException) -> list[Event]:
        """The step could not be computed: its sequences end with the error; all others go on."""
        flights = self._in_flight(step)
        self._flights = None
        return [
            event
            for flight in flights
            for event in self._end(flight.sequence, list(flight.sequence.choices), Ending("error", error=error))
        ]

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "cancelled") -> list[Event]:
        """End a request, or one choice of it, now. Returns the final events; none where it has ended already."""
        return self._end_choices(request_id, index, Ending(reason))

    def finish(self, request_id: str, index: int, stop_reason: str | int | None) -> list[Event]:
        """End a choice because of what it said: a stop string, found where there is text."""
        return self._end_choices(request_id, index, Ending("stop", stop_reason))

    def expire(self) -> list[Event]:
        """End what has not ended within its timeout. Returns the final events."""
        now = self._clock()
        late = [s.request for s in self._open.values() if s.deadline is not None and s.deadline <= now]
        return [
            event
            for request in late
            for event in self._end_choices(
                request.id, None, Ending("error", error=RequestTimeout(request.id, request.timeout or 0.0))
            )
        ]

    def _end_choices(self, request_id: str, index: int | None, ending: Ending) -> list[Event]:
        state = self._open.get(request_id)
        events: list[Event] = []
        if state is not None and state.beams is not None:
            ended = [choice for choice in sorted(state.open) if index is None or choice == index]
            events = [self._event(state.sequences[0], choice, ending=ending) for choice in ended]
            if not state.open:
                self._drop(state)
            return events
        for sequence in list(state.sequences) if state else ():
            ended = [choice for choice in sequence.choices if index is None or choice == index]
            events.extend(self._end(sequence, ended, ending))
        return events

    def _end(self, sequence: Sequence, choices: list[int], ending: Ending) -> list[Event]:
        if not choices:
            return []
        if sequence.request.beam_width > 1:
            return self._end_choices(sequence.request.id, None, ending)
        events = [self._event(sequence, index, ending=ending) for index in choices]
        self._assign(sequence, [choice for choice in sequence.choices if choice not in choices])
        return events

    # ---- listeners, invariants

    def _tell(self, sequence: Sequence) -> None:
        """Let the listeners know how many blocks the sequence has come to hold."""
        index, blocks = sequence.told
        if sequence.told == (sequence.index, sequence.tables.held):
            return
        if index != sequence.index:  # its first choice ended before the fork: the next one takes its blocks over
            self._report(self._listeners, sequence.request.id, index, -blocks)
            blocks = 0
        self._report(self._listeners, sequence.request.id, sequence.index, sequence.tables.held - blocks)
        sequence.told = (sequence.index, sequence.tables.held)

    @staticmethod
    def _report(listeners: list[AllocationListener], request_id: str, index: int, blocks: int) -> None:
        for listener in listeners if blocks else ():
            try:
                (listener.allocated if blocks > 0 else listener.released)(request_id, index, abs(blocks))
            except Exception:
                _log.exception("an allocation listener raised; it was told of request %s and goes on", request_id)

    def check(self) -> None:
        """Prove the invariants, the pool's included; AssertionError says what is broken. For tests."""
        parked = [s for state in self._open.values() for s in state.sequences if s.status == "parked"]
        everyone = [*self._running, *self._waiting, *parked]
        self._pool.check(s.tables for s in everyone)
        owned = sorted(s.id for state in self._open.values() for s in state.sequences)
        if owned != sorted(s.id for s in everyone):
            raise AssertionError("open requests and queued sequences do not match")
        if any(s.status != "running" for s in self._running) or any(s.status != "waiting" for s in self._waiting):
            raise AssertionError("a sequence is not where its status says")
        if self._running != sorted(self._running, key=_rank):
            raise AssertionError("the running sequences are out of order")
        idle = [s for s in everyone if s.remaining < 1 and not s.candidates]
        if any(s.tables.held for s in [*self._waiting, *parked]) or idle:
            raise AssertionError("a waiting sequence holds blocks, or one has nothing to compute")
        if sum(len(s.choices) for s in self._running) > self._seats:
            raise AssertionError("more sequences run than may")
        for request_id, state in self._open.items():
            choices = sorted(i for s in state.sequences for i in s.choices)
            fits = (
                set(choices) <= set(range(state.request.beam_width)) if state.beams else choices == sorted(state.open)
            )
            if not fits or len(choices) != len(set(choices)):
                raise AssertionError(f"request {request_id}: its choices do not add up")
