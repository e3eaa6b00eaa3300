"""Under which licence a checkpoint says that it may be used.

Owns the places where checkpoints say so. Must not know: what licences mean. Source: the hub's documentation of model
cards (the front matter of README.md).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tramontane.loading.checkpoint import Checkpoint

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_MAX_READ = 1 << 16  # bytes: what is asked for stands at the beginning
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_OTHER = ("other", "unknown")
_MAX_LENGTH = 100


def licence_of(checkpoint: Checkpoint) -> str | None:
    """A licence's name as the checkpoint gives it: in GGUF's `general.license` or a safetensors header, in the front
    matter of README.md, or by the first line of a LICENSE file. None where it says nothing."""
    for value in (checkpoint.metadata.get("general.license"), checkpoint.metadata.get("license")):
        if isinstance(value, str) and value.strip():
            return _short(value)
    if checkpoint.folder is None:
        return None
    readme = _beginning(checkpoint.folder / "README.md")
    front = _FRONT_MATTER.match(readme)
    if front is not None:
        said = {key: _entry(front[1], key) for key in ("license", "license_name")}
        name = said["license_name"] if said["license"] in (None, *_OTHER) else said["license"]
        if name or said["license"]:
            return _short(name or said["license"] or "")
    texts = (_beginning(checkpoint.folder / name).strip() for name in _FILES)
    return next((_short(text) for text in texts if text), None)


def _entry(front: str, key: str) -> str | None:
    """A plain value of YAML's at the top level; of a list the first."""
    match = re.search(rf"^{key}:[ \t]*(?:\n[ \t]*-[ \t]*)?([^\n]*)$", front, re.MULTILINE)
    return match[1].strip().strip("'\"[]") or None if match else None


def _short(text: str) -> str:
    return text.strip().splitlines()[0].strip(" #*")[:_MAX_LENGTH]


def _beginning(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(_MAX_READ).decode("utf-8", "replace").replace("\r\n", "\n")
