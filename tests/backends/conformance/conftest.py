"""The subjects as a fixture, and the report at the end: what each backend passed, and refused by capability."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.backends.conformance.subjects import REFUSED, SUBJECTS, Subject


@pytest.fixture(scope="session", params=SUBJECTS)
def _opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    subject: Subject = request.param
    subject.folder = tmp_path_factory.mktemp("conformance")
    yield subject
    if subject.shared is not None:
        subject.shared.close()
        subject.shared = None


@pytest.fixture
def subject(
    _opened: Subject, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Subject:
    record_property("conformance", request.node.callspec.id.split("-")[0])
    return _opened


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line a backend: how many it passed, refused and failed; and what it refused."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    refusals: dict[str, set[str]] = defaultdict(set)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            name = dict(getattr(report, "user_properties", ())).get("conformance")
            if name is None or (outcome == "passed" and report.when != "call"):
                continue
            why = str(report.longrepr[2]) if outcome == "skipped" and isinstance(report.longrepr, tuple) else ""
            refused = REFUSED in why
            counts[str(name)]["refused" if refused else outcome] += 1
            if refused:
                refusals[str(name)].update(why.split(REFUSED)[1].split(", "))
    if not counts:
        return
    terminalreporter.section("conformance of backends")
    terminalreporter.line(f"{'':<28}{'passed':>8}{'refused':>9}{'failed':>8}  refused by capability")
    for name, found in counts.items():
        failed = found["failed"] + found["error"]
        what = ", ".join(sorted(refusals[name])) or "nothing"
        terminalreporter.line(f"{name:<28}{found['passed']:>8}{found['refused']:>9}{failed:>8}  {what}")
