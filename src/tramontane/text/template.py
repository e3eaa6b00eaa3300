"""Chat templates: a conversation to the text a model was trained on.

Owns which of a model's templates is used and what a template is given. Must not know: tokens, models; how a template
is kept within bounds is `tramontane.text.sandbox`. Source: transformers' documentation on chat templates.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta

from tramontane.errors import CorruptCheckpoint, InvalidRequest, TemplateError
from tramontane.text import sandbox

_MAX_SOURCE_CHARS = 1 << 17  # the longest known templates have some 20,000; compiling takes kilobytes a character
_MAX_DEPTH = 64
_REMEDY = "Give another template with chat_template=, or send the prompt as plain text."
_PROBE = "tramontane-probe"


class ChatTemplate:
    """A compiled template. Rendering is safe from several threads.

    `special_tokens` gives the template further names (`unk_token`, ...). `tool_use` is the template for requests with
    tools, where the model has one of its own. Raises TemplateError when a source is no Jinja template.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        tool_use: str | None = None,
    ) -> None:
        if len(source) > _MAX_SOURCE_CHARS:
            raise TemplateError(f"The chat template has {len(source)} characters, which cannot be meant.", _REMEDY)
        self.source = source
        named = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}
        self._special_tokens = {name: token for name, token in named.items() if token is not None}
        self._with_tools = None if tool_use is None else ChatTemplate(tool_use, special_tokens=self._special_tokens)
        try:
            self._template = sandbox.Environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise TemplateError(f"The chat template cannot be parsed: {_said(error)}{line}.", _REMEDY) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text. `kwargs` are further variables the template may know (`enable_thinking`, ...).

        It ends with what precedes an answer (`add_generation_prompt`, the default), or, with
        `continue_final_message`, within the last message, for the model to go on with.
        A message whose content is a list of `{"type": "text", "text": ...}` parts works with every template: one
        that expects strings gets the texts joined. Reasoning may be called `reasoning_content`, `thinking` or
        `reasoning`. Raises TemplateError with the template's own words when it refuses, InvalidRequest for messages,
        tools or documents that are not plain data.
        """
        if tools and self._with_tools is not None:
            return self._with_tools.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                **kwargs,
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message", "it goes on with the last message, add_generation_prompt begins another"
            )
        conversation = [_with_reasoning(_mapping(message, "messages")) for message in messages]
        if any(isinstance(message.get("content"), list) for message in conversation) and not self._takes_parts:
            conversation = [_joined(message) for message in conversation]
        mark = _mark_end(conversation) if continue_final_message else None
        variables = {
            **self._special_tokens,
            **_plain(kwargs, "chat_template_kwargs"),
            "messages": conversation,
            "tools": None if tools is None else [_mapping(tool, "tools") for tool in tools],
            "documents": None if documents is None else [_mapping(entry, "documents") for entry in documents],
            "add_generation_prompt": not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
        }
        text = self._run(variables)
        return text if mark is None else _cut_at(text, mark)

    def _run(self, variables: Mapping[str, Any]) -> str:
        sandbox.start_budget()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                sandbox.check_size(size)
                pieces.append(piece)
        except Exception as error:  # whatever a template does wrong, it does as Python
            raise TemplateError(f"The chat template failed: {_said(error)}.", _REMEDY) from error
        return "".join(pieces)

    @property
    def text(self) -> str:
        """The source, with that of the template for tools where there is one."""
        return self.source if self._with_tools is None else f"{self.source}\n{self._with_tools.source}"

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not always set itself."""
        found = jinja2.meta.find_undeclared_variables(sandbox.Environment().parse(self.source))
        return frozenset(found) | (self._with_tools.variables if self._with_tools is not None else frozenset())

    @cached_property
    def takes_tools(self) -> bool:
        """Whether tools that a request gives show in its prompt: seen by trying."""
        template = self._with_tools or self
        parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
        tool = {"type": "function", "function": {"name": _PROBE, "description": "x", "parameters": parameters}}
        conversation = [{"role": "user", "content": "x"}]
        variables = {**self._special_tokens, "messages": conversation, "tools": [tool], "add_generation_prompt": True}
        try:
            return _PROBE in template._run(variables)
        except TemplateError:
            return False

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads lists of parts itself: seen by trying, since templates ask in many ways."""
        message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        try:
            text = self._run({**self._special_tokens, "messages": [message], "add_generation_prompt": True})
        except TemplateError:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text


def _said(error: BaseException) -> str:
    """The words of an error, without the full stop that ours adds."""
    text = str(error).strip() or type(error).__name__
    return text.removesuffix(".")


def _plain(value: Any, field: str, depth: int = 0) -> Any:
    """A copy made of JSON's types only: objects of other classes would bring their methods into the sandbox."""
    if depth > _MAX_DEPTH:
        raise InvalidRequest(field, f"nested more than {_MAX_DEPTH} levels deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, (str, int, float)):  # enums and the like
        base: type = next(base for base in (str, int, float) if isinstance(value, base))
        return base.__new__(base, value.value if hasattr(value, "value") else value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, field, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, field, depth + 1) for item in value]
    raise InvalidRequest(
        field, f"a {type(value).__name__} is not plain data", "Give strings, numbers, lists and dicts."
    )


def _mapping(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(field, f"an entry is a {type(value).__name__}, not a mapping")
    plain: dict[str, Any] = _plain(value, field)
    return plain


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the two names that templates read."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(conversation: list[dict[str, Any]]) -> str:
    """Put a mark at the end of the last message's text, and return it."""
    mark = f"{_PROBE}-{secrets.token_hex(8)} "  # the space shows whether the template trims
    content = conversation[-1].get("content") if conversation else None
    if isinstance(content, str):
        conversation[-1]["content"] = content + mark
        return mark
    texts = [part for part in content or () if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts:
        raise InvalidRequest("continue_final_message", "the conversation does not end with a text")
    texts[-1]["text"] += mark
    return mark


def _cut_at(text: str, mark: str) -> str:
    head, found, tail = text.rpartition(mark.strip())
    if not found:
        raise TemplateError("The chat template leaves the end of the last message out: it cannot go on.", _REMEDY)
    return head if tail.startswith(" ") else head.rstrip()


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text parts as one string."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidRequest("messages", f"this model's chat template takes text only, not a part of type {kind!r}")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


def named_templates(
    *,
    jinja_file: str | None = None,
    additional: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    gguf: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """A model's templates by name; the main one is "default".

    The first that there is: `jinja_file` (the text of `chat_template.jinja`) with `additional` (those of the folder
    `additional_chat_templates`, by name); `chat_template` of `config` (tokenizer_config.json: a string, or a list of
    named ones); `tokenizer.chat_template` of `gguf` (metadata), with `tokenizer.chat_template.NAME` beside it.
    Raises CorruptCheckpoint for templates that are no text.
    """
    if jinja_file is not None or additional:
        main = {} if jinja_file is None else {"default": jinja_file}
        return {**(additional or {}), **main}
    if config and config.get("chat_template") is not None:
        return _from_config(config["chat_template"])
    return _from_gguf(gguf) if gguf else {}


def select_template(
    *,
    override: str | None = None,
    jinja_file: str | None = None,
    additional: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    gguf: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str | None:
    """The source of the template to use, or None where the model has none.

    `override` (the user's) comes first, then `named_templates` of the rest. `name` asks for a named one (`tool_use`,
    ...); by default it is "default", or the only one there is. Raises InvalidRequest for a name that is not there,
    CorruptCheckpoint for templates that are no text.
    """
    if override is not None:
        return override
    named = named_templates(jinja_file=jinja_file, additional=additional, config=config, gguf=gguf)
    if name is not None and name not in named:
        known = ", ".join(sorted(named)) or "none"
        raise InvalidRequest("chat_template", f"the model has no template named {name!r}", f"It has: {known}.")
    only = next(iter(named.values())) if len(named) == 1 else None
    return named[name] if name is not None else named.get("default", only)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise CorruptCheckpoint(where, f"a chat template is a {type(value).__name__}, not a text")
    return value


def _from_config(value: object) -> dict[str, str]:
    where = "tokenizer_config.json"
    if isinstance(value, (list, tuple)):
        entries = [entry if isinstance(entry, Mapping) else {} for entry in value]
        return {_text(entry.get("name"), where): _text(entry.get("template"), where) for entry in entries}
    if isinstance(value, Mapping):
        return {str(key): _text(template, where) for key, template in value.items()}
    return {"default": _text(value, where)}


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {
        entry.removeprefix(f"{key}."): _text(value, "GGUF metadata")
        for entry, value in metadata.items()
        if entry.startswith(f"{key}.")
    }
    if metadata.get(key) is not None:
        named["default"] = _text(metadata[key], "GGUF metadata")
    return named
