"""What an answer must match, as masks over a model's tokens: grammars compiled by llguidance, and where answers stand.

Owns the way from a `Grammar` to llguidance and back, the cache of compiled ones, and what a hostile one may cost. Must
not know: requests, logits, the engine. llguidance is the extra "grammar", imported when the first grammar comes.

llguidance is told of one token more than the model has, and that this one ends a text: whether its bit is set says
whether an answer may end. Which of the model's own tokens then end it is a matter of the request, not of the grammar.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from tramontane.errors import InvalidRequest, MissingExtra
from tramontane.text.tokenizer import Tokenizer
from tramontane.text.trial import try_out, with_room
from tramontane.types import Grammar

if TYPE_CHECKING:
    import llguidance

_SPECIAL = b"\xff"
"""llguidance's mark in front of a special token's name. No UTF-8 has this byte, so no text token needs it."""
_LONGEST = 1 << 20
"""Characters of a grammar. A choice between 20,000 words is a quarter of that, and compiles in half a second."""
_SIMPLE = 1_000
"""Characters of a grammar up to which nothing in it can be nested, or multiplied, beyond what is good."""
_FINEST = 10_000
"""Above this, a `multipleOf` takes seconds and hundreds of megabytes: an automaton has as many states as the number."""
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.\deE]+)')
_LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 600_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
"""Where llguidance's own are too generous for requests from anywhere: they bound time and memory of one grammar."""
_JSON_OPTIONS: Mapping[str, Any] = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}}
"""Without an end to it, small models fill an answer with white space. A schema's own "x-guidance" prevails."""
_GUARD = "\n"

Words = NDArray[np.int32]


class Matcher:
    """Where one answer stands in its grammar. Not thread-safe."""

    def __init__(self, inner: llguidance.LLMatcher, vocab_size: int) -> None:
        self._inner = inner
        self._words = np.zeros(_words(vocab_size + 1), np.int32)
        self._width = _words(vocab_size)
        self._end = (vocab_size // 32, np.int32(np.uint32(1 << vocab_size % 32).view(np.int32)))

    def mask(self) -> tuple[Words, bool]:
        """Which tokens may come next, as int32 [ceil(V/32)] of which bit v % 32 of word v // 32 is token v's, and
        whether the answer may end here. Overwritten by the next call.

        Raises InvalidRequest("grammar") where the grammar is too complex to say.
        """
        self._inner.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        word, bit = self._end
        may_end = bool(self._words[word] & bit)
        self._words[word] &= ~bit
        return self._words[: self._width], may_end

    def advance(self, *tokens: int) -> None:
        """Take the next tokens of the answer. Raises InvalidRequest("grammar") for one that may not come."""
        if not self._inner.consume_tokens(list(tokens)):
            self._check()
            raise InvalidRequest("grammar", f"it does not allow the tokens {tokens}")

    @property
    def complete(self) -> bool:
        """Whether the answer matches and nothing can follow."""
        return self._inner.is_stopped() and self._inner.is_accepting() and not self._inner.is_error()

    def _check(self) -> None:
        if self._inner.is_error():
            raise _refused(self._inner.get_error())


class Compiled:
    """A grammar that is ready for any number of answers. Safe from several threads."""

    def __init__(self, inner: llguidance.LLMatcher, vocab_size: int) -> None:
        """Raises InvalidRequest("grammar") where the grammar is unsound, too complex, or matched by nothing."""
        self._inner, self._vocab_size = inner, vocab_size
        self._lock = threading.Lock()
        self.answers = 0
        """So many matchers have been given out."""
        if inner.is_error():
            raise _refused(inner.get_error())
        # The first mask takes the longest: done here, no step waits for it.
        words, may_end = Matcher(inner.deep_copy(), vocab_size).mask()
        if not may_end and not words.any():
            raise _refused("NoExtension")

    def matcher(self) -> Matcher:
        """At the beginning of an answer."""
        with self._lock:
            self.answers += 1
            return Matcher(self._inner.deep_copy(), self._vocab_size)


class Grammars:
    """The grammars of one model, compiled when first asked for. Safe from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, keep: int = 32) -> None:
        """`vocab_size`: the width of the model's logits; ids that are no token's are never allowed. `keep`: so many of
        the latest used grammars stay compiled, besides those that somebody holds."""
        self._tokenizer, self._vocab_size, self._keep = tokenizer, vocab_size, keep
        self._ours: llguidance.LLTokenizer | None = None
        self._held: WeakValueDictionary[str, Compiled] = WeakValueDictionary()
        self._latest: dict[str, Compiled] = {}
        self._lock = threading.Lock()

    def compiled(self, grammar: Grammar) -> Compiled:
        """The grammar, compiled if it is not yet, which may take a second or more: not on an event loop.

        Raises InvalidRequest("grammar") with what llguidance says of an unsound one, or MissingExtra.
        """
        source = _source(grammar)
        with self._lock:
            found = self._held.get(source)
        if found is None:
            found = Compiled(self._matcher(source), self._vocab_size)
        self._keep_it(source, found)
        return found

    def renew(self, grammar: Grammar) -> bool:
        """Compile anew what other answers may have worn out: the matchers of a grammar share llguidance's lexer, which
        grows with all that they meet, up to a limit. False where there were no others, so that nothing would change."""
        source = _source(grammar)
        with self._lock:
            worn = self._held.get(source)
        if worn is not None and worn.answers < 2:
            return False
        self._keep_it(source, Compiled(self._matcher(source), self._vocab_size))
        return True

    def _keep_it(self, source: str, compiled: Compiled) -> None:
        with self._lock:
            self._held[source] = compiled
            self._latest.pop(source, None)
            self._latest[source] = compiled  # the latest used stands last
            if len(self._latest) > self._keep:
                del self._latest[next(iter(self._latest))]

    def _matcher(self, source: str) -> llguidance.LLMatcher:
        library = _library()
        with self._lock:
            if self._ours is None:
                self._ours = library.LLTokenizer(_Vocabulary(self._tokenizer, self._vocab_size))
            ours = self._ours
        if len(source) > _SIMPLE:
            try_out(source, Path(library.__file__).parents[1])
        limits = library.LLParserLimits(**_LIMITS)
        return with_room(lambda: library.LLMatcher(ours, source, log_level=0, limits=limits))


class _Vocabulary:
    """A tokenizer by what llguidance asks of one."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [self._bytes(id_) for id_ in range(vocab_size)]
        self.eos_token_id = vocab_size
        self._by_bytes = {data: id_ for id_, data in reversed([*enumerate(self.tokens)]) if data[:1] != _SPECIAL}
        self._longest = max(map(len, self._by_bytes), default=0)
        self.tokens.append(_SPECIAL + b"<end of the text>")

    def _bytes(self, id_: int) -> bytes:
        """What a token stands for; nothing where it may never be drawn in a text: no token, or no UTF-8."""
        data = self._tokenizer.id_to_bytes(id_)
        if id_ in self._tokenizer.special_ids:
            return _SPECIAL + data
        return b"" if _SPECIAL in data else data

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are those of the text: the tokenizer's own where it can say them in mid-text (some put a
        space before a text), else the longest that fit."""
        before = self._encode(_GUARD)
        ids = self._encode(_GUARD + text)
        wanted = text.encode()
        if ids[: len(before)] == before and b"".join(self._data(id_) for id_ in ids[len(before) :]) == wanted:
            return ids[len(before) :]
        return self._greedy(wanted)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    def _data(self, id_: int) -> bytes:
        return self.tokens[id_] if id_ < len(self.tokens) else _SPECIAL

    def _greedy(self, data: bytes) -> list[int]:
        found: list[int] = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            size = next((size for size in sizes if data[:size] in self._by_bytes), None)
            if size is None:  # a byte that no token has: as far as tokens go
                return found
            found.append(self._by_bytes[data[:size]])
            data = data[size:]
        return found


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtra("grammar", "An answer held to a grammar") from error
    return llguidance


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's words. Raises InvalidRequest("grammar") for one that is too long or no JSON."""
    try:
        text = _written(grammar)
        text.encode()
    except RecursionError:
        raise InvalidRequest("grammar", "it is nested too deeply") from None
    except (TypeError, ValueError) as error:  # not JSON, NaN, half a surrogate pair
        raise InvalidRequest("grammar", f"it cannot be written down ({error})") from None
    if len(text) > _LONGEST:
        raise InvalidRequest("grammar", f"its {len(text)} characters exceed {_LONGEST}", "Shorten it.")
    if grammar.kind in ("json_schema", "lark"):
        _check_multiples(text)
    return text


def _written(grammar: Grammar) -> str:
    value = grammar.value
    if grammar.kind == "regex":
        return str(_library().LLMatcher.grammar_from_regex(value))
    if grammar.kind == "lark":
        return _part("lark_grammar", value)
    if grammar.kind == "choice":
        # One terminal, not a rule of as many branches, of which llguidance follows no more than 2,000 at once.
        texts = map(partial(json.dumps, ensure_ascii=False), filter(None, dict.fromkeys(value)))
        start = 'TEXT | ""' if "" in value else "TEXT"
        return _part("lark_grammar", f"start: {start}\nTEXT: {' | '.join(texts)}" if any(value) else 'start: ""')
    if grammar.kind == "json_object":
        return _part("json_schema", {**_JSON_OPTIONS, "type": "object"})
    if value is False:
        raise InvalidRequest("grammar", "the schema false allows nothing")
    return _part("json_schema", {**_JSON_OPTIONS, **({} if value is True else value)})


def _part(kind: str, content: object) -> str:
    return json.dumps({"grammars": [{kind: content}]}, default=_plain, allow_nan=False)


def _plain(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _check_multiples(text: str) -> None:
    for number in _MULTIPLE.findall(text.replace('\\"', '"')):
        digits = number.lower().partition("e")[0].replace(".", "").strip("-+0")
        if digits and int(digits) > _FINEST:
            raise InvalidRequest("grammar", f"multipleOf {number} has more than {_FINEST} remainders", "Round it.")


def _refused(message: str) -> InvalidRequest:
    """llguidance's message, without the state and the traces that follow it."""
    said = " ".join(re.split(r"\n<|\n\n", message, maxsplit=1)[0].split()).rstrip(".")
    if said.startswith("NoExtension"):
        said = "no text of this model's tokens matches it from here on"
    return InvalidRequest("grammar", said or "it cannot be followed any further")


def _words(bits: int) -> int:
    return -(-bits // 32)
