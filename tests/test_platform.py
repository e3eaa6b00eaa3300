"""What the operating system tells us, against psutil and made-up control groups."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tramontane import platform


def test_memory_agrees_with_psutil() -> None:
    psutil = pytest.importorskip("psutil")
    assert 0 < platform.available_memory() <= platform.total_memory() <= psutil.virtual_memory().total
    resident = psutil.Process().memory_info().rss
    assert resident / 2 < platform.current_rss() < resident * 2
    assert platform.peak_rss() >= platform.current_rss() * 0.9


def test_peak_counts_what_was_given_back() -> None:
    before = platform.peak_rss()
    block = np.ones(max(before - platform.current_rss(), 0) // 8 + (8 << 20))
    del block
    assert platform.peak_rss() >= before + (32 << 20)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's alone")
def test_a_trimmed_heap_gives_back_what_was_freed_below_what_is_held() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64 << 10))) for _ in range(512)]
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    for block in blocks[:-1]:
        libc.free(block)
    before = platform.current_rss()
    assert platform.trim_heap()
    assert platform.current_rss() < before - (24 << 20)
    libc.free(blocks[-1])
    assert isinstance(platform.trim_heap(), bool)


def test_cpu_count() -> None:
    assert 1 <= platform.cpu_count() <= (os.cpu_count() or 1)


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path))
    assert platform.cache_dir() == tmp_path
    monkeypatch.delenv("TRAMONTANE_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
        assert platform.cache_dir() == Path("/some/where/tramontane")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert platform.cache_dir() == Path.home() / ".cache" / "tramontane"


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages of a map are told apart on Linux only")
def test_released_pages_leave_memory_and_keep_their_content(tmp_path: Path) -> None:
    size = 32 << 20
    path = tmp_path / "big"
    path.write_bytes(b"\x07" * size)
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(mapping, np.uint8)
    assert platform.prefetch_pages(mapping, 100, size)
    assert int(view.max()) == 7
    full = platform.current_rss()
    assert platform.release_pages(mapping, 5, size - 9)
    assert platform.current_rss() < full - size // 2
    assert int(view.min()) == 7


def test_file_lock_holds_other_processes_off(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = "import sys\nfrom pathlib import Path\nfrom tramontane.platform import file_lock\n"
    program += "with file_lock(Path(sys.argv[1])): print('held')"
    with platform.file_lock(path):
        other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.communicate(timeout=0.5)
    assert other.communicate(timeout=60)[0].strip() == "held"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_control_groups_version_2(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "a/memory.max": "max\n",
            "a/b/memory.max": "1000\n",
            "a/b/memory.current": "700\n",
            "a/b/memory.stat": "anon 400\ninactive_file 300\n",
            "a/cpu.max": "150000 100000\n",
            "a/b/cpu.max": "max 100000\n",
        },
    )
    assert platform.cgroup_memory("0::/a/b\n", root) == [(1000, 400)]
    assert platform.cgroup_cpus("0::/a/b\n", root) == [2]


def test_control_groups_version_1_seen_from_a_container(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": "2000\n",
            "memory/memory.usage_in_bytes": "900\n",
            "memory/memory.stat": "total_inactive_file 100\n",
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    membership = "4:memory:/docker/0123\n2:cpu,cpuacct:/docker/0123\n1:name=systemd:/x\n"
    assert platform.cgroup_memory(membership, root) == [(2000, 800)]
    assert platform.cgroup_cpus(membership, root) == [1]


def test_control_groups_without_limits(tmp_path: Path) -> None:
    assert platform.cgroup_memory("0::/\n", tmp_path) == []
    write(tmp_path, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})
    assert platform.cgroup_cpus("2:cpu:/\n", tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of pages")
def test_large_pages_are_asked_for_in_memory_that_can_have_them() -> None:
    memory = platform.large_pages(8 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    about: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line)
        if head:
            inside = int(head[1], 16) <= address < int(head[2], 16)
            if inside:
                about["mode"] = head[3]
        elif inside and line.startswith("VmFlags"):
            about["flags"] = line
    assert about["mode"].endswith("p")  # private: what is shared gets small pages
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert " hg" in about["flags"]


def test_a_core_is_shared_only_when_every_core_has_a_thread(tmp_path: Path) -> None:
    siblings = {0: "0,4", 1: "1,5", 2: "2-3", 3: "2-3", 4: "0,4", 5: "1,5"}
    write(tmp_path, {f"cpu{cpu}/topology/thread_siblings_list": f"{text}\n" for cpu, text in siblings.items()})
    assert platform.cores_first(range(7), tmp_path) == [0, 1, 2, 6, 3, 4, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound on Linux only")
def test_a_pin_holds_only_its_thread_and_lets_go() -> None:
    before = os.sched_getaffinity(0)
    assert set(platform.processors()) == before
    chosen = platform.processors()[-1]
    pin = platform.Pin(chosen)
    with pin, ThreadPoolExecutor(1) as heirs, ThreadPoolExecutor(1) as free:
        assert os.sched_getaffinity(0) == {chosen}
        assert heirs.submit(os.sched_getaffinity, 0).result() == {chosen}
        with pin.lifted():
            assert free.submit(os.sched_getaffinity, 0).result() == before
        assert os.sched_getaffinity(0) == {chosen}
    assert os.sched_getaffinity(0) == before
    with platform.Pin(None):
        assert os.sched_getaffinity(0) == before
    with platform.Pin(1 << 20):  # no such processor
        assert os.sched_getaffinity(0) == before
