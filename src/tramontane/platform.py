"""The only module that knows the operating system: memory, pages, processors, cache folder, file locks.

Sizes are bytes. Where a system does not tell a figure, the function says what it returns instead; none raises
for a missing figure. Must not know: anything else of Tramontane's.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

_MANY_FILES = 1 << 16
"""Where the system sets no bound."""


def total_memory() -> int:
    """Bytes of memory this process may ever use: the machine's, or a container's limit when that is lower."""
    return min([_physical_memory(), *(limit for limit, _ in _cgroup_memory())])


def available_memory() -> int:
    """Bytes that can be taken now without swapping: free memory plus what the system gives up readily.

    Inside a control group the room left below every limit counts too; pages of files nobody used lately are room.
    """
    rooms = (max(limit - used, 0) for limit, used in _cgroup_memory())
    return min([_free_memory(), *rooms])


def cpu_count() -> int:
    """Processors this process may use: its affinity, and a control group's quota rounded up. At least 1."""
    if sys.platform == "win32" or sys.platform == "darwin":
        usable = os.cpu_count() or 1
    else:
        usable = len(os.sched_getaffinity(0))
    return max(1, min([usable, *_cgroup_cpus()]))


def processors() -> list[int]:
    """Ids of the processors that the calling thread may use, one of each core first and then their siblings; none
    where the system binds no threads to them."""
    if sys.platform != "linux":
        return []
    return cores_first(os.sched_getaffinity(0), Path("/sys/devices/system/cpu"))


class Pin:
    """Keeps the thread that enters it on one processor until it leaves, and while the pin is not lifted.

    `processor`: one of `processors()`; with None nothing happens. One that the process has lost since is not had.
    """

    def __init__(self, processor: int | None) -> None:
        self._processor = processor
        self._before: set[int] = set()

    def __enter__(self) -> None:
        if self._processor is not None and sys.platform == "linux":
            self._before = os.sched_getaffinity(0)
            with suppress(OSError):
                os.sched_setaffinity(0, {self._processor})

    def __exit__(self, *_: object) -> None:
        if self._processor is not None and sys.platform == "linux":
            with suppress(OSError):
                os.sched_setaffinity(0, self._before)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """What starts threads meanwhile does not start them pinned."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def cache_dir() -> Path:
    """Folder for what can be fetched again: `TRAMONTANE_CACHE`, else the platform's place. It may not exist yet."""
    if chosen := os.environ.get("TRAMONTANE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "tramontane" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tramontane"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification tells to ignore a relative path.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "tramontane"


def release_pages(mapping: mmap.mmap, start: int = 0, length: int | None = None) -> bool:
    """Let the system take back the pages of a file mapping; a later read fetches them from the file again.

    Only for shared or read-only maps of a file: a private map would lose what was written to it.
    `start` and `length` are bytes, rounded outward to pages. False where the system has no such advice.
    """
    if sys.platform == "win32":
        return False
    return _advise(mapping, mmap.MADV_DONTNEED, start, length)


def prefetch_pages(mapping: mmap.mmap, start: int = 0, length: int | None = None) -> bool:
    """Ask the system to read these bytes of a file mapping ahead. False where there is no such advice."""
    if sys.platform == "win32":
        return False
    return _advise(mapping, mmap.MADV_WILLNEED, start, length)


def large_pages(nbytes: int, first: int = 0) -> mmap.mmap:
    """Memory of the process's own, in large pages where the system has them and lets one ask, from byte `first` on, a
    multiple of the size of small ones."""
    if sys.platform != "linux":
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory would get small ones
    if first < nbytes:
        with suppress(OSError):  # a kernel built without them: small pages are what there is
            memory.madvise(mmap.MADV_HUGEPAGE, first)
    return memory


def trim_heap() -> bool:
    """Give back to the system what the C library keeps of freed memory. False where it has no such call (glibc has)."""
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(ctypes.c_size_t(0)))


def _advise(mapping: mmap.mmap, advice: int, start: int, length: int | None) -> bool:
    end = len(mapping) if length is None else min(start + length, len(mapping))
    first = start - start % mmap.PAGESIZE
    if sys.platform == "win32" or end <= first:
        return False
    mapping.madvise(advice, first, end - first)
    return True


def max_open_files() -> int:
    """How many files and sockets this process may have open."""
    if sys.platform == "win32":
        return _MANY_FILES
    else:  # which a checker of types takes for another platform's, unlike what merely follows
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return _MANY_FILES if soft == resource.RLIM_INFINITY else min(soft, _MANY_FILES)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold `path` (created if missing) exclusively among processes; waits for the holder. OSError if impossible."""
    with open(path, "a+b") as file:
        if sys.platform == "win32":
            file.seek(0)
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except PermissionError:  # how Windows says that another process holds it
                    time.sleep(0.1)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file lets go
            yield


# ---- memory, by system ----------------------------------------------------------------------------------------

if sys.platform == "win32":

    class _MemoryStatus(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", "page_total", "page_available")),
            *((name, ctypes.c_ulonglong) for name in ("virtual_total", "virtual_available", "extended_available")),
        ]

    class _ProcessMemory(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_ulong),
            ("faults", ctypes.c_ulong),
            *((name, ctypes.c_size_t) for name in ("peak_working_set", "working_set")),
            *((name, ctypes.c_size_t) for name in ("paged_peak", "paged", "nonpaged_peak", "nonpaged")),
            *((name, ctypes.c_size_t) for name in ("pagefile", "pagefile_peak")),
        ]

    def _memory_status() -> _MemoryStatus:
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status

    def _process_memory() -> _ProcessMemory:
        counters = _ProcessMemory(size=ctypes.sizeof(_ProcessMemory))
        kernel = ctypes.windll.kernel32
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
        return counters

    def _physical_memory() -> int:
        return int(_memory_status().total)

    def _free_memory() -> int:
        return int(_memory_status().available)

    def peak_rss() -> int:
        """The most bytes of physical memory this process has held so far."""
        return int(_process_memory().peak_working_set)

    def current_rss() -> int:
        """Bytes of physical memory this process holds now, mapped file pages included."""
        return int(_process_memory().working_set)

    def _cgroup_memory() -> list[tuple[int, int]]:
        return []

    def _cgroup_cpus() -> list[int]:
        return []

elif sys.platform == "darwin":

    def _sysctl(name: str) -> int:
        """An integer of the kernel's, 0 where this version does not have it (4 or 8 bytes, little endian)."""
        value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
        libc = ctypes.CDLL(None)
        libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
        return value.value

    def _physical_memory() -> int:
        return _sysctl("hw.memsize") or sys.maxsize

    def _free_memory() -> int:
        # Free, purgeable, and file-backed pages: what can be had without writing anything to swap.
        counts = ("vm.page_free_count", "vm.page_purgeable_count", "vm.page_pageable_external_count")
        return min(sum(map(_sysctl, counts)) * mmap.PAGESIZE, _physical_memory())

    def peak_rss() -> int:
        """The most bytes of physical memory this process has held so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def current_rss() -> int:
        """Bytes of physical memory this process holds now, mapped file pages included."""
        # proc_taskinfo: 96 bytes, the second 64-bit field is the resident size; 4 is PROC_PIDTASKINFO.
        info = (ctypes.c_uint64 * 12)()
        written = ctypes.CDLL(None).proc_pidinfo(os.getpid(), 4, ctypes.c_uint64(0), info, ctypes.sizeof(info))
        return int(info[1]) if written == ctypes.sizeof(info) else peak_rss()

    def _cgroup_memory() -> list[tuple[int, int]]:
        return []

    def _cgroup_cpus() -> list[int]:
        return []

else:

    def _kernel_table(path: str) -> dict[str, int]:
        """`Name: 123 kB` lines of a /proc file as bytes; empty where there is no such file."""
        table = {}
        for line in _text(Path(path)).splitlines():
            words = line.split()
            if len(words) == 3 and words[2] == "kB":
                table[words[0].rstrip(":")] = int(words[1]) * 1024
        return table

    def _physical_memory() -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def _free_memory() -> int:
        return _kernel_table("/proc/meminfo").get("MemAvailable", _physical_memory())

    def peak_rss() -> int:
        """The most bytes of physical memory this process has held so far."""
        # Unlike VmHWM, getrusage's figure survives an exec, and so may be the parent's.
        peak = _kernel_table("/proc/self/status").get("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak

    def current_rss() -> int:
        """Bytes of physical memory this process holds now, mapped file pages included."""
        return _kernel_table("/proc/self/status").get("VmRSS", peak_rss())

    def _cgroup_memory() -> list[tuple[int, int]]:
        return cgroup_memory(_text(Path("/proc/self/cgroup")), _CGROUPS)

    def _cgroup_cpus() -> list[int]:
        return cgroup_cpus(_text(Path("/proc/self/cgroup")), _CGROUPS)


# ---- files of text, so this part runs (and is tested) on any system --------------------------------------------

_CGROUPS = Path("/sys/fs/cgroup")


def cgroup_memory(membership: str, root: Path) -> list[tuple[int, int]]:
    """(limit, bytes used) of our control group and those above it that set a limit; versions 1 and 2.

    `membership` is the text of /proc/self/cgroup. Pages of files that nobody used lately do not count as used.
    """
    found = []
    for folder in _group_folders("memory", membership, root):
        for limit_name, used_name, idle_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
            if limit.isdecimal():
                idle = dict(line.split() for line in _text(folder / "memory.stat").splitlines()).get(idle_name, "0")
                found.append((int(limit), max(int(used or 0) - int(idle), 0)))
    return found


def cores_first(processors: Iterable[int], root: Path) -> list[int]:
    """In the order in which threads fill them: by their place among the processors of their core, then by number."""

    def turn(processor: int) -> tuple[int, int]:
        words = re.findall(r"\d+", _text(root / f"cpu{processor}" / "topology" / "thread_siblings_list"))
        return sorted(map(int, words)).index(processor) if str(processor) in words else 0, processor

    return sorted(processors, key=turn)


def cgroup_cpus(membership: str, root: Path) -> list[int]:
    """Processor quotas, rounded up, of our control group and those above it that set one; versions 1 and 2."""
    found = []
    for folder in _group_folders("cpu", membership, root):
        version_1 = f"{_text(folder / 'cpu.cfs_quota_us').strip()} {_text(folder / 'cpu.cfs_period_us').strip()}"
        for words in (_text(folder / "cpu.max").split(), version_1.split()):
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
                found.append(math.ceil(int(words[0]) / int(words[1])))
    return found


def _group_folders(controller: str, membership: str, root: Path) -> Iterator[Path]:
    """Folders of our group and of those above it, innermost first.

    A container often sees its own group mounted at the root, so that the path it reads does not exist there.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth])


def _text(path: Path) -> str:
    """The file's text, or nothing where it is missing or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
