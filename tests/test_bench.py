"""The pure parts of bench/: how a peer's output is read, what is made of the figures, what a process held."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

pytest.importorskip("bench", reason="this copy of the sources has no benchmarks")
pytest.importorskip("resource", reason="processes are weighed on POSIX systems only")

from bench import compare, table
from bench.engines import (
    LlamaCpp,
    Model,
    PythonEngine,
    Setting,
    engines,
    parse_llama_batched_bench,
    parse_llama_bench,
    parse_llama_version,
)
from bench.process import Others, ProgramFailed, run
from bench.roof import wide_peak
from bench.tasks import TASKS, Order, Task

SETTING = Setting(threads=1, timeout=60, cpu_clock={})
MODEL = Model("m", Path("m.gguf"))
ROOF = {"threads": 1, "read_gb_s": 20.0, "fp32_tflops": 0.1, "bf16_tflops": 0.2, "int8_tops": 0.4}


def test_speeds_of_tasks() -> None:
    assert Task("prefill", 1, 512, 1).speed(2.0, 2.5) == 256
    assert Task("decode", 1, 128, 65).speed(1.0, 5.0) == 16
    assert Task("batch16", 16, 32, 32).speed(0.0, 4.0) == 128


def test_prompts_share_nothing_and_repeat() -> None:
    task = TASKS["batch16"]
    prompts = task.prompts(0)
    assert (len(prompts), {len(p) for p in prompts}) == (16, {32})
    assert len({tuple(p[:4]) for p in [*prompts, *task.prompts(1)]}) == 32
    assert task.prompts(0) == prompts


def test_orders_survive_the_way_to_another_process() -> None:
    order = Order("a b.gguf", 2, [TASKS["decode"], TASKS["batch64"]])
    assert Order.load(order.dump()) == order


def test_llama_cpp_output() -> None:
    test = {"n_prompt": 512, "n_gen": 0, "avg_ts": 113.2, "samples_ts": [113.2]}
    assert parse_llama_bench(json.dumps([test]), TASKS["prefill"]) == 113.2
    row = {"pp": 32, "tg": 32, "pl": 16, "t_pp": 1.5, "t_tg": 2.5, "speed_tg": 204.8}
    assert parse_llama_batched_bench(f"loading\n\n{json.dumps(row)}\n", TASKS["batch16"]) == 16 * 32 / 4.0
    assert parse_llama_version("version: 0.5.0-dev (build 1)\nbuilt with GNU 12\n") == "0.5.0-dev (build 1)"


def test_peers_that_are_not_there_say_why(tmp_path: Path) -> None:
    assert "--peer llama.cpp=FOLDER" in (LlamaCpp(None).missing() or "")
    (tmp_path / "llama-bench").touch()
    assert LlamaCpp(tmp_path).missing() == f"no llama-batched-bench in {tmp_path}"
    assert "not installed" in (PythonEngine("x", "x", "no-such-package", sys.executable).missing() or "")
    assert "not installed" in (PythonEngine("x", "x", "x", str(tmp_path / "python")).missing() or "")
    with pytest.raises(SystemExit, match="no such peer: vlm"):
        engines({"vlm": "python"})


def test_what_an_engine_reads_of_a_model(tmp_path: Path) -> None:
    both = Model("m", tmp_path / "m.gguf", tmp_path / "m")
    reading = {engine.name: (engine.reads(MODEL), engine.reads(both)) for engine in engines({})}
    assert reading["vllm"] == (False, True)
    assert {reading[name] for name in ("tramontane", "mistral.rs", "transformers")} == {(True, True)}
    either = next(engine for engine in engines({}) if engine.name == "transformers")
    assert isinstance(either, PythonEngine)
    assert (either._source(MODEL), either._source(both)) == (MODEL.gguf, both.folder)


def test_processes_are_read_and_weighed() -> None:
    others = Others()
    small = run([sys.executable, "-c", "print('ok')"], timeout=60)
    big = run([sys.executable, "-c", "x = b'1' * 200_000_000; print(len(x))"], timeout=60)
    assert (small.stdout, big.stdout) == ("ok\n", "200000000\n")
    assert big.peak_bytes >= 200_000_000
    with pytest.raises(ProgramFailed, match=r"exit status 1: .*ValueError: so it is"):
        run([sys.executable, "-c", "raise ValueError('so it is')"], timeout=60)
    with pytest.raises(ProgramFailed, match="it took more than 0 s"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    share = others.share()
    assert share is None or 0 <= share <= 1


def test_roofs_of_many_rows() -> None:
    assert wide_peak(ROOF, quantized=True) == 0.4e12
    assert wide_peak(ROOF, quantized=False) == 0.2e12
    assert wide_peak({"fp32_tflops": 0.1}, quantized=True) == 0.1e12


class Scripted:
    """An engine with figures for each round; it fails where there are none left."""

    def __init__(self, name: str, rounds: Sequence[Mapping[str, float]], peak: int) -> None:
        self.name, self._rounds, self._peak = name, list(rounds), peak

    def missing(self) -> None: ...

    def version(self) -> str:
        return "1"

    def reads(self, model: Model) -> bool:
        return True

    def measure(self, model: Model, tasks: Sequence[Task], setting: Setting) -> tuple[Mapping[str, float], int]:
        if not self._rounds:
            raise ProgramFailed("exit status 3: out of luck")
        figures = self._rounds.pop(0)
        return {task.name: figures[task.name] for task in tasks}, self._peak


def report() -> dict[str, object]:
    ours = Scripted("tramontane", [{"prefill": 100, "decode": d} for d in (10, 30, 20)], 50_000_000)
    peer = Scripted("peer", [{"prefill": 50, "decode": d} for d in (5, 10, 25)], 100_000_000)
    broken = Scripted("broken", [], 0)
    cells = compare.measure(MODEL, [ours, peer, broken], [TASKS["prefill"], TASKS["decode"]], 3, SETTING)
    cost = {"token_bytes": 5e8, "layer_ops": 2e9, "quantized": True, "file_bytes": 4e7}
    compare.add_shares(cells, cost, ROOF)
    compare.add_ratios(cells)
    return {
        "date": "2026-11-28T12:00:00+00:00",
        "processor": "a processor",
        "cores": 2,
        "versions": {"tramontane": "1", "peer": "2", "broken": "3"},
        "tasks": {name: vars(TASKS[name]) for name in ("prefill", "decode")},
        "rounds": 3,
        "cpu_time": False,
        "skipped": {"vllm": "it is not installed"},
        "roof": {"1": ROOF},
        "others": {"m 1": 0.25},
        "cells": cells,
    }


def test_medians_ratios_and_shares() -> None:
    cells = {(c["engine"], c["task"]): c for c in report()["cells"]}  # type: ignore[attr-defined]
    ours, theirs = cells["tramontane", "decode"], cells["peer", "decode"]
    assert (ours["median"], ours["best"], ours["roof_share"]) == (20, 30, 0.5)
    assert (theirs["ours_over_this"], theirs["ours_over_this_best"]) == (2.0, 30 / 25)
    assert cells["tramontane", "prefill"]["roof_share"] == 0.5
    assert cells["tramontane", "memory"]["files"] == 1.25
    assert cells["peer", "memory"]["ours_over_this"] == 0.5
    assert cells["broken", "decode"]["failed"] == "exit status 3: out of luck"
    assert "median" not in cells["broken", "decode"]


def test_the_table() -> None:
    text = table.table(report())
    assert "| model | threads | task | tramontane | share of the roof | peer | broken |" in text
    assert "| m | 1 | decode, 1 sequence | 20.0 | 50% | 10.0 (2.00 ×) | failed |" in text
    assert "| m | 1 | prefill 512 | 100 | 50% | 50.0 (2.00 ×) | failed |" in text
    assert "| m | 1 | peak memory, 1 sequence, MB | 50.0 = 1.25 files |  | 100 = 2.50 files (0.50 ×) | failed |" in text
    assert "- broken on m failed: exit status 3: out of luck" in text
    assert "- vllm was left out: it is not installed" in text
    assert "took 25% to 25% of the processors" in text


def test_tasks_of_one_sequence_have_a_process_of_their_own() -> None:
    single, batch = compare.groups(TASKS.values())
    assert {task.sequences for task in single} == {1}
    assert [task.name for task in batch] == ["batch16", "batch64"]
