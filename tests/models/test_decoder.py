"""What the decoder promises besides its values: steps that allocate nothing, rows that do not feel one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.modules import DETERMINISTIC
from tests.loading.checkpoints import write_folder
from tests.models.harness import KERNELS, Rig, make
from tramontane.errors import UnsupportedModel
from tramontane.loading.build import load_model
from tramontane.models.decoder import slot_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("decoder") / "m")


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_allocates_nothing_once_its_buffers_are_there(
    kernels: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(load_model(folder, make(kernels)).decoder)
    rig.run(list(range(7)))
    nbytes = rig.workspace.nbytes

    def refuse(*_: object) -> None:
        raise AssertionError("allocated in a step")

    monkeypatch.setattr(rig.ops, "empty", refuse)
    monkeypatch.setattr(rig.ops, "zeros", refuse)
    rig.run(list(range(40)), [7, 1, 1])
    assert rig.workspace.nbytes == nbytes


@pytest.mark.parametrize("kernels", DETERMINISTIC)
def test_deterministic_rows_do_not_depend_on_their_batch(kernels: str, folder: Path) -> None:
    """Bit for bit: alone and whole, alone and in chunks, or among others that come and go."""
    decoder = load_model(folder, make(kernels)).decoder
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 50, 40)]
    alone = Rig(decoder).run(ids)
    assert np.array_equal(Rig(decoder).run(ids, [3, 1, 1, 17]), alone)
    rig = Rig(decoder)
    one, other, third = rig.sequence(), rig.sequence(), rig.sequence()
    parts = [
        rig.step((other, ids[:20]), (one, ids[:9]))[1],
        rig.step((one, ids[9:10]), (third, ids[5:12]), (other, ids[30:31]))[0],
        rig.step((third, [7]), (one, ids[10:]))[1],
    ]
    assert np.array_equal(np.concatenate(parts), alone)


def test_layers_that_share_cache_arrays_must_be_alike(folder: Path) -> None:
    spec = load_model(folder, make("reference")).spec
    first, second = spec.layers
    mixed = replace(
        spec, layers=(first, replace(second, attention=replace(second.attention, window=8, num_kv_heads=1)))
    )
    with pytest.raises(UnsupportedModel, match="another cache group"):
        slot_shapes(mixed)
