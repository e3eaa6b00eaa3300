"""BlockPool and ContiguousPool against a shadow of physical memory, and one test a promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.engine.shadow import Memory, digests
from tramontane.engine.blocks import BlockPool, BlockTables, ContiguousPool, Pool

CONTEXT = 24


class PoolMachine(RuleBasedStateMachine):
    """Sequences that appear, compute, fork and vanish in any order; each is (tables, its tokens)."""

    def __init__(self, pool: Pool, windows: tuple[int | None, ...], block_size: int, has_states: bool) -> None:
        super().__init__()
        self.pool = pool
        self.has_states = has_states
        self.memory = Memory(windows, block_size)
        self.live: list[tuple[BlockTables, list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=CONTEXT), salt=st.sampled_from(["", "", "s"]))
    def begin(self, tokens: list[int], salt: str) -> None:
        tables = self.pool.new_tables(salt)
        hit = self.pool.attach(tables, tokens)
        assert hit < len(tokens)
        assert hit % self.pool.block_size == 0
        # the first row to compute sees the prefix that was found
        truth = digests(salt, tokens)
        visible = [[*table, -2] for table in tables.groups]
        for group, window in enumerate(self.memory.windows):
            for position in range(0 if window is None else max(0, hit - window + 1), hit):
                slot = (visible[group][position // self.pool.block_size], position % self.pool.block_size)
                assert self.memory.slots[slot] == (group, position, truth[position])
        if self.has_states and hit:
            assert self.memory.states[tables.state] == (hit, truth[hit - 1])
        self.live.append((tables, tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def step(self, data: Any) -> None:
        """Some sequences compute some tokens at once; another may vanish after blocks were reserved."""
        chosen = data.draw(st.lists(st.integers(0, len(self.live) - 1), unique=True, max_size=4))
        work = []
        for i in chosen:
            tables, tokens = self.live[i]
            count = self.pool.until_state(tables, data.draw(st.integers(1, 6)))
            if tables.num_tokens + count > CONTEXT:
                continue
            before = [list(table) for table in tables.groups]
            if not self.pool.reserve(tables, count):
                assert before == tables.groups, "a refused reserve changed something"
                continue
            while len(tokens) < tables.num_tokens + count:
                tokens.append(data.draw(st.integers(0, 1)))
            work.append((tables, tokens, count))
        idle = [i for i in range(len(self.live)) if i not in chosen]
        if idle and data.draw(st.booleans()):
            self.pool.release(self.live.pop(data.draw(st.sampled_from(idle)))[0])
        self.memory.copy(self.pool.take_copies(), self.pool.take_state_copies())
        truths = [digests(tables.salt, tokens) for tables, tokens, _ in work]
        states = [tables.state for tables, _, _ in work if self.has_states]
        assert len(set(states)) == len(states), "two sequences write one state"
        for (tables, _, count), truth in zip(work, truths, strict=True):
            if self.has_states:
                self.memory.advance(tables.state, tables.num_tokens, tables.num_tokens + count, truth)
            self.memory.write(tables.groups, tables.num_tokens, tables.num_tokens + count, truth)
        for (tables, tokens, count), truth in zip(work, truths, strict=True):
            self.memory.verify(tables.groups, tables.num_tokens, tables.num_tokens + count, truth)
            self.pool.commit(tables, tokens, count)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        tables, tokens = self.live[data.draw(st.integers(0, len(self.live) - 1))]
        if not tables.num_tokens:
            return
        child = self.pool.fork(tables)
        if child is not None:
            self.live.append((child, tokens[: tables.num_tokens]))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        self.pool.release(self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))[0])

    @invariant()
    def sound(self) -> None:
        self.pool.check(tables for tables, _ in self.live)

    def teardown(self) -> None:
        for tables, _ in self.live:
            self.pool.release(tables)
        self.pool.take_copies()
        self.pool.take_state_copies()
        self.pool.check([])
        assert self.pool.used == 0


# a pool, its windows, its block size, and whether it has states
Maker = Callable[[], tuple[Pool, tuple[int | None, ...], int, bool]]


def paged(
    windows: tuple[int | None, ...], size: int, blocks: int, caching: bool = True, states: int = 0, interval: int = 1
) -> Maker:
    return lambda: (BlockPool(blocks, size, windows, caching, states, interval), windows, size, states > 0)


def contiguous(windows: tuple[int | None, ...], size: int, blocks: int, states: int = 0) -> Maker:
    return lambda: (ContiguousPool(blocks, size, len(windows), CONTEXT, states), windows, size, states > 0)


POOLS = {
    "full": paged((None,), 2, 18),
    "full, window": paged((None, 8), 3, 22),
    "windows, full": paged((5, None, 5), 2, 34),
    "windows only": paged((3, 1), 2, 14),
    "blocks of one token": paged((None, 4), 1, 30),
    "no prefix cache": paged((None, 8), 3, 22, caching=False),
    "contiguous": contiguous((None, 8), 4, 50),
    "full, state": paged((None,), 2, 30, states=6, interval=2),
    "full, window, state": paged((None, 8), 3, 30, states=4),
    "full, few states": paged((None,), 2, 40, states=2),
    "full, one state": paged((None,), 1, 40, states=1),
    "state": paged((), 2, 0, states=5),
    "state, no prefix cache": paged((), 2, 0, caching=False, states=5),
    "contiguous, state": contiguous((None,), 4, 50, states=3),
    "contiguous, nothing but state": contiguous((), 4, 0, states=3),
}


def run_machine(name: str, examples: int) -> None:
    class Machine(PoolMachine):
        def __init__(self) -> None:
            super().__init__(*POOLS[name]())

    case = Machine.TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=40, derandomize=True)
    case("runTest").runTest()


@pytest.mark.parametrize("name", POOLS)
def test_any_order_of_operations(name: str) -> None:
    run_machine(name, 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_any_order_of_operations_at_length(name: str) -> None:
    run_machine(name, 1000)


def computed(pool: Pool, tokens: list[int], salt: str = "") -> BlockTables:
    """Tables with all of `tokens` computed."""
    tables = pool.new_tables(salt)
    hit = pool.attach(tables, tokens)
    assert pool.reserve(tables, len(tokens) - hit)
    pool.commit(tables, tokens, len(tokens) - hit)
    return tables


def hit(pool: BlockPool, tokens: list[int], salt: str = "") -> int:
    return pool.match(pool.new_tables(salt), tokens)


def test_a_prefix_is_found_in_whole_blocks_and_one_token_remains() -> None:
    pool = BlockPool(10, 4)
    pool.release(computed(pool, list(range(10))))
    assert hit(pool, list(range(10))) == 8
    assert hit(pool, list(range(9))) == 8
    assert hit(pool, list(range(8))) == 4
    assert hit(pool, list(range(4))) == 0
    assert hit(pool, [0, 1, 2, 3, 9, 9, 9, 9, 9]) == 4
    assert hit(pool, [9, *range(1, 10)]) == 0
    assert hit(pool, [4, 5, 6, 7, 8]) == 0, "the same tokens after other tokens are not the same"


def test_a_salt_keeps_requests_apart() -> None:
    pool = BlockPool(10, 2)
    pool.release(computed(pool, [1, 2, 3, 4, 5], "mine"))
    assert hit(pool, [1, 2, 3, 4, 5]) == 0
    assert hit(pool, [1, 2, 3, 4, 5], "other") == 0
    assert hit(pool, [1, 2, 3, 4, 5], "mine") == 4


def test_prefix_caching_off_finds_and_keeps_nothing() -> None:
    pool = BlockPool(10, 2, prefix_caching=False)
    pool.release(computed(pool, [1, 2, 3, 4, 5]))
    assert hit(pool, [1, 2, 3, 4, 5]) == 0
    assert pool.cached == 0


def test_a_block_is_sealed_only_when_full_and_computed() -> None:
    pool = BlockPool(10, 4)
    tables = pool.new_tables()
    tokens = list(range(8))
    assert pool.reserve(tables, 7)
    assert hit(pool, tokens) == 0
    pool.commit(tables, tokens, 3)
    assert hit(pool, tokens) == 0
    pool.commit(tables, tokens, 1)
    assert hit(pool, tokens) == 4


def test_the_same_tokens_computed_twice_keep_the_first_block() -> None:
    pool = BlockPool(10, 2)
    a, b = pool.new_tables(), pool.new_tables()
    assert pool.reserve(a, 2)
    assert pool.reserve(b, 2)
    pool.commit(a, [1, 2], 2)
    pool.commit(b, [1, 2], 2)
    pool.check([a, b])
    found = pool.new_tables()
    pool.attach(found, [1, 2, 3])
    assert found.groups == a.groups
    pool.release(b)
    assert pool.cached == 0, "the double is a plain block"


def test_reserve_is_all_or_nothing_over_the_groups() -> None:
    pool = BlockPool(3, 4, (None, None))
    tables = pool.new_tables()
    assert not pool.reserve(tables, 5)
    assert tables.groups == [[], []]
    assert pool.used == 0
    assert pool.reserve(tables, 4)
    assert pool.used == 2


def test_unused_blocks_go_first_then_the_least_recently_used_the_deepest_first() -> None:
    pool = BlockPool(6, 2)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    pool.release(computed(pool, old))
    pool.release(computed(pool, new))
    assert (pool.cached, pool.used) == (4, 0)
    other = pool.new_tables()
    assert pool.reserve(other, 4)
    assert pool.cached == 4, "two blocks were unused"
    assert pool.reserve(other, 6)
    assert (hit(pool, [*old, 0]), hit(pool, [*new, 0])) == (2, 4)
    assert pool.reserve(other, 8)
    assert (hit(pool, [*old, 0]), hit(pool, [*new, 0])) == (0, 4)
    assert pool.reserve(other, 10)
    assert (hit(pool, [*old, 0]), hit(pool, [*new, 0])) == (0, 2)


def test_a_hit_is_used_again_so_it_is_evicted_later() -> None:
    pool = BlockPool(4, 2)
    pool.release(computed(pool, [1, 2, 3, 4]))
    pool.release(computed(pool, [5, 6, 7, 8]))
    again = pool.new_tables()
    assert pool.attach(again, [1, 2, 3, 4, 9]) == 4
    pool.release(again)
    other = pool.new_tables()
    assert pool.reserve(other, 4)
    assert (hit(pool, [1, 2, 3, 4, 0]), hit(pool, [5, 6, 7, 8, 0])) == (4, 0)


def test_held_blocks_are_never_evicted() -> None:
    pool = BlockPool(4, 2)
    held = computed(pool, [1, 2, 3, 4])
    other = pool.new_tables()
    assert not pool.reserve(other, 6)
    assert pool.reserve(other, 4)
    assert not set(held.groups[0]) & set(other.groups[0])


def test_a_fork_shares_all_until_one_writes_and_the_last_writes_in_place() -> None:
    pool = BlockPool(8, 4, (None, None))
    parent = computed(pool, [1, 2, 3, 4, 5])
    children = [pool.fork(parent) for _ in range(2)]
    assert pool.used == 4
    partial = [table[1] for table in parent.groups]
    assert pool.reserve(parent, 1)
    assert pool.reserve(children[0], 1)
    assert pool.reserve(children[1], 1)
    assert [table[1] for table in children[1].groups] == partial
    assert [source for source, _ in pool.take_copies()] == partial * 2
    assert pool.take_copies() == ()
    assert len({t.groups[0][0] for t in (parent, *children)}) == 1
    pool.check([parent, *children])


def test_a_fork_before_the_end_of_the_prompt_goes_its_own_way() -> None:
    pool = BlockPool(8, 2)
    parent = pool.new_tables()
    pool.attach(parent, [1, 2, 3, 4, 5])
    assert pool.reserve(parent, 1)
    pool.commit(parent, [1], 1)
    child = pool.fork(parent)
    pool.release(parent)
    assert pool.reserve(child, 1)
    pool.commit(child, [1, 9], 1)
    assert (hit(pool, [1, 9, 0]), hit(pool, [1, 2, 0])) == (2, 0)


def test_writing_a_new_block_copies_nothing() -> None:
    pool = BlockPool(8, 4)
    parent = computed(pool, [1, 2, 3, 4])
    child = pool.fork(parent)
    assert pool.reserve(child, 1)
    assert pool.take_copies() == ()


def test_a_freed_source_is_out_of_reach_until_its_copies_are_handed_over() -> None:
    pool = BlockPool(3, 4, prefix_caching=False)
    parent = computed(pool, [1])
    child = pool.fork(parent)
    source = parent.groups[0][0]
    assert pool.reserve(child, 1)
    pool.release(parent)
    other = pool.new_tables()
    assert pool.reserve(other, 4)
    assert not pool.reserve(other, 5)
    assert pool.take_copies() == ((source, child.groups[0][0]),)
    assert pool.reserve(other, 5)


def test_a_freed_target_takes_its_copy_with_it() -> None:
    pool = BlockPool(3, 4, prefix_caching=False)
    parent = computed(pool, [1])
    child = pool.fork(parent)
    assert pool.reserve(child, 1)
    pool.release(parent)
    pool.release(child)
    pool.check([])
    assert (pool.take_copies(), pool.used) == ((), 0)


def test_a_copy_of_a_copy_comes_from_where_the_first_does() -> None:
    pool = BlockPool(4, 4)
    parent = computed(pool, [1])
    child = pool.fork(parent)
    assert pool.reserve(child, 1)
    grandchild = pool.fork(child)
    assert pool.reserve(grandchild, 1)
    source = parent.groups[0][0]
    assert pool.take_copies() == ((source, child.groups[0][0]), (source, grandchild.groups[0][0]))


def test_a_window_frees_what_no_later_token_sees() -> None:
    pool = BlockPool(20, 2, (None, 4))
    tables = computed(pool, list(range(7)))  # token 7 sees 4..7
    assert tables.groups[1][:2] == [-1, -1]
    assert -1 not in tables.groups[1][2:]
    assert -1 not in tables.groups[0]
    assert tables.held == 4 + 2
    assert pool.reserve(tables, 1)
    pool.commit(tables, list(range(8)), 1)  # token 8 sees 5..8
    assert tables.groups[1] == [-1, -1, tables.groups[1][2], tables.groups[1][3]]


def test_a_hit_needs_of_a_window_group_only_what_the_next_token_sees() -> None:
    pool = BlockPool(20, 2, (None, 4))
    pool.release(computed(pool, list(range(12))))
    tables = pool.new_tables()
    assert pool.attach(tables, list(range(11))) == 10
    assert tables.groups[1][:3] == [-1, -1, -1]
    assert tables.held == 5 + 2
    pool.check([tables])


def test_a_hit_counts_only_where_every_group_still_holds_it() -> None:
    pool = BlockPool(12, 2, (None, 4))
    tables = computed(pool, list(range(8)))
    for depth in (2, 3):  # as if the window group had lost its last blocks to eviction
        pool._blocks.unseal(tables.groups[1][depth])
    # the token after 6 sees 3..6, that is blocks 1 and 2; the token after 4 sees 1..4: blocks 0 and 1 are enough
    assert hit(pool, [*range(8), 9]) == 4
    lost = pool._blocks.find((1, tables.hashes[1]))
    assert lost is not None
    pool._blocks.unseal(lost)
    assert hit(pool, [*range(8), 9]) == 2


@pytest.mark.parametrize("windows", [(None,), (1,), (2,), (5, None), (8, 3)])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_peak_blocks_bounds_a_sequence_computed_token_by_token(
    windows: tuple[int | None, ...], block_size: int
) -> None:
    pool = BlockPool(200, block_size, windows, prefix_caching=False)
    for num_tokens in range(1, 30):
        tables, peak = pool.new_tables(), 0
        for _ in range(num_tokens):
            assert pool.reserve(tables, 1)
            peak = max(peak, tables.held)
            pool.commit(tables, [0] * num_tokens, 1)
        pool.release(tables)
        assert peak <= pool.peak_blocks(num_tokens) <= peak + len(windows)


def test_contiguous_reserves_a_whole_context_and_copies_on_fork() -> None:
    pool = ContiguousPool(26, 4, 2, 10)
    parent, tokens = pool.new_tables(), [1, 2, 3, 4, 5]
    assert pool.attach(parent, tokens) == 0
    assert pool.reserve(parent, 5)
    assert parent.groups == [[0, 1, 2], [3, 4, 5]]
    pool.commit(parent, tokens, 5)
    child = pool.fork(parent)
    assert child is not None
    assert pool.take_copies() == ((0, 6), (1, 7), (3, 9), (4, 10))
    assert pool.used == 12
    assert [pool.fork(parent) is None for _ in range(3)] == [False, False, True]


def test_check_finds_what_is_broken() -> None:
    pool = BlockPool(8, 2)
    tables = computed(pool, [1, 2, 3])
    pool.check([tables])
    with pytest.raises(AssertionError, match="references"):
        pool.check([])
    tables.groups[0].append(7)
    tables.length += 1
    with pytest.raises(AssertionError, match="count of blocks"):
        pool.check([tables])
