"""Damage to GGUF files and to the llama files from before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from tests.hostile import sound
from tests.hostile.containers import ARRAY, STRING, Raw, Tensor, gguf_file, text
from tests.hostile.values import INF, NAN, VALUES, Case
from tests.loading.hostile import mutate
from tests.text.hostile import mutate_value

_HUGE = (2**64 - 1, 2**63, 2**62, 2**48, 2**32, 2**31, 2**24, 70_000)
_DIMS: Sequence[tuple[int, ...]] = (
    *(
        (),
        (0,),
        (0, 0),
        (1,),
        (64, 0),
        (2**64 - 1,),
        (2**63, 2),
        (2**32, 2**32),
        (2**33, 2**31),
        (64, 2**58),
        (2**62, 64),
    ),
    *((1,) * 4, (1,) * 5, (64, 16, 1, 1), (64, 16, 2**61, 8), (33, 16), (31, 16), (2**31, 2**31, 2), (1,) * 5000),
)
_OFFSETS = (1, 7, 31, 32, 64, 4096, 2**31, 2**32, 2**63, 2**64 - 32, 2**64 - 1)
NAMES: tuple[str, ...] = (
    "",
    "\0",
    "\u202eweight",
    "blk.1.attn_q.weight",
    "blk.00.attn_q.weight",
    "blk.-1.attn_q.weight",
    "x" * 70_000,
)
NAMES += (
    "blk.999999.attn_q.weight",
    "blk.\u0661.attn_q.weight",
    "token_embd.weight",
    "rope_freqs.weight",
    "output.bias",
)


def _arrays(levels: int, width: int) -> Raw:
    """Arrays of `width` arrays of ..., `levels` deep, the innermost empty."""
    data = b"\x04\0\0\0" + bytes(8)
    for _ in range(levels):
        data = b"\x09\0\0\0" + width.to_bytes(8, "little") + data * width
    return Raw(ARRAY, data)


_RAWS: Sequence[Raw] = (
    *(Raw(kind, b"\xff" * 8) for kind in (7, 8, 9, 13, 255, 2**32 - 1)),
    *(Raw(STRING, size.to_bytes(8, "little")) for size in _HUGE),
    *(
        Raw(ARRAY, kind.to_bytes(4, "little") + size.to_bytes(8, "little"))
        for kind in (0, 8, 9, 12, 99)
        for size in _HUGE[:4]
    ),
    *(Raw(STRING, text(content)) for content in (b"\xff\xfe", b"\xed\xa0\x80", b"\0" * 9, b"x" * 3_000_000)),
    *(_arrays(levels, 1) for levels in (1, 4, 5, 500, 20_000)),
    *(_arrays(1, 300_000), _arrays(2, 500), Raw(ARRAY, b"\x08\0\0\0" + (2**18).to_bytes(8, "little") + bytes(2**21))),
    Raw(ARRAY, b"\x00\0\0\0" + (2**23).to_bytes(8, "little") + bytes(2**23)),
)


class _GGUF:
    """The parts of a GGUF file, to be changed and written."""

    def __init__(self, model: str) -> None:
        self.metadata = sound.gguf_metadata(model)
        tokens = len(self.metadata["tokenizer.ggml.tokens"])
        self.tensors = dict(sound.gguf_tensors(tokens, mixed=model == "llama"))
        self.options: dict[str, Any] = {}
        self.name = "model.gguf"

    def case(self) -> Case:
        return {self.name: gguf_file(self.metadata, self.tensors, **self.options)}


def _change(part: _GGUF, rng: random.Random) -> None:
    kind = rng.randrange(8)
    key, name = rng.choice(list(part.metadata)), rng.choice(list(part.tensors))
    if kind < 2:
        part.metadata[key] = rng.choice(VALUES)
    elif kind == 2:
        part.metadata[key] = rng.choice(_RAWS)
    elif kind == 3:
        part.metadata[key] = mutate_value(part.metadata[key], rng)
    elif kind == 4:
        part.metadata.pop(key)
    elif kind == 5:
        part.tensors[name] = replace(part.tensors[name], dims=rng.choice(_DIMS))
    elif kind == 6:
        part.tensors[name] = replace(part.tensors[name], offset=rng.choice(_OFFSETS))
    else:
        part.tensors[name] = replace(part.tensors[name], kind=rng.choice((*range(45), 2**31, 2**32 - 1)))


def _counts(model: _GGUF) -> Iterable[dict[str, Any]]:
    true = len(model.tensors), len(model.metadata)
    for count in (*_HUGE, 0):
        yield {"counts": (count, true[1])}
        yield {"counts": (true[0], count)}
    yield from ({"version": version} for version in (0, 1, 2, 4, 2**31, 3 << 24, 1 << 24))
    yield from ({"alignment": alignment} for alignment in (8, 64, 4096))


@cache
def _catalogue(model: str) -> tuple[Callable[[_GGUF], None], ...]:
    """Changes that somebody thought of."""

    def option(options: dict[str, Any]) -> Callable[[_GGUF], None]:
        return lambda part: part.options.update(options)

    def value(key: str, value: Any) -> Callable[[_GGUF], None]:
        return lambda part: part.metadata.update({key: value})

    def tensor(name: str, **changes: Any) -> Callable[[_GGUF], None]:
        return lambda part: part.tensors.update({name: replace(part.tensors[name], **changes)})

    def extra(name: str, made: Tensor) -> Callable[[_GGUF], None]:
        return lambda part: part.tensors.update({name: made})

    def split(name: str, **values: Any) -> Callable[[_GGUF], None]:
        def change(part: _GGUF) -> None:
            part.name = name
            part.metadata.update({f"split.{key.replace('_', '.')}": item for key, item in values.items()})

        return change

    factors = (b"\0" * 32, b"\0\0\xc0\x7f" * 8, b"\0\0\x80\xbf" * 8, b"\0\0\x80\x7f" * 8)
    arch = "llama" if model == "llama" else "qwen2"
    return (
        *(option(options) for options in _counts(_GGUF(model))),
        *(value("general.alignment", v) for v in (0, 1, 3, 8, 64, 2**31, 2**32, 2**63, -8, "32", [32], 32.0, True)),
        *(tensor("blk.0.attn_q.weight", dims=dims) for dims in _DIMS),
        *(tensor("token_embd.weight", dims=dims) for dims in _DIMS[:12]),
        *(tensor("blk.0.attn_k.weight", offset=offset) for offset in _OFFSETS),
        *(extra(name, Tensor((64,), 0, bytes(256))) for name in NAMES),
        *(extra("rope_freqs.weight", Tensor((8,), 0, data)) for data in factors),
        *(extra("rope_freqs.weight", Tensor(dims, 0, bytes(256))) for dims in ((64,), (8, 8), (2**62,))),
        *(
            split(name, no=0, count=n)
            for name in ("model.gguf", "m-00001-of-99999.gguf")
            for n in (2, 65535, 99999, -1, "2")
        ),
        *(split("m-00001-of-00001.gguf", no=number, count=1) for number in (0, 1, -1, "0")),
        split("m-00001-of-00001.gguf", no=0, count=1, tensors_count=2**40),
        *(value(f"{arch}.block_count", n) for n in (0, 2, 9999, 2**16, 2**24, 2**31, 2**63, -1)),
        *(value(f"{arch}.{key}", n) for key in ("context_length", "vocab_size") for n in (1, 2**24, 2**31 - 1, 2**40)),
        *(value(f"{arch}.attention.head_count", n) for n in (0, 1, 3, 64, [4], [4, 4], [], [0], ["4"], 2**24)),
        *(
            value(f"{arch}.rope.{key}", n)
            for key in ("freq_base", "scaling.factor", "dimension_count")
            for n in (0, 1, NAN, 1e38)
        ),
        *(
            value("tokenizer.ggml.tokens", tokens)
            for tokens in ([], ["a"] * 264, ["\0"] * 9, [str(i) * 900 for i in range(264)])
        ),
        *(value("tokenizer.ggml.merges", merges) for merges in ([], ["a"], ["a b"] * 9, [" "], ["\u0120 h"] * 9999)),
        *(value("tokenizer.ggml.scores", [v] * 264) for v in (NAN, INF, -INF, 1e308, 0.0)),
        *(value("tokenizer.ggml.token_type", [v] * 264) for v in (0, 1, 2, 3, 4, 6, 7, 2**31 - 1, -1)),
        *(value("tokenizer.ggml.eos_token_id", v) for v in (-1, 264, 2**31, 2**32 - 1, 2**63, 1.0, "2", True)),
        *(value("tokenizer.ggml.precompiled_charsmap", [255] * size) for size in (1, 4, 999)),
        *(
            value("tokenizer.ggml.model", name)
            for name in ("t5", "bert", "gemma4", "rwkv", "no_vocab", "none", "", "\0")
        ),
        *(
            value("general.architecture", name)
            for name in ("clip", "qwen2", "llama", "mamba", "", "llama.", "\u202e", "x" * 99_999)
        ),
        *(value("general.sampling.temp", v) for v in (NAN, -1.0, INF, "hot", [1], 2**63)),
    )


def gguf(model: str) -> Callable[[int, random.Random], Case]:
    def make(number: int, rng: random.Random) -> Case:
        part, catalogue = _GGUF(model), _catalogue(model)
        if number < len(catalogue):
            catalogue[number](part)
            return part.case()
        if rng.random() < 0.4:
            return {"model.gguf": mutate(sound.gguf(model)["model.gguf"], rng, header=rng.choice((600, 8000, 200_000)))}
        for _ in range(rng.choice((1, 1, 2))):
            _change(part, rng)
        return part.case()

    return make


def ggjt(number: int, rng: random.Random) -> Case:
    content = sound.ggjt()["model.bin"]
    if rng.random() < 0.5:
        return {"model.bin": mutate(content, rng, header=rng.choice((36, 3000, len(content))))}
    damaged = bytearray(content)  # the numbers of the header: sizes, heads, layers
    at = 4 * rng.randrange(2, 10)
    damaged[at : at + 4] = rng.choice((0, 1, 3, 2**16, 2**20, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
    return {"model.bin": bytes(damaged)}
