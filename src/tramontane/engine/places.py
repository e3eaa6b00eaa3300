"""Places: numbered places of one size in the cache's memory, as bookkeeping.

Owns who holds a place, under which key what it holds is found again, eviction, and which copies a step makes first.
Must not know: arrays, tokens, what a place holds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class Copies:
    """Copies promised to the next step, over ids of places or regions.

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


class Places:
    """A place is unused, held (by one or more), or cached: held by nobody but sealed, that is found by a key.

    Unused places are handed out before cached ones; of the cached, the least recently used goes first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._refs = [0] * count
        self._unused = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, Hashable] = {}
        self._place_of: dict[Hashable, int] = {}
        self._copies = Copies()

    @property
    def available(self) -> int:
        """Places that `take` can hand out: unused and cached."""
        return len(self._unused) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    def find(self, key: Hashable) -> int | None:
        """The place that was sealed under `key`."""
        return self._place_of.get(key)

    def shared(self, place: int) -> bool:
        return self._refs[place] > 1

    def sealed(self, place: int) -> bool:
        return place in self._key_of

    def take(self) -> int:
        """A place of one's own, with anything in it."""
        if self._unused:
            place = self._unused.pop()
        else:
            place, _ = self._cached.popitem(last=False)
            self.unseal(place)
        self._refs[place] = 1
        return place

    def hold(self, place: int) -> None:
        """One more holder of a place that is held or found."""
        if not self._refs[place]:
            if place in self._cached:
                del self._cached[place]
            else:
                self._copies.parked.remove(place)
        self._refs[place] += 1

    def drop(self, place: int) -> None:
        """One holder less."""
        self._refs[place] -= 1
        if not self._refs[place]:
            for ready in self._copies.free(place):
                self._give(ready)

    def own_copy(self, place: int) -> int:
        """A place of one's own that the next step fills with what `place` holds, instead of holding that."""
        target = self.take()
        self._copies.add(place, target)
        self.drop(place)
        return target

    def seal(self, place: int, key: Hashable) -> None:
        """What `place` holds is found by `key` from now on; where another was first, it is a plain place."""
        if key not in self._place_of:
            self._place_of[key] = place
            self._key_of[place] = key

    def unseal(self, place: int) -> None:
        key = self._key_of.pop(place, None)
        if key is not None:
            del self._place_of[key]

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The (source, target) pairs that the next step copies first; each is handed out once."""
        pairs, ready = self._copies.take()
        for place in ready:
            self._give(place)
        return tuple(pairs)

    def _give(self, place: int) -> None:
        if place in self._key_of:
            self._cached[place] = None
        else:
            self._unused.append(place)

    def check(self, references: Counter[int]) -> None:
        """Prove the invariants, given how often each place is held; AssertionError says what is broken."""
        require(all(refs == references[place] for place, refs in enumerate(self._refs)), "references do not add up")
        parts = [set(self._unused), set(self._cached), set(references), self._copies.parked]
        require(len(self._unused) == len(parts[0]), "an unused place is listed twice")
        require(sum(map(len, parts)) == len(set().union(*parts)) == self.count, "the places are not partitioned")
        require({place: key for key, place in self._place_of.items()} == self._key_of, "keys and places do not match")
        require(len(self._place_of) == len(self._key_of), "two keys for one place")
        require(parts[1] <= set(self._key_of) and not parts[0] & set(self._key_of), "cached must be sealed, unused not")
