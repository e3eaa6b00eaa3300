"""From a Request to what the engine takes: prompt to tokens, sampling resolved, everything refused that cannot be done.

Owns the order of defaults and the checks that need the model's vocabulary. Must not know: the engine's thread, arrays.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tramontane.engine.sequence import EngineRequest
from tramontane.errors import CorruptCheckpoint, InvalidRequest
from tramontane.records import dataclass
from tramontane.text.detokenizer import Detokenizer
from tramontane.text.dialect import Dialect, Spoken
from tramontane.text.grammar import Compiled, Grammars
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer
from tramontane.text.toolcalls.parser import AnswerParser
from tramontane.types import SAMPLING_DEFAULTS, Grammar, Message, Request, SamplingParams

_LONG_PROMPT = 20_000
"""Characters from which on a prompt takes long to tokenize."""
_SHORT = 1 << 20
"""Characters that are always tokenized: normalizing may leave few of them."""


@dataclass(frozen=True)
class Prepared:
    """A request that the engine can take."""

    request: EngineRequest
    echo: str
    """What each choice's text begins with."""
    parser: Callable[[], AnswerParser] | None = None
    """For each choice: tells reasoning and calls from text; None where all is text."""
    shown: frozenset[int] = frozenset()
    """Special tokens that the parser has to see."""


class Preparer:
    """Prepares requests for one model. Immutable; safe from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        vocab_size: int,
        context_length: int,
        eos_ids: frozenset[int],
        defaults: SamplingParams,
        tool_format: str | None = None,
        reasoning_format: str | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`defaults`: the model-level ones over generation_config's; `vocab_size`: rows of the model's logits;
        `context_length`: tokens that a sequence can have; `grammars`: of the model's tokens, where its engine takes
        them. For the two formats see `Dialect`.

        Raises InvalidRequest for defaults that name tokens which the model lacks, and for unknown formats.
        """
        self.tokenizer = tokenizer
        self.template = template
        self._dialect = None
        if template is not None:
            formats = {"tool_format": tool_format, "reasoning_format": reasoning_format}
            self._dialect = Dialect(template, tokenizer, **formats)
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._eos_ids = eos_ids
        self._grammars = grammars
        self.defaults = defaults.over(SAMPLING_DEFAULTS)
        self._check_named(self.defaults)

    def resolved(self, sampling: SamplingParams) -> SamplingParams:
        """With the defaults for what is open."""
        return sampling.over(self.defaults)

    def takes_long(self, request: Request) -> bool:
        """Whether preparing may take more than some ten milliseconds."""
        contents = [request.prompt, *(message.content for message in request.messages or ())]
        if sum(len(content) for content in contents if isinstance(content, str)) >= _LONG_PROMPT:
            return True
        params = self.resolved(request.sampling)
        # Grammars are compiled, those of calls among them; DRY's breakers read the whole vocabulary, the first time.
        return params.grammar is not None or bool(request.tools) or bool(params.dry_multiplier)

    def prepare(self, request: Request) -> Prepared:
        """Raises InvalidRequest (naming the field), TemplateError or MissingExtra."""
        params = self.resolved(request.sampling)
        self._check_named(params)
        params = self._spelled(params)
        spoken = None
        if request.messages is not None:
            spoken = self._require_dialect().speak(replace(request, sampling=params))
        compiled = self._compiled(params.grammar, "grammar")
        if spoken is not None and spoken.grammar is not params.grammar:  # with what is around it, or of tools
            params = replace(params, grammar=spoken.grammar)
            compiled = self._compiled(params.grammar, "tools")
        if (params.beam_width or 1) > 1:
            _check_beams(request.sampling, params)
        prompt_ids, text = self._prompt(request, spoken)
        engine_request = EngineRequest(
            id=request.id or f"request-{uuid.uuid4().hex}",
            prompt_ids=prompt_ids,
            params=params,
            eos_ids=self._eos_ids,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            cache_salt=request.cache_salt,
            priority=request.priority,
            tenant=request.tenant,
            timeout=request.timeout,
            streamed=request.streamed,
            held=compiled,
        )
        self._check_choice(engine_request)
        echo = self._echo(params, prompt_ids, text) if params.echo else ""
        if spoken is None:
            return Prepared(engine_request, echo)
        return Prepared(engine_request, echo, spoken.parser, spoken.shown)

    def _compiled(self, grammar: Grammar | None, field: str) -> Compiled | None:
        """`field`: of the request, from which the grammar comes."""
        if grammar is None:
            return None
        if self._grammars is None:
            raise InvalidRequest(field, "this backend holds no answer to a grammar", "Leave it out.")
        try:
            return self._grammars.compiled(grammar)
        except InvalidRequest as error:
            if error.field == field:
                raise
            raise InvalidRequest(
                field, error.message.removeprefix("Invalid grammar: ").rstrip("."), error.remedy
            ) from None

    def render(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        """The text that a conversation becomes. Raises InvalidRequest("messages") without a chat template."""
        return self._require_dialect().render(messages, **template_kwargs)

    def _require_dialect(self) -> Dialect:
        if self._dialect is None:
            raise InvalidRequest(
                "messages", "the model has no chat template", "Pass chat_template= to the constructor, or a prompt."
            )
        return self._dialect

    def _prompt(self, request: Request, spoken: Spoken | None) -> tuple[tuple[int, ...], str | None]:
        """The prompt's tokens, and its text where it was given as one."""
        text: str | None = None
        if request.prompt_ids is not None:
            field, ids = "prompt_ids", tuple(request.prompt_ids)
        elif request.prompt is not None:
            field, text = "prompt", request.prompt
            ids = tuple(self._encode(field, text, add_special_tokens=True))
        else:
            # A template writes the tokens that begin a text itself.
            field, text = "messages", spoken.prompt if spoken is not None else ""
            ids = tuple(self._encode(field, text, add_special_tokens=False))
        if not ids:
            raise InvalidRequest(field, "the prompt has no tokens", "Give at least one.")
        self._check_ids(field, ids)
        return ids, text

    def _encode(self, field: str, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenizing takes hundreds of bytes a token: what can never fit in the context is not tokenized."""
        long = isinstance(text, str) and len(text) > _SHORT  # what is no text, the tokenizer refuses
        if long and len(text) > self._context_length * self.tokenizer.longest_token:
            raise InvalidRequest(
                field,
                f"{len(text)} characters are more than the {self._context_length} tokens of the context can stand for",
                "Shorten the prompt or load the model with a larger context_length.",
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_named(self, params: SamplingParams) -> None:
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", tuple(params.logit_bias or ()))
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        for name in ("bad_words", "dry_sequence_breakers"):
            for word in getattr(params, name) or ():
                self._check_ids(name, word if isinstance(word, tuple) else ())

    def _spelled(self, params: SamplingParams) -> SamplingParams:
        """The parameters with token ids in the place of words."""
        spelled: dict[str, Any] = {}
        if params.bad_words:
            spelled["bad_words"] = _each(params.bad_words, self._spellings)
        if params.dry_multiplier:
            spelled["dry_sequence_breakers"] = _each(params.dry_sequence_breakers or (), self._breaking)
        return replace(params, **spelled) if spelled else params

    def _spellings(self, word: str) -> set[tuple[int, ...]]:
        """A word at the beginning of a text, within one, and after a space."""
        bare = word.lstrip() or word
        texts = (word,) if bare != word else (bare, f" {bare}")
        found = {spelled for text in texts for spelled in (self._encoded(text), self._inside(text)) if spelled}
        if not found:
            raise InvalidRequest("bad_words", f"the tokenizer has no tokens for {word!r}", "Leave it out.")
        return found

    def _breaking(self, text: str) -> set[tuple[int, ...]]:
        """The tokens that hold the text; where none does, those that spell it within one."""
        holding = self.tokenizer.holding(text)
        inside = self._inside(text) or self._encoded(text)
        return {(id_,) for id_ in holding} or ({inside} if inside else set())

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _inside(self, text: str) -> tuple[int, ...]:
        """How a text is spelled within another; () where it grows together with what is before."""
        before = "\n" if text[0].isalnum() else "a"
        first, ids = self._encoded(before), self._encoded(before + text)
        return ids[len(first) :] if ids[: len(first)] == first else ()

    def _check_choice(self, request: EngineRequest) -> None:
        """Some token must be left to draw."""
        params = request.params
        masked = {id_ for id_, value in (params.logit_bias or {}).items() if value == -math.inf}
        if params.min_tokens:
            masked |= request.ends  # which are held off until then
        masked |= {word[-1] for word in params.bad_words or () if isinstance(word, tuple)}
        if params.allowed_token_ids is not None and masked.issuperset(params.allowed_token_ids):
            problem = "none of them is left to choose, beside what may not be drawn"
            raise InvalidRequest(
                "allowed_token_ids", problem, "Allow some token that is neither an end nor a bad word."
            )
        if len(masked) >= self._vocab_size:
            field = "bad_words" if params.bad_words else "logit_bias"
            raise InvalidRequest(field, "it leaves no token to choose", "Leave some token above -inf.")

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        for id_ in ids:
            if isinstance(id_, bool) or not isinstance(id_, int):
                raise InvalidRequest(field, f"{id_!r} is not a token id")
            if not 0 <= id_ < self._vocab_size:
                raise InvalidRequest(field, f"token id {id_} is outside the model's vocabulary of {self._vocab_size}")

    def _echo(self, params: SamplingParams, prompt_ids: Sequence[int], text: str | None) -> str:
        if text is not None:
            return text
        # Not `decode`: a character that the last tokens only begin belongs to the answer's first text.
        detokenizer = Detokenizer(self.tokenizer, bool(params.skip_special_tokens))
        return "".join(detokenizer.push(id_) for id_ in prompt_ids)


_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "xtc_probability")
_NOT_WITH_BEAMS = ("stop", "logits_processors", "grammar", "best_of")


def _check_beams(asked: SamplingParams, params: SamplingParams) -> None:
    """Nothing is drawn in a beam search, and no text is looked at: raises InvalidRequest for what would need that.

    `asked`: what the request says itself; what models' defaults say of drawing has no effect.
    """
    for name in _DRAWING:
        value = getattr(asked, name)
        if value not in (None, getattr(SAMPLING_DEFAULTS, name)) and not (name == "temperature" and value == 0):
            raise InvalidRequest(
                name, f"{value!r} shapes what is drawn, and a beam search draws nothing", "Leave it out."
            )
    for name in _NOT_WITH_BEAMS:
        if getattr(params, name):
            raise InvalidRequest(name, "a beam search does not take it", "Leave it out, or beam_width.")
    if params.max_tokens == 0:
        raise InvalidRequest("beam_width", "max_tokens=0 leaves nothing to search for", "Leave out one of the two.")


def _each(
    words: Sequence[str | tuple[int, ...]], spell: Callable[[str], set[tuple[int, ...]]]
) -> tuple[tuple[int, ...], ...]:
    """Words as token ids, each once; what is ids already stays."""
    found = {word for word in words if isinstance(word, tuple)}
    return tuple(sorted(found.union(*(spell(word) for word in words if isinstance(word, str)))))


_FROM_GENERATION_CONFIG = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generation_defaults(config: Mapping[str, Any], source: str) -> tuple[SamplingParams, frozenset[int]]:
    """What `generation_config.json` says of sampling, and the tokens that it says end a text.

    `do_sample: false` makes greedy the default. Raises CorruptCheckpoint for values out of range.
    """
    values = {name: config[name] for name in _FROM_GENERATION_CONFIG if config.get(name) is not None}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    ends = config.get("eos_token_id")
    ids = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in ids):
        raise CorruptCheckpoint(source, f"eos_token_id {ends!r:.80} in generation_config.json is no token id")
    try:
        return SamplingParams(**values), frozenset(ids)
    except InvalidRequest as error:
        raise CorruptCheckpoint(source, f"generation_config.json: {error.message}") from error
