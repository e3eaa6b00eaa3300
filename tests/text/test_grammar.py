"""Grammars as masks: every text that they allow matches, judged by jsonschema, re and llguidance's own tokenizers."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import model_path
from tests.schemas import SCHEMAS
from tests.text import samples
from tests.text.test_tekken import read, small
from tramontane.errors import InvalidRequest, MissingExtra
from tramontane.text.detokenizer import Detokenizer
from tramontane.text.grammar import Grammars, Matcher
from tramontane.text.tokenizer import Tokenizer
from tramontane.types import Grammar

llguidance = pytest.importorskip("llguidance", reason="the extra 'grammar' is not installed")
SURPLUS = 45  # ids that the model has and the tokenizer has not


def byte_level(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    samples.reference("qwen2").save(str(file))
    return Tokenizer.from_file(file)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "SentencePiece": lambda folder: Tokenizer.from_file(samples.sentencepiece_json(folder)),
    "GGUF": lambda folder: Tokenizer.from_gguf(samples.gguf_metadata("smollm")),
    "tekken": lambda folder: read(folder, small()),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return KINDS[request.param](tmp_path)


@pytest.fixture
def bpe(tmp_path: Path) -> Tokenizer:
    return byte_level(tmp_path)


def allowed(matcher: Matcher) -> tuple[list[int], bool]:
    words, may_end = matcher.mask()
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist(), may_end


def walk(tokenizer: Tokenizer, matcher: Matcher, rng: random.Random, most: int = 400) -> str | None:
    """The text of tokens chosen at random until the grammar lets it end; None where it was still going on."""
    text = Detokenizer(tokenizer)
    text.continue_text()
    found = ""
    for _ in range(most):
        ids, may_end = allowed(matcher)
        if may_end and (not ids or rng.random() < 0.5):
            return found + text.flush()
        assert ids
        assert not tokenizer.special_ids & {*ids}
        assert max(ids) < tokenizer.vocab_size
        token = rng.choice(ids)
        found += text.push(token)
        matcher.advance(token)
        if matcher.complete:
            return found + text.flush()
    return None


def texts(tokenizer: Tokenizer, grammar: Grammar, count: int = 12) -> Iterator[str]:
    grammars = Grammars(tokenizer, tokenizer.vocab_size + SURPLUS)
    for seed in range(count):
        text = walk(tokenizer, grammars.compiled(grammar).matcher(), random.Random(seed))
        if text is not None:
            yield text


PATTERN = r"[A-Z][a-zé]{1,4}(, 😀|!){2}\n?"
CHOICES = ("yes", "no", 'quo"te\\', "日本", "no way", " spaced ", "")


def test_any_tokenizer_writes_what_a_pattern_matches(tokenizer: Tokenizer) -> None:
    found = list(texts(tokenizer, Grammar("regex", PATTERN)))
    assert len({*found}) > 5
    assert all(re.fullmatch(PATTERN, text) for text in found)


def test_any_tokenizer_writes_one_of_the_choices(tokenizer: Tokenizer) -> None:
    found = {*texts(tokenizer, Grammar("choice", CHOICES), 60)}
    assert found <= {*CHOICES}
    assert len(found) > 3


def test_any_tokenizer_writes_json(tokenizer: Tokenizer) -> None:
    validate = pytest.importorskip("jsonschema", reason="jsonschema judges").validate
    schema = SCHEMAS["an order"]
    found = list(texts(tokenizer, Grammar("json_schema", schema)))
    assert len(found) > 5
    for text in found:
        validate(json.loads(text), schema)
    objects = list(texts(tokenizer, Grammar("json_object")))
    assert objects
    assert all(isinstance(json.loads(text), dict) for text in objects)


def test_any_tokenizer_writes_what_a_lark_grammar_matches(tokenizer: Tokenizer) -> None:
    found = list(texts(tokenizer, Grammar("lark", 'start: sum\nsum: NUM ("+" NUM)*\nNUM: /[0-9]{1,3}/')))
    assert all(re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text) for text in found)
    assert len({*found}) > 5


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_holds(bpe: Tokenizer, name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema judges")
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    found = list(texts(bpe, Grammar("json_schema", schema), 6))
    assert found
    for text in found:
        jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)


def test_masks_are_those_of_llguidances_own_tokenizer(tmp_path: Path) -> None:
    """Its loader of tokenizer.json knows the bytes of tokens by itself."""
    for name in ("byte-level BPE", "SentencePiece"):
        ours = KINDS[name](tmp_path)
        same_masks(ours, (tmp_path / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2", "gemma3", "llama3_2", "qwen2_5", "mistral_nemo", "deepseek_v3", "gpt2"])
def test_masks_of_published_tokenizers_are_llguidances_own(name: str) -> None:
    file = model_path("tokenizers") / name / "tokenizer.json"
    same_masks(Tokenizer.from_file(file), file.read_text(encoding="utf-8"))


def same_masks(ours: Tokenizer, file: str) -> None:
    theirs = llguidance.LLTokenizer(file)
    text = json.dumps({"name": "Zoë", "n": [1, 22]}, ensure_ascii=False)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    matcher = Grammars(ours, ours.vocab_size).compiled(Grammar("json_schema", schema)).matcher()
    options = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
    source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    other = llguidance.LLMatcher(theirs, source)
    plain = [id_ for id_ in range(ours.vocab_size) if plain_text(ours, id_)]
    # Both are led along the same bytes, by tokens as short as they come: how long texts are cut is not in question.
    by_bytes = {ours.id_to_bytes(id_): id_ for id_ in reversed(plain)}
    steps = [by_bytes.get(bytes([byte])) for byte in text.encode()]
    for token in (token for token in steps if token is not None):
        bits = np.unpackbits(np.frombuffer(other.compute_bitmask(), np.uint8), bitorder="little")
        may = {*allowed(matcher)[0]}
        assert may
        assert [id_ for id_ in plain if bits[id_]] == [id_ for id_ in plain if id_ in may]
        matcher.advance(token)
        assert other.consume_token(token)


def plain_text(tokenizer: Tokenizer, id_: int) -> bool:
    """Whether a token is neither special nor named like one, which llguidance takes for special too."""
    data = tokenizer.id_to_bytes(id_)
    return bool(data) and id_ not in tokenizer.special_ids and not re.fullmatch(rb"<.*>", data) and b"\xff" not in data


def test_special_tokens_come_only_where_a_grammar_names_them(bpe: Tokenizer) -> None:
    end = bpe.token_to_id("<|im_end|>")
    matcher = Grammars(bpe, bpe.vocab_size).compiled(Grammar("lark", 'start: "a" <|im_end|> "b"')).matcher()
    matcher.advance(*bpe.encode("a"))
    assert allowed(matcher) == ([end], False)


def test_nothing_follows_a_complete_answer(bpe: Tokenizer) -> None:
    matcher = Grammars(bpe, bpe.vocab_size).compiled(Grammar("choice", ("ab", "abc"))).matcher()
    matcher.advance(*bpe.encode("ab"))
    assert not matcher.complete
    assert allowed(matcher) == (bpe.encode("c"), True)
    matcher.advance(*bpe.encode("c"))
    assert matcher.complete


def test_a_token_that_may_not_come_is_refused(bpe: Tokenizer) -> None:
    matcher = Grammars(bpe, bpe.vocab_size).compiled(Grammar("regex", "[0-9]+")).matcher()
    with pytest.raises(InvalidRequest, match="grammar"):
        matcher.advance(*bpe.encode("12x"))
    assert not matcher.complete


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def products(count: int) -> dict[str, Any]:
    """2**count ways to combine."""

    def one(name: str) -> dict[str, Any]:
        return {"type": "object", "properties": {name: {"type": "string", "pattern": f"^{name}$"}}, "required": [name]}

    return {"allOf": [{"anyOf": [one(f"k{i}a"), one(f"k{i}b")]} for i in range(count)]}


def patterns(count: int) -> dict[str, Any]:
    return {"type": "object", "patternProperties": {f"^p{i}[a-z]*$": {} for i in range(count)}}


def chain(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {}}}


def rules(count: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(count)) + f'\nr{count}: "x"'


HOSTILE: dict[str, tuple[Grammar, str]] = {
    "syntax of a pattern": (Grammar("regex", "("), "unclosed group"),
    "look-around": (Grammar("regex", "(?=a)b"), "look-around"),
    "half a pair": (Grammar("regex", "\ud800"), "surrogates"),
    "half a pair in a choice": (Grammar("choice", ("\ud800",)), "escape|surrogate"),
    "syntax of a grammar": (Grammar("lark", "start: ("), "start"),
    "an unknown rule": (Grammar("lark", "start: nothing"), "unknown name"),
    "an unknown special token": (Grammar("lark", "start: <|nope|>"), "unknown special token"),
    "an unknown type": (Grammar("json_schema", {"type": "foo"}), "foo"),
    "an unknown keyword": (Grammar("json_schema", {"type": "object", "if": {}}), '"if"'),
    "unique items": (Grammar("json_schema", {"type": "array", "uniqueItems": True}), "uniqueItems"),
    "a schema of the network": (Grammar("json_schema", {"$ref": "http://example.invalid/s"}), "retriev"),
    "a schema of a file": (Grammar("json_schema", {"$ref": "file:///etc/passwd"}), "retriev"),
    "a reference to nothing": (Grammar("json_schema", {"$ref": "#/$defs/no"}), "no"),
    "the schema false": (Grammar("json_schema", False), "false"),
    "no number": (Grammar("json_schema", {"const": float("nan")}), "JSON"),
    "no JSON": (Grammar("json_schema", {"const": {1}}), "JSON"),
    "too deep": (Grammar("json_schema", nested(300)), "recursion"),
    "far too deep": (Grammar("json_schema", nested(100_000)), "nested too deeply"),
    "too many combinations": (Grammar("json_schema", products(18)), "too large"),
    "too long": (Grammar("choice", ("a" * 2_000_000,)), "exceed"),
    "too many properties": (Grammar("json_schema", {"properties": {f"p{i}": {} for i in range(40_000)}}), "complex"),
    "too many patterns": (Grammar("json_schema", patterns(1_300)), "too complex"),
    "a chain of references": (Grammar("json_schema", chain(2_000)), "too complex"),
    "a chain of rules": (Grammar("lark", rules(20_000)), "too complex"),
    "too fine": (Grammar("json_schema", {"multipleOf": 0.0123457}), "multipleOf"),
    "too fine inside": (Grammar("lark", 'start: %json {"multipleOf" : 999983}'), "multipleOf"),
    "what nothing matches": (Grammar("regex", "[^\\x00-\\U0010ffff]"), "no text"),
}


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tramontane.text.trial._CPU_SECONDS", 1)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_held_to_is_refused(bpe: Tokenizer, name: str) -> None:
    grammar, match = HOSTILE[name]
    with pytest.raises(InvalidRequest, match=match) as refused:
        Grammars(bpe, bpe.vocab_size).compiled(grammar)
    assert refused.value.field == "grammar"
    assert "\n" not in str(refused.value)
    assert "backtrace" not in str(refused.value)


def test_the_deepest_nesting_ends_in_an_error_under_any_limit(bpe: Tokenizer) -> None:
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(100_000)
        with pytest.raises(InvalidRequest):
            Grammars(bpe, bpe.vocab_size).compiled(Grammar("json_schema", nested(2_000)))
    finally:
        sys.setrecursionlimit(limit)


HEAVY = {
    "counted twice": Grammar("regex", "(a{1000}){1000}"),
    "long strings": Grammar("json_schema", {"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "many items": Grammar("json_schema", {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "ambiguous": Grammar("lark", 'start: a\na: a a | "x" | ""'),
    "unicode classes": Grammar("regex", r"(\p{L}{1,500}){1,50}x"),
    "intersections": Grammar("lark", "start: X\nX: /(a|b)*/ & /(.*a.{15})/ & ~/(.*b.{14})/"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_what_is_heavy_goes_on_or_ends_in_an_error(bpe: Tokenizer, name: str) -> None:
    with suppress(InvalidRequest):
        walk(bpe, Grammars(bpe, bpe.vocab_size).compiled(HEAVY[name]).matcher(), random.Random(0), 40)


def test_the_latest_used_stay_compiled_and_so_do_those_in_use(bpe: Tokenizer) -> None:
    grammars = Grammars(bpe, bpe.vocab_size, keep=2)
    a, b, c = (Grammar("regex", letter) for letter in "abc")
    in_use = grammars.compiled(a)
    grammars.compiled(b)
    marked = grammars.compiled(b)
    marked.answers = 77
    grammars.compiled(c)
    assert grammars.compiled(a) is in_use
    del marked
    grammars.compiled(c)
    assert grammars.compiled(b).answers == 0, "nobody held it any more"
    assert grammars.compiled(Grammar("regex", "b")) is grammars.compiled(b)


def test_a_worn_lexer_is_made_anew(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One grammar's matchers share a lexer, which may only grow so far."""
    monkeypatch.setattr("tramontane.text.grammar._LIMITS", {"max_lexer_states": 60, "verbose_errors": False})
    grammar = Grammar("regex", "([a-m]{3}[n-z]{2}){4}")
    grammars = Grammars(bpe, bpe.vocab_size)
    worn = grammars.compiled(grammar)
    assert not grammars.renew(grammar), "no answers have worn it"
    worn.matcher(), worn.matcher()
    assert grammars.renew(grammar)
    assert grammars.compiled(grammar) is not worn


def test_without_llguidance_the_remedy_is_named(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for grammar in (Grammar("regex", "a"), Grammar("json_object")):
        with pytest.raises(MissingExtra, match=r"pip install 'tramontane\[grammar\]'"):
            Grammars(bpe, bpe.vocab_size).compiled(grammar)
