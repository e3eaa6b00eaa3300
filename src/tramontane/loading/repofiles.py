"""Which files of a repository make a model: one rule, for a listing of the hub's and for what lies in a cache.

Owns the order of preference between formats and quantizations, and the names of the small files that come along.
Must not know: where the files are, or how they are fetched; what is inside them, beyond a shard index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from tramontane.errors import ModelNotFound, UnsupportedModel
from tramontane.loading.safetensors import INDEX_FILE, SINGLE_FILE

PREFERRED = ("Q4_K_M", "Q5_K_M", "Q8_0", "Q4_K_S")
"""Quantizations to take of a repository with nothing but GGUF files, best first."""
BITS = {"4": "Q4_K_M", "5": "Q5_K_M", "8": "Q8_0"}
"""`org/name:4` -> what it means."""

TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "spiece.model"})
SIDECARS = TOKENIZERS | {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "params.json",
    "README.md",
    "LICENSE",
}
CONSOLIDATED = "consolidated.safetensors"
CONSOLIDATED_SHARD = re.compile(r"consolidated-(\d{5})-of-(\d{5})\.safetensors")
"""Mistral's own layout: one file, or these."""

_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt|pkl)")


@dataclass(frozen=True)
class Choice:
    """The files to have, weights last, and the GGUF file to open (the first part of a split one); "" for the folder."""

    files: tuple[str, ...]
    gguf: str = ""


def plain(name: str) -> bool:
    """Whether a repository's file name is a relative path that stays below its folder on every system."""
    ordinary = all(part and part == part.strip(" .") for part in name.split("/"))
    return ordinary and not re.search(r'[\\:*?"<>|\x00-\x1f\x7f]', name)


def choose(names: Collection[str], tag: str, file: str, shards: Callable[[], Collection[str]], where: str) -> Choice:
    """The model among a repository's files.

    `file`: a GGUF file by its path. `tag`: a GGUF file by its quantization (or 4, 5, 8). With neither: safetensors
    with a config.json, else a GGUF file as in `PREFERRED`, else Mistral's own format. `shards()` reads the shard
    index. `where` names the repository in errors: ModelNotFound where nothing fits, UnsupportedModel for a checkpoint
    of pickles.
    """
    names = [name for name in names if plain(name)]
    ggufs = split_sets(names)
    if file:
        return _by_path(ggufs, file, where)
    if tag:
        return _by_tag(ggufs, BITS.get(tag, tag), where)
    weights = _safetensors(names, shards, where) if "config.json" in names else ()
    if weights:
        return Choice((*_sidecars(names), *weights))
    if ggufs:
        return _preferred(ggufs, where)
    consolidated = _consolidated(names) if "params.json" in names else ()
    if consolidated:
        return Choice((*_sidecars(names), *consolidated))
    if any(_PICKLE.fullmatch(name) for name in names):
        raise UnsupportedModel(
            f"{where} has its weights in PyTorch pickles alone, which are not read: they can run code.",
            "Use a revision with safetensors (the hub's conversions are pull requests: org/name@refs/pr/N), or convert "
            "the checkpoint to safetensors.",
        )
    lacking = "no .safetensors or .gguf file" if "config.json" in names else "neither config.json nor a .gguf file"
    raise ModelNotFound(where, f"it has {lacking}", "Name a repository that holds a whole language model.")


def _sidecars(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name in SIDECARS)


def _safetensors(names: Collection[str], shards: Callable[[], Collection[str]], where: str) -> tuple[str, ...]:
    """The weights in the order in which `SafetensorsFolder` looks for them; none where there are none."""
    if SINGLE_FILE in names:
        return (SINGLE_FILE,)
    if INDEX_FILE in names:
        wanted = sorted(shards())
        absent = [shard for shard in wanted if shard not in names]
        if absent:
            raise ModelNotFound(where, f"its index names {len(absent)} shards that are not there, such as {absent[0]}")
        return (INDEX_FILE, *wanted)
    others = {*_consolidated(names), "adapter_model.safetensors"}
    found = [n for n in names if n.endswith(".safetensors") and "/" not in n and n not in others]
    single = [name for name in found if not _SHARD.fullmatch(name)]
    if len(single) > 1:
        raise UnsupportedModel(
            f"{where} has {len(single)} .safetensors files and no {INDEX_FILE}: {_listed(single)}.",
            "Use another repository or revision.",
        )
    return tuple(single)


def _consolidated(names: Collection[str]) -> tuple[str, ...]:
    """The weights in Mistral's own layout."""
    return (CONSOLIDATED,) if CONSOLIDATED in names else tuple(sorted(filter(CONSOLIDATED_SHARD.fullmatch, names)))


# ---- GGUF -----------------------------------------------------------------------------------------------------


def split_sets(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The repository's GGUF models: the file to open -> all its parts in order. Incomplete sets are left out, as are
    files that hold no language model (mmproj, imatrix)."""
    sets: dict[str, tuple[str, ...]] = {}
    known = {name for name in names if name.lower().endswith(".gguf") and not _NO_MODEL.search(name.rpartition("/")[2])}
    for name in sorted(known):
        part = _PART.fullmatch(name)
        if part is None:
            sets[name] = (name,)
        elif int(part["part"]) == 1:
            # A count from a stranger: never more names than the repository has.
            numbers = range(1, min(int(part["parts"]), len(known) + 1) + 1)
            ending = name[len(name) - len(".gguf") :]
            parts = tuple(f"{part['stem']}-{number:05}-of-{part['parts']}{ending}" for number in numbers)
            if known.issuperset(parts):
                sets[name] = parts
    return sets


def has_tag(name: str, tag: str) -> bool:
    """Whether a GGUF file's path says that it is of this quantization, as in `model.Q4_K_M.gguf`."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])", name, re.IGNORECASE) is not None


def _by_path(ggufs: dict[str, tuple[str, ...]], file: str, where: str) -> Choice:
    if file in ggufs:
        return _gguf(ggufs, file)
    detail = f"its GGUF files are: {_listed(ggufs)}" if ggufs else "it has no complete GGUF model"
    raise ModelNotFound(f"{where}/{file}", detail, "Name one of its files; of a split model, the first part.")


def _by_tag(ggufs: dict[str, tuple[str, ...]], tag: str, where: str) -> Choice:
    found = [name for name in ggufs if has_tag(name, tag)]
    if len(found) == 1:
        return _gguf(ggufs, found[0])
    if not ggufs:
        raise ModelNotFound(f"{where}:{tag}", "the repository has no complete GGUF model", f"Leave out ':{tag}'.")
    detail = f"several files are of that kind: {_listed(found)}" if found else f"its GGUF files are: {_listed(ggufs)}"
    raise ModelNotFound(f"{where}:{tag}", detail, f"Name the file: {where}/FILE.gguf.")


def _preferred(ggufs: dict[str, tuple[str, ...]], where: str) -> Choice:
    for tag in PREFERRED:
        if any(has_tag(name, tag) for name in ggufs):
            return _by_tag(ggufs, tag, where)
    if len(ggufs) == 1:
        return _gguf(ggufs, next(iter(ggufs)))
    remedy = f"Name one of them: {where}/FILE.gguf."
    raise ModelNotFound(where, f"none of its GGUF files is {' or '.join(PREFERRED)}: {_listed(ggufs)}", remedy)


def _gguf(ggufs: dict[str, tuple[str, ...]], name: str) -> Choice:
    return Choice(ggufs[name], name)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
