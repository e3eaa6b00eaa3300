"""The blocks of the KV cache as bookkeeping: ids, references, hashes, and which copies a write needs.

Owns which block holds which tokens of which sequence, sharing (prefix cache, forks) with copy-on-write, and eviction.
Must not know: arrays, requests, the order in which sequences run.

One pool of equal-sized blocks serves all cache groups of a model; a sequence has one block table a group. `BlockPool`
is the paged cache (after Kwon et al., 2023, "PagedAttention"); `ContiguousPool` is the baseline it is compared with.
Every operation costs what it changes, never the size of the pool; only `check` looks at everything.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

from tramontane.config import CacheConfig

_DIGEST = 32  # bytes: another request's prefix must not be reachable by a collision


class BlockTables:
    """What one sequence holds of a pool. Read it freely; only a pool changes it."""

    __slots__ = ("groups", "hashes", "held", "num_tokens", "salt", "starts")

    def __init__(self, num_groups: int, salt: str = "") -> None:
        self.salt = salt
        self.groups: list[list[int]] = [[] for _ in range(num_groups)]
        """A table a group, all of one length: block ids in the order of the tokens, -1 where a window has passed."""
        self.starts = [0] * num_groups
        """For each group, the first entry that is not -1."""
        self.held = 0
        """Entries that are blocks, in all groups."""
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
        self.held = self.num_tokens = 0


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

    def reserve(self, tables: BlockTables, count: int) -> bool:
        """Blocks of their own for the next `count` tokens, in all groups, or nothing and False."""
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

    def peak_blocks(self, num_tokens: int) -> int:
        """The most blocks that a sequence of so many computed tokens needs at once, computed one by one."""
        ...

    def has_room(self, tables: BlockTables, num_tokens: int, others: int) -> bool:
        """Whether the sequence can grow to `num_tokens` and leave each of `others` sequences its next block."""
        ...

    def check(self, holders: Iterable[BlockTables]) -> None:
        """Prove the invariants, given all tables in use; AssertionError says what is broken."""
        ...


def make_pool(config: CacheConfig, num_blocks: int, windows: Sequence[int | None], context_length: int) -> Pool:
    """The pool that a configuration asks for. `windows`: one a cache group, None for a full one."""
    if config.paged_attention:
        return BlockPool(num_blocks, config.block_size, windows, config.prefix_caching)
    return ContiguousPool(num_blocks, config.block_size, len(windows), context_length)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class _Copies:
    """Copies promised to the next step, over ids of blocks or regions.

    All copies of a step are made before its first write, in no order: so no id may be source and target, nor target
    twice. A source that is freed stays out of reach until its copies are handed over; a target that is freed takes
    its copy with it.
    """

    def __init__(self) -> None:
        self._source_of: dict[int, int] = {}
        self._holds: Counter[int] = Counter()
        self.parked: set[int] = set()
        """Sources that nobody owns any more."""

    def add(self, source: int, target: int) -> None:
        source = self._source_of.get(source, source)  # not copied yet itself: take it from where it will come
        self._source_of[target] = source
        self._holds[source] += 1

    def free(self, id: int) -> list[int]:
        """`id` has lost its last owner: what may be handed out again."""
        ready = []
        source = self._source_of.pop(id, None)
        if source is not None:
            self._holds[source] -= 1
            if not self._holds[source]:
                del self._holds[source]
                if source in self.parked:
                    self.parked.remove(source)
                    ready.append(source)
        if id in self._holds:
            self.parked.add(id)
        else:
            ready.append(id)
        return ready

    def take(self) -> tuple[list[tuple[int, int]], set[int]]:
        """The (source, target) pairs, and the ids that may be handed out again."""
        pairs = [(source, target) for target, source in self._source_of.items()]
        ready = self.parked
        self._source_of, self._holds, self.parked = {}, Counter(), set()
        return pairs, ready


class BlockPool:
    """The paged cache.

    A block is unused, held (by one or more tables of one group), or cached: held by nobody but sealed, that is found
    by the key (group, hash of its tokens and all before them, and the salt). Unused blocks are handed out before
    cached ones; of the cached, the least recently used goes first, and of one sequence the deepest first.
    """

    def __init__(
        self, num_blocks: int, block_size: int, windows: Sequence[int | None] = (None,), prefix_caching: bool = True
    ) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._windows = tuple(windows)
        self._prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, tuple[int, bytes]] = {}
        self._block_of: dict[tuple[int, bytes], int] = {}
        self._copies = _Copies()
        self._pack = struct.Struct(f"<{block_size}q").pack

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def available(self) -> int:
        """Blocks that `reserve` can hand out: unused and cached."""
        return len(self._unused) + len(self._cached)

    @property
    def used(self) -> int:
        return self._num_blocks - self.available

    @property
    def cached(self) -> int:
        return len(self._cached)

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

        A prefix counts only where every group still holds it; of a window group, only the blocks that the next
        token sees. Changes nothing but the sequence's chain of hashes.
        """
        if not self._prefix_caching:
            return 0
        best = 0
        runs = [0] * len(self._windows)  # held blocks in a row, up to here
        for depth in range(1, (len(tokens) - 1) // self._block_size + 1):
            digest = self._digest(tables, tokens, depth - 1)
            for group in range(len(runs)):
                runs[group] = runs[group] + 1 if (group, digest) in self._block_of else 0
            lacking = [g for g, run in enumerate(runs) if run < depth - self._first_seen(g, depth * self._block_size)]
            if not lacking:
                best = depth
            elif any(self._windows[group] is None for group in lacking):
                break
        return best * self._block_size

    def attach(self, tables: BlockTables, tokens: Sequence[int]) -> int:
        _require(not tables.held and not tables.num_tokens, "only empty tables can take a prefix")
        num_tokens = self.match(tables, tokens)
        depth = num_tokens // self._block_size
        for group, table in enumerate(tables.groups):
            first = self._first_seen(group, num_tokens)
            table.extend([-1] * first)
            table.extend(self._block_of[group, digest] for digest in tables.hashes[first:depth])
            for block in table[first:]:
                self._hold(block)
            tables.starts[group] = first
            tables.held += depth - first
        tables.num_tokens = num_tokens
        return num_tokens

    def reserve(self, tables: BlockTables, count: int) -> bool:
        length = len(tables.groups[0])
        fresh = max(0, -(-(tables.num_tokens + count) // self._block_size) - length)
        written = range(tables.num_tokens // self._block_size, length)
        shared = [(table, i) for table in tables.groups for i in written if self._refs[table[i]] > 1]
        if fresh * len(tables.groups) + len(shared) > self.available:
            return False
        for table, i in shared:
            target = self._take()
            self._copies.add(table[i], target)
            self._refs[table[i]] -= 1
            table[i] = target
        for table in tables.groups:
            table.extend(self._take() for _ in range(fresh))
        tables.held += fresh * len(tables.groups)
        return True

    def commit(self, tables: BlockTables, tokens: Sequence[int], count: int) -> None:
        before = tables.num_tokens // self._block_size
        tables.num_tokens += count
        if self._prefix_caching:
            for depth in range(before, tables.num_tokens // self._block_size):
                self._seal(tables, self._digest(tables, tokens, depth), depth)
        for group, table in enumerate(tables.groups):
            first = self._first_seen(group, tables.num_tokens)
            for i in range(tables.starts[group], first):
                self._drop(table[i])
                table[i] = -1
                tables.held -= 1
            tables.starts[group] = max(first, tables.starts[group])

    def fork(self, tables: BlockTables) -> BlockTables:
        child = self.new_tables(tables.salt)
        child.groups = [list(table) for table in tables.groups]
        child.starts = list(tables.starts)
        child.hashes = tables.hashes[: tables.num_tokens // self._block_size]
        child.held = tables.held
        child.num_tokens = tables.num_tokens
        for table, start in zip(child.groups, child.starts, strict=True):
            for block in table[start:]:
                self._hold(block)
        return child

    def release(self, tables: BlockTables) -> None:
        for depth in range(len(tables.groups[0]) - 1, min(tables.starts) - 1, -1):
            for table in tables.groups:
                if table[depth] >= 0:
                    self._drop(table[depth])
        tables._clear()

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        pairs, ready = self._copies.take()
        for block in ready:
            self._give(block)
        return tuple(pairs)

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
            if table[depth] >= 0 and (group, digest) not in self._block_of:
                self._block_of[group, digest] = table[depth]
                self._key_of[table[depth]] = (group, digest)

    def _hold(self, block: int) -> None:
        if not self._refs[block]:
            del self._cached[block]
        self._refs[block] += 1

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._refs[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if not self._refs[block]:
            for ready in self._copies.free(block):
                self._give(ready)

    def _give(self, block: int) -> None:
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._unused.append(block)

    def check(self, holders: Iterable[BlockTables]) -> None:
        references: Counter[int] = Counter()
        role: dict[int, tuple[int, int]] = {}
        for tables in holders:
            _require(len({len(table) for table in tables.groups}) == 1, "the tables of a sequence differ in length")
            _require(
                tables.held == sum(b >= 0 for t in tables.groups for b in t), "a sequence's count of blocks is off"
            )
            _require(tables.num_tokens <= len(tables.groups[0]) * self._block_size, "computed tokens lack blocks")
            for group, (table, start) in enumerate(zip(tables.groups, tables.starts, strict=True)):
                _require(all(b == -1 for b in table[:start]) and -1 not in table[start:], "a hole in a table")
                _require(start <= self._first_seen(group, tables.num_tokens), "a block that is still seen was freed")
                for depth, block in enumerate(table[start:], start):
                    references[block] += 1
                    _require(role.setdefault(block, (group, depth)) == (group, depth), f"block {block} has two roles")
                    if block in self._key_of:
                        _require(self._key_of[block] == (group, tables.hashes[depth]), f"block {block}: another's key")
        _require(all(refs == references[b] for b, refs in enumerate(self._refs)), "references do not add up")
        parts = [set(self._unused), set(self._cached), set(references), self._copies.parked]
        _require(len(self._unused) == len(parts[0]), "an unused block is listed twice")
        _require(sum(map(len, parts)) == len(set().union(*parts)) == self._num_blocks, "the pool is not partitioned")
        _require({b: k for k, b in self._block_of.items()} == self._key_of, "hashes and blocks do not match")
        _require(len(self._block_of) == len(self._key_of), "two hashes for one block")
        _require(
            parts[1] <= set(self._key_of) and not parts[0] & set(self._key_of), "cached must be sealed, unused not"
        )


class ContiguousPool:
    """The honest baseline, `paged_attention=False`: a sequence reserves the blocks of a whole context, contiguous in
    each group, and shares nothing. It finds no prefixes, frees nothing behind a window, and a fork copies."""

    def __init__(self, num_blocks: int, block_size: int, num_groups: int, context_length: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._num_groups = num_groups
        self._span = -(-context_length // block_size)
        self._region = self._span * num_groups
        self._num_regions = num_blocks // self._region
        self._free = list(range(self._num_regions - 1, -1, -1))
        self._filled: dict[int, int] = {}  # blocks a group that a fork's region receives
        self._copies = _Copies()

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
        return bool(tables.held or self._free)

    def attach(self, tables: BlockTables, tokens: Sequence[int]) -> int:
        return 0

    def reserve(self, tables: BlockTables, count: int) -> bool:
        _require(tables.num_tokens + count <= self._span * self._block_size, "a sequence outgrew the context")
        if not tables.held:
            if not self._free:
                return False
            first = self._free.pop() * self._region
            for group, table in enumerate(tables.groups):
                table.extend(range(first + group * self._span, first + (group + 1) * self._span))
            tables.held = self._region
        return True

    def commit(self, tables: BlockTables, tokens: Sequence[int], count: int) -> None:
        tables.num_tokens += count

    def fork(self, tables: BlockTables) -> BlockTables | None:
        child = self.new_tables(tables.salt)
        if not self.reserve(child, tables.num_tokens):
            return None
        child.num_tokens = tables.num_tokens
        target = self._region_of(child)
        self._copies.add(self._region_of(tables), target)
        self._filled[target] = -(-tables.num_tokens // self._block_size)
        return child

    def release(self, tables: BlockTables) -> None:
        if tables.held:
            self._free.extend(self._copies.free(self._region_of(tables)))
            tables._clear()

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        pairs, ready = self._copies.take()
        self._free.extend(ready)
        return tuple(
            (source * self._region + group * self._span + i, target * self._region + group * self._span + i)
            for source, target in pairs
            for group in range(self._num_groups)
            for i in range(self._filled[target])
        )

    def _region_of(self, tables: BlockTables) -> int:
        return tables.groups[0][0] // self._region

    def check(self, holders: Iterable[BlockTables]) -> None:
        held = [tables for tables in holders if tables.held]
        for tables in held:
            first = tables.groups[0][0]
            _require(first % self._region == 0, "a region is out of line")
            blocks = [block for table in tables.groups for block in table]
            _require(blocks == list(range(first, first + self._region)), "a region is not contiguous")
        regions = [*self._free, *map(self._region_of, held), *self._copies.parked]
        _require(sorted(regions) == list(range(self._num_regions)), "the regions are not partitioned")
