"""Encoder: whole texts in turns, in batches and pieces, with the same states whoever else is there."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from tests.engine import checkpoints
from tests.engine.checkpoints import CONTEXT, prompt
from tests.kernels.modules import make
from tramontane.engine.encoder import Encoder, Task, Text
from tramontane.errors import EngineClosed, OutOfMemory
from tramontane.kernels.workspace import Workspace
from tramontane.loading.build import LoadedModel

STEP = 48


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Causal, with windows: two cache groups."""
    return checkpoints.load(checkpoints.write(tmp_path_factory.mktemp("tiny")), make("reference"))


def encoder(loaded: LoadedModel, rows: int = STEP, seqs: int = 8) -> Encoder:
    return Encoder(
        loaded.decoder,
        Workspace(loaded.ops, rows),
        block_size=4,
        context_length=CONTEXT,
        max_num_batched_tokens=STEP,
        max_num_seqs=seqs,
        cache_dtype="float32",
    )


def texts(*lengths: int) -> list[Text]:
    return [Text(prompt(length, seed)) for seed, length in enumerate(lengths)]


def drive(encoder: Encoder, *tasks: Task) -> int:
    """Read them all; the number of steps."""
    for task in tasks:
        encoder.add(task)
    steps = 0
    while encoder.has_work:
        encoder.step()
        steps += 1
        assert steps < 1000
    return steps


def read(encoder: Encoder, given: list[Text], *modes: Any) -> Any:
    task = Task(given, modes or ("mean",))
    drive(encoder, task)
    return np.array(task.future.result(0))


def test_alone_is_as_among_others(loaded: LoadedModel) -> None:
    given = texts(1, 7, 30, 48, 3, 12, 5, 100, 2, 160, 40)
    together = read(encoder(loaded), given, "mean", "lasttoken")
    alone = np.concatenate([read(encoder(loaded), [text], "mean", "lasttoken") for text in given])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    whole = read(encoder(loaded, rows=CONTEXT), given, "mean", "lasttoken")
    np.testing.assert_allclose(together, whole, rtol=1e-4, atol=1e-5)


def test_a_batch_is_as_many_whole_texts_as_a_step_has_room_for(loaded: LoadedModel) -> None:
    assert drive(encoder(loaded), Task(texts(*[6] * 16), ["mean"])) == 2
    assert drive(encoder(loaded, seqs=3), Task(texts(*[6] * 16), ["mean"])) == 6
    assert drive(encoder(loaded), Task(texts(40, 40, 8), ["mean"])) == 2
    assert drive(encoder(loaded), Task(texts(48 * 3), ["mean"])) == 3


def test_callers_take_turns(loaded: LoadedModel) -> None:
    long, short = Task(texts(*[20] * 30), ["mean"]), Task(texts(5), ["mean"])
    read_by = encoder(loaded)
    read_by.add(long)
    read_by.add(short)
    read_by.step()
    assert short.future.done()
    assert not long.future.done()


def test_a_long_text_lets_others_pass(loaded: LoadedModel) -> None:
    """One in pieces is being read: what is short goes between them, another long one waits, and a failure of the
    short ones is not its own."""
    read_by = encoder(loaded)
    long, second, short = (
        Task(texts(CONTEXT), ["mean"]),
        Task(texts(CONTEXT - 1), ["mean"]),
        Task(texts(5, 7), ["mean"]),
    )
    for task in (long, second, short):
        read_by.add(task)
    read_by.step()
    read_by.step()
    assert short.future.done()
    assert not long.future.done()
    bad = Task([Text((10**6,))], ["mean"])
    drive(read_by, bad)
    with pytest.raises(IndexError):
        bad.future.result(0)
    for task, given in ((long, texts(CONTEXT)), (second, texts(CONTEXT - 1))):
        assert np.array_equal(np.array(task.future.result(0)), read(encoder(loaded), given, "mean"))


def test_a_text_beyond_memory_is_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tramontane.engine.encoder.available_memory", lambda: 1000)
    task = Task(texts(CONTEXT), ["mean"])
    drive(encoder(loaded), task)
    with pytest.raises(OutOfMemory, match="read in pieces"):
        task.future.result(0)


def test_nothing_to_read_is_done_at_once(loaded: LoadedModel) -> None:
    task = Task([], ["mean"])
    assert drive(encoder(loaded), task) == 0
    assert task.future.result(0) == []


def test_cancelling_ends_the_work(loaded: LoadedModel) -> None:
    for given in (texts(*[40] * 50), texts(CONTEXT)):
        read_by, task, other = encoder(loaded), Task(given, ["mean"]), Task(texts(9), ["mean"])
        read_by.add(task)
        read_by.add(other)
        read_by.step()
        assert task.future.cancel()
        assert drive(read_by) <= 3
        assert len(other.future.result(0)) == 1


def test_what_was_cancelled_before_it_came_is_left_alone(loaded: LoadedModel) -> None:
    by, task, nothing = encoder(loaded), Task(texts(5), ["mean"]), Task([], ["mean"])
    assert task.future.cancel()
    assert nothing.future.cancel()
    by.add(task)
    by.add(nothing)
    assert not by.has_work
    assert len(read(by, texts(7))) == 1


def test_a_failure_is_its_batchs_alone(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read_by, good = encoder(loaded), Task(texts(4), ["mean"])
    bad = Task(texts(*[40] * 3, CONTEXT), ["mean"])
    read_by.add(bad)
    with monkeypatch.context() as patched:
        patched.setattr(loaded.decoder, "forward", lambda *_: 1 / 0)
        read_by.step()
    drive(read_by, good)
    with pytest.raises(ZeroDivisionError):
        bad.future.result(0)
    assert len(good.future.result(0)) == 1


def test_closing_fails_what_is_open_and_what_comes(loaded: LoadedModel) -> None:
    read_by = encoder(loaded)
    tasks = [Task(texts(*[40] * 3), ["mean"]), Task(texts(CONTEXT), ["mean"]), Task(texts(3), ["mean"])]
    for task in tasks[:2]:
        read_by.add(task)
    read_by.step()
    read_by.step()
    memory = weakref.ref(read_by._workspace)
    read_by.close(EngineClosed("closed"))
    assert memory() is None
    read_by.add(tasks[2])
    assert not read_by.has_work
    for task in tasks:
        with pytest.raises(EngineClosed):
            task.future.result(0)
    read_by.step()


def test_memory_is_a_step_long_and_one_layer_deep(loaded: LoadedModel) -> None:
    scratch = loaded.decoder.new_scratch(8, 4)
    assert {id(scratch.layer(index)[0]) for index in range(4)} == {id(scratch.layer(0)[0])}
