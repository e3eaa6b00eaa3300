"""Threads that stay on their processors, as the kernel tells of them, and those that must not."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.engine import checkpoints
from tests.kernels.modules import make
from tramontane import LLM, InvalidRequest, platform
from tramontane.backends import shared
from tramontane.kernels.cpu import CpuOps

if sys.platform != "linux":
    pytest.skip("threads are pinned on Linux only", allow_module_level=True)

USABLE = os.sched_getaffinity(0)
THREADS = len(platform.processors())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make("cpu")  # skips where it is not there
    return checkpoints.write(tmp_path_factory.mktemp("tiny") / "model")


def tasks() -> dict[int, set[int]]:
    """The processors that each thread of this process may use, by its id."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        listed = re.search(r"Cpus_allowed_list:\s*(\S+)", (task / "status").read_text())
        assert listed is not None
        spans = [span.split("-") for span in listed[1].split(",")]
        found[int(task.name)] = {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}
    return found


def work(ops: CpuOps) -> None:
    """More of it than a thread does alone."""
    x, weight = (ops.from_host(np.ones(shape, np.float32)) for shape in ((64, 512), (2048, 512)))
    ops.matmul(ops.empty((64, 2048), "float32"), x, weight)


def test_workers_have_a_processor_each_and_the_caller_its_own_affinity() -> None:
    make("cpu")
    before = tasks()
    ops = CpuOps(threads=THREADS, processors=platform.processors())
    work(ops)
    started = [allowed for task, allowed in tasks().items() if task not in before]
    assert sorted(map(min, started)) == sorted(platform.processors()[1:])
    assert all(len(allowed) == 1 for allowed in started)
    assert os.sched_getaffinity(0) == USABLE


@pytest.mark.skipif(THREADS < 2, reason="there is one processor")
def test_a_forked_child_pins_workers_of_its_own() -> None:
    make("cpu")
    ops = CpuOps(threads=2, processors=platform.processors())
    work(ops)
    child = os.fork()
    if child == 0:
        work(ops)
        os._exit(0 if sorted(map(len, tasks().values())) == sorted([1, len(USABLE)]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_engine_s_thread_is_pinned_while_it_is_the_engine_s(folder: Path) -> None:
    seen: list[set[int]] = []

    def processor(prompt_ids: Sequence[int], output_ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
        heir = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        heir.start()
        heir.join()
        return logits

    before = set(threading.enumerate())
    with LLM(folder, threads=1, num_blocks=64, pin_threads=True) as llm:
        llm.generate("a", max_tokens=2, ignore_eos=True, logits_processors=(processor,))
        allowed = tasks()
        for thread in threading.enumerate():
            engine = thread not in before and thread.name != "tramontane-loop"
            expected = {platform.processors()[0]} if engine else USABLE
            assert allowed[thread.native_id or 0] == expected, thread.name
    assert seen == [USABLE, USABLE]
    assert all(allowed == USABLE for allowed in tasks().values() if len(allowed) > 1)
    with LLM(folder, threads=1, num_blocks=64) as llm:
        llm.generate("a", max_tokens=1)
        assert all(tasks()[thread.native_id or 0] == USABLE for thread in threading.enumerate())


def none() -> list[int]:
    return []


@pytest.mark.parametrize(
    ("options", "processors", "told"),
    [
        ({"threads": THREADS + 1}, platform.processors, f"threads={THREADS}"),
        ({"threads": 1}, none, "binds no threads"),
        ({"threads": 1, "kernels": "reference"}, platform.processors, "only the compiled CPU kernels"),
        ({"pin_threads": 1}, platform.processors, "bool"),
    ],
)
def test_what_cannot_be_pinned_is_refused(
    folder: Path,
    options: dict[str, int | str],
    processors: Callable[[], list[int]],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared.platform, "processors", processors)
    with pytest.raises(InvalidRequest, match=told) as refused:
        LLM(folder, **{"pin_threads": True, **options})
    assert refused.value.field == "pin_threads"
