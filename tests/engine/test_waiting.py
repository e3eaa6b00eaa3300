"""Whose turn it is: priorities, tenants, a line that is full, time that runs out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.shadow import ShadowExecutor, expected
from tests.engine.test_engine import Scripted
from tests.engine.test_scheduler import Setup, drain, outputs, request, turn
from tramontane.engine.engine import Engine
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import Event
from tramontane.engine.waiting import Shares
from tramontane.errors import Overloaded, RequestTimeout

LONG: dict[str, Any] = {"ignore_eos": True}


def ends(events: list[Event]) -> list[str]:
    return [event.request_id for event in events if event.finish_reason]


def first_turns(scheduler: Scheduler, executor: ShadowExecutor) -> list[str]:
    """The requests in the order in which they draw their first token."""
    seen: dict[str, None] = {}
    while scheduler.has_work:
        for event in turn(scheduler, executor)[1]:
            seen.setdefault(event.request_id)
    return [*seen]


def test_lower_priorities_go_first_whatever_came_before() -> None:
    scheduler, executor = Setup(max_num_seqs=1).build()
    for id, priority in (("a", 5), ("b", 0), ("c", -1), ("d", 5), ("e", 0)):
        scheduler.add(request(id, [1, 2], priority=priority, max_tokens=2, **LONG))
    assert ends(drain(scheduler, executor)) == ["c", "b", "e", "a", "d"]


def test_what_runs_gives_its_seat_to_a_lower_priority_and_goes_on_later() -> None:
    scheduler, executor = Setup(max_num_seqs=2).build()
    asked = {
        id: request(id, [1, 2], seed=seed, priority=p, max_tokens=8, **LONG)
        for seed, (id, p) in enumerate({"late": 3, "later": 4, "urgent": 0}.items())
    }
    scheduler.add(asked["late"])
    scheduler.add(asked["later"])
    events = turn(scheduler, executor)[1]
    scheduler.add(asked["urgent"])
    _, more = turn(scheduler, executor)
    assert {e.request_id for e in more} == {"late", "urgent"}, "only the last gives way"
    events += more + drain(scheduler, executor)
    assert ends(events) == ["late", "urgent", "later"]
    assert scheduler.counters.preemptions == 1
    for id, one in asked.items():
        assert outputs(events)[id, 0] == expected(one, 0, 40)[0]


def test_equal_priorities_take_no_seat_from_each_other() -> None:
    scheduler, executor = Setup(max_num_seqs=1).build()
    scheduler.add(request("a", [1], tenant="x", max_tokens=9, **LONG))
    turn(scheduler, executor)
    scheduler.add(request("b", [1], tenant="y", max_tokens=1))
    assert ends(drain(scheduler, executor)) == ["a", "b"]
    assert scheduler.counters.preemptions == 0


def test_a_long_prompt_of_a_higher_priority_number_leaves_its_budget() -> None:
    scheduler, executor = Setup(max_num_batched_tokens=8).build()
    scheduler.add(request("slow", [0] * 30, priority=1, max_tokens=1))
    turn(scheduler, executor)
    scheduler.add(request("quick", [1] * 6, max_tokens=1))
    step, events = turn(scheduler, executor)
    assert {s.sequence_id: len(s.tokens) for s in step.sequences} == {1: 2, 2: 6}
    assert ends(events) == ["quick"]
    drain(scheduler, executor)


def test_out_of_blocks_the_highest_priority_number_gives_way_first() -> None:
    scheduler, executor = Setup(num_blocks=9, prefix_caching=False).build()
    for id, priority in (("last", 9), ("first", 0), ("second", 1)):
        scheduler.add(request(id, [1] * 6, priority=priority, max_tokens=20, **LONG))
    assert ends(drain(scheduler, executor)) == ["first", "second", "last"]
    assert scheduler.counters.preemptions > 0


def test_a_thousand_requests_of_one_tenant_do_not_hold_up_another() -> None:
    scheduler, executor = Setup(max_num_seqs=2, num_blocks=40).build()
    for i in range(1000):
        scheduler.add(request(f"many{i}", [i % 3] * 4, tenant="many", max_tokens=3, **LONG))
    for _ in range(30):
        turn(scheduler, executor)
    for i in range(3):
        scheduler.add(request(f"few{i}", [i % 3] * 4, tenant="few", max_tokens=3, **LONG))
    order: list[str] = []
    while len([id for id in order if id.startswith("few")]) < 3:
        order += ends(turn(scheduler, executor)[1])
    # the two that ran, and then at most as many as it has had itself
    assert len(order) <= 2 + 2 * 3
    for state in [*scheduler.sequences()]:
        scheduler.abort(state.request.id)
    scheduler.check()


def test_absence_earns_nothing_and_leaving_forgives_nothing() -> None:
    shares = Shares()
    shares.enter("a")
    shares.charge("a", 100)
    shares.enter("b")
    assert shares.had("b") == 100, "who comes late does not catch up on the past"
    shares.charge("b", 50)
    shares.leave("b")
    shares.enter("b")
    assert shares.had("b") == 150, "who leaves and returns has still had it"
    shares.leave("b")
    shares.charge("a", 100)
    shares.enter("c")
    shares.enter("b")
    assert shares.had("b") == 200
    for tenant in "abc":
        shares.leave(tenant)
    shares.enter("a")
    assert shares.had("a") == 0, "an idle engine starts afresh"


ARRIVAL = st.tuples(
    st.integers(0, 12),  # before which step it comes
    st.sampled_from([0, 0, 0, 2]),  # priority
    st.sampled_from("abc"),
    st.integers(1, 12),  # prompt
    st.integers(1, 6),  # answer
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ARRIVAL, min_size=1, max_size=25), st.integers(1, 3), st.integers(8, 30))
def test_all_end_once_in_order_of_priority_and_fairly(arrivals: list[Any], seats: int, blocks: int) -> None:
    scheduler, executor = Setup(max_num_seqs=seats, num_blocks=blocks).build()
    events: list[Event] = []
    steps = 0
    left = [(at, f"r{i}", rest) for i, (at, *rest) in enumerate(arrivals)]
    asked = {}
    while left or scheduler.has_work:
        for one in [one for one in left if one[0] <= steps]:
            left.remove(one)
            priority, tenant, prompt, tokens = one[2]
            new = request(one[1], [1] * prompt, priority=priority, tenant=tenant, max_tokens=tokens, **LONG)
            asked[new.id] = new
            scheduler.add(new)
        waited = {s.request.id: s.request for s in scheduler.sequences() if s.status == "waiting"}
        steps += 1
        if not scheduler.has_work:
            continue
        had = {r.tenant: scheduler._shares.had(r.tenant) for r in waited.values()}
        ran = {s.id: s.request.tenant for s in scheduler.sequences() if s.status == "running"}
        step, more = turn(scheduler, executor)
        events += more
        for scheduled in step.sequences:  # what runs is served before what waits is admitted
            tenant = ran.get(scheduled.sequence_id)
            if tenant in had:
                had[tenant] += len(scheduled.tokens)
        still = {s.request.id for s in scheduler.sequences() if s.status == "waiting"}
        begun = [r for id, r in waited.items() if id not in still]
        behind = [r for id, r in waited.items() if id in still]
        if begun and behind:
            assert max(r.priority for r in begun) <= min(r.priority for r in behind)
        if len(begun) == 1 and behind:  # then the shares are those that decided
            rivals = [r for r in behind if r.priority == begun[0].priority]
            assert all(had[begun[0].tenant] <= had[r.tenant] for r in rivals)
    final = ends(events)
    assert sorted(final) == sorted(asked), "each ends once"
    for id, one in asked.items():
        assert outputs(events)[id, 0] == expected(one, 0, 40)[0]
    assert scheduler.pool.used == 0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_full_line_refuses_and_says_when_to_come_again() -> None:
    clock = Clock()
    scheduler, executor = Setup(max_num_seqs=2, max_waiting=3, clock=clock).build()
    for i in range(5):  # two seats are free, three may wait
        scheduler.add(request(str(i), [1], max_tokens=2, **LONG))
    with pytest.raises(Overloaded) as caught:
        scheduler.add(request("x", [1], max_tokens=2))
    assert (caught.value.waiting, caught.value.retry_after) == (5, 5.0), "a second each, until one has ended"
    turn(scheduler, executor)
    with pytest.raises(Overloaded):
        scheduler.add(request("x", [1], max_tokens=2))
    clock.now += 60.0
    assert sorted(ends(turn(scheduler, executor)[1])) == ["0", "1"]
    scheduler.add(request("x", [1], max_tokens=2, **LONG))
    scheduler.add(request("y", [1], max_tokens=2, **LONG))
    with pytest.raises(Overloaded) as caught:
        scheduler.add(request("z", [1], max_tokens=2))
    assert caught.value.retry_after > 5 * 5.0, "they take longer than was thought"
    assert len(ends(drain(scheduler, executor))) == 5
    assert not scheduler.has_work
    scheduler.add(request("z", [1], max_tokens=1))


def test_no_waiting_at_all_still_fills_the_seats() -> None:
    scheduler, _ = Setup(max_num_seqs=2, max_waiting=0).build()
    scheduler.add(request("a", [1], max_tokens=2))
    scheduler.add(request("b", [1], max_tokens=2))
    with pytest.raises(Overloaded, match="max_waiting"):
        scheduler.add(request("c", [1], max_tokens=2))


@pytest.mark.parametrize("running", [True, False])
def test_time_runs_out_once_for_all_choices(running: bool) -> None:
    clock = Clock()
    scheduler, executor = replace(Setup(max_num_seqs=2), clock=clock).build()
    engine = Engine(scheduler, Scripted(scheduler, executor))
    if not running:
        engine.add(request("other", [1], n=2, max_tokens=30, priority=-1, **LONG))
    engine.add(request("late", [1, 2], n=2, timeout=2.5, max_tokens=30, **LONG))
    engine.step()
    clock.now += 2.4
    assert not ends(engine.step())
    clock.now += 0.1
    events = [e for e in engine.step() if e.request_id == "late"]
    assert [(e.index, e.finish_reason) for e in events] == [(0, "error"), (1, "error")]
    assert isinstance(events[0].error, RequestTimeout)
    assert "2.5 s" in str(events[0].error)
    assert scheduler.pool.used == (0 if running else scheduler.pool.used)
    scheduler.check()
    engine.add(request("late", [1, 2], timeout=1e6, max_tokens=3, **LONG))  # the name is free again
    rest: list[Event] = []
    while engine.has_work:
        rest += engine.step()
    assert {e.request_id: e.finish_reason for e in rest if e.finish_reason}["late"] == "length"
    assert engine.stats().requests_failed == 1
