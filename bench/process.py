"""Programs in processes of their own: what they print and the most memory that they held."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


class ProgramFailed(Exception):
    """A program that ended badly or took too long; the message has the last lines that it wrote."""


@dataclass(frozen=True)
class Outcome:
    stdout: str
    peak_bytes: int


def run(command: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run a program to its end; raises ProgramFailed. Runs at the top of this repository.

    A new process counts the memory of the one that started it as its own peak, so this one must stay small: nothing
    that is imported here may import numpy.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env={**os.environ, **(environment or {})})
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        late = threading.Timer(timeout, expire)
        late.start()
        _, status, usage = os.wait4(process.pid, 0)
        late.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        stdout, stderr = out.read(), err.read()
    if expired.is_set():
        raise ProgramFailed(f"it took more than {timeout:.0f} s")
    if process.returncode:
        end = " | ".join((stderr or stdout).strip().splitlines()[-3:])
        raise ProgramFailed(f"exit status {process.returncode}: {end[-500:]}")
    return Outcome(stdout, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


class Others:
    """What other programs of the machine take of its processors while ours run, as far as the system tells."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def share(self) -> float | None:
        """From 0 to 1, of all processors since this was made; None: it cannot be told."""
        now = self._seconds()
        if now is None or self._start is None:
            return None
        busy, idle, ours = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy - ours) / (busy + idle) if busy + idle else None

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Busy and idle seconds of all processors, and those of ended programs that we started."""
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        idle = ticks[3] + ticks[4]
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(ticks) - idle, idle, children.ru_utime + children.ru_stime


def own_peak_bytes() -> int:
    """The most memory that this process held: what every program started from it seems to hold at least."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
