"""A hundred clients for minutes on end, of whom many leave early: whether the server stays as it was.

    python -m bench.load MODEL [--minutes 10] [--streams 100] [--threads 2] [--blocks 1024] [--seed 0] [--json FILE]

The server runs in a process of its own, with as many places as there are streams; four clients more than that ask, so
that some are told to come back (429), and do. Prompts, lengths and what a client does are random: most read to the end,
streamed or whole, of one choice or two; others stop reading, or leave as soon as they have asked. At the end

- no answer was another than 200 or 429, and every choice that was read to the end ended once,
- the server's log has each request that was read exactly once, and none twice,
- /metrics shows no block in use, nothing running and nothing open,
- memory in the last quarter of the time is what it was in the second, within a twentieth,
- some of the answers, drawn at random, are what the library says to the same requests without a server.

Exit status 0, or 1 with what went wrong. A GGUF file or a folder is a model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.http_client import Reply, ask, get_json
from bench.process import ProgramFailed
from bench.serving import Running, free_port, running
from bench.tasks import HIGHEST_ID, LOWEST_ID

CONTEXT, BLOCK_SIZE = 1024, 16
MORE = 4
"""Clients beyond the places that there are."""
TEXT = "the wind sea lemon runs over under seven stone and why because green Größe 世界 . , ? \n"
DOINGS = ("read", "whole", "stop", "leave", "leave whole")
ODDS = (60, 15, 15, 5, 5)


@dataclass(frozen=True)
class Asked:
    """One request, and what its client does: reads a stream, or an answer; stops reading; leaves at once."""

    id: str
    doing: str
    prompt: str
    max_tokens: int
    n: int
    temperature: float
    seed: int
    stop_after: int

    @classmethod
    def draw(cls, rng: random.Random, number: int) -> Asked:
        words = min(int(rng.expovariate(1 / 60)) + 1, 350)
        return cls(
            id=f"load-{number}",
            doing=rng.choices(DOINGS, ODDS)[0],
            prompt=" ".join(rng.choices(TEXT.split(" "), k=words)),
            max_tokens=min(int(rng.expovariate(1 / 40)) + 1, 200),
            n=rng.choice((1, 1, 1, 2)),
            temperature=rng.choice((0.0, 0.9)),
            seed=rng.randrange(1 << 30),
            stop_after=rng.randint(1, 30),
        )

    def sampling(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "n": self.n, "temperature": self.temperature, "seed": self.seed}

    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt, **self.sampling(), "stream": self.doing in ("read", "stop", "leave")}


@dataclass
class Seen:
    """What all clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    doings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: list[tuple[Asked, list[str]]] = field(default_factory=list)
    """Requests that were read to the end, and the text of each choice."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, bytes."""
    tokens: int = 0


async def client(url: str, rng: random.Random, numbers: Any, until: float, seen: Seen) -> None:
    """One client, request after request."""
    while time.monotonic() < until:
        asked = Asked.draw(rng, next(numbers))
        try:
            if asked.doing in ("leave", "leave whole"):
                await leave(url, asked, rng.uniform(0, 0.5))
                seen.doings[asked.doing] += 1
                continue
            async with ask(url, "/v1/completions", asked.body(), {"X-Request-Id": asked.id}) as reply:
                seen.statuses[str(reply.status)] += 1
                if reply.status == 429:
                    await asyncio.sleep(int(reply.headers["retry-after"]) * rng.uniform(1, 1.5))
                elif reply.status != 200:
                    seen.wrong.append(f"{asked.id}: status {reply.status}: {(await reply.read())[:300]!r}")
                else:
                    seen.doings[asked.doing] += 1
                    await read(reply, asked, seen)
        except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
            seen.wrong.append(f"{asked.id} ({asked.doing}): {error!r}")


async def leave(url: str, asked: Asked, after: float) -> None:
    """Ask, and be gone before an answer comes, or while it does."""

    async def asking() -> None:
        async with ask(url, "/v1/completions", asked.body(), {"X-Request-Id": asked.id}) as reply:
            await reply.read()

    try:
        await asyncio.wait_for(asking(), after)
    except asyncio.TimeoutError:
        return


async def read(reply: Reply, asked: Asked, seen: Seen) -> None:
    """Raises ValueError and KeyError of what is no answer."""
    texts, ends = [""] * asked.n, Counter[int]()
    if asked.doing == "whole":
        answer = json.loads(await reply.read())
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] += choice["finish_reason"] in ("stop", "length")
        seen.tokens += answer["usage"]["completion_tokens"]
    else:
        pieces = 0
        async for data in reply.events():
            if data == "[DONE]":
                break
            for choice in json.loads(data)["choices"]:
                texts[choice["index"]] += choice["text"]
                ends[choice["index"]] += choice["finish_reason"] is not None
                pieces += 1
            if asked.doing == "stop" and pieces >= asked.stop_after:
                return
        else:
            raise ValueError("the stream ended without [DONE]")
    if ends != Counter(range(asked.n)):
        seen.wrong.append(f"{asked.id}: choices ended {dict(ends)}")
    seen.answers.append((asked, texts))


async def watch(server: Running, began: float, until: float, seen: Seen) -> None:
    """Memory, every few seconds."""
    while (now := time.monotonic()) < until:
        seen.memory.append((now - began, server.memory_bytes()))
        print(f"{now - began:6.0f} s  {seen.memory[-1][1] / 1e6:.0f} MB  {dict(seen.statuses)}", flush=True)
        await asyncio.sleep(min(5.0, max(until - now, 0.1)))


async def fill(url: str, blocks: int) -> None:
    """Let every block of the cache be written once: memory that is only reserved would seem to grow later."""
    rng = random.Random(0)

    async def read_only(length: int) -> None:
        prompt = [rng.randint(LOWEST_ID, HIGHEST_ID) for _ in range(length)]
        async with ask(url, "/v1/completions", {"prompt": prompt, "max_tokens": 1}) as reply:
            if reply.status != 200:
                raise ProgramFailed(f"status {reply.status}: {(await reply.read())[:300]!r}")

    length = CONTEXT - 2
    await asyncio.gather(*(read_only(length) for _ in range(blocks * BLOCK_SIZE // length + 2)))


async def gauges(url: str) -> dict[str, float]:
    _, text = await get_json(url, "/metrics")
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, _, value in lines}


IDLE = (
    "tramontane:kv_blocks_used",
    "tramontane:open_requests",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)


async def drive(args: argparse.Namespace, log: Path, seen: Seen) -> dict[str, float]:
    """Serve and ask; returns the gauges when all clients are gone."""
    port = free_port()
    command = [
        sys.executable, "-m", "tramontane", "serve", "--model", args.model, "--name", "m", "--port", str(port),
        "--log-file", str(log), "--log-format", "json",
        "--max-requests", str(args.streams),
        "-o", "deterministic=true",
        *(text for name, value in engine_options(args).items() for text in ("-o", f"{name}={value}")),
    ]  # fmt: skip
    async with running(command, port, ready="/ready", timeout=120) as server:
        await fill(server.url, args.blocks)
        began = time.monotonic()
        until = began + args.minutes * 60
        numbers = iter(range(1 << 60))
        rngs = [random.Random(f"{args.seed} {i}") for i in range(args.streams + MORE)]
        clients = (client(server.url, rng, numbers, until, seen) for rng in rngs)
        await asyncio.gather(watch(server, began, until, seen), *clients)
        for _ in range(100):  # the last who left have just done so
            left = await gauges(server.url)
            if not any(left[name] for name in IDLE):
                break
            await asyncio.sleep(0.1)
        return left


def engine_options(args: argparse.Namespace) -> dict[str, int]:
    return {
        "threads": args.threads,
        "context_length": CONTEXT,
        "num_blocks": args.blocks,
        "block_size": BLOCK_SIZE,
    }


def check_log(log: Path, seen: Seen) -> None:
    """Each request ended once."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    requests = {line["id"]: line for line in lines if line.get("path") == "/v1/completions"}
    times = Counter(line["id"] for line in lines if line.get("path") == "/v1/completions")
    seen.wrong += [f"{name} is in the log {count} times" for name, count in times.items() if count > 1]
    for asked, _ in seen.answers:
        ends = requests.get(asked.id, {}).get("finish_reasons", [])
        if len(ends) != asked.n:
            seen.wrong.append(f"{asked.id}: the log has the ends {ends} of {asked.n} choices")
    seen.wrong += [f"logged: {line}" for line in lines if line["level"] in ("error", "critical")][:20]


def check_memory(seen: Seen, seconds: float) -> tuple[float, float]:
    """Medians of the second and the last quarter, in bytes."""
    second = [held for at, held in seen.memory if seconds / 4 <= at < seconds / 2]
    last = [held for at, held in seen.memory if at >= seconds * 3 / 4]
    before, after = statistics.median(second), statistics.median(last)
    if after > before * 1.05:
        seen.wrong.append(f"memory grew from {before / 1e6:.0f} to {after / 1e6:.0f} MB")
    return before, after


def check_answers(args: argparse.Namespace, seen: Seen) -> int:
    """Some answers beside the library's; returns how many."""
    from tramontane import LLM

    def said(asked: Asked) -> list[str]:
        return [choice.text for choice in llm.generate(asked.prompt, **asked.sampling()).choices]

    some = random.Random(args.seed).sample(seen.answers, min(args.sample, len(seen.answers)))
    llm = LLM(args.model, deterministic=True, **engine_options(args))
    with llm, ThreadPoolExecutor(16) as pool:
        expected = [*pool.map(said, (asked for asked, _ in some))]
    for (asked, texts), right in zip(some, expected, strict=True):
        if right != texts:
            seen.wrong.append(f"{asked.id}: the library says {right}, the server {texts}")
    return len(some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=1024, help="of 16 tokens each, in the cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=40, help="answers to compare with the library's")
    parser.add_argument("--json", type=Path, help="where to write the report too")
    args = parser.parse_args()
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        left = asyncio.run(drive(args, log, seen))
        check_log(log, seen)
    seen.wrong += [f"{name} is {left[name]:g} at the end" for name in IDLE if left[name]]
    if not seen.answers:
        seen.wrong.append("nothing was read to the end")
    before, after = check_memory(seen, args.minutes * 60)
    report = {
        "model": Path(args.model).name,
        "minutes": args.minutes,
        "streams": args.streams,
        "statuses": dict(seen.statuses),
        "doings": dict(seen.doings),
        "tokens_read_whole": seen.tokens,
        "memory_second_quarter": before,
        "memory_last_quarter": after,
        "compared": check_answers(args, seen),
        "idle": {name: left[name] for name in IDLE},
        "wrong": seen.wrong,
    }
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**report, "memory": seen.memory}), encoding="utf-8")
    sys.exit(bool(seen.wrong))


if __name__ == "__main__":
    main()
