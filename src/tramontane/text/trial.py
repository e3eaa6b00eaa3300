"""A grammar tried out in a process of its own, before it is let into this one.

Owns the child and its bounds. Must not know: tokenizers, requests. llguidance follows references and rules by
recursion: a chain of a thousand ends the process that compiles it; and some schemas of a few thousand characters take
minutes. Whatever passes here compiles in this process with a stack several times the child's.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from tramontane.errors import InvalidRequest

T = TypeVar("T")

_CPU_SECONDS = 5
_SECONDS = 30.0
_MEMORY = 2 << 30
_CHILDS_STACK, _STACK = 2 << 20, 8 << 20
_CHILD = """
import sys, threading
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2])))
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    pass
sys.path.insert(0, sys.argv[1])
import llguidance
def compile():
    llguidance.LLMatcher.validate_grammar(sys.stdin.buffer.read().decode())
threading.stack_size(int(sys.argv[4]))
thread = threading.Thread(target=compile)
thread.start()
thread.join()
"""
_two_at_once = threading.Semaphore(2)
_starting = threading.Lock()


def try_out(source: str, library: Path) -> None:
    """Compile llguidance's words for a grammar elsewhere; `library` is the folder that holds the package.

    Raises InvalidRequest("grammar") where that takes too long or too much memory, or ends the process. An error that
    llguidance finds is left for the real compilation to find again.
    """
    limits = [str(number) for number in (_CPU_SECONDS, _MEMORY, _CHILDS_STACK)]
    command = [sys.executable, "-I", "-c", _CHILD, str(library), *limits]
    too_complex = InvalidRequest("grammar", "it is too complex to be compiled", "Make it smaller, or less nested.")
    try:
        with _two_at_once:
            done = subprocess.run(command, input=source.encode(), capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise too_complex from None
    except OSError as error:  # no interpreter to start, or no memory for it
        raise InvalidRequest("grammar", f"it is long, and could not be tried out ({error})", "Shorten it.") from error
    if done.returncode:
        raise too_complex


def with_room(call: Callable[[], T]) -> T:
    """What `call` returns or raises, on a thread with a large stack."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="tramontane-grammar", daemon=True)
    with _starting:
        before = threading.stack_size(_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return future.result()
