"""What the schemas are made of: strict bodies, refused fields, numbers, usage, errors, and sampling.

Owns the fields that chat and completions share. Must not know: how a field is honoured.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_FIELDS = 200
"""Of one object: far more than there are. Each unknown one would be a complaint of its own."""


def few(most: int) -> BeforeValidator:
    """Refuses an object with more entries at once, instead of complaining of each."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_long", "it has {count} entries", {"count": len(value)})
        return value

    return BeforeValidator(check)


Item = TypeVar("Item")
Several = Annotated[list[Item], Field(fail_fast=True)]
"""A list, of which the first wrong item is complained of."""


class Body(BaseModel):
    """Something that a client sends: unknown fields are refused, types are not guessed, null is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return few(MOST_FIELDS).func(value)  # type: ignore[call-arg]


class Reply(BaseModel):
    """Something that a client gets. Fields that were not set are left out."""

    model_config = ConfigDict(protected_namespaces=())

    def dumped(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


def refused(why: str, *neutral: Any) -> Any:
    """The type of a field that is refused by name, but for values that ask for nothing: null and `neutral`."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in neutral):
            return value
        raise PydanticCustomError("refused", "{why}", {"why": why})

    allowed: Any = Literal[neutral] | None if neutral else None
    return Annotated[allowed, BeforeValidator(check), Field(description=f"Refused: {why}.")]


def refused_unless_empty(why: str) -> Any:
    """The same for a list that may be empty."""

    def check(value: Any) -> Any:
        if value is None or value == []:
            return value
        raise PydanticCustomError("refused", "{why}", {"why": why})

    empty = Field(max_length=0, description=f"Refused: {why}.")
    return Annotated[Annotated[list[Any], empty] | None, BeforeValidator(check)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
"""An integer; 40.0 is one too, in JSON Schema as in what some clients send."""

Count = Annotated[Int, Field(ge=1, le=2**63 - 1)]
Natural = Annotated[Int, Field(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1)]
Schema = dict[str, Any] | bool
Labels = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16), few(16)
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    few(1024),
]
Ids = Annotated[Several[TokenId], Field(min_length=1)]
Texts = Annotated[Several[str], Field(min_length=1)]
Inputs = str | Ids | Texts | Annotated[Several[Ids], Field(min_length=1)]
"""A text, token ids, or several of either."""
ModelName = Annotated[str | None, Field(description="One of the names in /v1/models; the first when left out.")]


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorDetail


class StreamOptions(Body):
    include_usage: bool | None = None
    """End with a chunk that has usage and no choices."""
    continuous_usage_stats: bool | None = None
    """Usage so far on every chunk."""
    include_obfuscation: refused("chunks are not padded", False) = None  # type: ignore[valid-type]


class StructuredOutputs(Body):
    """What an answer must match, as vLLM spells it: one of these."""

    model_config = ConfigDict(protected_namespaces=())

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampled(Body):
    """How an answer is drawn and when it ends, and what the server is told besides: of chat and completions alike."""

    model: ModelName = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Natural | None = None
    n: Count | None = None
    seed: Annotated[Int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Text | Annotated[Several[Text], Field(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None
    # Beyond OpenAI's, spelt as vLLM does, and where vLLM has none, as llama.cpp.
    top_k: Annotated[Int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Field(ge=1, le=100)] | None = None
    dry_allowed_length: Count | None = None
    dry_range: Natural | None = None
    dry_sequence_breakers: Annotated[Several[Text], Field(max_length=64)] | None = None
    bad_words: Annotated[Several[Text], Field(max_length=1024)] | None = None
    allowed_token_ids: Ids | None = None
    best_of: Count | None = None
    """Draw so many choices, and answer with the n likeliest."""
    use_beam_search: bool | None = None
    """With beam_width beams, otherwise n."""
    beam_width: Count | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    ignore_eos: bool | None = None
    min_tokens: Natural | None = None
    stop_token_ids: Annotated[Several[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[Int, Field(ge=0, le=2**31 - 1)] | None = None
    adapter: Annotated[Text, Field(max_length=256)] | None = None
    """The name of a loaded LoRA adapter to answer with."""
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None


class PromptDetails(Reply):
    cached_tokens: int


class UsageReply(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
