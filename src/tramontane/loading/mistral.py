"""Mistral's own layout of a checkpoint: `consolidated.safetensors` (or shards of it) beside a `params.json`.

Owns which files belong together. Must not know: what is in them. Source: the repositories that Mistral AI publishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tramontane.errors import CorruptCheckpoint, ModelNotFound
from tramontane.loading.repofiles import CONSOLIDATED, CONSOLIDATED_SHARD
from tramontane.loading.safetensors import INDEX_FILE, SINGLE_FILE

SETTINGS = "params.json"


def is_mistral(path: Path) -> bool:
    """Whether `path` is a folder of that layout, or a weights file in it. A Hugging Face checkpoint beside it wins."""
    folder = path if path.is_dir() else path.parent
    if not (folder / SETTINGS).is_file():
        return False
    if path != folder:
        return path.name == CONSOLIDATED or CONSOLIDATED_SHARD.fullmatch(path.name) is not None
    own = (folder / "config.json").is_file() and any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return not own and bool(_shards(folder))


def files(path: Path) -> Mapping[Path, None]:
    """The weights files of a checkpoint of that layout, as `SafetensorsFolder.of` takes them.

    Raises ModelNotFound without any, and CorruptCheckpoint where shards are missing.
    """
    folder = path if path.is_dir() else path.parent
    shards = _shards(folder)
    if not shards:
        raise ModelNotFound(str(folder), f"there is no {CONSOLIDATED}")
    numbered = [CONSOLIDATED_SHARD.fullmatch(shard.name) for shard in shards]
    parts = [(int(match[1]), int(match[2])) for match in numbered if match]
    if parts and parts != [(number, len(parts)) for number in range(1, len(parts) + 1)]:
        raise CorruptCheckpoint(
            str(folder), f"of {parts[0][1]} shards there are {len(parts)}", "Fetch the missing files into the folder."
        )
    return dict.fromkeys(shards)


def _shards(folder: Path) -> list[Path]:
    single = folder / CONSOLIDATED
    if single.is_file():
        return [single]
    return sorted(path for path in folder.glob("consolidated-*") if CONSOLIDATED_SHARD.fullmatch(path.name))
