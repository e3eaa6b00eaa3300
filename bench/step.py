"""Where the time of a decode step goes that no kernel takes: the host's part, calls of ops, turns of the pool.

    python -m bench.step MODEL.gguf [--threads 1 2] [--sequences 1 16] [--context 128] [--steps 200]

Steps of an engine that decodes greedily, and the same steps' recorded ops replayed alone; medians, in microseconds.
`host` is the processor time of a step beside its replays: scheduling, the batch's arrays, drawing. A call is what a
replayed op costs that computes nothing, a turn what a shared op costs above its share of the work; both are measured
beforehand, and counted. `share` is all three, of a step. The JSON comes last. Another program on one of the
processors spoils all but `host`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tramontane.config import CacheConfig, EngineConfig, SchedulerConfig
from tramontane.engine.blocks import make_pool
from tramontane.engine.engine import Engine
from tramontane.engine.executor import LocalExecutor
from tramontane.engine.runner import Runner
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import EngineRequest
from tramontane.kernels.cpu import CpuOps
from tramontane.loading.build import LoadedModel, load_model
from tramontane.models.spec import cache_groups
from tramontane.types import SAMPLING_DEFAULTS, SamplingParams

BLOCK = 16
WARM = 20


def best(compute: Callable[[], object], rounds: int = 2000) -> float:
    """Seconds, of the fastest round: rounds are short, so that one of them is undisturbed."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return min(times)


def replay_of(ops: CpuOps, compute: Callable[[], None], count: int) -> Callable[[], None]:
    replay = ops.record(lambda: [compute() for _ in range(count)] and None)
    assert replay is not None
    return replay


def call_seconds() -> float:
    """Of an op that computes next to nothing."""
    ops, x = CpuOps(), np.ones((1, 1), np.float32)
    return best(replay_of(ops, lambda: ops.scale(x, 1.0), 100)) / 100


def turn_seconds(threads: int) -> float:
    """Of an op that threads share, above what their share of the work takes: a product of some microseconds."""
    took = []
    for count in (1, threads):
        ops = CpuOps(count)
        weight = ops.pack(np.ones((2048, 64), np.float32), "F32")
        x, out = np.ones((1, 64), np.float32), np.empty((1, 2048), np.float32)
        took.append(best(replay_of(ops, lambda: ops.matmul(out, x, weight), 20)) / 20)  # noqa: B023
    return max(took[1] - took[0] / threads, 0.0) if threads > 1 else 0.0


def decoding(loaded: LoadedModel, sequences: int, context: int, steps: int) -> tuple[Engine, Runner]:
    """An engine whose sequences have all been read."""
    length = context + 2 * (steps + WARM)
    blocks = sequences * (-(-length // BLOCK) + 1)
    cache = loaded.decoder.new_cache(blocks, BLOCK, loaded.cache_dtype())
    groups = cache_groups(loaded.spec)
    config = EngineConfig(CacheConfig(num_blocks=blocks, block_size=BLOCK), SchedulerConfig(sequences, 512))
    sizes = {"block_size": BLOCK, "context_length": length, "max_num_batched_tokens": 512, "max_num_seqs": sequences}
    runner = Runner(loaded.decoder, loaded.ops, cache, num_groups=len(groups), **sizes)
    pool = make_pool(config.cache, blocks, [group.window for group in groups], length)
    engine = Engine(Scheduler(config.scheduler, pool, length), LocalExecutor(runner))
    params = SamplingParams(temperature=0.0, max_tokens=length - context).over(SAMPLING_DEFAULTS)
    rng, vocabulary = random.Random(1), loaded.spec.vocab_size
    for number in range(sequences):
        prompt = tuple(rng.randrange(vocabulary) for _ in range(context))
        engine.add(EngineRequest(str(number), prompt, params, frozenset(), number))
    answering: set[str] = set()
    while len(answering) < sequences:
        answering |= {event.request_id for event in engine.step()}
    for _ in range(WARM):
        engine.step()
    return engine, runner


def measure(loaded: LoadedModel, threads: int, sequences: int, context: int, steps: int) -> dict[str, Any]:
    engine, runner = decoding(loaded, sequences, context, steps)
    plans, native = runner._plans, loaded.ops._native  # type: ignore[attr-defined]
    run, replays = plans.run, [0.0]

    def timed(key: Any, compute: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = run(key, compute)
        replays[0] += time.thread_time() - start
        return result

    plans.run = timed  # type: ignore[method-assign]
    elapsed, host, turns = [], [], native.turns
    for _ in range(steps):
        replays[0] = 0.0
        start, own = time.perf_counter(), time.thread_time()
        engine.step()
        host.append(time.thread_time() - own - replays[0])
        elapsed.append(time.perf_counter() - start)
    ops = sum(len(replay.__self__) for replay, _ in list(plans._kept.values())[-2:] if replay)  # type: ignore[attr-defined]
    turns = (native.turns - turns) / steps
    call, turn = call_seconds(), turn_seconds(threads)
    step = statistics.median(elapsed)
    beside = {"host": statistics.median(host), "calls": ops * call, "turns": turns * turn}
    return {
        "threads": threads,
        "sequences": sequences,
        "tokens_s": sequences / step,
        "step": step * 1e6,
        "fastest": min(elapsed) * 1e6,
        **{name: seconds * 1e6 for name, seconds in beside.items()},
        "ops": ops,
        "shared": turns,
        "call_ns": call * 1e9,
        "turn_ns": turn * 1e9,
        "share": sum(beside.values()) / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    lines = []
    for threads in args.threads:
        loaded = load_model(args.model, CpuOps(threads))
        for sequences in args.sequences:
            lines.append(measure(loaded, threads, sequences, args.context, args.steps))
            shown = {name: f"{value:.1%}" if name == "share" else f"{value:.0f}" for name, value in lines[-1].items()}
            print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    print(json.dumps({"model": args.model.name, "context": args.context, "results": lines}))


if __name__ == "__main__":
    main()
