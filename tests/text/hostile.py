"""Mutated tokenizer files and templates, made from a seed; run as a program, it feeds them to the readers.

`python -m tests.text.hostile KIND COUNT FOLDER`: COUNT cases of one kind, in this process, which limits its own
memory to 2 GiB. Ends with 0 when each case gave a tokenizer (or a rendering) or an error of the family.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.text.samples import gguf_metadata, sentencepiece_json
from tests.text.test_template import FEATURES, MESSAGES, PARTS, PLAIN, TOOLS
from tramontane.errors import TramontaneError
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer

LIMIT = 2 << 30
CHARSMAP = struct.pack("<257I", 1024, *[0] * 256) + b"\x00"  # a table in which nothing is found
TEXT = "Hello <s> 123 é🙂 [INST] \u0947\u3000 x" * 20
_WEIRD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    "",
    "a",
    "\u0000",
    "ÿ" * 300,
    [],
    {},
    [[]],
    "(",
    "a{99}",
]


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def sentencepiece_model(kind: int) -> bytes:
    """A small model, written by hand so that no package is needed: kind 1 is unigram, 2 is BPE."""
    specials = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256)), ("<user>", 4)]
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "é"]
    pieces = [(text, 0.0, kind) for text, kind in specials] + [(word, -float(i), 1) for i, word in enumerate(words)]
    body = b"".join(_field(1, _field(1, t.encode()) + _field(2, s) + _field(3, k)) for t, s, k in pieces)
    return body + _field(2, _field(3, kind) + _field(35, 1)) + _field(3, _field(2, CHARSMAP if kind == 1 else b""))


def tekken_file() -> bytes:
    """A small tekken.json."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"hel", b"lo"]
    config = {"pattern": r"\p{L}+|\s+|.", "default_vocab_size": 269, "default_num_special_tokens": 10, "version": "v7"}
    specials = [{"rank": i, "token_str": name} for i, name in enumerate(("<unk>", "<s>", "</s>"))]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": specials}).encode()


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat or overwrite a few stretches."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 9, 64))
        action = rng.randrange(5)
        if action == 0:
            del out[at : at + rng.choice((size, len(out)))]
        elif action == 1:
            out[at : at + size] = rng.randbytes(size)
        elif action == 2:
            out[at:at] = out[max(0, at - size) : at] * rng.choice((1, 3, 500))
        elif action == 3:
            out[at : at + size] = rng.choice((b"\xff", b"\x80", b"\x00", b"\x7f")) * size
        elif out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
    return bytes(out)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Replace, drop, double or nest one value somewhere inside."""
    if isinstance(value, (list, dict)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys[:8] if rng.random() < 0.5 else keys)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        action = rng.randrange(8)
        if action == 0:
            del copy[key]
        elif action == 1 and isinstance(copy, list):
            copy.insert(key, copy[rng.randrange(len(copy))])
        else:
            copy[key] = mutate_value(copy[key], rng)
        return copy
    if isinstance(value, str) and rng.random() < 0.5:
        return value * rng.choice((0, 2, 5000)) + rng.choice(("", "\u0301", " ", "\U0010ffff"))
    weird = rng.choice(_WEIRD)
    if rng.random() < 0.1:
        for _ in range(500):
            weird = [weird]
    return weird


def _mutate_entry(entries: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    key = rng.choice(list(entries))
    return {**entries, key: mutate_value(entries[key], rng)}


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    tokenizer.encode(TEXT, parse_special=False)
    b"".join(map(tokenizer.id_to_bytes, ids))


def _file(name: str, data: bytes, folder: Path) -> None:
    file = folder / name
    file.write_bytes(data)
    _use(Tokenizer.from_file(file))


def _json_case(name: str, content: bytes, rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.3:
        _file(name, mutate_bytes(content, rng), folder)
    else:
        _file(name, json.dumps(mutate_value(json.loads(content), rng)).encode("utf-8", "surrogatepass"), folder)


def _gguf_case(rng: random.Random, folder: Path) -> None:
    metadata = rng.choice((_GGUF_BPE, _GGUF_LLAMA, _GGUF_T5, _GGUF_BERT))
    _use(Tokenizer.from_gguf(_mutate_entry(metadata, rng)))


def _config_case(rng: random.Random, folder: Path) -> None:
    added = {"267": {"content": "<x>", "special": True, "lstrip": False}, "268": "<y>"}
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "added_tokens_decoder": added,
    }
    _use(Tokenizer.from_file(folder / "tokenizer.json", _mutate_entry(config, rng)))


def _template_case(rng: random.Random, folder: Path) -> None:
    """Templates cut up and glued together, with pieces that reach for what they should not."""
    spice = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ namespace.__init__ }}",
        "{{ ''.join(['x'] * 99999999) }}",
        "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 'ab' * 9999 %}",
        "{% set x = x ~ x %}" * 9,
        "{{ x.replace('', x) }}",
        "{{ '%99999999s' % 1 }}",
        "{{ messages | map('tojson') | join(x) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10 ** 9) | list }}",
        "{{ (2 ** 99999999) | string }}",
        "{{ lipsum() }}{% include 'x' %}{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ x.format(x) }}",
        "{{ messages | attr('__class__') }}",
    )
    parts = [rng.choice((PLAIN, PARTS, FEATURES)), *rng.choices(spice, k=rng.randint(0, 3))]
    rng.shuffle(parts)
    source = mutate_bytes("".join(parts).encode(), rng) if rng.random() < 0.6 else "".join(parts).encode()
    ChatTemplate(source.decode("utf-8", "replace"), bos_token="<s>").render(MESSAGES, tools=TOOLS, extra="x")


_SPECIAL = {"tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "e", "▁h", "▁he"]}
_KINDS = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1]
_GGUF_BPE = gguf_metadata()
_GGUF_LLAMA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": _SPECIAL["tokens"],
    "tokenizer.ggml.scores": [-float(i) for i in range(len(_KINDS))],
    "tokenizer.ggml.token_type": _KINDS,
    "tokenizer.ggml.bos_token_id": 1,
}
_GGUF_T5 = {
    **_GGUF_LLAMA,
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.precompiled_charsmap": list(CHARSMAP),
    "tokenizer.ggml.remove_extra_whitespaces": True,
}
_GGUF_BERT = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁h", "e", "▁e", "h", "l"],
    "tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.seperator_token_id": 3,
    "tokenizer.ggml.unknown_token_id": 1,
}

CASES: dict[str, Callable[[random.Random, Path], None]] = {
    "bpe.model": lambda rng, folder: _file("tokenizer.model", mutate_bytes(sentencepiece_model(2), rng), folder),
    "unigram.model": lambda rng, folder: _file("tokenizer.model", mutate_bytes(sentencepiece_model(1), rng), folder),
    "tekken.json": lambda rng, folder: _json_case("tekken.json", tekken_file(), rng, folder),
    "tokenizer.json": lambda rng, folder: _json_case(
        "mutated.json", (folder / "tokenizer.json").read_bytes(), rng, folder
    ),
    "vocab.txt": lambda rng, folder: _file(
        "vocab.txt", mutate_bytes(b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nh\n##e\nhello\n", rng), folder
    ),
    "tokenizer_config.json": _config_case,
    "gguf": _gguf_case,
    "template": _template_case,
}


def main(kind: str, count: str, folder: str) -> int:
    """Run the cases; say of the first that escapes which seed makes it."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    sentencepiece_json(Path(folder))
    sound = 0
    for seed in range(int(count)):
        try:
            CASES[kind](random.Random(f"{kind} {seed}"), Path(folder))
            sound += 1
        except TramontaneError:
            pass
        except BaseException:
            print(f"{kind}, seed {seed}:")
            traceback.print_exc(limit=-6, file=sys.stdout)
            return 1
    print(f"{kind}: {sound} of {count} were sound all the same")
    return 0 if sound else 1  # else what is mutated was never sound


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
