"""Ours beside every installed peer: the same models and tasks, in turn, in one run.

    python -m bench.compare --peer llama.cpp=FOLDER [--peer vllm=PYTHON] [--peer openvino=PYTHON]
                            [--models rand1b-q4_0 ...] [--tasks decode ...] [--threads 1 2] [--rounds 3] [--json FILE]

Each round asks every engine once, in a process of its own; medians, ratios and shares of the roof that was measured in
the same run are printed, the JSON last. Absolute figures move with the machine and the hour: only ratios are results.
Places of peers can also stand in $TRAMONTANE_PEERS, separated by commas. bench/models.py makes the random models,
bench/table.py a table of the JSON. A path to a GGUF is a model too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bench.engines import Engine, Model, Setting, engines, models
from bench.process import Others, ProgramFailed, own_peak_bytes, run
from bench.roof import Roof, build_cpu_clock, measure_roof, wide_peak
from bench.tasks import TASKS, USUAL, Task

FOLDER = Path(os.environ.get("TRAMONTANE_BENCH_MODELS", Path.home() / ".cache" / "tramontane-bench"))
MEMORY = {1: "memory", 2: "memory_batch"}
"""What the peak of a process is called that had one sequence, or several."""

Cell = dict[str, Any]
"""model, threads, task, engine, and rounds with median, or failed with the reason."""


def groups(tasks: Iterable[Task]) -> list[list[Task]]:
    """What shares a process: tasks of one sequence, so that its peak memory says what one user takes; the others."""
    tasks = list(tasks)
    single = [task for task in tasks if task.sequences == 1]
    batch = [task for task in tasks if task.sequences > 1]
    return [group for group in (single, batch) if group]


def measure(model: Model, asked: Sequence[Engine], tasks: Sequence[Task], rounds: int, setting: Setting) -> list[Cell]:
    """Some rounds of every engine on one model. One that fails is not asked again for the same tasks."""
    cells: dict[tuple[str, str], Cell] = {}

    def cell(engine: Engine, task: str) -> Cell:
        empty = {"model": model.name, "threads": setting.threads, "task": task, "engine": engine.name, "rounds": []}
        return cells.setdefault((engine.name, task), empty)

    for turn in range(rounds):
        for group in groups(tasks):
            memory = MEMORY[min(group[0].sequences, 2)]
            for engine in asked:
                if not engine.reads(model) or "failed" in cell(engine, memory):
                    continue
                try:
                    speeds, peak = engine.measure(model, group, setting)
                except ProgramFailed as error:
                    for name in (memory, *(task.name for task in group)):
                        cell(engine, name)["failed"] = str(error)
                    say(f"  round {turn + 1}  {engine.name:<13} failed: {error}")
                    continue
                for name, value in {**speeds, memory: peak}.items():
                    cell(engine, name)["rounds"].append(value)
                figures = "  ".join(f"{name} {value:.1f}" for name, value in speeds.items())
                say(f"  round {turn + 1}  {engine.name:<13} {figures}  {peak / 1e6:.0f} MB")
    for one in cells.values():
        if one["rounds"] and "failed" not in one:
            one["median"] = statistics.median(one["rounds"])
            one["best"] = (min if one["task"] in MEMORY.values() else max)(one["rounds"])
    return list(cells.values())


def add_shares(cells: Iterable[Cell], cost: dict[str, float], roof: Roof) -> None:
    """Shares of what the machine can do: decoding reads the weights once a token, a prompt multiplies with the layers'.

    Both leave attention out. Memory is given as multiples of the file.
    """
    for cell in cells:
        if "median" not in cell:
            continue
        if cell["task"] == "decode":
            cell["roof_share"] = cell["median"] * cost["token_bytes"] / (roof["read_gb_s"] * 1e9)
        elif cell["task"] == "prefill":
            cell["roof_share"] = cell["median"] * cost["layer_ops"] / wide_peak(roof, bool(cost["quantized"]))
        elif cell["task"] in MEMORY.values():
            cell["files"] = cell["median"] / cost["file_bytes"]


def add_ratios(cells: Sequence[Cell]) -> None:
    """Ours over each peer's, of medians and of the best rounds: above 1 is faster, and for memory more."""
    ours = {cell["task"]: cell for cell in cells if cell["engine"] == "tramontane" and "median" in cell}
    for cell in cells:
        if cell["engine"] != "tramontane" and "median" in cell and cell["task"] in ours:
            cell["ours_over_this"] = ours[cell["task"]]["median"] / cell["median"]
            cell["ours_over_this_best"] = ours[cell["task"]]["best"] / cell["best"]


def cost_of(model: Model) -> dict[str, float]:
    """In a process of its own: see `process.run`."""
    cost: dict[str, float] = json.loads(
        run([sys.executable, "-m", "bench.weights", str(model.gguf)], timeout=60).stdout
    )
    return cost


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    names = [
        name for name in ("avx2", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16") if name in flags
    ]
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({', '.join(names)})"


class Candidate(Protocol):
    @property
    def name(self) -> str: ...

    def missing(self) -> str | None:
        """Why it cannot be had here; None: it can."""
        ...


Asked = TypeVar("Asked", bound=Candidate)


def installed(candidates: Iterable[Asked]) -> tuple[list[Asked], dict[str, str]]:
    """Those that can be asked here, and why the others cannot."""
    asked, skipped = [], {}
    for one in candidates:
        if reason := one.missing():
            skipped[one.name] = reason
            say(f"skipped {one.name}: {reason}")
        else:
            asked.append(one)
    return asked, skipped


def compare(args: argparse.Namespace, cpu_clock: Mapping[str, str]) -> dict[str, Any]:
    found = engines(dict(place.split("=", 1) for place in args.peer))
    asked, skipped = installed(engine for engine in found if not args.engines or engine.name in args.engines)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {engine.name: engine.version() for engine in asked},
        "tasks": {name: vars(TASKS[name]) for name in args.tasks},
        "rounds": args.rounds,
        "cpu_time": bool(cpu_clock),
        "least_memory_seen": own_peak_bytes(),
        "skipped": skipped,
        "roof": {},
        "costs": {},
        "others": {},
        "cells": [],
    }
    for threads in args.threads:
        setting = Setting(threads, args.timeout, cpu_clock)
        report["roof"][str(threads)] = roof = measure_roof(threads, cpu_clock)
        say(f"threads {threads}: {roof}")
        for name in args.models:
            model = models(args.folder).get(name) or Model(name, Path(name).expanduser().resolve())
            if not model.gguf.exists():
                report["skipped"][name] = f"no {model.gguf.name}: see bench/models.py"
                say(f"skipped {name}: no {model.gguf.name}")
                continue
            say(f"{name}, {threads} thread{'s' if threads > 1 else ''}")
            others = Others()
            cells = measure(model, asked, [TASKS[task] for task in args.tasks], args.rounds, setting)
            busy = others.share()
            report["others"][f"{name} {threads}"] = busy
            say(f"  others took {busy:.0%} of the processors meanwhile" if busy is not None else "")
            report["costs"][name] = cost = cost_of(model)
            add_shares(cells, cost, roof)
            add_ratios(cells)
            report["cells"] += cells
            for cell in cells:
                say(f"    {summary(cell)}")
            if args.json:  # what there is, should somebody lose patience
                args.json.write_text(json.dumps(report), encoding="utf-8")
    return report


def summary(cell: Cell) -> str:
    """A cell as a line for people."""
    head = f"{cell['task']:<13}{cell['engine']:<13}"
    if "failed" in cell:
        return f"{head}failed"
    memory = cell["task"] in MEMORY.values()
    parts = [f"{cell['median'] / 1e6:10.0f} MB" if memory else f"{cell['median']:10.1f} tokens/s"]
    if "ours_over_this" in cell:
        parts.append(f"ours {cell['ours_over_this']:.2f} × (best {cell['ours_over_this_best']:.2f} ×)")
    if "roof_share" in cell:
        parts.append(f"{cell['roof_share']:.0%} of the roof")
    if "files" in cell:
        parts.append(f"{cell['files']:.2f} × the file")
    return head + "  ".join(parts)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = [place for place in os.environ.get("TRAMONTANE_PEERS", "").split(",") if place]
    parser.add_argument("--peer", action="append", default=places, metavar="NAME=PLACE")
    parser.add_argument("--engines", nargs="+", help="these only")
    parser.add_argument("--models", nargs="+", default=list(models(FOLDER)))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=USUAL)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the time that engines compute: for a busy machine, one thread"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one process may take")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of random models")
    parser.add_argument("--json", type=Path, help="where to write the report too")
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time needs --threads 1")
    with tempfile.TemporaryDirectory() as folder:
        report = compare(args, build_cpu_clock(Path(folder)) if args.cpu_time else {})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
