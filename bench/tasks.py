"""The tasks that every engine is given, and how a speed is read off the clock."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

CPU_TIME = "TRAMONTANE_BENCH_CPU_TIME"
"""Set where an engine is to count the time that it computes, not the time that passes."""

clock = time.process_time if os.environ.get(CPU_TIME) else time.perf_counter

LOWEST_ID, HIGHEST_ID = 1000, 40000
"""Token ids of prompts: ordinary ones of every model here."""


@dataclass(frozen=True)
class Task:
    name: str
    sequences: int
    prompt: int
    generate: int

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids of each sequence: different for each and for every seed, so that no cached prefix answers."""
        rng = random.Random(f"{self} {seed}")
        return [[rng.randint(LOWEST_ID, HIGHEST_ID) for _ in range(self.prompt)] for _ in range(self.sequences)]

    def speed(self, first: float, total: float) -> float:
        """Tokens a second, from the seconds to the first token and to the last of all.

        Of the prompt where one token is generated; of one sequence after its first token; of all sequences over the
        whole call, their prompts included.
        """
        if self.generate == 1:
            return self.sequences * self.prompt / first
        if self.sequences == 1:
            return (self.generate - 1) / (total - first)
        return self.sequences * self.generate / total


TASKS = {
    task.name: task
    for task in (
        Task("prefill", 1, 512, 1),
        Task("decode", 1, 128, 64),
        Task("batch16", 16, 32, 32),
        Task("batch64", 64, 32, 32),
        Task("prefill4096", 1, 4096, 1),
        Task("decode8000", 1, 8000, 64),
    )
}
USUAL = ("prefill", "decode", "batch16", "batch64")
"""The others take minutes."""


@dataclass(frozen=True)
class Order:
    """What one process of an engine has to do."""

    model: str
    threads: int
    tasks: Sequence[Task]

    @property
    def context(self) -> int:
        """Tokens that every sequence fits in."""
        return max(1024, *(task.prompt + task.generate + 64 for task in self.tasks))

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Order:
        fields = json.loads(text)
        return cls(fields["model"], fields["threads"], [Task(**task) for task in fields["tasks"]])


class Engine(Protocol):
    def answer(self, prompts: list[list[int]], generate: int) -> tuple[float, float]:
        """Greedy answers of exactly `generate` tokens: seconds to the first token of all, and to the last."""
        ...


def serve(engine: Engine, order: Order) -> None:
    """Do the tasks, each after a shorter one of its kind to warm up, and print their speeds as JSON."""
    speeds = {}
    for task in order.tasks:
        engine.answer(task.prompts(0), min(2, task.generate))
        speeds[task.name] = task.speed(*engine.answer(task.prompts(1), task.generate))
    print(json.dumps(speeds))


def ordered() -> Order:
    """The order that this process was started with."""
    return Order.load(sys.argv[1])
