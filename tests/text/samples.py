"""Hard texts, and a small byte-level BPE vocabulary in the shape of GGUF metadata, trained on the spot."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tramontane.text.tokenizer import Tokenizer

HARD_TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two spaces,   three,\t\ttabs\n\n\n and\r\nlines \n ",
    " " * 300 + "x" + "\n" * 50,
    "It's we'll THEY'RE I'd o'clock 'tis",
    "1234567890 3.14159 0x1F 1,000,000 ٣٤٥ १२३ ² ½ Ⅷ 〇",
    "Ελληνικά русский العربية עברית हिन्दी বাংলা ไทย ქართული հայերեն தமிழ்",
    "中文 日本語のテキスト 한국어 བོད་ཡིག မြန်မာ ខ្មែរ አማርኛ ᏣᎳᎩ ଓଡ଼ିଆ සිංහල",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 1️⃣ ❤️‍🔥 🫠 e\u0301 é Å Å ﬁ ﷽",
    "\x00\x01\x1b[0m\x7f\u200b\u200d\ufeff\u2028\u00a0\u3000\ufffd\U0010ffff",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # note\n",
    "a" * 500 + "🙂" * 40,
    "▁already ▁marked <0x41> <0xE2>",
    "<s> </s> <|im_end|> <tool> <|im_start|>user\nhi<|im_end|>",
)

_POOLS = (
    "abcdefghij ABC ",
    "the of ing tion",
    "   \t\n\r",
    "0123456789.,;:!?'\"()[]{}<>/\\=+-*&^%$#@~`|_",
    "éèüßñçøåλπДжщאבגदेवนागरीไทย中文日本한국🙂👍🏽",
    "\x01\x1b\u200b\ufeff\u2028\u00a0\u3000\u0301\u200d\ufe0f",
)


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of up to 60 characters that no sane person writes, without the names of special tokens."""
    rng = random.Random(seed)
    return ["".join(rng.choice(rng.choice(_POOLS)) for _ in range(rng.randint(1, 60))) for _ in range(count)]


_CORPUS = [
    "The house stands by the river, and it's been there for 250 years. We'll see them they're THERE.",
    "Ελληνικά русский 中文 日本語 한국어 العربية हिन्दी 👍🏽 12345 3.14",
    "    indented code = {'a': 1}\n\n\n\treturn code\r\n",
]
MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SPECIALS = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool>": 4}  # with ggml's token types


def pre_tokenizer(pre: str) -> Any:
    """What the published tokenizer.json of each model says, written out once more."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "default":  # llama.cpp's own: marks, GPT-2's words, digits in threes
        marks = pre_tokenizers.Split(tokenizers.Regex(r"[\p{P}$+<=>^~|]+"), "isolated")
        digits = [pre_tokenizers.Split(tokenizers.Regex(r), "isolated") for r in (r"\p{N}+", r"[0-9]{3}")]
        words = pre_tokenizers.Split(tokenizers.Regex(GPT2), "isolated")
        return pre_tokenizers.Sequence([marks, words, *digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if pre == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    digits = r"\p{N}" if pre == "qwen2" else r"\p{N}{1,3}"
    first = pre_tokenizers.Split(tokenizers.Regex(MODERN % digits), "isolated")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def reference(pre: str = "gpt-2") -> tokenizers.Tokenizer:
    """A tokenizer trained and assembled by the tokenizers package alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "llama3")))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    for name, kind in SPECIALS.items():
        tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False, special=kind == 3)])
    return tokenizer


def gguf_metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """`reference(pre)` as GGUF metadata. `changes` replace entries; None removes one."""
    tokenizer = reference(pre)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    entries: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [SPECIALS.get(token, 1) for token in tokens],
        "merges": [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]],
        "bos_token_id": vocab["<|im_start|>"],
        "eos_token_id": vocab["<|im_end|>"],
        "add_bos_token": False,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def sentencepiece_json(path: Path) -> Path:
    """A tokenizer.json in the manner of Llama 2: word marks, byte fallback, a BOS from the post-processor."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "i", "▁h", "▁hi", "x", "▁x", "é"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    mark = {"String": " "}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": pieces[id_], **special} for id_ in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": mark, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: id_ for id_, piece in enumerate(pieces)},
            "merges": ["▁ h", "▁h i", "▁ x"],
        },
    }
    file = path / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def byte_level() -> Tokenizer:
    """The rebuilt small tokenizer."""
    return Tokenizer.from_gguf(gguf_metadata())
