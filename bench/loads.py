"""Loads for the benchmarks of this engine alone: many answers at once, watched from outside.

Each measurement runs in a process of its own (`apart`), so that the most memory that it held is its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.process import run
from bench.tasks import Task
from tramontane import AsyncLLM
from tramontane.errors import TramontaneError

Report = dict[str, Any]


def prompts(sequences: int, tokens: int, seed: int = 1) -> list[list[int]]:
    return Task("load", sequences, tokens, 1).prompts(seed)


def apart(module: str, **asked: Any) -> Report:
    """What `module`'s `measurement` returns for these arguments in a process of its own, with its peak memory."""
    outcome = run([sys.executable, "-m", module, json.dumps(asked)], timeout=3600)
    report: Report = json.loads(outcome.stdout.strip().splitlines()[-1])
    return {**report, "peak_mb": round(outcome.peak_bytes / 1e6, 1)}


def parser(description: str | None) -> argparse.ArgumentParser:
    """With what all of these benchmarks are asked: a model, threads, and where to `write` what was measured."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--json", type=Path)
    return made


def write(file: Path | None, rows: object) -> None:
    if file is not None:
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def answer_if_asked(measurement: Callable[..., Report]) -> bool:
    """In the process that `apart` starts: print what was asked for."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measurement(**json.loads(sys.argv[1]))))
        return True
    return False


@dataclass
class Watched:
    """What was seen while answers were given."""

    seconds: float = 0.0
    tokens: int = 0
    failed: int = 0
    most_running: int = 0
    filled: list[float] = field(default_factory=list)
    """At each token: how much of the blocks that requests held had a token in it."""
    between: list[float] = field(default_factory=list)
    """Seconds between the tokens of a stream."""
    first: list[float] = field(default_factory=list)
    """Seconds to the first token of each."""

    def told(self) -> Report:
        lists = ("filled", "between", "first")
        return {name: value for name, value in asdict(self).items() if name not in lists}


class Blocks:
    """An allocation listener that counts what each request holds."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()

    def allocated(self, request_id: str, index: int, blocks: int) -> None:
        self.held[request_id] += blocks

    def released(self, request_id: str, index: int, blocks: int) -> None:
        self.held[request_id] -= blocks


async def watch(llm: AsyncLLM, given: Sequence[list[int]], generate: int, block_size: int = 16) -> Watched:
    """Stream all answers at once."""
    seen, blocks, known = Watched(), Blocks(), dict[str, int]()
    llm.add_allocation_listener(blocks)
    began = time.perf_counter()

    async def one(prompt: list[int]) -> None:
        last = time.perf_counter()
        begun, name = False, ""
        try:
            async for chunk in llm.stream(prompt, max_tokens=generate, temperature=0.0, ignore_eos=True):
                now = time.perf_counter()
                (seen.between if begun else seen.first).append(now - last)
                last, begun, name = now, True, chunk.request_id
                # The last token is in no block before the next is computed.
                known[name] = known.get(name, len(prompt) - 1) + len(chunk.token_ids)
                seen.tokens += len(chunk.token_ids)
                held = sum(blocks.held[request] for request in known)
                if held:
                    seen.filled.append(min(1.0, sum(known.values()) / (held * block_size)))
                seen.most_running = max(seen.most_running, llm.stats().running)
        except TramontaneError:
            seen.failed += 1
        known.pop(name, None)

    await asyncio.gather(*(one(prompt) for prompt in given))
    seen.seconds = time.perf_counter() - began
    return seen
