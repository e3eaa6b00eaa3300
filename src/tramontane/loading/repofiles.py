"""Which files of a repository make a model: one rule, for a listing of the hub's and for what lies in a cache.

Owns the order of preference between formats and quantizations, and the names of the small files that come along.
Must not know: where the files are, or how they are fetched; what is inside them, beyond a shard index.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from tramontane.errors import ModelNotFound, UnsupportedModel
from tramontane.loading.safetensors import INDEX_FILE, SINGLE_FILE
from tramontane.records import dataclass

PREFERRED = ("Q4_K_M", "Q5_K_M", "Q8_0", "Q4_K_S")
"""Quantizations to take of a repository with nothing but GGUF files, best first."""
PREFERRED_UQFF = ("Q4_K", "Q5_K", "Q8_0", "AFQ4", "AFQ8")
"""The same for UQFF files."""
BITS = {"4": ("Q4_K_M", "Q4_K", "AFQ4"), "5": ("Q5_K_M", "Q5_K"), "8": ("Q8_0", "AFQ8")}
"""`org/name:4` -> what it means: the first of these that there is."""

TOKENIZERS = (
    *("tokenizer.json", "tekken.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.txt"),
)
"""The files that hold a tokenizer, best first: a tokenizer.json says everything."""
SIDECARS = {
    *TOKENIZERS,
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "params.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "README.md",
    "LICENSE",
}
CONSOLIDATED = "consolidated.safetensors"
CONSOLIDATED_SHARD = re.compile(r"consolidated-(\d{5})-of-(\d{5})\.safetensors")
"""Mistral's own layout: one file, or these."""
RESIDUAL = "residual.safetensors"
"""What UQFF files leave unquantized."""
UQFF_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>0|[1-9]\d{0,4})\.uqff")

_BELOW = re.compile(r"\d+_[A-Za-z]+/(config\.json|model\.safetensors)|additional_chat_templates/[^/]+\.jinja")
"""Files of one of sentence-transformers' modules, such as 1_Pooling and 2_Dense; named templates."""
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt|pkl)")


@dataclass(frozen=True)
class Choice:
    """The files to have, weights last, and the one to open: a GGUF or UQFF file, of several parts the first; "" for
    the folder."""

    files: tuple[str, ...]
    opens: str = ""


def plain(name: str) -> bool:
    """Whether a repository's file name is a relative path that stays below its folder on every system."""
    ordinary = all(part and part == part.strip(" .") for part in name.split("/"))
    return ordinary and not re.search(r'[\\:*?"<>|\x00-\x1f\x7f]', name)


def choose(names: Collection[str], tag: str, file: str, shards: Callable[[], Collection[str]], where: str) -> Choice:
    """The model among a repository's files.

    `file`: a GGUF or UQFF file by its path. `tag`: one by its quantization (or 4, 5, 8). With neither: safetensors
    with a config.json, else a GGUF file as in `PREFERRED`, else a UQFF file as in `PREFERRED_UQFF`, else Mistral's own
    format. `shards()` reads the shard index. `where` names the repository in errors: ModelNotFound where nothing fits,
    UnsupportedModel for a checkpoint of pickles.
    """
    names = [name for name in names if plain(name)]
    ggufs, uqffs = split_sets(names), uqff_sets(names)
    if file or tag:
        sets = {**ggufs, **uqffs}
        return _choice(sets, _by_path(sets, file, where) if file else _by_tag(sets, tag, where), names)
    weights = _safetensors(names, shards, where) if "config.json" in names else ()
    if weights:
        return Choice((*_sidecars(names), *weights))
    for sets, preferred in ((ggufs, PREFERRED), (uqffs, PREFERRED_UQFF)):
        if sets:
            return _choice(sets, _preferred(sets, preferred, where), names)
    consolidated = _consolidated(names) if "params.json" in names else ()
    if consolidated:
        return Choice((*_sidecars(names), *consolidated))
    if any(_PICKLE.fullmatch(name) for name in names):
        raise UnsupportedModel(
            f"{where} has its weights in PyTorch pickles alone, which are not read: they can run code.",
            "Use a revision with safetensors (the hub's conversions are pull requests: org/name@refs/pr/N), or convert "
            "the checkpoint to safetensors.",
        )
    lacking = (
        "no .safetensors, .gguf or .uqff file" if "config.json" in names else "neither config.json nor a .gguf file"
    )
    raise ModelNotFound(where, f"it has {lacking}", "Name a repository that holds a whole language model.")


def _sidecars(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name in SIDECARS or _BELOW.fullmatch(name))


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
    others = {*_consolidated(names), "adapter_model.safetensors", RESIDUAL}
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


# ---- GGUF and UQFF ----------------------------------------------------------------------------------------------


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


def uqff_sets(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The same for UQFF: NAME-0.uqff -> all its shards, or a file without a number. They lie beside a config.json."""
    if "config.json" not in names:
        return {}
    known = {name: UQFF_SHARD.fullmatch(name) for name in sorted(names) if name.endswith(".uqff") and "/" not in name}
    shards = Counter(shard["stem"] for shard in known.values() if shard)
    sets: dict[str, tuple[str, ...]] = {}
    for name, shard in known.items():
        if shard is None:
            sets[name] = (name,)
        elif shard["number"] == "0":
            parts = tuple(f"{shard['stem']}-{number}.uqff" for number in range(shards[shard["stem"]]))
            if known.keys() >= set(parts):
                sets[name] = parts
    return sets


def has_tag(name: str, tag: str) -> bool:
    """Whether a file's path says that it is of this quantization, as in `model.Q4_K_M.gguf`. UQFF files are named
    after it with or without underscores: `model-q4k-0.uqff`, `q8_0-0.uqff`."""
    wanted = "_?".join(map(re.escape, tag.replace("_", ""))) if name.endswith(".uqff") else re.escape(tag)
    return re.search(rf"(?<![A-Za-z0-9]){wanted}(?![A-Za-z0-9_])", name, re.IGNORECASE) is not None


def _choice(sets: Mapping[str, tuple[str, ...]], name: str, names: Collection[str]) -> Choice:
    """The model to open at `name`: GGUF has all in itself, UQFF what `names` has beside it."""
    if name.endswith(".uqff"):
        residual = (RESIDUAL,) if RESIDUAL in names else ()
        return Choice((*_sidecars(names), *residual, *sets[name]), name)
    return Choice(sets[name], name)


def _by_path(sets: Mapping[str, tuple[str, ...]], file: str, where: str) -> str:
    if file in sets:
        return file
    raise ModelNotFound(
        f"{where}/{file}", _what_there_is(sets), "Name one of its files; of a split model, the first part."
    )


def _by_tag(sets: Mapping[str, tuple[str, ...]], tag: str, where: str) -> str:
    found: list[str] = []
    for wanted in BITS.get(tag, (tag,)):
        found = found or [name for name in sets if has_tag(name, wanted)]
    if len(found) == 1:
        return found[0]
    if not sets:
        raise ModelNotFound(f"{where}:{tag}", _what_there_is(sets), f"Leave out ':{tag}'.")
    detail = f"several files are of that kind: {_listed(found)}" if found else _what_there_is(sets)
    raise ModelNotFound(f"{where}:{tag}", detail, f"Name the file: {where}/{next(iter(sets))}.")


def _preferred(sets: Mapping[str, tuple[str, ...]], preferred: Iterable[str], where: str) -> str:
    for tag in preferred:
        if any(has_tag(name, tag) for name in sets):
            return _by_tag(sets, tag, where)
    if len(sets) == 1:
        return next(iter(sets))
    remedy = f"Name one of them: {where}/{next(iter(sets))}."
    raise ModelNotFound(where, f"none is {' or '.join(preferred)}; {_what_there_is(sets)}", remedy)


def _what_there_is(sets: Iterable[str]) -> str:
    names = list(sets)
    if not names:
        return "it has no complete GGUF or UQFF model"
    kinds = sorted({name.rpartition(".")[2].upper() for name in names})
    return f"its {' and '.join(kinds)} files are: {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
