"""Models of the hub: the files of a repository, fetched into huggingface_hub's cache and found there again.

Owns the way from a repository's name to a path. Files come through huggingface_hub's own HTTP client, with its
settings (HF_TOKEN or the login, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE) and into its cache, so that other programs share
them. What huggingface_hub 2 lacks is done here: it begins an interrupted transfer anew in the next process, waits on
servers as long as they say, does not check what arrives, and only warns of a full disk.

A file that the cache has never asks the network: the revision is looked up in the cache's refs, and where the snapshot
holds a whole model, that is it. A transfer is kept as `blobs/HASH.tramontane.incomplete`, continued by whoever comes
next, held under the lock that huggingface_hub itself would take, and checked against the repository's hash.

Must not know: model formats beyond file names, or what is done with the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from tramontane.errors import AuthenticationRequired, DownloadFailed, ModelNotFound, TramontaneError
from tramontane.loading.pypi import Progress
from tramontane.loading.repofiles import TOKENIZERS, Choice, choose, plain
from tramontane.loading.safetensors import INDEX_FILE, SINGLE_FILE, read_index
from tramontane.platform import file_lock
from tramontane.records import dataclass

_CHUNK = 1 << 20
_ATTEMPTS = 4  # requests in a row that may fail without bringing a byte
_PAUSE = 1.0  # seconds before the second of those, doubling
_LONGEST_PAUSE = 30.0  # seconds, whatever a server asks for
_TIMEOUT = 30.0  # seconds without a byte
_PLAIN_HTTP = 50_000_000_000  # bytes; larger files the hub gives out by Xet alone

# Read when huggingface_hub is imported, which is later: it would tell the hub what is installed, and ask it for more.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `blob` is its SHA-256, or git's SHA-1, in hex; "" where the hub does not tell."""

    name: str
    size: int
    blob: str


class _Unreachable(DownloadFailed):
    """The hub does not answer, or not with what was asked for: what the cache has may do instead."""


def fetch(
    repo: str,
    revision: str | None = None,
    tag: str = "",
    file: str = "",
    progress: Progress | None = None,
    *,
    refresh: bool = False,
) -> Path:
    """The model in a repository: a snapshot's folder, or the GGUF file (of a split one, the first part).

    `revision`: a branch, tag or commit; None is main. `tag`, `file`: see `repofiles.choose`. `refresh`: ask the hub
    whether the revision has moved; without it, what the cache holds whole is taken as it is.

    Raises ModelNotFound (no such repository, revision or file; or not cached and offline), AuthenticationRequired
    (private, gated), UnsupportedModel (pickles) and DownloadFailed (network, hash, disk).
    """
    revision = revision or "main"
    home = repo_folder(repo)
    where = repo if revision == "main" else f"{repo}@{revision}"
    kept = _kept(home, revision, tag, file, where)
    if kept is not None and kept.whole and not refresh:
        return kept.path
    if _offline():
        if kept is None:
            raise ModelNotFound(
                where,
                f"the cache {home.parent} does not hold it, and HF_HUB_OFFLINE is set",
                "Unset HF_HUB_OFFLINE, or set HF_HOME to a folder that has the model.",
            )
        return kept.path
    try:
        with _disk_errors(home.parent):
            return _Repository(repo, revision, where, home, progress or (lambda done, total, label: None)).bring(
                tag, file
            )
    except _Unreachable as error:
        if kept is None:
            raise
        _log.warning("%s The copy in the cache is used.", error)
        return kept.path


# ---- the cache ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """huggingface_hub's cache, as HF_HOME and HF_HUB_CACHE set it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def snapshot_names(snapshot: Path) -> list[str]:
    """The files of a snapshot, as the repository names them; links to nowhere are none."""
    return sorted(
        path.relative_to(snapshot).as_posix()
        for folder, _, files in os.walk(snapshot)
        for path in (Path(folder, name) for name in files)
        if path.is_file()
    )


def choose_in(snapshot: Path, tag: str, file: str, where: str) -> Choice:
    """As `repofiles.choose`, among the files of a snapshot."""
    return choose(snapshot_names(snapshot), tag, file, lambda: read_index(snapshot / INDEX_FILE), where)


@dataclass(frozen=True)
class _Kept:
    path: Path
    whole: bool
    """Whether it is sure to be what the repository would give; else it is better than nothing."""


def _kept(home: Path, revision: str, tag: str, file: str, where: str) -> _Kept | None:
    """What the cache has of a model, None where that cannot be loaded."""
    commit = cached_commit(home, revision)
    if commit is None:
        return None
    snapshot = home / "snapshots" / commit
    try:
        choice = choose_in(snapshot, tag, file, where)
    except TramontaneError:
        return None
    if choice.opens:
        return _Kept(snapshot / choice.opens, bool(tag or file) or _no_safetensors(home, commit))
    # Others may have fetched the weights alone.
    return _Kept(snapshot, not {*TOKENIZERS, "vocab.json"}.isdisjoint(choice.files))


def _no_safetensors(home: Path, commit: str) -> bool:
    """Whether a repository of GGUF or UQFF files is known to have no safetensors checkpoint, by huggingface_hub's marks
    of what is not there."""
    absent = home / ".no_exist" / commit
    weights = [(absent / name).exists() for name in (SINGLE_FILE, INDEX_FILE)]
    return (absent / "config.json").exists() or all(weights)


def cached_commit(home: Path, revision: str) -> str | None:
    """The commit that the cache knows a revision to be."""
    if _is_commit(revision):
        return revision
    try:
        commit = (home / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _is_commit(commit) else None


def _is_commit(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


# ---- one repository's files, from there to here ---------------------------------------------------------------


class _Repository:
    """A repository at a revision, and the folder that its files come to."""

    def __init__(self, repo: str, revision: str, where: str, home: Path, progress: Progress) -> None:
        self._repo = repo
        self._revision = revision
        self._where = where
        self._home = home
        self._progress = progress

    def bring(self, tag: str, file: str) -> Path:
        """Have all files of the model here. The ref is set last: it leads to whole models only."""
        commit, files = self._listing()
        snapshot = self._home / "snapshots" / commit

        def shards() -> Collection[str]:
            self._bring_all(commit, [files[INDEX_FILE]])
            return read_index(snapshot / INDEX_FILE)

        choice = choose(files, tag, file, shards, self._where)
        self._bring_all(commit, [files[name] for name in choice.files])
        if choice.opens and not (tag or file):
            self._mark_absent(commit, {"config.json", SINGLE_FILE, INDEX_FILE} - files.keys())
        if self._revision != commit:
            ref = self._home / "refs" / self._revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit, encoding="ascii")
        return snapshot / choice.opens if choice.opens else snapshot

    def _mark_absent(self, commit: str, names: Iterable[str]) -> None:
        folder = self._home / ".no_exist" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()

    def _listing(self) -> tuple[str, dict[str, RemoteFile]]:
        """The commit, and the repository's files by name: as a stranger tells it, so only what is well-formed."""
        from huggingface_hub import get_session, hf_raise_for_status

        url = f"{_endpoint()}/api/models/{self._repo}/revision/{quote(self._revision, safe='')}"

        def ask() -> tuple[str, dict[str, RemoteFile]]:
            response = get_session().get(url, params={"blobs": True}, headers=_headers(), timeout=_TIMEOUT)
            hf_raise_for_status(response)
            listing = response.json()
            if not _is_commit(listing["sha"]):
                raise ValueError(f"{listing['sha']!r} is not a commit")
            found = [_remote_file(entry) for entry in listing["siblings"]]
            return listing["sha"], {file.name: file for file in found if plain(file.name)}

        try:
            return self._ask(ask)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _Unreachable(
                f"The hub's listing of {self._where} makes no sense: {error}.",
                f"Check HF_ENDPOINT ({_endpoint()}): it may not be a hub.",
            ) from error

    def _bring_all(self, commit: str, files: list[RemoteFile]) -> None:
        missing = [file for file in files if not self._pointer(commit, file).is_file()]
        self._check_room(missing)
        for file in missing:
            if file.blob and file.size <= _PLAIN_HTTP:
                self._bring_one(commit, file)
            else:
                self._leave_to_client(commit, file)

    def _bring_one(self, commit: str, file: RemoteFile) -> None:
        """Have a file in the cache, as its layout is documented: the content in blobs/, a link in snapshots/."""
        blob, pointer = self._home / "blobs" / file.blob, self._pointer(commit, file)
        lock = self._home.parent / ".locks" / self._home.name / f"{file.blob}.lock"
        for folder in (blob.parent, pointer.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with file_lock(lock):
            if not (blob.exists() or pointer.is_file()):  # another process may have been faster
                part = self._part(file)
                self._download(commit, file, part)
                part.replace(blob)
            _link(blob, pointer)

    def _download(self, commit: str, file: RemoteFile, part: Path) -> None:
        """Bring the file to `part`, continuing what is there of it, and check it."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self._repo, file.name, revision=commit)
        if _size(part) > file.size:
            part.unlink()
        barren = 0
        while not part.exists() or _size(part) < file.size:
            before = _size(part)
            try:
                self._transfer(url, file, part)
                failure: TramontaneError = _Unreachable(
                    f"The transfer of {file.name} broke after {_size(part):,} bytes.", _AGAIN
                )
                wait = 0.0
            except _errors() as error:
                failure, wait = self._explain(error)
                if not isinstance(failure, _Unreachable):
                    raise failure from error
            barren = 0 if _size(part) > before else barren + 1
            if barren >= _ATTEMPTS:
                raise failure
            if barren:
                time.sleep(_pause(barren, wait))
        if (got := _hash(part, file)) != file.blob:
            part.unlink()
            raise DownloadFailed(
                f"{file.name} of {self._where} has the hash {got}, the hub promised {file.blob}; it was removed.",
                "Try again; if it stays so, the hub or something before it is broken.",
            )

    def _transfer(self, url: str, file: RemoteFile, part: Path) -> None:
        """One request for what `part` lacks, written to it as it comes."""
        from huggingface_hub import get_session, hf_raise_for_status

        have = _size(part)
        headers = {**_headers(), "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            resumed = have > 0 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if resumed else 0
            with open(part, "ab" if resumed else "wb") as out:
                for chunk in response.iter_bytes():
                    have += len(chunk)
                    if have > file.size:
                        raise DownloadFailed(
                            f"{self._endpoint_name()} sends more of {file.name} than its {file.size:,} bytes."
                        )
                    out.write(chunk)
                    self._progress(have, file.size, file.name)

    def _leave_to_client(self, commit: str, file: RemoteFile) -> None:
        """What plain HTTP cannot bring, or the hub's listing has no hash of, huggingface_hub fetches in its own way."""
        from huggingface_hub import hf_hub_download

        self._ask(lambda: hf_hub_download(self._repo, file.name, revision=commit))
        size = _size(self._pointer(commit, file))
        self._progress(size, size, file.name)

    def _pointer(self, commit: str, file: RemoteFile) -> Path:
        return self._home / "snapshots" / commit / file.name

    def _part(self, file: RemoteFile) -> Path:
        return self._home / "blobs" / f"{file.blob}.tramontane.incomplete"

    def _check_room(self, missing: list[RemoteFile]) -> None:
        absent = [file for file in missing if not file.blob or not (self._home / "blobs" / file.blob).exists()]
        needed = sum(max(file.size - (_size(self._part(file)) if file.blob else 0), 0) for file in absent)
        folder = next(folder for folder in (self._home, *self._home.parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DownloadFailed(
                f"{self._where} needs {needed:,} bytes more, {folder} has {free:,} free.",
                "Make room there (`tramontane list`, `tramontane rm`), or set HF_HOME to a folder on a larger disk.",
            )

    # ---- asking, and what the answers mean

    def _ask(self, action: Callable[[], T]) -> T:
        """An action on the hub, tried again where that may help."""
        attempt = 1
        while True:
            try:
                return action()
            except _errors() as error:
                failure, wait = self._explain(error)
                if attempt >= _ATTEMPTS or not isinstance(failure, _Unreachable):
                    raise failure from error
            time.sleep(_pause(attempt, wait))
            attempt += 1

    def _explain(self, error: Exception) -> tuple[TramontaneError, float]:
        """What an exception of the client's means, and the seconds that the server asked to wait."""
        from huggingface_hub import errors

        if not isinstance(error, errors.HfHubHTTPError):
            remedy = (
                "Check the network, HF_ENDPOINT and the proxy settings, then try again; it continues where it stopped."
            )
            reason = str(error) or type(error).__name__
            return _Unreachable(f"{self._endpoint_name()} cannot be reached for {self._where}: {reason}.", remedy), 0.0
        status = error.response.status_code
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelNotFound(self._where, f"the repository has no revision {self._revision!r}", _NAME), 0.0
        if isinstance(error, errors.DisabledRepoError):
            return ModelNotFound(self._where, "the hub has closed this repository"), 0.0
        if status in (401, 403):
            return self._refused(isinstance(error, errors.GatedRepoError)), 0.0
        if status == 404:
            remedy = _NAME if _token() else f"{_NAME} If it is private, {_LOGIN}."
            return ModelNotFound(self._where, f"{self._endpoint_name()} has no such repository or file", remedy), 0.0
        reason = f"{self._endpoint_name()} answers {status} for {self._where}"
        if status in (408, 429) or status >= 500:
            remedy = "Try again later."
            if status == 429:
                reason, remedy = f"{reason}: too many requests", f"Try again later; {_LOGIN} to be allowed more."
            waited = str(error.response.headers.get("Retry-After", ""))
            return _Unreachable(f"{reason}.", remedy), float(waited) if waited.isdecimal() else 0.0
        return DownloadFailed(f"{reason}.", "Try again; if it stays so, the hub or something before it is broken."), 0.0

    def _refused(self, gated: bool) -> AuthenticationRequired:
        if gated:
            return AuthenticationRequired(
                f"{self._where} is gated: its owners let in accounts that asked.",
                f"Ask for access at {_endpoint()}/{self._repo}" + ("." if _token() else f", then {_LOGIN}."),
            )
        if _token():
            return AuthenticationRequired(
                f"{self._endpoint_name()} refuses your token for {self._where}.",
                "Check HF_TOKEN or `hf auth whoami`; the token needs read access to this repository.",
            )
        return AuthenticationRequired(
            f"{self._endpoint_name()} shows {self._where} to nobody without a token: it is private, or does not exist.",
            f"Check the name; if it is right, {_LOGIN}.",
        )

    def _endpoint_name(self) -> str:
        return re.sub(r"^https?://(.*@)?", "", _endpoint())


_NAME = "Check the name; a model is org/name, org/name@revision, org/name:Q4_K_M or org/name/file.gguf (or .uqff)."
_LOGIN = "set HF_TOKEN or log in with `hf auth login`"
_AGAIN = "Run the same again to continue where it stopped."


def _errors() -> tuple[type[Exception], ...]:
    """What a request may raise: the HTTP library's own exceptions, whichever library huggingface_hub is built on, and
    what huggingface_hub makes of them."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    return (HfHubHTTPError, HfHubHTTPError.__bases__[0], LocalEntryNotFoundError, ConnectionError, TimeoutError)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _headers() -> dict[str, str]:
    """Ours, not huggingface_hub's, which would describe this machine."""
    token = _token()
    return {"user-agent": "tramontane", **({"authorization": f"Bearer {token}"} if token else {})}


def _token() -> str | None:
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def _pause(attempt: int, wanted: float) -> float:
    return min(max(_PAUSE * 2.0 ** (attempt - 1), wanted), _LONGEST_PAUSE)


def _remote_file(entry: Mapping[str, Any]) -> RemoteFile:
    name, size, lfs = entry["rfilename"], entry.get("size"), entry.get("lfs")
    blob = lfs["sha256"] if lfs else entry.get("blobId")
    sound = (
        isinstance(size, int) and size >= 0 and re.fullmatch(r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}", blob or "")
    )
    if not isinstance(name, str):
        raise TypeError(f"a file is named {name!r}")
    return RemoteFile(name, size if isinstance(size, int) else 0, str(blob) if sound else "")


# ---- the disk -------------------------------------------------------------------------------------------------


def _link(blob: Path, pointer: Path) -> None:
    if pointer.is_file():
        return
    try:
        os.symlink(os.path.relpath(blob, pointer.parent), pointer)
    except FileExistsError:
        pass  # a link of before, whose blob had gone and is back
    except OSError:
        blob.replace(pointer)  # no links here (Windows without the right to make them)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash(path: Path, file: RemoteFile) -> str:
    """The content's hash, of the kind that the blob is named by."""
    digest = hashlib.sha256()
    if len(file.blob) == 40:  # git's: over a header and the content
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    """Turn what the file system refuses into `DownloadFailed`."""
    try:
        yield
    except OSError as error:
        raise DownloadFailed(
            f"The hub's cache {cache} cannot be written: {error}.",
            "Make room or get write access there, or set HF_HOME to another folder.",
        ) from error
