"""Repositories of the hub: huggingface_hub's own client against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine import checkpoints as tiny
from tests.loading import test_uqff
from tests.loading.checkpoints import write_gguf
from tests.loading.fakehub import REPO, FakeHub, commit_of
from tramontane import kernels
from tramontane.errors import (
    AuthenticationRequired,
    CorruptCheckpoint,
    DownloadFailed,
    ModelNotFound,
    TramontaneError,
    UnsupportedModel,
)
from tramontane.loading import hub as hub_module
from tramontane.loading.build import load_model
from tramontane.loading.repofiles import TOKENIZERS
from tramontane.loading.sources import ModelSource, resolve
from tramontane.text.tokenizer import tokenizer_file

Progressed = list[tuple[int, "int | None", str]]

WEIGHTS = bytes(range(256)) * 1200
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{ }",
    "tokenizer_config.json": b"{  }",
    "chat_template.jinja": b"hello",
    "model.safetensors": WEIGHTS,
    "README.md": b"a model",
    "pytorch_model.bin": b"\x80pickle",
    "onnx/model.onnx": b"other",
}
NEEDED = sorted(set(FILES) - {"pytorch_model.bin", "onnx/model.onnx"})


def ggufs(*names: str) -> dict[str, bytes]:
    return {name: b"GGUF" + name.encode() * 50 for name in names}


def environment(hub: FakeHub, home: Path, **more: str) -> dict[str, str]:
    """For another process: nothing of this machine's settings for the hub or for proxies."""
    ours = {name: value for name, value in os.environ.items() if not re.match(r"HF_|HUGGING|(?i:.*_proxy$)", name)}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    return {**ours, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **settings, **more}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with FILES, and huggingface_hub of this process pointed at it. (It reads its settings when imported.)"""
    import huggingface_hub
    from huggingface_hub import constants

    for name in [name for name in os.environ if re.match(r"HF_|HUGGING|(?i:.*_proxy$)", name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = FakeHub(FILES)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "_PAUSE", 0.0)
    huggingface_hub.close_session()
    with hub.running():
        yield hub
    huggingface_hub.close_session()


def names_in(folder: Path) -> list[str]:
    return hub_module.snapshot_names(folder)


# ---- what is fetched ------------------------------------------------------------------------------------------


def test_only_needed_files_are_fetched_and_only_once(hub: FakeHub, home: Path) -> None:
    steps: Progressed = []
    path = resolve(REPO, lambda *step: steps.append(step))
    assert path == home / "hub" / "models--org--tiny" / "snapshots" / hub.commit
    assert names_in(path) == NEEDED
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert steps[-1] == (len(WEIGHTS), len(WEIGHTS), "model.safetensors")
    assert {label for done, total, label in steps if done == total} == set(NEEDED)

    hub.asked.clear()
    assert resolve(REPO) == resolve(f"{REPO}@main") == resolve(f"{REPO}@{hub.commit}") == path
    assert not hub.asked, "what the cache has never asks the network"


def test_every_tokenizer_file_comes_along_and_named_templates(hub: FakeHub) -> None:
    files = {**dict.fromkeys(TOKENIZERS, b"x"), "additional_chat_templates/rag.jinja": b"x"}
    hub.revisions["main"] = {
        "config.json": b"{}",
        "model.safetensors": b"x",
        **files,
        "additional_chat_templates/x": b"",
    }
    assert set(names_in(resolve(REPO))) == {"config.json", "model.safetensors", *files}
    for name in TOKENIZERS:
        hub.revisions["main"] = {"config.json": b"{}", "model.safetensors": b"x", name: name.encode()}
        path = resolve(REPO, refresh=True)
        hub.asked.clear()
        assert tokenizer_file(resolve(REPO)) == path / name
        assert not hub.asked, "with any of them a copy is whole"


def test_the_cache_is_huggingface_hubs_own(hub: FakeHub, home: Path) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

    path = resolve(REPO)
    info = scan_cache_dir(home / "hub")  # its default is of when it was imported, by whomever
    assert not info.warnings
    (repo,) = info.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (REPO, hub.commit, {"main"})
    assert sorted(file.file_name for file in revision.files) == sorted(Path(name).name for name in NEEDED)
    hub.asked.clear()
    assert hf_hub_download(REPO, "model.safetensors") == str(path / "model.safetensors")
    assert snapshot_download(REPO, allow_patterns=["*.json"]) == str(path)
    assert not hub.transfers("model.safetensors")


def test_what_huggingface_hub_fetched_is_taken(hub: FakeHub) -> None:
    from huggingface_hub import snapshot_download

    path = snapshot_download(REPO)
    hub.asked.clear()
    assert resolve(REPO) == Path(path)
    assert not hub.asked


def test_weights_without_a_tokenizer_are_completed(hub: FakeHub) -> None:
    from huggingface_hub import hf_hub_download

    for name in ("config.json", "model.safetensors"):
        hf_hub_download(REPO, name)
    assert names_in(resolve(REPO)) == NEEDED
    assert len(hub.transfers("model.safetensors")) == 1


def test_revisions(hub: FakeHub) -> None:
    hub.revisions["refs/pr/1"] = {**FILES, "config.json": b'{"model_type": "qwen2"}'}
    hub.revisions["v1"] = {**FILES, "model.safetensors": b"old"}
    main, pull, tag = resolve(REPO), resolve(f"{REPO}@refs/pr/1"), resolve(f"{REPO}@v1")
    assert len({main, pull, tag}) == 3
    assert (tag / "model.safetensors").read_bytes() == b"old"
    assert pull.name == commit_of(hub.revisions["refs/pr/1"])
    assert len(hub.transfers("model.safetensors")) == 2, "a file of two revisions is fetched once"
    with pytest.raises(ModelNotFound, match="no revision 'v2'"):
        resolve(f"{REPO}@v2")
    hub.asked.clear()
    assert resolve(f"{REPO}@v1") == tag
    assert not hub.asked


def test_refresh_follows_a_branch(hub: FakeHub) -> None:
    old = resolve(REPO)
    hub.revisions["main"] = {**FILES, "config.json": b'{"new": 1}'}
    assert resolve(REPO) == old
    new = resolve(REPO, refresh=True)
    assert new.name == hub.commit != old.name
    assert resolve(REPO) == new
    assert len(hub.transfers("model.safetensors")) == 1


def test_embedders_come_with_their_modules(hub: FakeHub) -> None:
    wanted = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "tokenizer.json": b"{ }",
        "modules.json": b"[]",
        "config_sentence_transformers.json": b"{  }",
        "sentence_bert_config.json": b"{   }",
        "1_Pooling/config.json": b"{    }",
        "2_Dense/config.json": b"{     }",
        "2_Dense/model.safetensors": b"more weights",
    }
    others = {"2_Dense/pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "onnx/config.json": b"x"}
    hub.revisions["main"] = {**wanted, **others}
    folder = resolve(REPO)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == wanted


def test_shards(hub: FakeHub) -> None:
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}).encode()
    sharded = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": index}
    hub.revisions["main"] = {**sharded, **dict.fromkeys(parts, b"part"), "extra.safetensors": b"not of the index"}
    path = resolve(REPO)
    assert names_in(path) == sorted([*sharded, *parts])
    hub.asked.clear()
    assert resolve(REPO) == path
    assert not hub.asked
    (path / parts[1]).unlink()
    assert names_in(resolve(REPO)) == sorted([*sharded, *parts]), "a shard that has gone is fetched again"

    hub.revisions["main"] = {**sharded, parts[0]: b"part"}
    with pytest.raises(ModelNotFound, match=parts[1]):
        resolve(REPO, refresh=True)
    hub.revisions["main"] = {**sharded, "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}
    with pytest.raises(CorruptCheckpoint, match="no file of the folder"):
        resolve(REPO, refresh=True)


def test_mistrals_own_format_comes_last(hub: FakeHub) -> None:
    own = {"params.json": b"{}", "consolidated.safetensors": b"x", "tekken.json": b"{}"}
    hub.revisions["main"] = {**FILES, **own}
    assert "consolidated.safetensors" not in names_in(resolve(REPO))
    hub.revisions["main"] = own
    assert names_in(resolve(REPO, refresh=True)) == sorted(own)
    shards = {f"consolidated-0000{number}-of-00002.safetensors": b"x" for number in (1, 2)}
    hub.revisions["main"] = {"params.json": b"{}", "tokenizer.model.v3": b"x", **shards, "README.md": b""}
    assert set(shards) < set(names_in(resolve(REPO, refresh=True)))
    hub.asked.clear()
    assert set(shards) < set(names_in(resolve(REPO)))
    assert not hub.asked


@pytest.mark.parametrize(
    ("files", "error", "word"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, UnsupportedModel, "pickles"),
        ({"config.json": b"{}", "a.safetensors": b"", "b.safetensors": b""}, UnsupportedModel, "2 .safetensors"),
        ({"config.json": b"{}"}, ModelNotFound, r"no \.safetensors, \.gguf or \.uqff"),
        ({"adapter_model.safetensors": b""}, ModelNotFound, "neither config.json"),
        ({}, ModelNotFound, "neither config.json"),
    ],
)
def test_repositories_without_a_model(
    hub: FakeHub, files: dict[str, bytes], error: type[TramontaneError], word: str
) -> None:
    hub.revisions["main"] = files
    with pytest.raises(error, match=word):
        resolve(REPO)
    assert all("/api/" in asked.path for asked in hub.asked), "nothing is fetched for nothing"


# ---- GGUF -----------------------------------------------------------------------------------------------------

MANY = ggufs("m-Q8_0.gguf", "m.Q4_K_S.gguf", "m-q5_k_m.gguf", "m-IQ4_XS.gguf", "mmproj-m-f16.gguf")
SPLIT = ggufs(*(f"Q4_K_M/m-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)))


@pytest.mark.parametrize(
    ("files", "asked", "expected"),
    [
        (MANY, "", "m-q5_k_m.gguf"),
        ({**MANY, **ggufs("x_Q4_K_M.gguf")}, "", "x_Q4_K_M.gguf"),
        ({**MANY, **SPLIT}, "", "Q4_K_M/m-Q4_K_M-00001-of-00003.gguf"),
        (ggufs("m-Q8_0.gguf", "m.Q4_K_S.gguf"), "", "m-Q8_0.gguf"),
        (ggufs("m-Q2_K.gguf", "m.Q4_K_S.gguf"), "", "m.Q4_K_S.gguf"),
        (ggufs("only-f32.gguf", "mmproj-only-f32.gguf"), "", "only-f32.gguf"),
        (MANY, ":q8_0", "m-Q8_0.gguf"),
        (MANY, ":8", "m-Q8_0.gguf"),
        (MANY, ":5", "m-q5_k_m.gguf"),
        ({**MANY, **SPLIT}, ":4", "Q4_K_M/m-Q4_K_M-00001-of-00003.gguf"),
        (MANY, ":IQ4_XS", "m-IQ4_XS.gguf"),
        (MANY, "/m-Q8_0.gguf", "m-Q8_0.gguf"),
        ({**MANY, **SPLIT}, "/Q4_K_M/m-Q4_K_M-00001-of-00003.gguf", "Q4_K_M/m-Q4_K_M-00001-of-00003.gguf"),
        ({**MANY, **FILES}, ":Q8_0", "m-Q8_0.gguf"),
        ({**MANY, **FILES}, "", ""),
    ],
)
def test_which_gguf(hub: FakeHub, files: dict[str, bytes], asked: str, expected: str) -> None:
    hub.revisions["main"] = files
    path = resolve(REPO + asked)
    snapshot = hub_module.repo_folder(REPO) / "snapshots" / hub.commit
    assert path == snapshot / expected if expected else snapshot
    if expected:
        fetched = sorted(SPLIT) if "00001" in expected else [expected]
        assert names_in(snapshot) == fetched
    hub.asked.clear()
    assert resolve(REPO + asked) == path
    assert not hub.asked


def test_a_cached_gguf_does_not_hide_the_checkpoint(hub: FakeHub) -> None:
    hub.revisions["main"] = {**MANY, **FILES}
    resolve(f"{REPO}:8")
    assert names_in(resolve(REPO)) == sorted([*NEEDED, "m-Q8_0.gguf"])
    hub.revisions["main"] = MANY
    resolve(f"{REPO}:8", refresh=True)
    assert resolve(REPO).name == "m-q5_k_m.gguf", "nor one file the better one"


@pytest.mark.parametrize(
    ("files", "asked", "word"),
    [
        (MANY, ":Q3_K_M", r"its GGUF files are: m-IQ4_XS\.gguf"),
        (MANY, ":Q4_K", "its GGUF files are"),
        ({**MANY, **ggufs("n-Q8_0.gguf")}, ":8", r"several files.*m-Q8_0\.gguf, n-Q8_0\.gguf"),
        (FILES, ":Q4_K_M", "no complete GGUF"),
        (MANY, "/n.gguf", "its GGUF files are"),
        (ggufs("a-Q2_K.gguf", "a-Q3_K.gguf"), "", r"none is Q4_K_M or .*; its GGUF files are: a-Q2_K"),
        (ggufs("m-Q4_K_M-00001-of-00002.gguf"), ":4", "no complete GGUF"),
        (ggufs("m-Q4_K_M-00001-of-99999.gguf"), ":4", "no complete GGUF"),
    ],
)
def test_no_such_gguf(hub: FakeHub, files: dict[str, bytes], asked: str, word: str) -> None:
    hub.revisions["main"] = files
    with pytest.raises(ModelNotFound, match=word):
        resolve(REPO + asked)


# ---- UQFF -----------------------------------------------------------------------------------------------------

BESIDE = {"config.json": b"{}", "tokenizer.json": b"{ }", "generation_config.json": b"{  }", "README.md": b"a model"}
UQFF_REPO = {
    **{name: name.encode() * 40 for name in ("q4k-0.uqff", "q4k-1.uqff", "q4k-2.uqff", "q8_0-0.uqff", "afq4-0.uqff")},
    **BESIDE,
    "residual.safetensors": b"residual" * 30,
    "uqff_report.json": b"{}",
}
Q4K = ["q4k-0.uqff", "q4k-1.uqff", "q4k-2.uqff"]
OLD_NAMES = {**BESIDE, **dict.fromkeys(("m-7b-instruct-q4k.uqff", "m-7b-instruct-f8e4m3.uqff"), b"x")}


@pytest.mark.parametrize(
    ("files", "asked", "weights"),
    [
        (UQFF_REPO, "", Q4K),
        (UQFF_REPO, ":Q4_K", Q4K),
        (UQFF_REPO, ":q4k", Q4K),
        (UQFF_REPO, ":4", Q4K),
        (UQFF_REPO, ":8", ["q8_0-0.uqff"]),
        (UQFF_REPO, ":Q8_0", ["q8_0-0.uqff"]),
        (UQFF_REPO, "/q4k-0.uqff", Q4K),
        (UQFF_REPO, ":AFQ4", ["afq4-0.uqff"]),
        (UQFF_REPO, "@main/afq4-0.uqff", ["afq4-0.uqff"]),
        ({**BESIDE, "afq8-0.uqff": b"x"}, ":8", ["afq8-0.uqff"]),
        ({**BESIDE, "tiny-hqq4-0.uqff": b"x"}, "", ["tiny-hqq4-0.uqff"]),
        (OLD_NAMES, "", ["m-7b-instruct-q4k.uqff"]),
        (OLD_NAMES, ":f8e4m3", ["m-7b-instruct-f8e4m3.uqff"]),
    ],
)
def test_which_uqff(hub: FakeHub, files: dict[str, bytes], asked: str, weights: list[str]) -> None:
    hub.revisions["main"] = files
    path = resolve(REPO + asked)
    snapshot = hub_module.repo_folder(REPO) / "snapshots" / hub.commit
    beside = {*BESIDE, "residual.safetensors"} & files.keys()
    assert path == snapshot / weights[0]
    assert names_in(snapshot) == sorted([*weights, *beside])
    hub.asked.clear()
    assert resolve(REPO + asked) == path
    assert not hub.asked


def test_uqff_gives_way(hub: FakeHub) -> None:
    hub.revisions["main"] = {**UQFF_REPO, **FILES}
    assert names_in(resolve(REPO)) == sorted(NEEDED)
    hub.revisions["main"] = {**UQFF_REPO, **ggufs("m-Q4_K_M.gguf")}
    assert resolve(REPO, refresh=True).name == "m-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("files", "asked", "word"),
    [
        (
            UQFF_REPO,
            ":Q6_K",
            r"UQFF files are: afq4-0\.uqff, q4k-0\.uqff, q8_0-0\.uqff\)\. Name the file: org/tiny/",
        ),
        (UQFF_REPO, "/q4k-1.uqff", "its UQFF files are"),
        ({**UQFF_REPO, **MANY}, "/none.uqff", "its GGUF and UQFF files are"),
        ({**UQFF_REPO, **MANY}, ":8", r"several files.*m-Q8_0\.gguf, q8_0-0\.uqff"),
        ({**BESIDE, "q4k-0.uqff": b"", "q4k-2.uqff": b""}, "", r"no \.safetensors, \.gguf or \.uqff"),
        ({**BESIDE, "q4k-1.uqff": b""}, ":4", "no complete GGUF or UQFF model"),
        ({**BESIDE, "q2k-0.uqff": b"", "q3k-0.uqff": b""}, "", "none is Q4_K or .*; its UQFF files are: q2k-0"),
        ({"q4k-0.uqff": b"", "residual.safetensors": b""}, "", "neither config.json"),
        ({**BESIDE, "residual.safetensors": b""}, "", r"no \.safetensors"),
    ],
)
def test_no_such_uqff(hub: FakeHub, files: dict[str, bytes], asked: str, word: str) -> None:
    hub.revisions["main"] = files
    with pytest.raises(ModelNotFound, match=word):
        resolve(REPO + asked)
    assert not [a for a in hub.asked if "/api/" not in a.path], "nothing is fetched for nothing"


def test_a_missing_uqff_shard_is_fetched_again(hub: FakeHub) -> None:
    hub.revisions["main"] = UQFF_REPO
    path = resolve(f"{REPO}:Q4_K")
    (path.parent / "q4k-1.uqff").unlink()
    assert resolve(f"{REPO}:Q4_K") == path
    assert (path.parent / "q4k-1.uqff").is_file()


# ---- refusals -------------------------------------------------------------------------------------------------


def test_private(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    with pytest.raises(AuthenticationRequired, match=r"private, or does not exist.*HF_TOKEN"):
        resolve(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AuthenticationRequired, match="refuses your token"):
        resolve(REPO)
    monkeypatch.delenv("HF_TOKEN")
    home.mkdir()
    (home / "token").write_text("hf_right\n")  # what `hf auth login` leaves
    assert names_in(resolve(REPO)) == NEEDED


def test_gated(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated, hub.token = True, "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(AuthenticationRequired, match=f"gated.*{hub.url}/{REPO}"):
        resolve(REPO)
    hub.answers = [(403, {})]
    with pytest.raises(AuthenticationRequired, match="refuses your token"):
        resolve(REPO)


def test_missing(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFound, match=r"has no such repository.*Check the name"):
        resolve("org/other")
    hub.extra = [{"rfilename": "model.safetensors", "size": 5, "blobId": "0" * 40}]
    hub.revisions["main"] = {"config.json": b"{}"}
    with pytest.raises(ModelNotFound, match="no such repository or file"):
        resolve(REPO)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_servers_that_falter(hub: FakeHub, status: int) -> None:
    hub.answers = [(status, {"Retry-After": "0"})] * 2
    hub.cuts = 1
    assert names_in(resolve(REPO)) == NEEDED


@pytest.mark.parametrize(("status", "word"), [(429, "too many requests.*HF_TOKEN"), (500, "answers 500"), (418, "418")])
def test_servers_that_stay_so(hub: FakeHub, status: int, word: str) -> None:
    hub.answers = [(status, {})] * 100
    with pytest.raises(DownloadFailed, match=word):
        resolve(REPO)
    assert len(hub.asked) <= 5


def test_servers_do_not_decide_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_module._pause(1, 1e9) == hub_module._LONGEST_PAUSE
    assert hub_module._pause(50, 0.0) == hub_module._LONGEST_PAUSE


def test_no_server(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadFailed, match=r"127\.0\.0\.1:9 cannot be reached"):
        resolve(REPO)


def test_a_failing_refresh_takes_the_copy(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    path = resolve(REPO)
    hub.answers = [(500, {})] * 100
    assert resolve(REPO, refresh=True) == path
    assert "The copy in the cache is used" in caplog.text


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    path = resolve(REPO)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(REPO) == resolve(REPO, refresh=True) == path
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        resolve("org/other")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        resolve(f"{REPO}:Q4_K_M")
    assert not hub.asked


# ---- transfers ------------------------------------------------------------------------------------------------


def part_of(files: dict[str, bytes], name: str) -> Path:
    blob = hashlib.sha256(files[name]).hexdigest()
    return hub_module.repo_folder(REPO) / "blobs" / f"{blob}.tramontane.incomplete"


def test_broken_transfers_continue(hub: FakeHub) -> None:
    hub.cuts = 3
    steps: Progressed = []
    path = resolve(REPO, lambda *step: steps.append(step))
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.transfers("model.safetensors") == [None, *(f"bytes={n}-" for n in (153600, 230400, 268800))]
    assert all(done <= (total or 0) for done, total, _ in steps)


def test_a_later_process_continues(hub: FakeHub) -> None:
    part = part_of(FILES, "model.safetensors")
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:1000])
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.transfers("model.safetensors") == ["bytes=1000-"]
    assert not part.exists()


def test_servers_without_ranges(hub: FakeHub) -> None:
    hub.ranges = False
    part = part_of(FILES, "model.safetensors")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"something else")
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS


def test_transfers_that_bring_nothing_end(hub: FakeHub) -> None:
    hub.cuts = 1000
    hub.ranges = False  # every transfer brings the same half
    with pytest.raises(DownloadFailed, match=r"model\.safetensors|cannot be reached"):
        resolve(REPO)
    assert len(hub.transfers("model.safetensors")) <= 6
    assert part_of(FILES, "model.safetensors").exists(), "what has come is kept"


def test_what_arrives_is_checked(hub: FakeHub) -> None:
    hub.override["model.safetensors"] = WEIGHTS[:-1] + b"?"
    with pytest.raises(DownloadFailed, match=r"has the hash .* was removed"):
        resolve(REPO)
    assert not part_of(FILES, "model.safetensors").exists()
    hub.override["config.json"] = b'{"model_type": "gemma"}'  # as long as the right one, and not in LFS
    shutil.rmtree(hub_module.repo_folder(REPO))
    with pytest.raises(DownloadFailed, match=r"config\.json.* has the hash"):
        resolve(REPO)
    hub.override = {"config.json": b"x" * 1000}
    with pytest.raises(DownloadFailed, match=r"sends more of config\.json than its 23 bytes"):
        resolve(REPO)


def test_full_disk(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DownloadFailed, match=r"needs 307,\d+ bytes more, .* 1,000 free.*HF_HOME"):
        resolve(REPO)
    assert not hub.transfers("config.json"), "checked before the first byte"


def test_a_cache_that_cannot_be_written(hub: FakeHub, home: Path) -> None:
    home.mkdir()
    (home / "hub").write_text("a file")
    with pytest.raises(DownloadFailed, match="cannot be written"):
        resolve(REPO)


def test_systems_without_links(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("a privilege is missing")

    monkeypatch.setattr(hub_module.os, "symlink", refuse)
    path = resolve(REPO)
    assert names_in(path) == NEEDED
    assert not any(file.is_symlink() for file in path.iterdir())
    assert not list((path.parent.parent / "blobs").iterdir()), "one copy, not two"
    hub.asked.clear()
    assert resolve(REPO) == path
    assert not hub.asked


def test_tokens_stay_at_home(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come from other hosts after a redirect; those get no token, and nobody is told what is installed."""
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with FakeHub(FILES).running() as elsewhere:
        hub.elsewhere = elsewhere.url
        assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert len(elsewhere.asked) == len(NEEDED)
    assert {asked.token for asked in elsewhere.asked} == {None}
    assert {asked.token for asked in hub.asked} == {"hf_right"}
    assert {asked.agent for asked in hub.asked + elsewhere.asked} == {"tramontane"}


def test_hubs_that_tell_no_hashes(hub: FakeHub) -> None:
    hub.blobs = False
    steps: Progressed = []
    path = resolve(REPO, lambda *step: steps.append(step))
    assert names_in(path) == NEEDED
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert steps[-1] == (len(WEIGHTS), len(WEIGHTS), "model.safetensors")


EVIL = [
    "../../evil.gguf",
    "/etc/evil.gguf",
    "a\\..\\evil.gguf",
    "C:evil.gguf",
    "x/../../evil.gguf",
    "a\0.gguf",
    "./m.gguf",
]


def test_hostile_names(hub: FakeHub, home: Path) -> None:
    hub.revisions["main"] = {}
    hub.extra = [{"rfilename": name, "size": 4, "blobId": "0" * 40} for name in EVIL]
    with pytest.raises(ModelNotFound, match=r"neither config\.json nor"):
        resolve(REPO)
    assert not [asked for asked in hub.asked if "/api/" not in asked.path]
    for name in EVIL:
        with pytest.raises(TramontaneError):
            resolve(ModelSource(repo=REPO, file=name))
    hub.extra = [{"rfilename": "m.gguf", "size": 4, "blobId": "../../../../evil"}]
    hub.revisions["main"] = {"m.gguf": b"GGUF"}
    resolve(REPO)
    assert not list(home.parent.rglob("*evil*"))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"id": "x", "sha": "../../x", "siblings": []}',
        b'{"id": "x", "siblings": 3}',
        b"<html>",
        b"[" * 100_000,
    ],
)
def test_listings_that_make_no_sense(hub: FakeHub, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_listing", lambda files: answer)
    with pytest.raises(DownloadFailed, match=r"makes no sense.*HF_ENDPOINT"):
        resolve(REPO)


# ---- other processes ------------------------------------------------------------------------------------------

PULL = "import sys; from tramontane.loading.sources import resolve; print(resolve(sys.argv[1]))"


def start(hub: FakeHub, home: Path, code: str = PULL, model: str = REPO, **more: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, model]
    return subprocess.Popen(command, env=environment(hub, home, **more), stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    return out.strip(), err


def wait_for(condition: Callable[[], Any], processes: list[subprocess.Popen[str]]) -> None:
    while not condition():
        for process in processes:
            assert process.poll() is None, finish(process)
        time.sleep(0.02)


def test_two_processes_fetch_once(home: Path) -> None:
    with FakeHub(FILES).running() as hub:
        hub.gate.clear()
        processes = [start(hub, home) for _ in range(2)]
        wait_for(lambda: len([asked for asked in hub.asked if "/api/" in asked.path]) == 2, processes)
        hub.gate.set()
        paths = {finish(process)[0] for process in processes}
        assert paths == {str(home / "hub" / "models--org--tiny" / "snapshots" / hub.commit)}
        assert [len(hub.transfers(name)) for name in NEEDED] == [1] * len(NEEDED)
        assert len(hub.asked) == 2 + len(NEEDED), "and asks for nothing else, least of all telemetry"


def test_settings_come_from_the_environment(home: Path) -> None:
    with FakeHub(FILES).running() as hub:
        hub.token = "hf_right"
        out, err = finish(start(hub, home))
        assert not out
        assert "AuthenticationRequired" in err
        out, err = finish(start(hub, home, HF_TOKEN="hf_right"))
        assert Path(out).is_dir(), err
        hub.asked.clear()
        assert finish(start(hub, home, HF_HUB_OFFLINE="1"))[0] == out
        assert "HF_HUB_OFFLINE" in finish(start(hub, home, model="org/x", HF_HUB_OFFLINE="1"))[1]
        assert not hub.asked
        # what is cached needs none of the client's machinery
        check = PULL + "; sys.exit(any(name in sys.modules for name in ('httpx', 'httpx2', 'huggingface_hub.utils')))"
        process = start(hub, home, check)
        assert finish(process)[0] == out
        assert process.returncode == 0


# ---- to the end -----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pulled_checkpoint_runs(hub: FakeHub, tmp_path: Path) -> None:
    from tramontane import LLM

    local = tiny.write(tmp_path / "local")
    hub.revisions["main"] = contents(local)
    steps: Progressed = []
    with LLM(REPO, progress=lambda *step: steps.append(step)) as pulled, LLM(local) as own:
        answer = pulled.generate("abc", temperature=0, max_tokens=8, ignore_eos=True)
        assert answer.token_ids == own.generate("abc", temperature=0, max_tokens=8, ignore_eos=True).token_ids
    assert steps
    with LLM(ModelSource.huggingface(REPO)) as again:
        assert again.generate("abc", temperature=0, max_tokens=8, ignore_eos=True).token_ids == answer.token_ids
    with LLM(f"native/{REPO}@main") as again:
        assert again.generate("abc", temperature=0, max_tokens=8, ignore_eos=True).token_ids == answer.token_ids


def test_a_pulled_uqff_runs(hub: FakeHub, tmp_path: Path) -> None:
    test_uqff.write(tmp_path / "m", "Q8_0", shards=3)
    hub.revisions["main"] = {name.replace("q-", "q8_0-"): data for name, data in contents(tmp_path / "m").items()}
    ops = kernels.for_device("cpu")
    expected = load_model(tmp_path / "m", ops).formats
    for name in (REPO, f"{REPO}:8", f"{REPO}/q8_0-0.uqff"):
        loaded = load_model(resolve(name), ops)
        assert (loaded.checkpoint.kind, loaded.formats) == ("uqff", expected)


def test_a_pulled_gguf_runs(hub: FakeHub, tmp_path: Path) -> None:
    import tramontane

    tokens = [*(chr(ord("A") + i) for i in range(49)), "AB"]
    vocab = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * 50, "merges": ["A B"]}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "add_bos_token": False}
    local = write_gguf(tmp_path / "m-F32.gguf", {f"tokenizer.ggml.{k}": v for k, v in {**vocab, **ids}.items()})
    hub.revisions["main"] = {"m-F32.gguf": local.read_bytes(), "README.md": b""}
    with tramontane.LLM(local) as own:
        expected = own.generate([3, 4, 5], temperature=0, max_tokens=8, ignore_eos=True).token_ids
    for open_it in (
        lambda: tramontane.LLM(f"{REPO}:F32"),
        lambda: tramontane.load_gguf_hf(REPO, "m-F32.gguf", context_length=64),
    ):
        with open_it() as pulled:
            assert pulled.generate([3, 4, 5], temperature=0, max_tokens=8, ignore_eos=True).token_ids == expected
