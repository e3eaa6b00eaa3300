"""An X-LoRA checkpoint as the wheel can read it from a folder.

Owns that layout. Must not know: models, requests. A repository on the hub has each adapter in a folder of its own; of
a local folder the wheel sees only what lies in it directly, and tells adapters by the names of the files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tramontane.errors import CorruptCheckpoint, InvalidRequest, ModelNotFound

_OWN = ("xlora_classifier.safetensors", "xlora_config.json")
_OF_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def staged(checkpoint: Path, order: Path, stage: Path) -> Path:
    """Fill `stage`, an empty folder, with links to the checkpoint's files under names that the wheel tells apart.

    Raises InvalidRequest for an ordering file without adapters, or with names that the wheel confuses; ModelNotFound
    for a file that is missing; CorruptCheckpoint.
    """
    names = _names(order)
    for name in _OWN:
        _link(checkpoint / name, stage / name)
    for adapter in names:
        folder = _folder_of(checkpoint, adapter)
        for file in _OF_ADAPTER:
            _link(folder / file, stage / f"{adapter}.{file}")
    return stage


def _names(order: Path) -> list[str]:
    names = _json(order).get("order")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidRequest("xlora_order", f"{order} has no list `order` of the adapters' names")
    for one, other in _pairs(names):
        if one in other:
            raise InvalidRequest(
                "xlora_order", f"mistral.rs takes {other!r} for {one!r}, whose name is in it", "Rename the adapters."
            )
    if odd := [name for name in names if "/" in name or "\\" in name or name.startswith(".")]:
        raise InvalidRequest("xlora_order", f"{odd[0]!r} is no name of an adapter")
    return names


def _pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    return ((one, other) for i, one in enumerate(names) for j, other in enumerate(names) if i != j)


def _folder_of(checkpoint: Path, adapter: str) -> Path:
    """The adapter's own folder in the checkpoint's, else where xlora_config.json says that it is."""
    if (checkpoint / adapter).is_dir():
        return checkpoint / adapter
    told = _json(checkpoint / _OWN[1]).get("adapters")
    place = told.get(adapter) if isinstance(told, dict) else None
    if isinstance(place, str) and (checkpoint / place).is_dir():
        return checkpoint / place
    raise ModelNotFound(str(checkpoint / adapter), "the ordering file names that adapter", "Put its folder there.")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFound(str(path), error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(str(path), f"it is not JSON ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(str(path), f"it holds a {type(value).__name__}, not an object")
    return value


def _link(file: Path, name: Path) -> None:
    if not file.is_file():
        raise ModelNotFound(str(file), "the X-LoRA checkpoint lacks it")
    try:
        os.symlink(file.resolve(), name)
    except OSError:  # where links need rights that this user has not
        shutil.copyfile(file, name)
