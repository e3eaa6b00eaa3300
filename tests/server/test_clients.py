"""Clients that others wrote, each in its own environment with a script of its own, against servers on real sockets.

Nothing is fetched: `tests/server/clients/make.py` makes the environments below $TEST_CLIENTS. Where that is not set
they are skipped, in CI too; where it is, CI must have them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.server.clients import make
from tests.server.live import Live, live, until
from tests.server.scripted import Scripted, says
from tramontane.backends.native import NativeBackend
from tramontane.config import EngineConfig
from tramontane.llm import LLM
from tramontane.types import Chunk, Request, ToolCallDelta

pytestmark = pytest.mark.slow

HERE = Path(make.__file__).parent
SECONDS = 900
"""That one client may take: it is only there to end a test that hangs."""


def agent(request: Request) -> list[Chunk]:
    """What clients/common.py says of the scripted model."""
    assert request.messages is not None
    if request.messages[-1].role == "tool":
        return says("It is sunny in Nice.")
    if request.tools and request.tool_choice != "none":
        deltas = [ToolCallDelta(0, "call-1", "weather"), *(ToolCallDelta(0, arguments=c) for c in '{"city":"Nice"}')]
        return [*(Chunk("r", tool_calls=(d,), token_ids=(1,)) for d in deltas), Chunk("r", finish_reason="tool_calls")]
    return says("The wind is up." if request.sampling.grammar is None else '{"name": "Nice", "people": 342669}')


@pytest.fixture(scope="module")
def scripted() -> Iterator[Live]:
    with live(Scripted(agent), names=("scripted",)) as server:
        yield server


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Live]:
    config = EngineConfig.from_options({"context_length": 1024})
    with live(lambda: NativeBackend(smollm2, config), names=("smollm2",), wait=False) as server:
        until(lambda: server.get("/ready").status_code == 200, 120)
        yield server


def run(environment: str, script: str, *servers: Live, more: tuple[Path, ...] = ()) -> None:
    """Run a client's script with its environment's Python; it asserts by itself."""
    folder = make.folder()
    if folder is None:
        pytest.skip("TEST_CLIENTS is not set: see tests/server/clients/make.py")
    python = make.python(folder / environment)
    if python is None:
        missing(f"no environment {environment} of today's pins in {folder}: see tests/server/clients/make.py")
    quiet = {"NO_PROXY": "*", "PYTHONPATH": "", "PYTHONSAFEPATH": "", "COLUMNS": "120"}
    done = subprocess.run(
        [str(python), str(HERE / f"use_{script}.py"), *(server.url for server in servers), *map(str, more)],
        capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


PLAIN = {
    "openai-2": "openai",
    "openai-3": "openai",
    "langchain": "langchain",
    "instructor": "instructor",
    "pydantic-ai": "pydantic_ai",
    "litellm": "litellm",
    "llm": "llm",
    "adk": "adk",
}


@pytest.mark.parametrize("environment", PLAIN)
def test_a_client(environment: str, scripted: Live, real: Live) -> None:
    run(environment, PLAIN[environment], scripted, real)
    until(lambda: real.service.open_requests == 0 and scripted.service.open_requests == 0)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the GGUF file, for programs that read Hugging Face's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    command = [sys.executable, "-m", "tramontane", "inspect", "-m", str(smollm2), "--save-tokenizer", str(folder)]
    subprocess.run(command, check=True)
    return folder


def test_lm_eval(scripted: Live, real: Live, smollm2: Path, tokenizer: Path, tmp_path: Path) -> None:
    """What it reads off the server is what the library says of the same texts."""
    run("lm-eval", "lm_eval", scripted, real, more=(tokenizer, tmp_path / "likelihoods.json"))
    read = json.loads((tmp_path / "likelihoods.json").read_text(encoding="utf-8"))
    assert len(read) == 6
    with LLM(str(smollm2), context_length=1024) as llm:
        for context, choice, likelihood, _ in read:
            scores = llm.score(context + choice)
            start = len(llm.tokenize(context))
            assert likelihood == pytest.approx(sum(scores.logprobs[start:]), rel=0.02, abs=0.1), (context, choice)
    paris, apple, *_ = read
    assert paris[2] > apple[2]


def test_guidellm(scripted: Live, real: Live, tokenizer: Path) -> None:
    run("guidellm", "guidellm", scripted, real, more=(tokenizer,))


def test_each_client_that_is_pinned_is_run() -> None:
    assert {*PLAIN, "lm-eval", "guidellm"} == make.pins().keys()
