"""What stands before the merges of a byte-pair tokenizer, by the name that `tokenizer.ggml.pre` gives it.

Owns one table: which patterns cut a text, in which order, and what else a name implies. Must not know: vocabularies,
files, the tokenizers package. Sources: the published tokenizer.json of the models that each name stands for, where
there is one; llama.cpp for the names themselves, for what it does on its own account ("default") and for what a name
implies about the first token. Where llama.cpp approximates a published pattern, the published one is here.
"""

from __future__ import annotations

from collections.abc import Mapping

from tramontane.records import dataclass
from tramontane.text.pretokenizer_letters import DEEPSEEK_LETTERS


@dataclass(frozen=True)
class Pre:
    """`splits`: regular expressions (Oniguruma's), each cutting what the one before has left.

    `nfc`: texts are normalized to NFC first. `ignore_merges`: a whole piece that is a token is that token.
    `add_bos`: whether a text begins with BOS where the file does not say. `raw`: merges join UTF-8 characters, spaces
    written U+2581 if `marks`, instead of GPT-2's alphabet of bytes.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    raw: bool = False
    marks: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_TRIPLES_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"


def _modern(digits: str, letters: str = r"\p{L}+", others: str = r"\p{L}", suffix: str = _SUFFIX + "|") -> str:
    """The pattern that cl100k began: contractions, words, digits, marks, spaces."""
    return rf"{suffix}[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}| ?[^\s{others}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(
    digits: str, suffix: str = "", upper: str = f"[{_UPPER}]", lower: str = f"[{_LOWER}]", end: str = "/"
) -> str:
    """The pattern that o200k began: words are also cut where their case changes."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{end}]*|{_SPACES}"


def _deepseek3(tail: str) -> str:
    words = rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    return rf"{words}| ?[\p{{P}}\p{{S}}]+{tail}|\s+(?!\S)|\s+"


_LLAMA3 = _modern(r"\p{N}{1,3}")
_QWEN2 = _modern(_DIGIT)
_GPT4O = _cased(r"\p{N}{1,3}", f"{_SUFFIX}?")
_DEEPSEEK3 = (r"\p{N}{1,3}", _CJK, _deepseek3(r"[\r\n]*|\s*[\r\n]+"))
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_NOT_HAN = r"&&[^\p{Han}]"
_KIMI = r"\p{Han}+|" + _cased(r"\p{N}{1,3}", f"{_SUFFIX}?", f"[{_UPPER}{_NOT_HAN}]", f"[{_LOWER}{_NOT_HAN}]", "")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_FALCON_MARKS = r"\p{P}\$\+<=>\^~\|"
_YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+"
_ASIAN = "[一-鿿㐀-䶿豈-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    _DIGIT,
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)

_TABLE: tuple[tuple[str, Pre], ...] = (
    # llama.cpp's own, for files that name none: no model was trained so.
    ("default", Pre((rf"[{_FALCON_MARKS}]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum exaone4", Pre((_GPT2,))),
    ("jina-v1-en jina-v2-code roberta-bpe jais trillion granite-docling", Pre((_GPT2,))),
    ("mpt olmo modern-bert", Pre((_GPT2,), nfc=True)),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", Pre((_DIGIT, _GPT2))),
    ("command-r", Pre((_DIGIT, _GPT2), nfc=True)),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe", Pre((_LLAMA3,))),
    ("chatglm-bpe", Pre((_LLAMA3,))),
    ("glm4 glm5", Pre((_LLAMA3,), ignore_merges=True)),
    ("jais-2", Pre((_LLAMA3.replace(r"|\s+(?!\S)|\s+", rf"|{_JAIS2_SPACES}|\s"),))),
    ("qwen2 stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez", Pre((_QWEN2,), nfc=True)),
    ("hunyuan solar-open grok-2", Pre((_QWEN2,))),
    ("qwen35", Pre((_modern(_DIGIT, r"[\p{L}\p{M}]+", r"\p{L}\p{M}"),), nfc=True)),
    ("ufakzeka", Pre((_modern(_DIGIT, suffix=""),))),
    ("laguna", Pre((r"[^\n]+|[\n]+", _QWEN2))),
    ("minicpm5", Pre((r"\p{N}{1,3}", _modern(r"\p{N}+")), ignore_merges=True)),
    ("seed-coder", Pre((_SEED,))),
    ("bailingmoe bailingmoe2 llada-moe", Pre((_BAILING,))),
    ("exaone-moe", Pre((_EXAONE_MOE,))),
    ("tekken", Pre((_cased(_DIGIT),), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Pre((_GPT4O,))),
    ("granite-embed-multi-97m", Pre((_GPT4O,), ignore_merges=True)),
    ("kimi-k2", Pre((_KIMI,))),
    ("tiny_aya cohere2moe", Pre((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    ("superbpe", Pre((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    ("youtu", Pre((_YOUTU_SCRIPTS, _cased(_DIGIT, f"{_SUFFIX}?")), ignore_merges=True)),
    (
        "deepseek-llm",
        Pre(
            (
                "[\r\n]",
                rf"\s?[{DEEPSEEK_LETTERS}]+",
                "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
                r"\s+$",
                _DEEPSEEK_CJK,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Pre(_DEEPSEEK3)),
    ("spark2_5", Pre((r"\p{N}{1,3}", _CJK, _deepseek3(r"|[\r\n]"), _DIGIT))),
    ("afmoe", Pre((_TRIPLES_FROM_THE_RIGHT, _ASIAN, _deepseek3(r"[\r\n]*|\s*[\r\n]+")))),
    ("falcon", Pre((rf"[{_FALCON_MARKS}`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", Pre((_BLOOM,))),
    ("viking", Pre((_BLOOM, _DIGIT))),
    ("chameleon", Pre(_CHAMELEON, add_bos=True)),
    ("gemma4 granite-embed-multi-311m", Pre((), add_bos=True, raw=True, marks=True)),
    ("sarvam-moe", Pre((), raw=True, marks=True)),
    ("whitespace", Pre((r"\S+",), raw=True)),
)

PRE_TOKENIZERS: Mapping[str, Pre] = {name: pre for names, pre in _TABLE for name in names.split()}
