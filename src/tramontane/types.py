"""The data that crosses the front door: requests, sampling parameters, chunks, results, usage.

Owns plain frozen dataclasses, picklable, with no behaviour beyond checks of their own ranges.
Must not know: any other module of ours but the errors; arrays; how anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields, replace
from operator import index
from typing import Any, Literal, Protocol, get_args

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]
"""Why a choice ended: the model's own end or a stop, its length, calls of tools, or what became of the request."""
Role = Literal["system", "developer", "user", "assistant", "tool"]
Pooling = Literal["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"]
"""How the states of a text's tokens become one vector, by sentence-transformers' names: their mean, the first one, the
last one, the largest of each element, the mean weighted by position, the sum over the root of their number."""


class LogitsProcessor(Protocol):
    """A user's own processor: gets the row's history and its own copy of the logits, returns new logits."""

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: Any) -> Any:
        """`logits`: numpy float32 [vocab]; return an array of the same shape (may be the same one, changed)."""
        ...


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image by URL, data URL or path. No model of this build takes it: it is refused by name."""

    source: str


@dataclass(frozen=True)
class AudioPart:
    """Audio by URL, data URL or path. No model of this build takes it: it is refused by name."""

    source: str


Part = TextPart | ImagePart | AudioPart


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the model. `arguments` is the JSON text that the model wrote."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a streamed tool call: `id` and `name` come once, on the first piece of call `index`; the `arguments`
    of all pieces, joined, are those of the call."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters`: the JSON Schema of its arguments, None for no arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    """Hold the arguments to the schema by a grammar, not only by the prompt."""


@dataclass(frozen=True)
class NamedTool:
    """A `tool_choice`: this tool, and no other, is to be called."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What an answer must match, from its first character to its last.

    `value`: nothing (None) for "json_object", a JSON Schema (mapping or bool) for "json_schema", a pattern for "regex",
    a tuple of texts for "choice", a grammar in llguidance's Lark dialect for "lark".
    """

    kind: GrammarKind
    value: Any = None

    def __post_init__(self) -> None:
        wanted: dict[str, tuple[type, ...]] = {
            "json_object": (type(None),),
            "json_schema": (Mapping, bool),
            "regex": (str,),
            "choice": (tuple,),
            "lark": (str,),
        }
        if self.kind not in wanted:
            raise InvalidRequest("grammar", f"the kind {self.kind!r} is unknown", f"Use one of {', '.join(wanted)}.")
        value: Any = self.value
        if self.kind == "choice" and isinstance(value, list):
            value = tuple(value)
            object.__setattr__(self, "value", value)
        if not isinstance(value, wanted[self.kind]):
            raise InvalidRequest("grammar", f"{value!r:.80} is not what a {self.kind} grammar is made of")
        texts: Any = value if self.kind == "choice" else ("",)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest("grammar", "a choice is between one text or more")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str | tuple[Part, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant's turn."""
    tool_call_id: str | None = None
    """Of a tool's turn: the call that it answers."""
    name: str | None = None
    reasoning: str | None = None
    """Of an assistant's turn: what it thought before it answered; whether a template shows it is the template's."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise InvalidRequest("role", f"{self.role!r} is unknown", f"Use one of {', '.join(get_args(Role))}.")
        given = self.content
        parts = isinstance(given, tuple) and all(isinstance(p, (TextPart, ImagePart, AudioPart)) for p in given)
        if not isinstance(given, str) and not parts:
            raise InvalidRequest("content", f"{self.content!r} is neither a text nor a tuple of parts")

    @property
    def text(self) -> str:
        """The text parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


# field -> (lowest, highest, lowest is excluded); None means no bound on that side.
_RANGES: dict[str, tuple[float | None, float | None, bool]] = {
    "temperature": (0.0, 100.0, False),
    "top_k": (0, None, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "typical_p": (0.0, 1.0, True),
    "xtc_probability": (0.0, 1.0, False),
    "xtc_threshold": (0.0, 1.0, False),
    "dry_multiplier": (0.0, 100.0, False),
    "dry_base": (1.0, 100.0, False),
    "dry_allowed_length": (1, None, False),
    "dry_range": (0, None, False),
    "repetition_penalty": (0.0, 100.0, True),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "seed": (-(2**63), 2**64 - 1, False),
    "n": (1, 1024, False),
    "best_of": (1, 1024, False),
    "beam_width": (1, 1024, False),
    "length_penalty": (-100.0, 100.0, False),
    "logprobs": (0, 1000, False),
    "prompt_logprobs": (0, 1000, False),
    "min_tokens": (0, None, False),
    "max_tokens": (0, None, False),
}
_INTEGERS = frozenset(
    {
        *("top_k", "dry_allowed_length", "dry_range", "seed", "n", "best_of", "beam_width"),
        *("logprobs", "prompt_logprobs", "min_tokens", "max_tokens"),
    }
)

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def _words(name: str, given: object) -> tuple[str | tuple[int, ...], ...]:
    """Texts or token ids, each frozen; a lone text is one of them."""
    words = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (None,)
    frozen = tuple(word if isinstance(word, str) or not isinstance(word, Iterable) else tuple(word) for word in words)
    for word in frozen:
        is_ids = isinstance(word, tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in word)
        if not word or not (isinstance(word, str) or is_ids):
            raise InvalidRequest(name, f"{word!r} is neither a text nor a sequence of token ids")
    return frozen


def _token_id(key: object) -> int:
    """A token id; JSON knows only strings as keys, so "42" is one too, while 4.2 is not."""
    return int(key) if isinstance(key, str) else index(key)  # type: ignore[arg-type]  # raises TypeError as wanted


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. None means "not set": the next default applies.

    Order of defaults: the request, the model-level defaults given to the constructor, `generation_config.json`,
    then `SAMPLING_DEFAULTS`. Order of operations on a row: penalties, DRY, logit bias, bad words, allowed tokens,
    custom processors, temperature, top-k, typical, top-p, min-p, XTC, one draw (the cuts in llama.cpp's order).
    Frequency and presence penalties count generated tokens; repetition, DRY and bad words see the prompt too.
    `temperature=0` is greedy: the cuts change nothing. `top_k=0` is off.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    """Keep the tokens that surprise about as much as is to be expected, up to this probability (Meister et al., 2022);
    1 is off."""
    xtc_probability: float | None = None
    """So often, of the tokens with a probability of at least `xtc_threshold`, only the least likely stays ("exclude top
    choices")."""
    xtc_threshold: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    """Against passages said before ("don't repeat yourself"): where the last n tokens have stood already, what followed
    them loses dry_multiplier * dry_base ** (n - dry_allowed_length), from n = dry_allowed_length on. 0 is off."""
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = None
    """Look only at so many of the last tokens; 0: at all."""
    dry_sequence_breakers: tuple[str | tuple[int, ...], ...] | None = None
    """Over these, texts or token ids, no passage is looked for: in other places they begin something new."""
    bad_words: tuple[str | tuple[int, ...], ...] | None = None
    """Texts (as the tokenizer spells them first, within a text and after a space) or token ids: never completed."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Nothing else is drawn."""
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    """Draw so many choices and return the `n` of them whose tokens are likeliest on average, best first. They come at
    the end, a chunk each."""
    beam_width: int | None = None
    """Above 1: beam search, as in transformers, whose `n` best sequences come at the end, a chunk each. Nothing is
    drawn: what shapes a distribution (temperature, top_k, ...) is refused, and of the model's defaults ignored."""
    length_penalty: float | None = None
    """A sequence's score is its log probability over its length to this power: above 0 longer ones gain."""
    early_stopping: bool | Literal["never"] | None = None
    """End a beam search as soon as `beam_width` sequences have ended (True), when no better one is likely (False), or
    when none is possible ("never")."""
    logprobs: int | None = None
    """Report the chosen token's log probability and this many alternatives for each generated token."""
    prompt_logprobs: int | None = None
    """The same for each prompt token (the first has none)."""
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    include_stop: bool | None = None
    """Keep the matched stop string in the text."""
    min_tokens: int | None = None
    max_tokens: int | None = None
    """None: as many as the context holds. 0: none; the prompt is read (and scored, with prompt_logprobs)."""
    ignore_eos: bool | None = None
    echo: bool | None = None
    """Put the prompt's text before the answer's."""
    skip_special_tokens: bool | None = None
    logits_processors: tuple[LogitsProcessor, ...] | None = None
    grammar: Grammar | None = None
    """What the answer must match."""

    def __post_init__(self) -> None:
        for name, (low, high, open_low) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            kinds = (int,) if name in _INTEGERS else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                kind = "an integer" if name in _INTEGERS else "a number"
                raise InvalidRequest(name, f"{value!r} is not {kind}")
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidRequest(name, f"{value!r} is not finite")
            if (low is not None and (value < low or (open_low and value == low))) or (
                high is not None and value > high
            ):
                left = "above" if open_low else "at least"
                bounds = f"{left} {low}" + (f" and at most {high}" if high is not None else "")
                raise InvalidRequest(name, f"{value!r} is out of range", f"It must be {bounds}.")
        self._normalise()

    def _normalise(self) -> None:
        """Accept what callers naturally write (a lone string, lists) and freeze it."""
        put = object.__setattr__
        for name, kind in (("stop", str), ("stop_token_ids", int), ("allowed_token_ids", int)):
            value = getattr(self, name)
            if value is None:
                continue
            values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, kind) else (value,)
            if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
                raise InvalidRequest(name, f"{value!r} must hold only {kind.__name__} values")
            if kind is int and any(v < 0 for v in values):
                raise InvalidRequest(name, "token ids must not be negative")
            if kind is str and "" in values:
                raise InvalidRequest(name, "an empty stop string would stop at once", "Leave it out.")
            put(self, name, values)
        for name in ("bad_words", "dry_sequence_breakers"):
            if getattr(self, name) is not None:
                put(self, name, _words(name, getattr(self, name)))
        if self.allowed_token_ids == ():
            raise InvalidRequest("allowed_token_ids", "they leave no token to choose", "Name some, or leave it out.")
        if self.logits_processors is not None:
            given = self.logits_processors
            put(self, "logits_processors", tuple(given) if isinstance(given, Iterable) else (given,))
            if not all(callable(p) for p in self.logits_processors):
                raise InvalidRequest("logits_processors", "every processor must be callable")
        if self.logit_bias is not None:
            try:
                bias = {_token_id(k): float(v) for k, v in self.logit_bias.items()}
            except (TypeError, ValueError, AttributeError, OverflowError):
                raise InvalidRequest("logit_bias", "it must map token ids to numbers") from None
            if any(not abs(v) <= _FLOAT32_MAX and v != -math.inf for v in bias.values()):
                raise InvalidRequest("logit_bias", "values must be finite float32 numbers or -inf")
            if any(k < 0 for k in bias):
                raise InvalidRequest("logit_bias", "token ids must not be negative")
            put(self, "logit_bias", bias)
        if self.early_stopping not in (None, "never") and not isinstance(self.early_stopping, bool):
            raise InvalidRequest("early_stopping", f"{self.early_stopping!r} is none of True, False and 'never'")
        for name, most in (("best_of", self.best_of), ("beam_width", self.beam_width)):
            if most is not None and most > (name == "beam_width") and (self.n or 1) > most:
                raise InvalidRequest(name, f"{most} is less than n={self.n}")
        for name in ("include_stop", "ignore_eos", "echo", "skip_special_tokens"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise InvalidRequest(name, f"{value!r} is not a boolean")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens", f"{self.min_tokens} exceeds max_tokens={self.max_tokens}")

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These parameters, with what is unset taken from `defaults`."""
        unset = {f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **unset)


SAMPLING_DEFAULTS = SamplingParams(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    typical_p=1.0,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    dry_multiplier=0.0,
    dry_base=1.75,
    dry_allowed_length=2,
    dry_range=0,
    dry_sequence_breakers=("\n", ":", '"', "*"),
    bad_words=(),
    n=1,
    beam_width=1,
    length_penalty=1.0,
    early_stopping=False,
    stop=(),
    stop_token_ids=(),
    include_stop=False,
    min_tokens=0,
    ignore_eos=False,
    echo=False,
    skip_special_tokens=True,
    logits_processors=(),
)


@dataclass(frozen=True)
class Request:
    """One thing asked of a backend: exactly one of `prompt` (text), `prompt_ids` or `messages`."""

    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template; only with `messages`."""
    tools: tuple[Tool, ...] = ()
    """Only with `messages`, as are the next four."""
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    """Whether one answer may call several tools."""
    thinking: bool | None = None
    """Whether the model is to reason before it answers; None leaves it to the template."""
    reasoning_effort: str | None = None
    """"low", "medium", "high" or whatever else the template knows."""
    priority: int = 0
    """Lower ones are served first; of equal ones, whose `tenant` has had least, then the first to come."""
    tenant: str = ""
    """On whose behalf: among requests of equal priority, tenants take turns."""
    timeout: float | None = None
    """Seconds after which what has not ended fails with RequestTimeout; None: as long as it takes."""
    adapter: str | None = None
    """The name of a loaded adapter to answer with; None: the model alone."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    streamed: bool = False
    """Whether somebody reads along: then others' prompts are read in small portions, so that tokens come steadily."""
    id: str = ""
    """Chosen by the backend when empty."""

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "prompt_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                "prompt", f"give exactly one of prompt, prompt_ids and messages, not {given or 'none'}"
            )
        for name in ("template_kwargs", "tools", "thinking", "reasoning_effort"):
            if self.messages is None and getattr(self, name):
                raise InvalidRequest(name, "only a request with messages uses a chat template")
        names = [tool.name for tool in self.tools]
        if len(names) != len(set(names)):
            raise InvalidRequest("tools", f"two tools have the same name among {names}")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise InvalidRequest("tool_choice", f"there is no tool {self.tool_choice.name!r}", f"There are {names}.")
        if self.tool_choice == "required" and not names:
            raise InvalidRequest("tool_choice", "a call is required, and there are no tools", "Give tools.")
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise InvalidRequest("priority", f"{self.priority!r} is not an integer")
        if not isinstance(self.tenant, str):
            raise InvalidRequest("tenant", f"{self.tenant!r} is not a text")
        if self.timeout is not None and not _is_duration(self.timeout):
            raise InvalidRequest("timeout", f"{self.timeout!r} is not a number of seconds above 0")


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its natural-log probability (before processors) and the most likely alternatives, best first."""

    token_id: int
    text: str
    logprob: float
    rank: int
    """1 for the most likely token; 0 where the backend does not tell."""
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of a request. `cached_tokens` of the prompt came out of the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Chunk:
    """A piece of one choice's answer. Each choice ends with exactly one chunk whose `finish_reason` is set."""

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    """Once, on the first chunk of choice 0: the prompt as the model saw it."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Once, on the first chunk of choice 0, when asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice, when one did."""
    usage: Usage | None = None
    """On the final chunk of each choice: the prompt's and this choice's tokens; on the last of `best_of`, those of the
    choices that are not told as well."""
    error: Exception | None = None
    """With finish_reason "error": what went wrong."""
    reasoning: str = ""
    """What the model thinks before it answers, where it does and its marks are known; never part of `text`."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    score: float | None = None
    """On the final chunk of a choice of a beam search, or of `best_of`: what it was chosen by."""


@dataclass(frozen=True)
class Choice:
    """One finished answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    score: float | None = None


@dataclass(frozen=True)
class Result:
    """The whole answer to one request; `text` and the like are the first choice's."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls


@dataclass(frozen=True)
class Score:
    """Log probabilities of a text under the model: `logprobs[i]` belongs to `token_ids[i]`; the first has none."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        """Sum of the natural-log probabilities."""
        return sum(p for p in self.logprobs if p is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log probability of the scored tokens."""
        scored = [p for p in self.logprobs if p is not None]
        if not scored:
            raise InvalidRequest("prompt", "a text of fewer than two tokens has no perplexity")
        return math.exp(-sum(scored) / len(scored))


@dataclass(frozen=True)
class EmbedRequest:
    """Texts, or token ids taken as they are, to become vectors. None leaves a choice to the model's own settings."""

    inputs: tuple[str | tuple[int, ...], ...]
    prompt: str | None = None
    """Put in front of every text; "" for none at all."""
    prompt_name: str | None = None
    """One of the prompts that the model brings, by its name."""
    pooling: Pooling | None = None
    normalize: bool | None = None
    """To length 1."""
    dimensions: int | None = None
    """Keep so many leading elements; a normalized vector is normalized again."""
    truncate: bool = True
    """Cut a text at the longest that the model takes, and say so in its `Embedding`; False refuses it."""

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in get_args(Pooling):
            raise InvalidRequest(
                "pooling", f"{self.pooling!r} is unknown", f"Use one of {', '.join(get_args(Pooling))}."
            )
        if self.prompt is not None and self.prompt_name is not None:
            raise InvalidRequest("prompt_name", "a prompt is given as well", "Give one of them.")
        for name in ("prompt", "prompt_name"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidRequest(name, f"{value!r} is not a text")
            if value is not None and not all(isinstance(given, str) for given in self.inputs):
                raise InvalidRequest(name, "token ids are taken as they are", "Give texts, or leave the prompt out.")
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise InvalidRequest("normalize", f"{self.normalize!r} is not a boolean")
        _check_count("dimensions", self.dimensions)
        _check_truncate(self.truncate)


@dataclass(frozen=True)
class Embedding:
    """A text as a vector."""

    vector: tuple[float, ...]
    """Of float32 precision."""
    usage: Usage
    truncated: bool = False
    """Whether the text was cut at the longest that the model takes."""


@dataclass(frozen=True)
class RerankRequest:
    """Documents to be ordered by how well each answers a query."""

    query: str
    documents: tuple[str, ...]
    top_n: int | None = None
    """Keep so many of the best; None: all."""
    truncate: bool = True
    """Cut a query and document, the longer first, at what the model takes together, and say so; False refuses them."""

    def __post_init__(self) -> None:
        if not isinstance(self.query, str):
            raise InvalidRequest("query", f"{self.query!r} is not a text")
        for document in self.documents:
            if not isinstance(document, str):
                raise InvalidRequest("documents", f"{document!r} is not a text")
        _check_count("top_n", self.top_n)
        _check_truncate(self.truncate)


@dataclass(frozen=True)
class Ranked:
    """A document's place among others."""

    index: int
    """Where it stood in the request."""
    score: float
    """Higher is better; what it means, the model's own activation says (often a probability)."""
    truncated: bool = False


@dataclass(frozen=True)
class RerankResult:
    """Documents, best first; of equal ones the earlier."""

    results: tuple[Ranked, ...]
    usage: Usage


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidRequest(name, f"{value!r} is not an integer of at least 1")


def _check_truncate(value: bool) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest("truncate", f"{value!r} is not a boolean")


@dataclass(frozen=True)
class Stats:
    """A moment's state of an engine. Counters count since it was built; bytes are bytes."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    requests_finished: int = 0
    requests_failed: int = 0
    requests_cancelled: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    workspace_bytes: int = 0


class AllocationListener(Protocol):
    """Hears of each sequence's blocks, on the engine's thread: return soon, never raise."""

    def allocated(self, request_id: str, index: int, blocks: int) -> None:
        """The sequence now holds `blocks` more blocks."""
        ...

    def released(self, request_id: str, index: int, blocks: int) -> None:
        """The sequence gave back `blocks` blocks (end, preemption, window)."""
        ...
