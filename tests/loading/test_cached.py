"""What the caches hold, and what goes when a model is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loading.fakehub import REPO, FakeHub, commit_of
from tests.loading.test_hub import FILES, UQFF_REPO, WEIGHTS, ggufs, home, hub
from tramontane.errors import InvalidRequest, ModelNotFound
from tramontane.loading import hub as hub_module
from tramontane.loading.cached import cache_folders, cached_models, removal
from tramontane.loading.sources import resolve

__all__ = ["home", "hub"]  # fixtures

SPLIT = [f"m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "packages"))
    return tmp_path / "packages" / "models" / "pypi"


def listed() -> list[tuple[str, str, int]]:
    return [(model.name, model.revision, model.nbytes) for model in cached_models()]


def test_nothing(hub: FakeHub) -> None:
    assert cached_models() == []
    assert list(cache_folders().values()) == [0, 0]
    for name in (REPO, f"{REPO}@main", f"{REPO}:Q8_0", "pypi:a/b.gguf"):
        with pytest.raises(ModelNotFound, match="not cached"):
            removal(name)
    with pytest.raises(InvalidRequest, match="path"):
        removal("./model.gguf")


def test_the_list_opens_what_it_names(hub: FakeHub, packages: Path) -> None:
    hub.revisions["main"] = {**FILES, **ggufs("a-Q4_K_M.gguf", *SPLIT)}
    hub.revisions["v1"] = {**FILES, "config.json": b"{}"}
    old = resolve(f"{REPO}@v1")
    paths = [resolve(name) for name in (f"{REPO}:4", f"{REPO}:8", REPO)]
    (packages / "pack" / "1.0" / "sub").mkdir(parents=True)
    (packages / "pack" / "1.0" / "sub" / "m.gguf").write_bytes(b"GGUF")
    assert cached_models() == sorted(cached_models(), key=lambda m: m.name)
    assert len(cached_models()) == 4, "a package's file without its note does not count"
    (packages / "pack" / "1.0" / "sub" / "m.gguf.sha256").write_text("0")

    names = [model.name for model in cached_models()]
    main = [REPO, f"{REPO}/a-Q4_K_M.gguf", f"{REPO}/{SPLIT[0]}"]
    assert names == [main[0], *main[1:], f"{REPO}@v1", "pypi:pack==1.0/sub/m.gguf"]
    hub.asked.clear()
    assert [resolve(model.name) for model in cached_models()] == [model.path for model in cached_models()]
    assert not hub.asked
    by_name = {model.name: model for model in cached_models()}
    assert {by_name[main[1]].path, by_name[main[2]].path, by_name[REPO].path} == set(paths)
    assert by_name[f"{REPO}@v1"].path == old
    assert by_name[main[2]].nbytes == sum(len(hub.files[name]) for name in SPLIT)
    assert len(WEIGHTS) < by_name[REPO].nbytes < len(WEIGHTS) + 1000
    assert by_name[REPO].revision == "main"

    hub.revisions["main"] = {**FILES, "tokenizer.json": b"[]"}
    resolve(REPO, refresh=True)
    # The commit that main has left is still there, under its own name.
    assert f"{REPO}@{paths[2].name}" in [model.name for model in cached_models()]
    assert resolve(f"{REPO}@{paths[2].name}") == paths[2]


def test_unfinished_and_foreign_things_are_not_listed(hub: FakeHub) -> None:
    hub.override["model.safetensors"] = b"short"
    hub.revisions["main"] = {**FILES}
    snapshot = hub_module.repo_folder(REPO) / "snapshots" / hub.commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    for folder in ("datasets--a--b", "models--single"):
        (hub_module.cache_folder() / folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    assert cached_models() == []


def test_a_repository_goes_with_its_leftovers(hub: FakeHub) -> None:
    resolve(REPO)
    home = hub_module.repo_folder(REPO)
    (home / "blobs" / "x.tramontane.incomplete").write_bytes(b"half")
    before = sum(cache_folders().values())
    found = removal(REPO)
    assert found.paths == (home,)
    assert home.exists(), "nothing goes before it is said"
    found.run()
    assert not home.exists()
    assert not (home.parent / ".locks" / home.name).exists()
    refs_and_links = 40
    assert before - sum(cache_folders().values()) == found.nbytes + refs_and_links
    assert cached_models() == []

    (home / "blobs").mkdir(parents=True)
    (home / "blobs" / "x.tramontane.incomplete").write_bytes(b"half")
    found = removal(REPO)
    assert found.nbytes == 4
    found.run()
    assert not home.exists()


def test_a_revision_leaves_what_others_share(hub: FakeHub) -> None:
    hub.revisions["v1"] = {**FILES, "config.json": b'{"v": 1}'}
    main, old = resolve(REPO), resolve(f"{REPO}@v1")
    found = removal(f"{REPO}@v1")
    assert found.nbytes == len(b'{"v": 1}')
    found.run()
    assert not old.exists()
    assert (main / "model.safetensors").read_bytes() == WEIGHTS
    with pytest.raises(ModelNotFound):
        removal(f"{REPO}@v1")
    removal(f"{REPO}@{commit_of(FILES)}").run()
    assert not hub_module.repo_folder(REPO).exists()


def test_a_file_leaves_the_others(hub: FakeHub) -> None:
    hub.revisions["main"] = {**FILES, **ggufs("a-Q4_K_M.gguf", *SPLIT)}
    hub.revisions["v1"] = ggufs("a-Q4_K_M.gguf")
    for name in (REPO, f"{REPO}:4", f"{REPO}:8", f"{REPO}@v1:4"):
        resolve(name)
    assert removal(f"{REPO}@v1:4").nbytes == 0, "main needs it too"
    found = removal(f"{REPO}:8")
    assert found.nbytes == sum(len(hub.files[name]) for name in SPLIT)
    before = cache_folders()[hub_module.cache_folder()]
    found.run()
    assert before - cache_folders()[hub_module.cache_folder()] == found.nbytes
    found = removal(f"{REPO}/a-Q4_K_M.gguf")
    assert (len(found.paths), found.nbytes) == (2, len(hub.files["a-Q4_K_M.gguf"]))
    found.run()
    assert [model.name for model in cached_models()] == [REPO]
    assert (resolve(f"{REPO}:8")).read_bytes() == hub.files[SPLIT[0]], "and comes back when it is asked for"


def test_uqff(hub: FakeHub) -> None:
    hub.revisions["main"] = UQFF_REPO
    paths = [resolve(f"{REPO}:{tag}") for tag in ("Q4_K", "8")]
    found = {model.name: model for model in cached_models()}
    assert list(found) == [f"{REPO}/q4k-0.uqff", f"{REPO}/q8_0-0.uqff"]
    assert [model.path for model in found.values()] == paths == [resolve(name) for name in found]
    shards = [name for name in UQFF_REPO if name.startswith("q4k")]
    assert found[f"{REPO}/q4k-0.uqff"].nbytes == sum(len(UQFF_REPO[name]) for name in shards)
    going = removal(f"{REPO}:Q4_K")
    assert {path.name for path in going.paths} == set(shards), "what lies beside them stays for the other"
    going.run()
    assert [model.name for model in cached_models()] == [f"{REPO}/q8_0-0.uqff"]


def test_a_package(packages: Path, hub: FakeHub) -> None:
    for version in ("1.0", "2.0"):
        (packages / "my-pack" / version).mkdir(parents=True)
        (packages / "my-pack" / version / "m.gguf").write_bytes(b"GGUF")
        (packages / "my-pack" / version / "m.gguf.sha256").write_text("0")
    removal("pypi:My_Pack==1.0/m.gguf").run()
    assert [model.revision for model in cached_models()] == ["2.0"]
    with pytest.raises(ModelNotFound):
        removal("pypi:my-pack==1.0/m.gguf")
    found = removal("pypi:my-pack/m.gguf")
    assert found.nbytes == 4
    found.run()
    assert cached_models() == []
