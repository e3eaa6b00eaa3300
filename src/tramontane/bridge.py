"""The bridge from plain threads to coroutines: one event loop on one thread of its own, for the whole process.

Owns that thread and the waiting for it. Works from any thread, and where an event loop runs already (notebooks), as
nothing ever runs on the caller's loop. Must not know: backends, requests.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

from tramontane.errors import TramontaneError

T = TypeVar("T")
Item = TypeVar("Item")
Reply = TypeVar("Reply")

# A wait without a limit cannot be interrupted from the keyboard on every platform; waits of this many seconds can.
_TICK = 1.0

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end and return its result. An exception in the waiting thread (Ctrl-C) cancels it."""
    job = _Job(work)
    try:
        job.start()
        while not job.done.done():
            wait([job.done], timeout=_TICK)
    finally:
        job.leave()
    return job.done.result()


def converse(
    work: Callable[[Callable[[Item], Awaitable[Reply]]], Coroutine[Any, Any, T]],
) -> Generator[Item, Reply, T]:
    """Run `work(ask)`: each `await ask(item)` gives the item to whoever iterates here, and returns what they send.

    So a coroutine goes no faster than its reader. The generator's return value is the coroutine's; closing the
    generator, or leaving it to the garbage collector, cancels the coroutine without waiting for it.
    """
    mail: queue.SimpleQueue[tuple[Item, asyncio.Future[Reply]] | None] = queue.SimpleQueue()

    async def ask(item: Item) -> Reply:
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        mail.put((item, answered))
        return await answered

    job = _Job(work(ask))
    job.done.add_done_callback(lambda _: mail.put(None))
    try:
        job.start()
        while True:
            try:
                got = mail.get(timeout=_TICK)
            except queue.Empty:
                continue
            if got is None:
                return job.done.result()
            item, answered = got
            reply = yield item
            answered.get_loop().call_soon_threadsafe(_settle, answered, reply)
    finally:
        job.leave()


def _settle(answered: asyncio.Future[Reply], reply: Reply) -> None:
    if not answered.done():
        answered.set_result(reply)


class _Job(Generic[T]):
    """A coroutine on the loop. Its owner may leave at any moment, even in the middle of starting it."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.done: Future[T] = Future()
        self._work = work
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        loop = _running_loop()
        if threading.current_thread() is _thread:
            raise TramontaneError("LLM was called from inside a backend's own event loop.", "Use AsyncLLM there.")
        self._loop = loop
        loop.call_soon_threadsafe(self._begin)

    def leave(self) -> None:
        """Cancel what is not done. Waits for nothing."""
        if self.done.done():
            return
        if self._loop is None:
            self._work.close()
        else:
            self._loop.call_soon_threadsafe(self._stop)

    # on the loop

    def _begin(self) -> None:
        self._task = asyncio.ensure_future(self._finish())
        # Cancelled before its first step, the task would leave the work unstarted.
        self._task.add_done_callback(lambda _: self._work.close())

    async def _finish(self) -> None:
        try:
            result = await self._work
        except BaseException as error:  # whatever it is, it is the owner's, and must not end the loop
            self.done.set_exception(error)
        else:
            self.done.set_result(result)

    def _stop(self) -> None:
        if self._task is None:
            self._work.close()
        else:
            self._task.cancel()


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _thread
    with _lock:
        # A forked child inherits the loop but not its thread.
        if _loop is None or _thread is None or not _thread.is_alive():
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_serve, args=(_loop,), name="tramontane-loop", daemon=True)
            _thread.start()
        return _loop


@atexit.register
def _let_end() -> None:
    """What is cancelled when the program ends comes to its end: of tasks that do not, asyncio tells the terminal."""
    if _loop is None or _thread is None or not _thread.is_alive():
        return

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_TICK)

    wait([asyncio.run_coroutine_threadsafe(end(), _loop)], timeout=2 * _TICK)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
