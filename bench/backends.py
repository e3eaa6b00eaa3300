"""What each backend takes of the same model: start, a token, memory; and what it adds to an installation.

    RAYON_NUM_THREADS=1 python -m bench.backends MODEL [MODEL ...] [--backends native mistralrs transformers]
                                                 [--rounds 3] [--threads 1] [--tokens 33] [--many 8]

Every answer comes from a process of its own, all backends in turn; medians of the rounds are printed as a table in
Markdown, in seconds that pass and, in brackets, seconds of the processor's, of all threads: on a busy machine only
those say something. Start: from nothing to the first token of the first answer. A token: those after the first, behind
a prompt of some 120 tokens; of many at once, each token of all of them. mistral.rs takes its number of threads from
RAYON_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.process import ProgramFailed, run

PROMPT = " ".join(["The wind that comes over the mountains in the north is cold and dry, and it clears the sky."] * 6)
EXTRAS = {"mistralrs": "mistralrs", "transformers": "transformers"}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}

Times = list[float]
"""Seconds that passed, seconds of the processor's."""


def now() -> Times:
    return [time.perf_counter(), time.process_time()]


def since(start: Times, share: int = 1) -> Times:
    return [(end - begin) / share for end, begin in zip(now(), start, strict=True)]


def answer(asked: argparse.Namespace) -> dict[str, Times]:
    """In a process of its own: what one backend takes."""
    began = now()
    from tramontane import LLM
    from tramontane.backends.registry import declared

    (backend,), (model,) = asked.backends, asked.models
    threads = {"threads": asked.threads} if "threads" in declared(backend).options else {}
    with LLM(model, backend=backend, **threads) as llm:
        llm.generate("Hello", **GREEDY, max_tokens=1)
        taken = {"start": since(began)}
        tokens, first = 0, now()
        for chunk in llm.stream(PROMPT, **GREEDY, max_tokens=asked.tokens):
            if not tokens:
                first = now()
            tokens += len(chunk.token_ids)
        taken["token"] = since(first, max(tokens - 1, 1))
        prompts, first = [f"{PROMPT} {i}" for i in range(asked.many)], now()
        found = llm.generate(prompts, **GREEDY, max_tokens=asked.tokens)
        taken["many"] = since(first, sum(result.usage.completion_tokens for result in found))
    return taken


def report(asked: argparse.Namespace) -> None:
    print(f"| model | backend | start, s | a token, ms | a token of {asked.many} at once, ms | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for model in asked.models:
        rounds: dict[str, list[dict[str, Times]]] = {name: [] for name in asked.backends}
        peaks: dict[str, list[int]] = {name: [] for name in asked.backends}
        for name in [name for _ in range(asked.rounds) for name in asked.backends]:
            numbers = ["--threads", asked.threads, "--tokens", asked.tokens, "--many", asked.many]
            command = [sys.executable, "-m", "bench.backends", model, "--backends", name, "--alone", *numbers]
            try:
                outcome = run([str(part) for part in command], timeout=asked.timeout)
            except ProgramFailed as error:
                print(f"{name} on {model}: {error}", file=sys.stderr)
                continue
            rounds[name].append(json.loads(outcome.stdout.strip().splitlines()[-1]))
            peaks[name].append(outcome.peak_bytes)
        for name, taken in rounds.items():
            if taken:
                cells = [shown(taken, "start", 1), shown(taken, "token", 1000), shown(taken, "many", 1000)]
                peak = statistics.median(peaks[name]) / 1e6
                print(f"| {Path(model).name} | `{name}` | {' | '.join(cells)} | {peak:,.0f} |", flush=True)
    print()
    for name, extra in EXTRAS.items():
        if name in asked.backends:
            print(f"{name} adds {', '.join(f'{size / 1e6:.0f} MB {one}' for one, size in added(extra))}")


def shown(taken: list[dict[str, Times]], what: str, scale: int) -> str:
    passed, busy = (scale * statistics.median(one[what][i] for one in taken) for i in range(2))
    return f"{passed:.1f} ({busy:.1f})"


def added(extra: str) -> list[tuple[str, int]]:
    """The packages that an extra brings besides the core's, with their bytes, the largest first; no small ones."""
    sizes = {name: size(name) for name in needed("tramontane", extra) - needed("tramontane", "")}
    return sorted(((one, size) for one, size in sizes.items() if size >= 1e6), key=lambda one: -one[1])


def needed(package: str, extra: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """What is installed of all that a package needs, itself among it, by normalized names."""
    name = re.sub(r"[-_.]+", "-", package).lower()
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return set()
    found = {name}
    for line in requirements:
        wanted, _, condition = line.partition(";")
        if "extra" in condition and not (extra and re.search(rf"extra == ['\"]{extra}['\"]", condition)):
            continue
        inner = re.split(r"[\s<>=!~;\[(]", wanted.strip(), maxsplit=1)[0]
        if re.sub(r"[-_.]+", "-", inner).lower() not in seen | found:
            found |= needed(inner, "", seen | found)
    return found


def size(package: str) -> int:
    """Bytes of its files."""
    files = (Path(str(file.locate())) for file in metadata.files(package) or ())
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--backends", nargs="+", default=["native", "mistralrs", "transformers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=33, help="of each answer")
    parser.add_argument("--many", type=int, default=8, help="prompts at once")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one process may take")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        print(json.dumps(answer(asked)))
    else:
        report(asked)


if __name__ == "__main__":
    main()
