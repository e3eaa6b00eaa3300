"""Which device to compute on: the user's word, and what this machine has.

Owns the choice. Must not know: weights, layers, models; how a device computes.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path

from tramontane.errors import DeviceNotAvailable, InvalidRequest, MissingExtra
from tramontane.kernels import for_device

log = logging.getLogger("tramontane")

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|metal")


def resolve_device(device: str = "auto", *, fallback: bool = False, kernels: str = "auto") -> str:
    """The device to use: cpu, cuda, cuda:N or metal.

    "auto" prefers CUDA, then Metal, then the CPU; torch, which knows, is asked only where it is installed and could
    have a GPU. A named device that is missing raises DeviceNotAvailable, unless `fallback` takes what auto would, and
    logs it. `kernels` that run on the CPU alone make auto the CPU. Raises InvalidRequest("device") for another name.
    """
    if not _DEVICE.fullmatch(device):
        raise InvalidRequest("device", f"{device!r} is unknown", "Use auto, cpu, cuda, cuda:N or metal.")
    if device == "cpu":
        return device
    if device == "auto":
        return "cpu" if kernels in ("cpu", "reference") else _best()
    try:
        for_device(device, kernels="torch")
    except (DeviceNotAvailable, MissingExtra) as error:
        if not fallback:
            raise
        best = _best()
        log.warning("%s Falling back to %s.", error, best)
        return best
    return device


def _best() -> str:
    gpu = "metal" if sys.platform == "darwin" else "cuda"
    if _torch_may_have_gpu():
        try:
            for_device(gpu, kernels="torch")
        except (DeviceNotAvailable, MissingExtra):
            return "cpu"
        return gpu
    return "cpu"


def _torch_may_have_gpu() -> bool:
    """Whether importing torch (seconds) could show a GPU: not where it is missing or built for the CPU alone."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    try:  # what importlib.metadata would say, which takes 30 ms to import
        return "+cpu" not in Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return True


def available_devices() -> list[str]:
    """The devices that this machine and installation have: cpu, then cuda:0, cuda:1, ..., or metal."""
    devices = ["cpu"]
    if _torch_may_have_gpu():
        candidates = ["metal"] if sys.platform == "darwin" else [f"cuda:{i}" for i in range(64)]
        for name in candidates:
            try:
                for_device(name, kernels="torch")
            except (DeviceNotAvailable, MissingExtra):
                break
            devices.append(name)
    return devices
