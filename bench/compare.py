"""Ours beside llama.cpp: the same file and task, in turn, in one run.

    python bench/compare.py MODEL.gguf --llama-bench PATH/TO/llama-bench [--llama-batched-bench PATH]
                            [--threads 2] [--rounds 5] [--prompt 512] [--generate 64] [--batch 16]

Each round runs every engine once; medians and ratios are printed, the JSON last. Absolute figures move with the
machine and the hour: only the ratios are results. Build llama.cpp with GGML_NATIVE=ON for a fair peer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import tramontane
from tramontane import LLM
from tramontane.cli.bench import measure, memory_bandwidth

Figures = dict[str, float]
METRICS = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s", "batch": "batch_tokens_per_s"}


def ours(llm: LLM, args: argparse.Namespace) -> Figures:
    report = measure(llm, prompt=args.prompt, generate=args.generate, batch=args.batch, rounds=1)
    return {name: report[field] for name, field in METRICS.items()}


def llama_cpp(args: argparse.Namespace) -> Figures:
    """Prefill and decode of llama-bench (its own warm-up included); batch of llama-batched-bench, prefill included."""
    common = ["-m", str(args.model), "-t", str(args.threads)]
    command = [args.llama_bench, *common, "-p", str(args.prompt), "-n", str(args.generate), "-r", "1", "-o", "json"]
    runs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures = {"prefill" if run["n_prompt"] else "decode": float(run["avg_ts"]) for run in runs}
    if args.llama_batched_bench:
        sizes = ["-npp", "32", "-ntg", str(args.generate), "-npl", str(args.batch), "-c", "8192"]
        command = [args.llama_batched_bench, *common, *sizes, "--output-format", "jsonl"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        row = next(json.loads(line) for line in lines if line.startswith("{"))
        figures["batch"] = args.batch * args.generate / (row["t_pp"] + row["t_tg"])
    return figures


def run(args: argparse.Namespace) -> Mapping[str, object]:
    with LLM(args.model, threads=args.threads, prefix_caching=False, context_length=4096) as llm:
        measure(llm, prompt=args.prompt, generate=8, batch=2, rounds=1)
        engines: dict[str, Callable[[], Figures]] = {"tramontane": lambda: ours(llm, args)}
        if args.llama_bench:
            engines["llama.cpp"] = lambda: llama_cpp(args)
        rounds: dict[str, list[Figures]] = {name: [] for name in engines}
        for turn in range(args.rounds):
            for name, engine in engines.items():
                rounds[name].append(engine())
                print(f"round {turn + 1} {name:<12}", {k: round(v, 1) for k, v in rounds[name][-1].items()})
        weights = llm.stats().weight_bytes
    medians = {n: {m: statistics.median(r[m] for r in rs) for m in METRICS if m in rs[0]} for n, rs in rounds.items()}
    roof = memory_bandwidth() * 1e9 / weights
    return {
        "date": datetime.date.today().isoformat(),
        "version": tramontane.__version__,
        "machine": platform.machine(),
        "model": args.model.name,
        "threads": args.threads,
        "rounds": args.rounds,
        "medians": medians,
        "ratios": {
            name: {m: medians["tramontane"][m] / value for m, value in figures.items()}
            for name, figures in medians.items()
            if name != "tramontane"
        },
        "decode_roof_tokens_per_s": roof,
        "decode_share_of_roof": {name: figures["decode"] / roof for name, figures in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench")
    parser.add_argument("--llama-batched-bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    report = run(parser.parse_args())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
