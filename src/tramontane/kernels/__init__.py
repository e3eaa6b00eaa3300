"""Kernels: the ops that everything above computes with, one implementation a kind of device.

Owns the choice of an implementation for a device. Must not know: weights, layers, models, requests.
"""

from __future__ import annotations

import logging

from tramontane.errors import DeviceNotAvailable, InvalidRequest
from tramontane.kernels.base import BLOCKS, Array, BlockLayout, Ops

__all__ = ["BLOCKS", "Array", "BlockLayout", "Ops", "for_device"]

log = logging.getLogger("tramontane")
_warned: set[str] = set()


def for_device(
    device: str = "cpu", *, kernels: str = "auto", threads: int = 1, deterministic: bool = False, exact: bool = False
) -> Ops:
    """The ops for a device ("cpu", "cuda", "cuda:N", "metal"), chosen once.

    `kernels`: "auto" takes the compiled module on the CPU (the reference with one warning where it is not built) and
    torch elsewhere; "cpu", "reference" and "torch" force one. `exact` forbids the compiled module to round activations;
    the others never do. Raises DeviceNotAvailable or MissingExtra.
    """
    if kernels not in ("auto", "cpu", "reference", "torch"):
        raise InvalidRequest("kernels", f"{kernels!r} is unknown", "Use auto, cpu, torch or reference.")
    if kernels == "torch" or (kernels == "auto" and device != "cpu"):
        from tramontane.kernels.torch_ops import TorchOps

        return TorchOps(device, threads=threads, deterministic=deterministic)
    if device != "cpu":
        raise DeviceNotAvailable(device, f"kernels={kernels!r} run on the CPU only", "Use kernels='auto'.")
    if kernels in ("auto", "cpu"):
        from tramontane.kernels import cpu

        if cpu.available():
            return cpu.CpuOps(threads=threads, deterministic=deterministic, exact=exact)
        if kernels == "cpu":
            raise DeviceNotAvailable(
                "cpu", "the compiled module is not installed", "Reinstall with a C++20 compiler, or use kernels='auto'."
            )
        if "reference" not in _warned:
            _warned.add("reference")
            log.warning(
                "the compiled CPU kernels are not installed; running on the slow numpy reference. "
                "Install a C++20 compiler and reinstall tramontane."
            )
    from tramontane.kernels.reference import ReferenceOps

    return ReferenceOps(threads=threads, deterministic=deterministic)
