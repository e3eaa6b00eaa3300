"""Opens hostile models, one after another, in a process of two gibibytes: `python -m tests.hostile.worker A B STEP`.

Says "begin N" and "end N OUTCOME" of each, so that whoever started it knows which case killed it. The system kills it
when a case takes more processor time than any may.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tests.hostile.cases import make, write
from tests.hostile.opening import open_model, target

LIMIT = 2 << 30
CPU_SECONDS = 20
"""A refused case takes milliseconds; a template may spend its million steps, twice."""
PEAK = 1 << 30
"""Bytes that no case may have resident."""


def _reset_peak() -> bool:
    """Forget the most memory held so far; False where the system does not let us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def outcome(number: int, folder: Path) -> str:
    """Says "sound", "refused", or what went wrong."""
    measured = _reset_peak()
    try:
        case = make(number)
        write(case, folder)
        refusals = open_model(target(folder, case))
    except BaseException:
        return "failed " + " | ".join(traceback.format_exc(limit=-6).splitlines())
    if measured and _peak() > PEAK:
        return f"failed {_peak() >> 20} MiB were resident"
    return f"refused {' & '.join(refusals)!r:.300}" if refusals else "sound"


def main(first: int, end: int, step: int) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, end, step):
        print("begin", number, flush=True)
        # The kernel's signal comes within compiled code too, where Python's handlers do not run.
        spent = int(time.process_time()) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (spent, resource.RLIM_INFINITY))
        folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        said = outcome(number, folder)
        shutil.rmtree(folder)
        print("end", number, said, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
