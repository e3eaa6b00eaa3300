"""Our server beside others, and beside our own engine without one: the same prompts, as streams, in one run.

    python -m bench.server [--peer llama.cpp=FOLDER] [--peer vllm=PYTHON] [--models smollm2-q4_1 rand1b-q4_0]
                           [--streams 1 16 64] [--prompt 32] [--generate 64] [--threads 2] [--rounds 3] [--json FILE]

Each server runs in a process of its own, started anew for every number of streams; its client in another
(bench/streams.py), whose processor time is told apart. Where there are several streams, the same prompts are also given
to `LLM.generate` all at once. Absolute figures move with the machine and the hour: only ratios of one run are results.
Prints a table (`python -m bench.server --table REPORT.json` prints it again), the JSON last. Places of peers can also
stand in $TRAMONTANE_PEERS, separated by commas. A path to a GGUF is a model too; servers that read no GGUF take the
random models of bench/models.py, with the tokenizer of a GGUF beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compare import FOLDER, installed, processor, say
from bench.engines import Model, PythonEngine, Setting, models
from bench.process import Others, ProgramFailed, run
from bench.servers import OURS, PEERS, Server, servers
from bench.serving import free_port, running
from bench.streams import StreamOrder
from bench.tasks import Task

OFFLINE = "offline"
Cell = dict[str, Any]
"""model, streams, engine, rounds (figures of bench.streams; of `offline` throughput alone) and the medians of each
figure; or failed with the reason."""


async def ask(server: Server, model: Model, task: Task, setting: Setting) -> dict[str, float]:
    """One round of one server. Raises ProgramFailed."""
    port = free_port()
    command, environment = server.command(model, port, task, setting.threads), server.environment(setting.threads)
    async with running(command, port, ready=server.ready, timeout=setting.timeout, environment=environment) as started:
        order = StreamOrder(started.url, started.process.pid, task, dict(server.body))
        client = [sys.executable, "-m", "bench.streams", order.dump()]
        outcome = await asyncio.to_thread(run, client, timeout=setting.timeout)
    figures: dict[str, float] = json.loads(outcome.stdout)
    return figures


def offline(model: Model, task: Task, setting: Setting) -> dict[str, float]:
    """The same prompts by the library. Raises ProgramFailed."""
    engine = PythonEngine(OURS, "tramontane", "tramontane", sys.executable)
    speeds, _ = engine.measure(model, [task], setting)
    return {"throughput": speeds[task.name]}


def measure(model: Model, asked: Sequence[Server], task: Task, rounds: int, setting: Setting) -> list[Cell]:
    """Some rounds of everyone on one model. One that fails is not asked again."""
    ways = {server.name: server for server in asked if server.reads(model)}
    names = [*ways, *([OFFLINE] if task.sequences > 1 else ())]
    cells = {name: Cell(model=model.name, streams=task.sequences, engine=name, rounds=[]) for name in names}
    for turn in range(rounds):
        for name, cell in cells.items():
            if "failed" in cell:
                continue
            try:
                server = ways.get(name)
                one = asyncio.run(ask(server, model, task, setting)) if server else offline(model, task, setting)
            except ProgramFailed as error:
                cell["failed"] = str(error)
                say(f"  round {turn + 1}  {name:<11} failed: {error}")
                continue
            cell["rounds"].append(one)
            say(f"  round {turn + 1}  {name:<11} " + "  ".join(f"{key} {value:.4g}" for key, value in one.items()))
    for cell in cells.values():
        if cell["rounds"] and "failed" not in cell:
            cell |= {key: statistics.median(one[key] for one in cell["rounds"]) for key in cell["rounds"][0]}
    return [*cells.values()]


def add_ratios(cells: Iterable[Cell], cores: int) -> None:
    """Ours over each other's throughput; ours over the library's, and that with the client's processor time taken off
    the time that passed, as if it had come from cores of its own."""
    cells = list(cells)
    ours = {(cell["model"], cell["streams"]): cell for cell in cells if cell["engine"] == OURS and "throughput" in cell}
    for cell in cells:
        own = ours.get((cell["model"], cell["streams"]))
        if own is None or cell is own or "throughput" not in cell:
            continue
        cell["ours_over_this"] = own["throughput"] / cell["throughput"]
        if cell["engine"] == OFFLINE:
            own["of_offline"] = cell["ours_over_this"]
            own["of_offline_without_client"] = own["of_offline"] / (1 - own["client_cpu"] / cores / own["seconds"])


def table(report: Mapping[str, Any]) -> str:
    """What was measured on what, a row a model, number of streams and engine, and why others are missing."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    prompt, generate, threads, rounds = (report[key] for key in ("prompt", "generate", "threads", "rounds"))
    lines = [
        f"{report['date'][:10]}, {report['cores']} cores of {report['processor']}; {versions}.",
        f"Streams of {prompt} tokens' prompts and {generate} tokens' answers, all at once, {threads} threads; medians "
        f"of {rounds} round{'s' if rounds > 1 else ''}.",
    ]
    if shares := [share for share in report["others"].values() if share is not None]:
        lines.append(f"Other programs took {min(shares):.0%} to {max(shares):.0%} of the processors meanwhile.")
    lines += ["", _row(COLUMNS), _row("---" for _ in COLUMNS)]
    lines += [_row(_texts(cell)) for cell in report["cells"]]
    lines += ["", *(f"- {c['engine']} on {c['model']} failed: {c['failed']}" for c in report["cells"] if "failed" in c)]
    lines += [f"- {name} was left out: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines).rstrip() + "\n"


COLUMNS = (
    "model", "streams", "engine", "tokens/s", "ours over this", "first token, ms (95 %)",
    "between tokens, ms (95 %)", "client's processor time",
)  # fmt: skip


def _texts(cell: Cell) -> Iterable[str]:
    yield from (cell["model"], str(cell["streams"]), cell["engine"])
    if "throughput" not in cell:
        yield from ("failed", "", "", "", "")
        return
    yield f"{cell['throughput']:.1f}"
    ratio = f"{cell['ours_over_this']:.2f} ×" if "ours_over_this" in cell else ""
    if "of_offline" in cell:
        ratio = f"{cell['of_offline']:.0%} of offline, {cell['of_offline_without_client']:.0%} without the client"
    yield ratio
    for name in ("ttft", "itl"):
        yield f"{cell[name] * 1e3:.1f} ({cell[f'{name}_p95'] * 1e3:.1f})" if name in cell else ""
    yield f"{cell['client_cpu']:.2f} of {cell['seconds']:.2f} s" if "client_cpu" in cell else ""


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def compare(args: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    asked, skipped = installed(servers(dict(place.split("=", 1) for place in args.peer), tokenizer))
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {server.name: server.version() for server in asked},
        "prompt": args.prompt,
        "generate": args.generate,
        "threads": args.threads,
        "rounds": args.rounds,
        "skipped": skipped,
        "others": {},
        "cells": [],
    }
    setting = Setting(args.threads, args.timeout, {})
    for name in args.models:
        model = models(args.folder).get(name) or Model(name, Path(name).expanduser().resolve())
        if not model.gguf.exists():
            report["skipped"][name] = f"no {model.gguf.name}: see bench/models.py"
            continue
        if any(server.name == "vllm" and server.reads(model) for server in asked):
            write_tokenizer(model.gguf, tokenizer)
        for streams in args.streams:
            say(f"{name}, {streams} stream{'s' if streams > 1 else ''}")
            others = Others()
            task = Task(f"streams{streams}", streams, args.prompt, args.generate)
            report["cells"] += measure(model, asked, task, args.rounds, setting)
            report["others"][f"{name} {streams}"] = others.share()
            add_ratios(report["cells"], os.cpu_count() or 1)
            if args.json:  # what there is, should somebody lose patience
                args.json.write_text(json.dumps(report), encoding="utf-8")
    return report


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """In a process of its own: see `process.run`."""
    command = [sys.executable, "-m", "tramontane", "inspect", "--model", str(gguf), "--save-tokenizer", str(folder)]
    run(command, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get("TRAMONTANE_PEERS", "").split(",")
    places = [place for place in given if place.partition("=")[0] in PEERS]
    parser.add_argument("--peer", action="append", default=places, metavar="NAME=PLACE")
    parser.add_argument("--models", nargs="+", default=["smollm2-q4_1", "rand1b-q4_0"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--generate", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one process may take")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of random models")
    parser.add_argument("--json", type=Path, help="where to write the report too")
    parser.add_argument("--table", type=Path, help="print the table of this report, and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8").strip().splitlines()[-1])), end="")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = compare(args, Path(folder))
    say(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
