"""Packed weights kept on disk: read by the next start, and by none that they are not of."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.kernels.modules import make
from tests.loading.checkpoints import write_folder, write_gguf
from tests.loading.quantized.cases import CASES, write_case
from tests.models.harness import Rig
from tests.models.tiny import TinyModels
from tramontane import LLM
from tramontane.backends.shared import stamps
from tramontane.errors import InvalidRequest
from tramontane.kernels.arena import Arena
from tramontane.kernels.coded import Coded
from tramontane.kernels.cpu import CpuOps
from tramontane.loading import build, packed
from tramontane.loading.build import load_model
from tramontane.weights import Weight

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
Arrays = dict[str, NDArray[Any]]


def logits(model: Path, **options: Any) -> NDArray[np.float32]:
    return Rig(load_model(model, make("cpu"), **options).decoder).run(IDS)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats of the matrices that were packed, samples aside."""
    done: list[str] = []
    pack = CpuOps.pack

    def counted(self: CpuOps, matrix: NDArray[Any], format: str) -> NDArray[Any]:
        if matrix.shape[0] != 17:
            done.append(format)
        return pack(self, matrix, format)

    def counted_codes(self: CpuOps, coded: Coded, rows: int) -> Coded:
        made = pack_codes(self, coded, rows)
        if made.codes is not coded.codes and rows != 17:
            done.append("codes")
        return made

    pack_codes = CpuOps.pack_codes
    monkeypatch.setattr(CpuOps, "pack", counted)
    monkeypatch.setattr(CpuOps, "pack_codes", counted_codes)
    return done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_gguf(folder / "m.gguf", matrices="Q4_1")


def kept(model: Path) -> Path:
    (found,) = model.parent.rglob("*.packed")
    return found


@pytest.mark.parametrize("matrices", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_what_one_start_packs_the_next_one_reads(tmp_path: Path, packs: list[str], matrices: str) -> None:
    model = write_gguf(tmp_path / "m.gguf", matrices=matrices)
    plain, first = logits(model), logits(model, keep_packed=True)
    assert packs.count(matrices) >= 14
    assert kept(model) == tmp_path / "m.gguf.auto.packed"
    packs.clear()
    np.testing.assert_array_equal(logits(model, keep_packed=True), plain)
    np.testing.assert_array_equal(first, plain)
    assert not packs


def test_a_folder_keeps_its_own_one_for_each_dtype(tmp_path: Path, packs: list[str]) -> None:
    model = write_folder(tmp_path / "m")
    before = stamps(model)
    expected = {dtype: logits(model, dtype=dtype, keep_packed=True) for dtype in ("float32", "bfloat16")}
    assert {path.name for path in model.glob("*.packed")} == {"weights.float32.packed", "weights.bfloat16.packed"}
    assert stamps(model) == before, "what we keep is no change of the model"
    packs.clear()
    for dtype, wanted in expected.items():
        np.testing.assert_array_equal(logits(model, dtype=dtype, keep_packed=True), wanted)
    assert not packs


@pytest.mark.parametrize("name", CASES)
def test_codes_are_kept_with_all_that_belongs_to_them(tmp_path: Path, packs: list[str], name: str) -> None:
    write_case(tmp_path / "m", CASES[name])
    plain = load_model(tmp_path / "m", make("cpu"))
    if not packs:
        with pytest.raises(InvalidRequest, match="packs no matrix"):
            load_model(tmp_path / "m", make("cpu"), keep_packed=True)
        return
    in_vectors = not name.endswith("axis0")  # whose groups are of columns
    assert ("codes" in packs) == (in_vectors and CASES[name].format in ("INT4", "INT8", "NF4", "FP4"))
    load_model(tmp_path / "m", make("cpu"), keep_packed=True)
    packs.clear()
    again = load_model(tmp_path / "m", make("cpu"), keep_packed=True)
    assert not packs
    for canonical, weight in plain.decoder.parameters.items():
        if not isinstance(weight, Weight):
            continue
        kept_one: Any = again.decoder.parameters[canonical]
        assert (kept_one.format, kept_one.shape, kept_one.nbytes) == (weight.format, weight.shape, weight.nbytes)
        tensors, expected = kept_one.tensors(), weight.tensors()
        assert tensors.keys() == expected.keys()
        for role, array in expected.items():
            np.testing.assert_array_equal(tensors[role], array)


def test_each_expert_is_kept(tmp_path: Path, packs: list[str]) -> None:
    model = TinyModels(tmp_path).get("mixtral").path
    first = logits(model, keep_packed=True)
    packs.clear()
    np.testing.assert_array_equal(logits(model, keep_packed=True), first)
    assert not packs


def test_a_folder_of_ones_own_choice(model: Path, tmp_path: Path, packs: list[str]) -> None:
    there = tmp_path / "else" / "where"
    logits(model, keep_packed=str(there))
    assert [path.parent for path in tmp_path.rglob("*.packed")] == [there]
    packs.clear()
    logits(model, keep_packed=str(there))
    assert not packs


def test_where_the_models_folder_is_not_ones_own_it_is_our_cache(
    model: Path, tmp_path: Path, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "cache"))
    refuse_writing_below(model.parent, monkeypatch)
    logits(model, keep_packed=True)
    assert [path.parent for path in tmp_path.rglob("*.packed")] == [tmp_path / "cache" / "packed"]
    packs.clear()
    logits(model, keep_packed=True)
    assert not packs


def refuse_writing_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As permissions do to all but root, who runs tests too."""
    write = packed._write

    def refusing(place: Path, *rest: Any) -> None:
        if folder in place.parents:
            raise PermissionError(13, "Permission denied")
        write(place, *rest)

    monkeypatch.setattr(packed, "_write", refusing)


def test_where_nothing_can_be_written_the_model_loads_and_a_warning_says_so(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    np.testing.assert_array_equal(logits(model, keep_packed=str(tmp_path / "file")), logits(model))
    assert "cannot be kept" in caplog.text


def test_a_write_that_fails_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setenv("TRAMONTANE_CACHE", str(model.parent / "cache"))
    logits(model, keep_packed=True)
    assert not list(model.parent.rglob("*.packed"))


def _other_values(model: Path) -> None:
    tensors = bytearray(model.read_bytes())
    tensors[-5] ^= 8
    model.write_bytes(tensors)


def _truncated(model: Path) -> None:
    path = kept(model)
    path.write_bytes(path.read_bytes()[:-100])


def _longer(model: Path) -> None:
    path = kept(model)
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(model: Path) -> None:
    kept(model).write_bytes(b"")


def _another_identity(model: Path) -> None:
    path = kept(model)
    path.write_bytes(path.read_bytes().replace(b'"identity": "', b'"identity": "0', 1)[:-1])


def _another_shape(model: Path) -> None:
    path = kept(model)
    old, new = b'"shape": [2, 1, ', b'"shape": [1, 2, '
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def _another_name(model: Path) -> None:
    path = kept(model)
    path.write_bytes(path.read_bytes().replace(b"layers.0.mlp.up", b"layers.7.mlp.up"))


@pytest.mark.parametrize(
    "change",
    [_other_values, _truncated, _longer, _empty, _another_identity, _another_shape, _another_name],
)
def test_what_is_not_of_this_model_is_made_anew(
    model: Path, change: Callable[[Path], None], packs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    logits(model, keep_packed=True)
    change(model)
    expected = logits(model)
    packs.clear()
    np.testing.assert_array_equal(logits(model, keep_packed=True), expected)
    assert packs
    assert "packed weights are made anew" in caplog.text
    packs.clear()
    caplog.clear()
    np.testing.assert_array_equal(logits(model, keep_packed=True), expected)
    assert not packs
    assert not caplog.text


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(packed, "_code", lambda: [("names.py", 1, 2)]), (build, "packed_sample", lambda ops, format: b"other tiles")],
)
def test_another_version_or_layout_makes_it_anew(
    model: Path, module: Any, name: str, value: object, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(model, keep_packed=True)
    packs.clear()
    monkeypatch.setattr(module, name, value)
    logits(model, keep_packed=True)
    assert packs


UP = "layers.0.mlp.up/0"


def _set(name: str, at: int, value: int) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[f"{UP}/{name}"].reshape(-1)[at] = value

    return change


def _cut(name: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[f"{UP}/{name}"] = arrays[f"{UP}/{name}"][1:].copy()

    return change


def _narrowed(arrays: Arrays) -> None:
    for name in ("scales", "zeros"):
        arrays[f"{UP}/{name}"] = arrays[f"{UP}/{name}"][:, 1:].copy()


def _groups_that_are_no_vectors(arrays: Arrays) -> None:
    _set("layout", 0, 8)(arrays)
    for name in ("scales", "zeros"):
        arrays[f"{UP}/{name}"] = np.repeat(arrays[f"{UP}/{name}"], 4, axis=1)


def _without(name: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        del arrays[f"{UP}/{name}"]

    return change


def _with_more(arrays: Arrays) -> None:
    arrays[f"{UP}/else"] = np.zeros(3, np.uint8)


def _of_no_matrix(arrays: Arrays) -> None:
    arrays["else"] = np.zeros(3, np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        *(_set("order", 0, value) for value in (10**6, -1, 5)),
        *(_set("layout", 0, value) for value in (0, -32, 31, 2**31 - 1)),
        _set("layout", 1, 0),
        *(_cut(name) for name in ("order", "layout", "scales", "zeros", "table", "codes")),
        *(_without(name) for name in ("codes", "scales", "table", "layout")),
        _narrowed,
        _groups_that_are_no_vectors,
        _with_more,
        _of_no_matrix,
    ],
)
def test_codes_that_cannot_be_of_the_model_are_made_anew(
    tmp_path: Path, change: Callable[[Arrays], None], packs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "m"
    write_case(model, CASES["gptq-4-act-order"])
    expected = logits(model, keep_packed=True)
    with safe_open(kept(model), "numpy") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(arrays)
    save_file(arrays, kept(model), metadata)
    packs.clear()
    np.testing.assert_array_equal(logits(model, keep_packed=True), expected)
    assert "codes" in packs
    assert "packed weights are made anew" in caplog.text


def test_a_matrix_of_codes_that_is_not_kept_is_read_from_the_model(tmp_path: Path, packs: list[str]) -> None:
    model = tmp_path / "m"
    write_case(model, CASES["awq"])
    expected = logits(model, keep_packed=True)
    with safe_open(kept(model), "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys() if UP not in name}  # noqa: SIM118
        metadata = file.metadata()
    save_file(arrays, kept(model), metadata)
    packs.clear()
    np.testing.assert_array_equal(logits(model, keep_packed=True), expected)
    assert packs == ["codes"]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_byte_of_kept_codes_makes_loading_or_computing_fail(
    coded: tuple[Path, bytes, list[range]], data: st.DataObject
) -> None:
    model, content, places = coded
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.sampled_from(data.draw(st.sampled_from(places))))] ^= 1 << data.draw(st.integers(0, 7))
    (model / "weights.auto.packed").write_bytes(broken)
    logging.getLogger("tramontane").setLevel(logging.CRITICAL)
    try:
        assert logits(model, keep_packed=True).shape[0] == len(IDS)
    finally:
        logging.getLogger("tramontane").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[range]]:
    """A model of codes, its kept file, and where in it lie the header and all that says how codes are read."""
    model = tmp_path_factory.mktemp("coded") / "m"
    write_case(model, CASES["gptq-4-act-order"])
    logits(model, keep_packed=True)
    content = kept(model).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = {name: entry for name, entry in json.loads(content[8:start]).items() if name != "__metadata__"}
    small = [entry["data_offsets"] for name, entry in entries.items() if not name.endswith(("/codes", "/tiles"))]
    return model, content, [range(start), *(range(start + begin, start + end) for begin, end in small)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[packed.KeptWeights, dict[str, NDArray[Any]], bytes]:
    """A kept file, what is in it, and its bytes."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "m.gguf").write_bytes(b"GGUF")
    weights = packed.KeptWeights.of(folder / "m.gguf", True, "auto", ())
    arrays = {f"layers.{i}/0": np.arange(640, dtype=np.uint8).reshape(1, 10, 64) + np.uint8(i) for i in range(3)}
    weights.write(arrays)
    return weights, arrays, weights.places[0].read_bytes()


def rooms(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: Arena().empty(array.shape, array.dtype) for name, array in arrays.items()}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_header_makes_the_reader_fail_or_give_what_is_not_there(
    sound: tuple[packed.KeptWeights, dict[str, NDArray[Any]], bytes], data: st.DataObject
) -> None:
    weights, arrays, content = sound
    broken = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    kind = data.draw(st.sampled_from(["flip", "cut", "splice"]))
    at = data.draw(st.integers(0, header - 1))
    if kind == "flip":
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del broken[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        broken[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    weights.places[0].write_bytes(broken)
    logging.getLogger("tramontane").setLevel(logging.CRITICAL)
    try:
        found = weights.read(lambda stored: rooms(arrays))
    finally:
        logging.getLogger("tramontane").setLevel(logging.NOTSET)
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])
    assert found.keys() in ({}.keys(), arrays.keys())


def test_others_may_read_what_the_umask_lets_them(model: Path) -> None:
    logits(model, keep_packed=True)
    assert stat.S_IMODE(kept(model).stat().st_mode) == stat.S_IMODE(model.stat().st_mode)


def test_parts_of_a_split_model_count(tmp_path: Path) -> None:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m.gguf", "n-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(name.encode())

    def identity() -> str:
        return packed.KeptWeights.of(tmp_path / "m-00001-of-00002.gguf", True, "auto", ()).identity

    before = identity()
    (tmp_path / "n-00001-of-00002.gguf").write_bytes(b"others change")
    assert identity() == before
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"part two changes")
    assert identity() != before


@pytest.mark.parametrize("value", ["", 1, None.__class__])
def test_what_is_neither_yes_nor_a_folder_is_refused(model: Path, value: object) -> None:
    with pytest.raises(InvalidRequest, match="keep_packed"):
        LLM(model, keep_packed=value)


def test_ops_that_pack_nothing_refuse(model: Path) -> None:
    with pytest.raises(InvalidRequest, match="keep_packed"):
        load_model(model, make("reference"), keep_packed=True)


def test_progress_is_told_of_loads_that_take_long(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, int | None, str]] = []
    load_model(model, make("cpu"), progress=lambda *said: heard.append(said))
    assert not heard
    monkeypatch.setattr(build, "_LONG", -1.0)
    loaded = load_model(model, make("cpu"), progress=lambda *said: heard.append(said))
    assert heard == sorted(heard)
    assert heard[-1] == (loaded.weight_bytes, loaded.weight_bytes, "loading m.gguf")
