"""Tracing: what happened when, as a file that chrome://tracing and ui.perfetto.dev show.

Owns the file and its format (Trace Event Format, as an array of objects, a line each). Must not know: what is traced.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tramontane.errors import InvalidRequest


class Trace:
    """A trace under way; any thread may add to it. The file can be read at any time after `flush`: its readers do not
    ask for the array's closing bracket."""

    def __init__(self, path: str | Path) -> None:
        """Overwrites `path`. Raises InvalidRequest where it cannot be written."""
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  # open as long as the trace
        except OSError as error:
            raise InvalidRequest("profile", f"cannot write {path}: {error.strerror}", "Name another file.") from None
        self._file.write("[\n")
        self._lock = threading.Lock()
        self._named: set[int] = set()

    @contextmanager
    def span(self, name: str, category: str, **told: Any) -> Iterator[dict[str, Any]]:
        """Something that lasts as long as the block; `told`, and what the block puts into the dict that it gets, says
        more of it."""
        begun = time.perf_counter_ns()
        try:
            yield told
        finally:
            self.add(name, category, begun, time.perf_counter_ns(), told)

    def add(self, name: str, category: str, begun: int, ended: int, told: dict[str, Any] | None = None) -> None:
        """Something that has lasted between two readings of `time.perf_counter_ns`."""
        self._write(name, category, "X", begun, dur=(ended - begun) / 1000, **({"args": told} if told else {}))

    def mark(self, phase: str, name: str, category: str, identity: str, **told: Any) -> None:
        """Something that does not lie on one thread: `phase` "b" begins it, "n" is a moment of it, "e" its end."""
        self._write(name, category, phase, time.perf_counter_ns(), id=identity, args=told)

    def flush(self) -> None:
        """Write out what is known."""
        with self._lock:
            self._file.flush()

    def _write(self, name: str, category: str, phase: str, at: int, **more: Any) -> None:
        thread = threading.get_native_id()
        event = {"name": name, "cat": category, "ph": phase, "ts": at / 1000, "pid": os.getpid(), "tid": thread, **more}
        lines = [json.dumps(event)]
        with self._lock:
            if thread not in self._named:
                self._named.add(thread)
                named = {"name": threading.current_thread().name}
                lines.append(
                    json.dumps({"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": thread, "args": named})
                )
            self._file.write(",\n".join(lines) + ",\n")
