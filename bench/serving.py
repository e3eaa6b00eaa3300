"""Servers in processes of their own, and what they take of the processors and of memory.

Needs psutil. Must not know: what is asked of a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from bench.http_client import get_json
from bench.process import ROOT, ProgramFailed


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Processor time so far, of all its processes."""
        times = [one.cpu_times() for one in self._all()]
        return sum(t.user + t.system for t in times)

    def memory_bytes(self) -> int:
        """Memory that it holds now: what lies in files and could be given back is left out where that can be told."""
        return sum(getattr(one.memory_full_info(), "uss", 0) or one.memory_info().rss for one in self._all())

    def _all(self) -> Sequence[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@asynccontextmanager
async def running(
    command: Sequence[str], port: int, *, ready: str, timeout: float, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Running]:
    """Start a server that listens on `port`, wait until it answers 200 to `ready`, and end it after the block. Raises
    ProgramFailed with the last that it wrote."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        url = f"http://127.0.0.1:{port}"
        try:
            await _until_ready(process, url, ready, timeout)
            yield Running(url, psutil.Process(process.pid))
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            out.seek(0)
            end = " | ".join(out.read().strip().splitlines()[-3:])
            raise ProgramFailed(f"{error!r}; exit status {process.poll()}: {end[-500:]}") from error
        finally:
            children: Sequence[psutil.Process] = ()
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for one in [process, *children]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


async def _until_ready(process: subprocess.Popen[bytes], url: str, path: str, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if (await get_json(url, path))[0] == 200:
                return
        if process.poll() is not None:
            raise OSError("it ended before it was ready")
        if loop.time() > end:
            raise TimeoutError(f"it was not ready after {timeout:.0f} s")
        await asyncio.sleep(0.2)


def interpreter_environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
