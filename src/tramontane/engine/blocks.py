"""The blocks of the KV cache as bookkeeping: ids, references, hashes, and which copies a write needs.

Owns which block holds which tokens of which sequence, sharing (prefix cache, forks) with copy-on-write, and eviction.
Must not know: arrays, requests, the order in which sequences run.

One pool of equal-sized blocks serves all cache groups of a model; a sequence has one block table a group. `BlockPool`
is the paged cache (after Kwon et al., 2023, "PagedAttention"); `ContiguousPool` is the baseline it is compared with.
Every operation costs what it changes, never the size of the pool; only `check` looks at everything.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

from tramontane.config import CacheConfig
from tramontane.engine.places import Copies, Places, require

STATE_INTERVAL = 4
"""Blocks from one remembered state of a sequence to the next."""
_DIGEST = 32  # bytes: another request's prefix must not be reachable by a collision


class BlockTables:
    """What one sequence holds of a pool. Read it freely; only a pool changes it."""

    __slots__ = ("groups", "hashes", "held", "length", "num_tokens", "salt", "starts", "state")

    def __init__(self, num_groups: int, salt: str = "") -> None:
        self.salt = salt
        self.groups: list[list[int]] = [[] for _ in range(num_groups)]
        """A table a group, all of one length: block ids in the order of the tokens, -1 where a window has passed."""
        self.starts = [0] * num_groups
        """For each group, the first entry that is not -1."""
        self.length = 0
        """Entries of each table."""
        self.held = 0
        """Entries that are blocks, in all groups."""
        self.state = -1
        """The place of the sequence's state; -1 before it has one, and in models without."""
        self.num_tokens = 0
        """Tokens whose keys and values are in the blocks."""
        self.hashes: list[bytes] = []
        """The chain over the sequence's full blocks, as far as it was needed; outlives a release."""

    def covering(self, num_tokens: int, block_size: int) -> tuple[tuple[int, ...], ...]:
        """The tables as a step carries them: the entries of the first `num_tokens` tokens."""
        return tuple(tuple(table[: -(-num_tokens // block_size)]) for table in self.groups)

    def _clear(self) -> None:
        for table in self.groups:
            table.clear()
        self.starts = [0] * len(self.groups)
        self.length = self.held = self.num_tokens = 0
        self.state = -1


class Pool(Protocol):
    """What the scheduler needs of a cache."""

    @property
    def block_size(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def used(self) -> int:
        """Blocks that a sequence holds."""
        ...

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and whose tokens can still be found."""
        ...

    def new_tables(self, salt: str = "") -> BlockTables: ...

    def attach(self, tables: BlockTables, tokens: Sequence[int]) -> int:
        """Give empty tables the longest prefix of `tokens` that is computed; returns its length in tokens."""
        ...

    def until_state(self, tables: BlockTables, count: int) -> int:
        """How many of the next `count` tokens a step should compute: states are remembered only where steps end."""
        ...

    def reserve(self, tables: BlockTables, count: int) -> bool:
        """Blocks of their own for the next `count` tokens, in all groups, and a state to write, or nothing and
        False."""
        ...

    def commit(self, tables: BlockTables, tokens: Sequence[int], count: int) -> None:
        """`count` more tokens are computed. `tokens`: the sequence's, at least the computed ones."""
        ...

    def fork(self, tables: BlockTables) -> BlockTables | None:
        """The same tokens for another sequence; None when there is no room for it."""
        ...

    def release(self, tables: BlockTables) -> None:
        """Give back everything; the tables are empty and can be used again."""
        ...

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The (source, target) blocks that the next step copies first; each is handed out once."""
        ...

    def take_state_copies(self) -> tuple[tuple[int, int], ...]:
        """The same of states; asked for after `take_copies`."""
        ...

    def peak_blocks(self, num_tokens: int) -> int:
        """The most blocks that a sequence of so many computed tokens needs at once, computed one by one."""
        ...

    def has_room(self, tables: BlockTables, num_tokens: int, others: int) -> bool:
        """Whether the sequence can grow to `num_tokens` and leave each of `others` sequences its next block."""
        ...

    def check(self, holders: Iterable[BlockTables]) -> None:
        """Prove the invariants, given all tables in use; AssertionError says what is broken."""
        ...


def make_pool(
    config: CacheConfig, num_blocks: int, windows: Sequence[int | None], context_length: int, num_states: int = 0
) -> Pool:
    """The pool that a configuration asks for. `windows`: one a cache group, None for a full one; `num_states`: places
    for the states of sequences, in models that keep one."""
    if config.paged_attention:
        return BlockPool(num_blocks, config.block_size, windows, config.prefix_caching, num_states, STATE_INTERVAL)
    return ContiguousPool(num_blocks, config.block_size, len(windows), context_length, num_states)


class BlockPool:
    """The paged cache.

    A block is unused, held (by one or more tables of one group), or cached: held by nobody but sealed, that is found
    by the key (group, hash of its tokens and all before them, and the salt). Of the cached blocks of one sequence the
    deepest goes first.

    States (of models that keep one) have places of their own. A sequence writes its state in place, until the state
    is shared with a fork, or sealed: remembered under the hash of the tokens that it stands for. Then it goes on in a
    copy, or where there is no place for one and nobody shares it, in place after all.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: Sequence[int | None] = (None,),
        prefix_caching: bool = True,
        num_states: int = 0,
        state_interval: int = 1,
    ) -> None:
        """`state_interval`: blocks from one remembered state of a sequence to the next."""
        self._block_size = block_size
        self._windows = tuple(windows)
        self._prefix_caching = prefix_caching
        self._blocks = Places(num_blocks)
        self._states = Places(num_states)
        self._interval = state_interval * block_size
        self._pack = struct.Struct(f"<{block_size}q").pack

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_blocks(self) -> int:
        return self._blocks.count

    @property
    def available(self) -> int:
        """Blocks that `reserve` can hand out: unused and cached."""
        return self._blocks.available

    @property
    def used(self) -> int:
        return self._blocks.count - self._blocks.available

    @property
    def cached(self) -> int:
        return self._blocks.cached

    def new_tables(self, salt: str = "") -> BlockTables:
        return BlockTables(len(self._windows), salt)

    def peak_blocks(self, num_tokens: int) -> int:
        blocks = -(-num_tokens // self._block_size)
        # w neighbouring positions touch at most ceil((w - 1) / size) + 1 blocks
        spans = [blocks if w is None else (w + self._block_size - 2) // self._block_size + 1 for w in self._windows]
        return sum(min(blocks, span) for span in spans)

    def has_room(self, tables: BlockTables, num_tokens: int, others: int) -> bool:
        return self.peak_blocks(num_tokens) - tables.held + others * len(self._windows) <= self.available

    def match(self, tables: BlockTables, tokens: Sequence[int]) -> int:
        """Tokens of the longest computed prefix, in whole blocks, that leaves at least one token to compute.

        A prefix counts only where every group still holds it, and the state after it is remembered; of a window
        group, only the blocks that the next token sees. Changes nothing but the sequence's chain of hashes.
        """
        if not self._prefix_caching:
            return 0
        best = 0
        runs = [0] * len(self._windows)  # held blocks in a row, up to here
        for depth in range(1, (len(tokens) - 1) // self._block_size + 1):
            digest = self._digest(tables, tokens, depth - 1)
            for group in range(len(runs)):
                runs[group] = runs[group] + 1 if self._blocks.find((group, digest)) is not None else 0
            lacking = [g for g, run in enumerate(runs) if run < depth - self._first_seen(g, depth * self._block_size)]
            if not lacking and (not self._states.count or self._states.find(digest) is not None):
                best = depth
            elif any(self._windows[group] is None for group in lacking):
                break
        return best * self._block_size

    def attach(self, tables: BlockTables, tokens: Sequence[int]) -> int:
        require(not tables.held and not tables.num_tokens, "only empty tables can take a prefix")
        num_tokens = self.match(tables, tokens)
        depth = num_tokens // self._block_size
        for group, table in enumerate(tables.groups):
            first = self._first_seen(group, num_tokens)
            table.extend([-1] * first)
            table.extend(self._known(self._blocks, (group, digest)) for digest in tables.hashes[first:depth])
            for block in table[first:]:
                self._blocks.hold(block)
            tables.starts[group] = first
            tables.held += depth - first
        if self._states.count and depth:
            tables.state = self._known(self._states, tables.hashes[depth - 1])
            self._states.hold(tables.state)
        tables.length, tables.num_tokens = depth, num_tokens
        return num_tokens

    @staticmethod
    def _known(places: Places, key: Hashable) -> int:
        place = places.find(key)
        require(place is not None, "a prefix that was found is gone")
        return -1 if place is None else place

    def until_state(self, tables: BlockTables, count: int) -> int:
        last = (tables.num_tokens + count) // self._interval * self._interval
        cut = self._states.count and self._prefix_caching and last > tables.num_tokens
        return last - tables.num_tokens if cut else count

    def reserve(self, tables: BlockTables, count: int) -> bool:
        length = tables.length
        fresh = max(0, -(-(tables.num_tokens + count) // self._block_size) - length)
        written = range(tables.num_tokens // self._block_size, length)
        shared = [(table, i) for table in tables.groups for i in written if self._blocks.shared(table[i])]
        if fresh * len(tables.groups) + len(shared) > self.available or not self._own_state(tables):
            return False
        for table, i in shared:
            table[i] = self._blocks.own_copy(table[i])
        for table in tables.groups:
            table.extend(self._blocks.take() for _ in range(fresh))
        tables.length += fresh
        tables.held += fresh * len(tables.groups)
        return True

    def _own_state(self, tables: BlockTables) -> bool:
        """Let the sequence write its state; False where it needs a place for that and there is none."""
        states, state = self._states, tables.state
        if not states.count or (state >= 0 and not states.shared(state) and not states.sealed(state)):
            return True
        if states.available:
            tables.state = states.take() if state < 0 else states.own_copy(state)
            return True
        if state < 0 or states.shared(state):
            return False
        states.unseal(state)
        return True

    def commit(self, tables: BlockTables, tokens: Sequence[int], count: int) -> None:
        before = tables.num_tokens // self._block_size
        tables.num_tokens += count
        if self._prefix_caching:
            for depth in range(before, tables.num_tokens // self._block_size):
                self._seal(tables, self._digest(tables, tokens, depth), depth)
            if self._states.count and tables.num_tokens % self._interval == 0:
                depth = tables.num_tokens // self._block_size
                self._states.seal(tables.state, self._digest(tables, tokens, depth - 1))
        for group, table in enumerate(tables.groups):
            first = self._first_seen(group, tables.num_tokens)
            for i in range(tables.starts[group], first):
                self._blocks.drop(table[i])
                table[i] = -1
                tables.held -= 1
            tables.starts[group] = max(first, tables.starts[group])

    def fork(self, tables: BlockTables) -> BlockTables:
        child = self.new_tables(tables.salt)
        child.groups = [list(table) for table in tables.groups]
        child.starts = list(tables.starts)
        child.hashes = tables.hashes[: tables.num_tokens // self._block_size]
        child.held, child.length = tables.held, tables.length
        child.num_tokens, child.state = tables.num_tokens, tables.state
        for table, start in zip(child.groups, child.starts, strict=True):
            for block in table[start:]:
                self._blocks.hold(block)
        if child.state >= 0:
            self._states.hold(child.state)
        return child

    def release(self, tables: BlockTables) -> None:
        for depth in range(tables.length - 1, min(tables.starts, default=0) - 1, -1):
            for table in tables.groups:
                if table[depth] >= 0:
                    self._blocks.drop(table[depth])
        if tables.state >= 0:
            self._states.drop(tables.state)
        tables._clear()

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        return self._blocks.take_copies()

    def take_state_copies(self) -> tuple[tuple[int, int], ...]:
        return self._states.take_copies()

    def _first_seen(self, group: int, num_tokens: int) -> int:
        """Index of the first block that the token after `num_tokens` sees; its window includes the token itself."""
        window = self._windows[group]
        return 0 if window is None else max(0, num_tokens - window + 1) // self._block_size

    def _digest(self, tables: BlockTables, tokens: Sequence[int], depth: int) -> bytes:
        """The chained hash of the full block at `depth`: of its tokens, of all before them, and of the salt."""
        chain = tables.hashes
        while len(chain) <= depth:
            at = len(chain) * self._block_size
            parent = chain[-1] if chain else blake2b(tables.salt.encode(), digest_size=_DIGEST, person=b"salt").digest()
            data = parent + self._pack(*tokens[at : at + self._block_size])
            chain.append(blake2b(data, digest_size=_DIGEST, person=b"block").digest())
        return chain[depth]

    def _seal(self, tables: BlockTables, digest: bytes, depth: int) -> None:
        for group, table in enumerate(tables.groups):
            # The same tokens may have been computed twice at once: the first stays, the other is a plain block.
            if table[depth] >= 0:
                self._blocks.seal(table[depth], (group, digest))

    def check(self, holders: Iterable[BlockTables]) -> None:
        blocks: Counter[int] = Counter()
        states: Counter[int] = Counter()
        role: dict[int, tuple[int, int]] = {}
        for tables in holders:
            require(all(len(t) == tables.length for t in tables.groups), "the tables of a sequence differ in length")
            require(tables.held == sum(b >= 0 for t in tables.groups for b in t), "a sequence's count of blocks is off")
            require(tables.num_tokens <= tables.length * self._block_size, "computed tokens lack blocks")
            for group, (table, start) in enumerate(zip(tables.groups, tables.starts, strict=True)):
                require(all(b == -1 for b in table[:start]) and -1 not in table[start:], "a hole in a table")
                require(start <= self._first_seen(group, tables.num_tokens), "a block that is still seen was freed")
                for depth, block in enumerate(table[start:], start):
                    blocks[block] += 1
                    require(role.setdefault(block, (group, depth)) == (group, depth), f"block {block} has two roles")
                    if self._blocks.sealed(block):
                        key = (group, tables.hashes[depth])
                        require(self._blocks.find(key) == block, f"block {block}: another's key")
            self._check_state(tables, states)
        self._blocks.check(blocks)
        self._states.check(states)

    def _check_state(self, tables: BlockTables, states: Counter[int]) -> None:
        wanted = self._states.count and tables.length
        require((tables.state >= 0) == bool(wanted), "a sequence with tokens has no state, or one without has one")
        if wanted:
            states[tables.state] += 1
            if self._states.sealed(tables.state):
                key = tables.hashes[tables.num_tokens // self._block_size - 1]
                require(self._states.find(key) == tables.state, f"state {tables.state}: another's key")


class ContiguousPool:
    """The honest baseline, `paged_attention=False`: a sequence reserves the blocks of a whole context, contiguous in
    each group, and the state of the same number, and shares nothing. It finds no prefixes, frees nothing behind a
    window, and a fork copies."""

    def __init__(
        self, num_blocks: int, block_size: int, num_groups: int, context_length: int, num_states: int = 0
    ) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._num_groups = num_groups
        self._span = -(-context_length // block_size)
        self._region = self._span * num_groups
        limits = [num_blocks // self._region] if num_groups else []
        self._num_regions = min([*limits, *([num_states] if num_states else [])])
        self._has_states = num_states > 0
        self._free = list(range(self._num_regions - 1, -1, -1))
        self._filled: dict[int, int] = {}  # blocks a group that a fork's region receives
        self._copies = Copies()
        self._copied: tuple[tuple[int, int], ...] = ()  # regions, of the copies last taken

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def used(self) -> int:
        return (self._num_regions - len(self._free)) * self._region

    @property
    def cached(self) -> int:
        return 0

    def new_tables(self, salt: str = "") -> BlockTables:
        return BlockTables(self._num_groups, salt)

    def peak_blocks(self, num_tokens: int) -> int:
        return self._region

    def has_room(self, tables: BlockTables, num_tokens: int, others: int) -> bool:
        return bool(tables.length or self._free)

    def attach(self, tables: BlockTables, tokens: Sequence[int]) -> int:
        return 0

    def until_state(self, tables: BlockTables, count: int) -> int:
        return count

    def reserve(self, tables: BlockTables, count: int) -> bool:
        require(tables.num_tokens + count <= self._span * self._block_size, "a sequence outgrew the context")
        if not tables.length:
            if not self._free:
                return False
            tables.state = self._free.pop()
            first = tables.state * self._region
            for group, table in enumerate(tables.groups):
                table.extend(range(first + group * self._span, first + (group + 1) * self._span))
            tables.length, tables.held = self._span, self._region
        return True

    def commit(self, tables: BlockTables, tokens: Sequence[int], count: int) -> None:
        tables.num_tokens += count

    def fork(self, tables: BlockTables) -> BlockTables | None:
        child = self.new_tables(tables.salt)
        if not self.reserve(child, tables.num_tokens):
            return None
        child.num_tokens = tables.num_tokens
        self._copies.add(tables.state, child.state)
        self._filled[child.state] = -(-tables.num_tokens // self._block_size)
        return child

    def release(self, tables: BlockTables) -> None:
        if tables.length:
            self._free.extend(self._copies.free(tables.state))
            tables._clear()

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        pairs, ready = self._copies.take()
        self._free.extend(ready)
        self._copied = tuple(pairs)
        return tuple(
            (source * self._region + group * self._span + i, target * self._region + group * self._span + i)
            for source, target in pairs
            for group in range(self._num_groups)
            for i in range(self._filled[target])
        )

    def take_state_copies(self) -> tuple[tuple[int, int], ...]:
        copied, self._copied = self._copied, ()
        return copied if self._has_states else ()

    def check(self, holders: Iterable[BlockTables]) -> None:
        held = [tables for tables in holders if tables.length]
        for tables in held:
            first = tables.state * self._region
            blocks = [block for table in tables.groups for block in table]
            require(blocks == list(range(first, first + self._region)), "a region is not contiguous")
        regions = [*self._free, *(tables.state for tables in held), *self._copies.parked]
        require(sorted(regions) == list(range(self._num_regions)), "the regions are not partitioned")
