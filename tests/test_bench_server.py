"""bench/server.py and bench/load.py: their client against a real server, what is made of figures, what a run finds."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bench", reason="this copy of the sources has no benchmarks")
pytest.importorskip("resource", reason="processes are weighed on POSIX systems only")
pytest.importorskip("psutil", reason="psutil is not installed")
pytest.importorskip("fastapi", reason="the extra 'server' is not installed")

from bench import load, server
from bench.http_client import ask, get_json
from bench.load import Asked, Seen
from bench.process import ROOT, ProgramFailed, run
from bench.servers import LlamaServer, Ours, VllmServer, servers
from bench.serving import free_port, running
from bench.streams import Stream, StreamOrder, figures, measure, percentile
from bench.tasks import Task

from tests.server.live import Live, live
from tests.server.scripted import Scripted, says


@pytest.fixture(scope="module")
def counted() -> Iterator[Live]:
    """Says as many tokens as are asked for."""
    with live(Scripted(lambda request: says("x" * (request.sampling.max_tokens or 1), "length"))) as running:
        yield running


def test_streams_are_read_to_their_end(counted: Live) -> None:
    order = StreamOrder(counted.url, os.getpid(), Task("streams3", 3, 4, 15), {"model": "mock"})
    assert StreamOrder.load(order.dump()) == order
    found = asyncio.run(measure(order))
    assert found["throughput"] == pytest.approx(45 / found["seconds"])
    assert 0 < found["ttft"] <= found["ttft_p95"] < found["seconds"]
    assert 0 <= found["client_cpu"] <= found["server_cpu"] + 0.05, "which here are one process"
    with pytest.raises(ValueError, match="status 404"):
        asyncio.run(measure(replace(order, body={"model": "another"})))


def test_what_else_the_client_reads(counted: Live) -> None:
    async def refused() -> tuple[int, Any]:
        async with ask(counted.url, "/v1/completions", {"prompt": "a", "store": 7}) as reply:
            return reply.status, json.loads(await reply.read())

    status, body = asyncio.run(refused())
    assert (status, body["error"]["param"]) == (400, "store")
    assert asyncio.run(get_json(counted.url, "/health"))[0] == 200
    assert "vllm:" in asyncio.run(get_json(counted.url, "/metrics"))[1]


def test_figures_of_streams() -> None:
    streams = [Stream([0.1, 0.2, 0.5], 5), Stream([0.3, 0.4, 0.7], 5)]
    found = figures(streams, 2.0)
    assert found["throughput"] == 5
    assert found["ttft"] == pytest.approx(0.2)
    assert found["ttft_p95"] == 0.3
    assert found["itl"] == pytest.approx(0.1)  # five tokens in three pieces are four steps from the first to the last
    assert [percentile(range(1, 21), part) for part in (0.05, 0.5, 0.95, 1.0)] == [1, 10, 19, 20]


def test_servers_that_are_not_there_say_why(tmp_path: Path) -> None:
    assert Ours().missing() is None
    assert "--peer llama.cpp=FOLDER" in (LlamaServer(None).missing() or "")
    assert LlamaServer(tmp_path).missing() == f"no llama-server in {tmp_path}"
    assert "not installed" in (VllmServer(str(tmp_path / "python"), tmp_path).missing() or "")
    with pytest.raises(SystemExit, match="no such peer: vlm"):
        servers({"vlm": "python"}, tmp_path)


def test_a_server_that_does_not_start_is_told_with_its_last_words() -> None:
    async def start() -> None:
        command = [sys.executable, "-c", "raise SystemExit('no such model')"]
        async with running(command, free_port(), ready="/health", timeout=30):
            raise AssertionError("it runs")

    with pytest.raises(ProgramFailed, match=r"exit status 1: no such model"):
        asyncio.run(start())


def test_ratios_and_the_table() -> None:
    base = {"model": "m", "streams": 4, "rounds": [{}]}
    times = {"ttft": 0.05, "ttft_p95": 0.06, "itl": 0.01, "itl_p95": 0.02, "client_cpu": 0.4, "seconds": 2.0}
    ours = {**base, "engine": "tramontane", "throughput": 90.0, **times}
    peer = {**base, "engine": "llama.cpp", "throughput": 60.0, **times}
    offline = {**base, "engine": "offline", "throughput": 100.0}
    failed = {**base, "engine": "vllm", "failed": "exit status 1: out of luck"}
    cells = [ours, peer, offline, failed]
    server.add_ratios(cells, cores=2)
    assert ours["of_offline"] == 0.9
    assert ours["of_offline_without_client"] == pytest.approx(1.0)
    assert peer["ours_over_this"] == 1.5
    report = {
        "date": "2026-11-28T12:00:00+00:00", "processor": "a processor", "cores": 2, "versions": {"tramontane": "1"},
        "prompt": 16, "generate": 8, "threads": 2, "rounds": 3, "others": {"m 4": 0.25}, "skipped": {"x": "it is gone"},
        "cells": cells,
    }  # fmt: skip
    text = server.table(report)
    assert "| m | 4 | tramontane | 90.0 | 90% of offline, 100% without the client | 50.0 (60.0) | 10.0 (20.0)" in text
    assert "| m | 4 | llama.cpp | 60.0 | 1.50 × |" in text
    assert "- vllm on m failed: exit status 1: out of luck" in text
    assert "- x was left out: it is gone" in text


def test_what_clients_do_is_drawn_and_repeats() -> None:
    asked = [Asked.draw(random.Random(7), number) for number in range(3)]
    assert asked == [Asked.draw(random.Random(7), number) for number in range(3)]
    drawn = random.Random(1)
    many = [Asked.draw(drawn, number) for number in range(500)]
    assert {one.doing for one in many} == {*load.DOINGS}
    assert {one.n for one in many} == {1, 2}
    assert all(1 <= one.max_tokens <= 200 and one.prompt for one in many)


def test_what_a_run_finds_wrong(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [
        {"id": "a", "path": "/v1/completions", "level": "info", "finish_reasons": ["stop"]},
        {"id": "b", "path": "/v1/completions", "level": "info", "finish_reasons": ["stop"]},
        {"id": "b", "path": "/v1/completions", "level": "info", "finish_reasons": ["stop"]},
        {"level": "error", "message": "a bug"},
    ]
    log.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    drawn = Asked.draw(random.Random(0), 0)
    seen = Seen(answers=[(Asked(**{**vars(drawn), "id": "a", "n": 1}), ["x"])])
    load.check_log(log, seen)
    assert [one.split(":")[0] for one in seen.wrong] == ["b is in the log 2 times", "logged"]
    seen = Seen(memory=[(second, 100 + (10 if second > 70 else 0)) for second in range(100)])
    assert load.check_memory(seen, 100) == (100, 110)
    assert "memory grew" in seen.wrong[0]
    assert Counter() == seen.statuses


@pytest.mark.slow
def test_a_short_load_finds_nothing_wrong(smollm2: Path, tmp_path: Path) -> None:
    options = ["--minutes", "0.2", "--streams", "8", "--blocks", "128", "--sample", "10"]
    command = [sys.executable, "-m", "bench.load", str(smollm2), *options, "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["compared"] > 0
    assert set(report["statuses"]) <= {"200", "429"}


@pytest.mark.slow
def test_the_benchmark_of_servers(smollm2: Path, tmp_path: Path) -> None:
    options = ["--streams", "1", "3", "--prompt", "8", "--generate", "6", "--threads", "1", "--rounds", "1"]
    command = [sys.executable, "-m", "bench.server", "--models", str(smollm2), *options]
    report = json.loads(run(command, timeout=240).stdout.strip().splitlines()[-1])
    ours = [cell for cell in report["cells"] if cell["engine"] == "tramontane"]
    assert [cell["streams"] for cell in ours] == [1, 3]
    assert all(cell["throughput"] > 0 and "failed" not in cell for cell in report["cells"])
    assert ours[1]["of_offline"] > 0
