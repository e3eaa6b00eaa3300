"""Damage to folders: safetensors and UQFF, their indexes and settings, tokenizers, templates, links."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from tests.hostile import sound
from tests.hostile.gguf_cases import NAMES
from tests.hostile.templates import TEMPLATES
from tests.hostile.values import INF, NAN, VALUES, Case, Content, Link, damaged_json
from tests.loading.hostile import mutate
from tests.text.hostile import mutate_bytes, mutate_value

_SHAPES: Sequence[Any] = (
    *(
        [],
        [0],
        [0, 64],
        [-1],
        [64, -64],
        [2**64],
        [2**32, 2**32],
        [2**63, 2],
        [1] * 33,
        [1] * 99_999,
        [64.0],
        ["64"],
        64,
    ),
    *([True, 64], [None], [2**62, 0, 2**62], [0] * 64, [[64]], {}, [10**400, 0], [10**400]),
)
_SPANS: Sequence[Any] = (
    *(
        [0, 0],
        [0],
        [],
        [0, 1, 2],
        [-1, 3],
        [1, 0],
        [2**63, 2**63 + 16384],
        [2**64 - 1, 2**64],
        [0, 2**40],
        [0.0, 16384.0],
    ),
    *([None, None], ["0", "16384"], {}, 5, [0, 16384, 0], [16, 16400], [10**400, 10**400 + 16384]),
)
_TYPES: Sequence[Any] = (
    "F64",
    "F16",
    "BF16",
    "I8",
    "BOOL",
    "C64",
    "F4",
    "F6_E2M3",
    "F8_E4M3",
    "U64",
    "x",
    "",
    None,
    1,
    [],
)


def _header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header lies, before the same data."""
    size = int.from_bytes(content[:8], "little")
    raw, data = content[8 : 8 + size], content[8 + size :]
    kind = rng.randrange(12)
    header = json.loads(raw)
    name = rng.choice([key for key in header if key != "__metadata__"])
    if kind < 3:
        header[name]["shape"] = rng.choice(_SHAPES)
    elif kind < 6:
        header[name]["data_offsets"] = rng.choice(_SPANS)
    elif kind == 6:
        header[name]["dtype"] = rng.choice(_TYPES)
    elif kind == 7:
        other = rng.choice(list(header))
        header[name] = header[other]
    elif kind == 8:
        header[rng.choice(("__metadata__", "", "\ud800", "\0", "x" * 99_999, *NAMES))] = rng.choice(
            (*VALUES, header.pop(name))
        )
    elif kind == 9:
        header = (
            json.loads(damaged_json(raw, random.Random(1)) or b"{}")
            if rng.random() < 0.1
            else mutate_value(header, rng)
        )
    elif kind == 10:
        lie = rng.choice((0, 1, 2, size - 1, size + 1, len(content), 100_000_001, 2**31, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + raw + data
    else:
        return mutate(content, rng, header=rng.choice((9, size, len(content))))
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data


_SETTINGS: Mapping[str, Sequence[Any]] = {
    "rope_scaling": [
        {"rope_type": kind, "factor": factor, **more}
        for kind in ("linear", "yarn", "llama3", "dynamic", "longrope", None, 1)
        for factor in (0, -1, NAN, INF, 1e-300, 1e12, "2", None)
        for more in (
            {},
            {"original_max_position_embeddings": 0},
            {"low_freq_factor": 1, "high_freq_factor": 1, "beta_fast": NAN},
        )
    ],
    "layer_types": [["full_attention"] * n for n in (0, 2, 99_999)] + [["sliding_attention"], [None], "full_attention"],
    "hidden_act": ["__class__", "eval", "", "gelu", ["silu"]],
    "architectures": [[], ["__import__('os')"], [None], "LlamaForCausalLM", {"a": 1}, ["LlamaForCausalLM"] * 9999],
    "model_type": ["../../etc/passwd", "qwen2", "", "llama\0", "mixtral"],
    "auto_map": [{"AutoModelForCausalLM": "evil.Model"}],
}


def _config(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.6:
        return damaged_json(content, rng)
    key = rng.choice(list(_SETTINGS))
    return json.dumps({**json.loads(content), key: rng.choice(_SETTINGS[key])}).encode()


_NO_TOKENS: Sequence[Any] = ("", {"content": ""}, {"content": None}, {"content": "x" * 99_999}, None, [], {})
_TOKEN_SETTINGS: Mapping[str, Sequence[Any]] = {
    "added_tokens_decoder": [
        *({str(id_): "<x>"} for id_ in (0, 264, 2**31, 2**63, -1, 10**30, "x", "", "\u0661", "1_0")),
        *({"264": token} for token in _NO_TOKENS),
        {str(264 + i): f"<{i}>" for i in range(20_000)},
    ],
    "bos_token": ["", "nope", {"content": "</s>", "lstrip": 1}, {"__type": "AddedToken"}, 1, ["<s>"], "\ud800"],
    "chat_template": [
        [],
        [{}],
        [{"name": "default", "template": 1}],
        {"default": None},
        [None],
        5,
        "\ud800",
        ["{{"] * 999,
    ],
    "model_max_length": [10**400, NAN, -1, "x"],
    "tokenizer_class": ["../../evil", None, 5, "__class__"],
}


def _token_config(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.4:
        return damaged_json(content, rng)
    key = rng.choice(list(_TOKEN_SETTINGS))
    return json.dumps({**json.loads(content), key: rng.choice(_TOKEN_SETTINGS[key])}).encode()


_CHANGES: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    "config.json": _config,
    "tokenizer_config.json": _token_config,
    "params.json": lambda rng, content: damaged_json(content, rng),
    "generation_config.json": lambda rng, content: damaged_json(content, rng),
    "tokenizer.json": lambda rng, content: damaged_json(content, rng),
    "tekken.json": lambda rng, content: damaged_json(content, rng),
    "tokenizer.model": lambda rng, content: mutate_bytes(content, rng),
    "spiece.model": lambda rng, content: mutate_bytes(content, rng),
}


def _change(files: sound.Files, name: str, rng: random.Random) -> bytes:
    if name.endswith((".safetensors", ".uqff")):
        return _header(rng, files[name])
    if name.endswith("index.json"):
        return damaged_json(files[name], rng)
    return _CHANGES[name](rng, files[name])


def folder(kind: str, *favourites: str) -> Callable[[int, random.Random], Case]:
    """A folder of this kind with one file damaged: mostly one of `favourites`, of all where there are none."""

    def make(number: int, rng: random.Random) -> Case:
        files = _sound(kind)
        names = [name for name in files if any(part in name for part in favourites)] or list(files)
        name = rng.choice(names if rng.random() < 0.9 else list(files))
        return {**files, name: _change(files, name, rng)}

    return make


@cache
def _sound(kind: str) -> sound.Files:
    return sound.SOUND[kind]()


_PATHS: Sequence[Any] = (
    *(
        "../model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../b.safetensors",
        "C:\\x.safetensors",
        "model.safetensors\0",
    ),
    *(
        "\\\\host\\x.safetensors",
        "x" * 300 + ".safetensors",
        "\ud800.safetensors",
        "file:///etc/passwd.safetensors",
        None,
        1,
        [],
    ),
    *(
        "~/x.safetensors",
        "model-00001-of-00003.safetensors ",
        "MODEL-00001-OF-00003.safetensors",
        ".safetensors",
        "a\nb.safetensors",
    ),
)
_LINKS = ("/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "nowhere", ".", "..", "/", "/dev/full")


@cache
def _link_catalogue() -> tuple[Callable[[dict[str, Content]], None], ...]:
    """Indexes that point elsewhere, and links in place of files."""
    index = "model.safetensors.index.json"

    def mapped(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Content]], None]:
        def apply(files: dict[str, Content]) -> None:
            content = json.loads(_sound("sharded")[index])
            change(content["weight_map"])
            files[index] = json.dumps(content).encode()

        return apply

    def linked(name: str, to: str) -> Callable[[dict[str, Content]], None]:
        return lambda files: files.update({name: Link(to)})

    def gone(name: str) -> Callable[[dict[str, Content]], None]:
        def apply(files: dict[str, Content]) -> None:
            del files[name]

        return apply

    names = ("config.json", index, "model-00002-of-00003.safetensors", "tokenizer.json", "tokenizer_config.json")
    more = (*names, "generation_config.json", "chat_template.jinja")
    return (
        *(mapped(lambda shards, path=path: shards.update({"model.norm.weight": path})) for path in _PATHS),  # type: ignore[misc]
        mapped(lambda shards: shards.update({f"x{i}": "model-00001-of-00003.safetensors" for i in range(200_000)})),
        mapped(lambda shards: shards.update({f"x{i}": f"{i}.safetensors" for i in range(50_000)})),
        mapped(lambda shards: shards.clear()),
        *(linked(name, to) for name in more for to in (*_LINKS, name)),
        *(gone(name) for name in names),
    )


def links(number: int, rng: random.Random) -> Case:
    files: dict[str, Content] = dict(_sound("sharded"))
    catalogue = _link_catalogue()
    if number < len(catalogue):
        catalogue[number](files)
        return files
    return folder("sharded", "index", "model-")(number, rng)


def template(number: int, rng: random.Random) -> Case:
    files: dict[str, Content] = dict(_sound("folder"))
    source = TEMPLATES[number % len(TEMPLATES)].encode("utf-8", "surrogatepass")
    if number >= len(TEMPLATES):
        pieces = [rng.choice(TEMPLATES).encode("utf-8", "surrogatepass")[:2000] for _ in range(2)]
        source = mutate_bytes(pieces[0] + sound.TEMPLATE.encode() + pieces[1], rng)
    files["chat_template.jinja"] = source
    return files
