"""The command as a user runs it: in a process of its own, on pipes or on a terminal, with a scripted model."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "tramontane"]
# Runs the command with a scripted model in place of whatever --model says. Once three pieces of an answer have been
# read, it writes what $TELL says to standard error.
_SCRIPTED = """
import os
from tramontane.backends.mock import MockBackend
from tramontane.cli import main, run
from tramontane.llm import LLM

class Telling(MockBackend):
    async def generate(self, request):
        count = 0
        async for chunk in super().generate(request):
            yield chunk
            count += 1
            if count == 3:
                os.write(2, os.environ.get("TELL", "").encode())

run.open_llm = lambda *args, **kwargs: LLM.from_backend(Telling(SETTINGS))
main()
"""
_PATIENCE = 60.0
"""Seconds after which a test gives up; nothing is measured by them."""


def scripted(settings: str) -> list[str]:
    """The command with `MockBackend(settings)` behind it; `settings` are written as in Python."""
    return [sys.executable, "-c", _SCRIPTED.replace("SETTINGS", settings)]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what changes the shell's output, and with `changes`."""
    steering = ("NO_COLOR", "FORCE_COLOR", "MISTRALRS_NO_STREAM", "TRAMONTANE_DEBUG", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), source if "PYTHONPATH" in kept else ""]))
    return {**kept, **({"PYTHONPATH": path} if path else {}), "TERM": "xterm", "PYTHONUTF8": "1", **changes}


def run(
    *arguments: str,
    command: Sequence[str] = COMMAND,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end on pipes."""
    env = environment() if env is None else env
    return subprocess.run([*command, *arguments], input=stdin, capture_output=True, env=env, timeout=_PATIENCE)


class Terminal:
    """A command on a pseudo terminal, whose keyboard and screen the test has."""

    def __init__(self, *arguments: str, command: Sequence[str] = COMMAND, env: Mapping[str, str] | None = None) -> None:
        pty = pytest.importorskip("pty", reason="this system has no pseudo terminals")
        argv, env = [*command, *arguments], environment() if env is None else env
        self._pid, self._screen = pty.fork()
        if self._pid == 0:
            os.execve(argv[0], argv, dict(env))
        self.seen = ""
        self._fresh = 0

    def send(self, keys: str | bytes) -> None:
        os.write(self._screen, keys.encode() if isinstance(keys, str) else keys)

    def expect(self, text: str) -> str:
        """Wait until `text` is on the screen, after what was expected before; what stands from there up to its end."""
        while (at := self.seen.find(text, self._fresh)) < 0:
            if not self._read():
                pytest.fail(f"{text!r} did not come; after {self.seen[: self._fresh]!r} came {self.rest()!r}")
        found = self.seen[self._fresh : at + len(text)]
        self._fresh = at + len(text)
        return found

    def insist(self, keys: str, text: str) -> str:
        """Send `keys`, and every other second again, until `text` comes. Of Ctrl-C that arrives just before Python
        waits for a key, Python tells with the next."""
        again, late = 0.0, time.monotonic() + _PATIENCE
        while self.seen.find(text, self._fresh) < 0 and (now := time.monotonic()) < late:
            if now >= again:
                self.send(keys)
                again = now + 2
            if select.select([self._screen], [], [], 0.1)[0] and not self._read():
                break
        return self.expect(text)

    def rest(self) -> str:
        """What is on the screen after what was expected last."""
        return self.seen[self._fresh :]

    def close(self) -> int:
        """Wait for the command's end; its exit code."""
        while self._read():
            pass
        _, status = os.waitpid(self._pid, 0)
        os.close(self._screen)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._screen], [], [], _PATIENCE)
        if not ready:
            os.kill(self._pid, signal.SIGKILL)
            return False
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)


def interrupted(command: Sequence[str], *arguments: str) -> tuple[int, str, str]:
    """Send SIGINT when some of a `scripted` answer was read: exit code, output and errors."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([*command, *arguments], stdout=pipe, stderr=pipe, env=environment(TELL="!"))
    assert process.stderr is not None
    assert process.stderr.read(1) == b"!"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=_PATIENCE)
    return process.returncode, out.decode(), err.decode()
