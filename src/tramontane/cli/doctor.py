"""`tramontane doctor`: what is here, and what this installation can do with it.

Owns the checks and their wording. Must not know: models.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from tramontane.cli.options import AsJson

_CORE = ("numpy", "ml_dtypes", "tokenizers", "jinja2", "safetensors", "huggingface_hub", "typer", "rich")
_EXTRAS = {
    "torch": ("torch",),
    "cuda": ("torch", "triton"),
    "transformers": ("transformers", "torch", "accelerate", "gguf"),
    "mistralrs": ("mistralrs",),
    "grammar": ("llguidance",),
    "server": ("llguidance", "fastapi", "uvicorn", "prometheus_client"),
}


def doctor(as_json: AsJson = False) -> None:
    """Check the installation, the machine and the devices. Exits with 1 when something is wrong."""
    from tramontane.cli.terminal import one_line, print_json

    report = examine()
    if as_json:
        print_json(report)
    else:
        for section in ("system", "kernels", "devices", "backends", "extras", "packages"):
            print(section)
            for name, value in report[section].items():
                print(f"  {name:<18}{one_line(str(value or 'missing'))}")
        for problem in report["problems"]:
            print(f"problem: {problem}")
        if not report["problems"]:
            print("All is well.")
    if report["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that the command prints, by section; `problems` is empty where all is well."""
    packages = {name: _version(name) for name in _CORE}
    lacking = [name for name, version in packages.items() if version is None]
    problems = [f"{name} is missing: pip install {name}" for name in lacking]
    kernels, devices = {"cpu": "not examined, as packages are missing"}, ["cpu"]
    system, backends = _system(problems), {}
    if not lacking:
        backends = _backends(problems)
        from tramontane.kernels.device import available_devices

        kernels = {"cpu": _kernels(problems)}
        devices = available_devices()
    return {
        "system": system,
        "kernels": kernels,
        "devices": dict.fromkeys(devices, "available"),
        "backends": backends,
        "extras": {
            extra: "installed" if all(map(_installed, needs)) else f"not installed: pip install 'tramontane[{extra}]'"
            for extra, needs in _EXTRAS.items()
        },
        "packages": packages,
        "problems": problems,
    }


def _system(problems: list[str]) -> dict[str, Any]:
    import platform as python_platform

    from tramontane import __version__
    from tramontane.platform import available_memory, cpu_count, total_memory

    return {
        "tramontane": __version__,
        "python": python_platform.python_version(),
        "platform": python_platform.platform(),
        "cpus": cpu_count(),
        "memory": f"{available_memory() / 1e9:.1f} GB free of {total_memory() / 1e9:.1f} GB",
        "cache": _cache(problems),
    }


def _cache(problems: list[str]) -> str:
    """The folder of fetched models, tried out as far as it exists."""
    import os

    from tramontane.platform import cache_dir

    try:
        folder = cache_dir()
    except RuntimeError:
        problems.append("there is no home folder to keep models in: set TRAMONTANE_CACHE to a folder")
        return "none"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problems.append(f"the model cache {folder} cannot be written: set TRAMONTANE_CACHE to another folder")
    return str(folder)


def _backends(problems: list[str]) -> dict[str, str]:
    """Of each backend, what it can do and lacks; or how it is installed."""
    from tramontane.backends.declared import Declared
    from tramontane.backends.registry import all_declared

    found = all_declared()
    there = [one for one in found.values() if isinstance(one, Declared)]
    fields = {field for one in there for field in one.sampling_fields | one.request_fields}
    shown = {}
    for name, one in found.items():
        if not isinstance(one, Declared):
            problems.append(f"the backend {name} cannot be used: {one}")
            shown[name] = "broken"
        elif missing := one.missing():
            line = f"tramontane[{one.extra}]" if one.extra else " ".join(missing)
            shown[name] = f"not installed: pip install '{line}'"
        else:
            lacking = ", ".join(sorted(fields - one.sampling_fields - one.request_fields))
            shown[name] = f"{', '.join(sorted(one.abilities))}{f'; without {lacking}' if lacking else ''}"
    return shown


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels(problems: list[str]) -> str:
    """The name of the kernels that the CPU gets, after one product of theirs was held against what it must be."""
    import numpy as np

    from tramontane.kernels import cpu, for_device

    if not cpu.available():
        problems.append(
            "the compiled CPU kernels are missing, so models run slowly: "
            "install a C++20 compiler and reinstall tramontane"
        )
    elif trouble := cpu.trouble():
        problems.append(trouble)
    ops = for_device("cpu", kernels="auto" if cpu.available() else "reference")
    x, w = np.ones((3, 64), np.float32), np.full((5, 64), 0.5, np.float32)
    out = np.zeros((3, 5), np.float32)
    ops.matmul(out, x, w)
    if not (out == 32.0).all():
        problems.append(f"the kernels {ops.name} compute wrongly on {sys.platform}: report this")
    return ops.name
