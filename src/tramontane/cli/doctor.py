"""`tramontane doctor`: what is here, and what this installation can do with it.

Owns the checks and their wording. Must not know: models.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform as python_platform
import sys
from typing import Annotated, Any

import typer

_CORE = ("numpy", "ml_dtypes", "tokenizers", "jinja2", "safetensors", "huggingface_hub", "llguidance", "typer", "rich")
_EXTRAS = {
    "torch": ("torch",),
    "cuda": ("torch", "triton"),
    "transformers": ("transformers", "torch"),
    "mistralrs": ("mistralrs",),
    "server": ("fastapi", "uvicorn", "prometheus_client"),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the installation, the machine and the devices. Exits with 1 when something is wrong."""
    report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        for section in ("system", "kernels", "devices", "extras", "packages"):
            print(section)
            for name, value in report[section].items():
                print(f"  {name:<18} {value}")
        for problem in report["problems"]:
            print(f"problem: {problem}")
        if not report["problems"]:
            print("All is well.")
    if report["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """The facts by section, and `problems`: what keeps Tramontane from running well, each with its remedy."""
    from tramontane import __version__
    from tramontane.kernels import cpu
    from tramontane.platform import available_memory, cache_dir, cpu_count, total_memory

    problems = []
    packages = {name: _version(name) for name in _CORE}
    problems += [f"{name} is missing: pip install {name}" for name, version in packages.items() if not version]
    if not cpu.available():
        problems.append(
            "the compiled CPU kernels are missing, so models run slowly: install a C++20 compiler and reinstall tramontane"
        )
    problems += _self_test()
    return {
        "system": {
            "tramontane": __version__,
            "python": python_platform.python_version(),
            "platform": python_platform.platform(),
            "cpus": cpu_count(),
            "memory": f"{available_memory() / 1e9:.1f} GB free of {total_memory() / 1e9:.1f} GB",
            "cache": str(cache_dir()),
        },
        "kernels": {"cpu": _kernels()},
        "devices": _devices(),
        "extras": {
            extra: "installed" if all(map(_installed, needs)) else f"not installed: pip install 'tramontane[{extra}]'"
            for extra, needs in _EXTRAS.items()
        },
        "packages": packages,
        "problems": problems,
    }


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> str:
    from tramontane.kernels import for_device

    return for_device("cpu").name


def _devices() -> dict[str, str]:
    from tramontane.kernels.device import available_devices

    return {name: "available" for name in available_devices()}


def _self_test() -> list[str]:
    """One product on the installed kernels against numpy."""
    import numpy as np

    from tramontane.kernels import for_device

    ops = for_device("cpu")
    x, w = np.ones((3, 64), np.float32), np.full((5, 64), 0.5, np.float32)
    out = np.zeros((3, 5), np.float32)
    ops.matmul(out, x, w)
    if not np.allclose(out, 32.0):
        return [f"the kernels {ops.name} compute wrongly on {sys.platform}: set TRAMONTANE_ISA=plain and report this"]
    return []
