"""`pull`, `list` and `rm` at the shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.loading.fakehub import REPO, FakeHub
from tests.loading.test_hub import FILES, home, hub

__all__ = ["home", "hub"]  # fixtures


@pytest.fixture(autouse=True)
def no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "packages"))


def test_pull_list_rm(hub: FakeHub, shell: Shell, home: Path) -> None:
    pulled = shell("pull", REPO)
    assert pulled.exit_code == 0, pulled.output
    path = Path(pulled.stdout.strip())
    assert (path / "model.safetensors").is_file()
    assert "fetching model.safetensors" in pulled.stderr

    text = shell("list")
    assert text.exit_code == 0
    head, row, *folders = text.stdout.splitlines()
    assert head.split() == ["NAME", "REVISION", "SIZE", "LAST", "USED", "PATH"]
    assert row.split()[:4] == [REPO, "main", "300.0", "KiB"]
    assert row.endswith(str(path))
    assert str(home / "hub") in folders[0]

    report = json.loads(shell("list", "--json").stdout)
    (model,) = report["models"]
    assert {key: model[key] for key in ("name", "revision", "path")} == {
        "name": REPO,
        "revision": "main",
        "path": str(path),
    }
    assert report["caches"][0]["path"] == str(home / "hub")
    assert report["caches"][0]["nbytes"] >= model["nbytes"] > 300_000

    refused = shell("rm", REPO)
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert path.is_dir()
    removed = shell("rm", REPO, "--yes")
    assert removed.exit_code == 0
    assert removed.stdout.strip() == "300.0 KiB freed"
    assert not path.exists()
    assert json.loads(shell("list", "--json").stdout)["models"] == []


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_rm_asks(answer: str, code: int, hub: FakeHub, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shell("pull", REPO).stdout.strip())
    monkeypatch.setattr("tramontane.cli.models._can_ask", lambda: True)
    asked = shell("rm", REPO, stdin=answer)
    assert asked.exit_code == code
    assert path.exists() == bool(code)
    assert "Remove org/tiny (300.0 KiB)?" in asked.stderr
    assert str(path.parent.parent) in asked.stderr


def test_pull_takes_what_is_new(hub: FakeHub, shell: Shell) -> None:
    first = shell("pull", REPO).stdout
    hub.revisions["main"] = {**FILES, "config.json": b'{"new": 1}'}
    assert shell("pull", REPO).stdout != first


def test_what_cannot_be_had(hub: FakeHub, shell: Shell) -> None:
    assert "no such repository" in shell("pull", "org/none").stderr
    assert shell("rm", "org/none", "--yes").exit_code == 1
    assert shell("rm", "./mine.gguf", "--yes").exit_code == 2
