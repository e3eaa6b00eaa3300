"""The client of bench/server.py, in a process of its own so that what it takes of the processors can be told apart.

    python -m bench.streams ORDER

All prompts of a task are asked for at once, each over a connection of its own, as streams; so many tokens are answered
as are asked for. Prints what was seen as JSON.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench.http_client import ask
from bench.serving import Running
from bench.tasks import Task


@dataclass(frozen=True)
class StreamOrder:
    """`body`: what this server wants to be told besides. `pid`: of the server, whose processor time is counted."""

    url: str
    pid: int
    task: Task
    body: Mapping[str, Any]

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> StreamOrder:
        fields = json.loads(text)
        return cls(**{**fields, "task": Task(**fields["task"])})


@dataclass(frozen=True)
class Stream:
    """When the pieces of one answer came, in seconds since it was asked for, and how many tokens they hold."""

    times: Sequence[float]
    tokens: int


async def one(order: StreamOrder, prompt: Sequence[int], generate: int) -> Stream:
    """Raises ValueError where the server refuses, or answers otherwise than was asked."""
    body = {
        "model": "m", "prompt": prompt, "max_tokens": generate, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **order.body,
    }  # fmt: skip
    began, times, tokens = time.perf_counter(), [], 0
    async with ask(order.url, "/v1/completions", body) as reply:
        if reply.status != 200:
            raise ValueError(f"status {reply.status}: {(await reply.read())[:300]!r}")
        async for data in reply.events():
            now = time.perf_counter() - began
            event = {} if data == "[DONE]" else json.loads(data)
            if event.get("choices"):
                times.append(now)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if tokens != generate:
        raise ValueError(f"{tokens} tokens came, {generate} were asked for")
    return Stream(times, tokens)


async def measure(order: StreamOrder) -> dict[str, float]:
    task, server = order.task, Running(order.url, psutil.Process(order.pid))
    await asyncio.gather(*(one(order, prompt, 2) for prompt in task.prompts(0)))
    served, client, began = server.cpu_seconds(), time.process_time(), time.perf_counter()
    streams = await asyncio.gather(*(one(order, prompt, task.generate) for prompt in task.prompts(1)))
    seconds = time.perf_counter() - began
    return {
        **figures(streams, seconds),
        "client_cpu": time.process_time() - client,
        "server_cpu": server.cpu_seconds() - served,
    }


def figures(streams: Sequence[Stream], seconds: float) -> dict[str, float]:
    """Throughput of all; of the times to a first token and between tokens the median and what one in twenty exceeds.

    Between tokens: of each stream its mean, since a piece may hold several tokens.
    """
    first = [stream.times[0] for stream in streams]
    between = [(s.times[-1] - s.times[0]) / (s.tokens - 1) for s in streams if s.tokens > 1]
    return {
        "seconds": seconds,
        "throughput": sum(stream.tokens for stream in streams) / seconds,
        "ttft": statistics.median(first),
        "ttft_p95": percentile(first, 0.95),
        "itl": statistics.median(between),
        "itl_p95": percentile(between, 0.95),
    }


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def main() -> None:
    print(json.dumps(asyncio.run(measure(StreamOrder.load(sys.argv[1])))))


if __name__ == "__main__":
    main()
