"""Kernels: the ops that everything above computes with, one implementation a kind of device.

Owns the choice of an implementation for a device. Must not know: weights, layers, models, requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tramontane.errors import DeviceNotAvailable, InvalidRequest
from tramontane.kernels.base import BLOCKS, Array, BlockLayout, Ops

__all__ = ["BLOCKS", "Array", "BlockLayout", "Ops", "for_device"]

log = logging.getLogger("tramontane")
_warned: set[str] = set()


def for_device(
    device: str = "cpu",
    *,
    kernels: str = "auto",
    threads: int = 1,
    deterministic: bool = False,
    exact: bool = False,
    processors: Sequence[int] = (),
) -> Ops:
    """The ops for a device ("cpu", "cuda", "cuda:N", "metal"), chosen once.

    `kernels`: "auto" takes the compiled module on the CPU (the reference with one warning where it is not built) and
    torch elsewhere; "cpu", "reference" and "torch" force one. `exact` forbids the compiled module to round activations;
    the others never do. `processors`: one for each thread of the compiled module to be bound to; only it binds threads.
    Raises DeviceNotAvailable, MissingExtra or InvalidRequest.
    """
    if kernels not in ("auto", "cpu", "reference", "torch"):
        raise InvalidRequest("kernels", f"{kernels!r} is unknown", "Use auto, cpu, torch or reference.")
    from tramontane.kernels import cpu

    compiled = kernels in ("auto", "cpu") and device == "cpu" and cpu.available()
    if processors and not compiled:
        raise InvalidRequest("pin_threads", "only the compiled CPU kernels pin threads", "Leave it out.")
    if kernels == "torch" or (kernels == "auto" and device != "cpu"):
        from tramontane.kernels.torch_ops import TorchOps

        return TorchOps(device, threads=threads, deterministic=deterministic)
    if device != "cpu":
        raise DeviceNotAvailable(device, f"kernels={kernels!r} run on the CPU only", "Use kernels='auto'.")
    if kernels in ("auto", "cpu"):
        if compiled:
            return cpu.CpuOps(threads=threads, deterministic=deterministic, exact=exact, processors=processors)
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
