"""Tracing: a file that readers of Chrome's format take, with what happened in it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tramontane import LLM
from tramontane.errors import InvalidRequest
from tramontane.tracing import Trace


def events(path: Path) -> list[dict[str, Any]]:
    """As Chrome reads it: an array whose end may be missing."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8").rstrip().rstrip(",") + "]")
    assert all({"name", "ph", "pid", "tid"} <= event.keys() for event in found)
    return found


def test_spans_hold_one_another_on_each_thread(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")

    def work() -> None:
        with trace.span("outer", "test"), trace.span("inner", "test", shape=[1, 2]):
            pass

    threads = [threading.Thread(target=work, name=f"worker {i}") for i in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    trace.flush()
    found = events(tmp_path / "trace.json")
    assert [e["args"]["name"] for e in found if e["ph"] == "M"] == ["worker 0", "worker 1"]
    spans = [e for e in found if e["ph"] == "X"]
    for inner, outer in zip(spans[::2], spans[1::2], strict=True):
        assert (inner["name"], outer["name"], inner["tid"]) == ("inner", "outer", outer["tid"])
        assert inner["args"] == {"shape": [1, 2]}
        assert outer["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_an_engine_tells_of_steps_ops_waiting_and_requests(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model")
    options: dict[str, Any] = {"threads": 1, "block_size": 4, "num_blocks": 50, "temperature": 0.0}
    with LLM(folder, **options) as llm:
        plain = llm.generate("The wind", max_tokens=5, ignore_eos=True)
    with LLM(folder, profile=str(tmp_path / "trace.json"), **options) as llm:
        assert llm.generate("The wind", max_tokens=5, ignore_eos=True).token_ids == plain.token_ids
    found = events(tmp_path / "trace.json")
    named = {e["name"] for e in found}
    assert {"step", "text", "waiting", "attention", "write_cache", "matmul", "sample"} <= named
    steps = [e for e in found if e["name"] == "step"]
    assert len(steps) == 5
    ops = [e for e in found if e["name"] == "attention"]
    assert ops
    assert all(any(s["ts"] <= op["ts"] <= s["ts"] + s["dur"] for s in steps) for op in ops)
    assert ops[0]["args"]["shapes"][0][0] == len(plain.prompt_ids)
    phases = [(e["ph"], e["args"]) for e in found if e["name"] == "request"]
    assert phases[0] == ("b", {"prompt_tokens": len(plain.prompt_ids)})
    assert [phase for phase, _ in phases] == ["b", *["n"] * 5, "e"]
    assert phases[-1][1] == {"reason": "length"}


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="profile"):
        LLM(checkpoints.write(tmp_path / "model"), profile=str(tmp_path / "nowhere" / "trace.json"))
