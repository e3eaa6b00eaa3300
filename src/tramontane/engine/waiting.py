"""Whose turn it is: the sequences that wait, by priority, fairly between tenants, then by age.

Owns the order of admission and the count of what each tenant has had. Must not know: arrays, blocks, how sequences run.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator

from tramontane.engine.sequence import Sequence


class Shares:
    """How many tokens have been computed for each tenant: virtual time, a clock a tenant (after Sheng et al., 2024,
    "Fairness in Serving Large Language Models").

    Absence earns nothing: who comes back starts no further behind than the least served of those who are there.
    """

    def __init__(self) -> None:
        self._had: dict[str, int] = {}
        self._present: Counter[str] = Counter()

    def enter(self, tenant: str) -> None:
        """The tenant has one more open request."""
        if not self._present:
            self._had.clear()  # nobody is there to be fair to
        if tenant not in self._present:
            least = min((self._had[other] for other in self._present), default=0)
            self._had = {t: had for t, had in self._had.items() if had > least or t in self._present}
            self._had.setdefault(tenant, least)
        self._present[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One of its requests has ended."""
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        self._had[tenant] += tokens

    def had(self, tenant: str) -> int:
        return self._had[tenant]


class WaitingLine:
    """The sequences that wait. First is one of the lowest priority; of those, of the tenant that has had least; of
    that one's, the oldest. Costs grow with the tenants that wait, not with their requests."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._lines: dict[int, dict[str, deque[Sequence]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """In no order that means anything."""
        return (sequence for tenants in self._lines.values() for line in tenants.values() for sequence in line)

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        line = self._lines.setdefault(request.priority, {}).setdefault(request.tenant, deque())
        insort(line, sequence, key=lambda s: s.age)
        self._count += 1

    def first(self) -> Sequence | None:
        if not self._lines:
            return None
        heads = [line[0] for line in self._lines[min(self._lines)].values()]
        return min(heads, key=lambda s: (self._shares.had(s.request.tenant), s.age))

    def remove(self, sequence: Sequence) -> None:
        request = sequence.request
        tenants = self._lines[request.priority]
        line = tenants[request.tenant]
        line.remove(sequence)
        self._count -= 1
        if not line:
            del tenants[request.tenant]
        if not tenants:
            del self._lines[request.priority]
