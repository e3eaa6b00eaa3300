"""The bridge's own promises; what rests on it is tested with the facade."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings

import pytest

from tramontane import bridge


async def seven() -> int:
    return 7


def test_who_leaves_before_the_first_step_leaves_nothing_behind() -> None:
    """The loop is busy while the job is started and left: then it has both to do at once."""
    busy, free = threading.Event(), threading.Event()
    assert bridge.run(seven()) == 7
    loop = bridge._loop
    assert loop is not None

    def occupy() -> None:
        busy.set()
        free.wait(60)

    begun = []

    async def work() -> None:
        begun.append(1)

    loop.call_soon_threadsafe(occupy)
    assert busy.wait(60)
    coroutine = work()
    job = bridge._Job(coroutine)
    job.start()
    job.leave()
    free.set()
    assert bridge.run(seven()) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a coroutine that is never awaited says so when it is collected
        assert bridge.run(asyncio.sleep(0, 7)) == 7
        assert coroutine.cr_frame is None, "it is closed"
        del job, coroutine
        gc.collect()
    assert not begun


def test_a_thread_that_is_gone_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a forked child, which has the loop without its thread."""
    gone = threading.Thread(target=int)
    gone.start()
    gone.join()
    monkeypatch.setattr(bridge, "_loop", asyncio.new_event_loop())
    monkeypatch.setattr(bridge, "_thread", gone)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(bridge.run(seven())), daemon=True)
    asking.start()
    asking.join(60)
    assert found == [7]
    loop, thread = bridge._loop, bridge._thread
    assert thread is not gone
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
