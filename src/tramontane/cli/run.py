"""`tramontane run`: one answer, or a chat.

Owns the command's options and the one-shot answer; the conversation is in `chat`. Must not know: the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli.options import Backend, Device, Model, Profile, Settings, Threads, open_llm, read_json, read_text
from tramontane.errors import InvalidRequest

if TYPE_CHECKING:
    from tramontane.llm import LLM
    from tramontane.types import Choice, Chunk, Grammar, Result, SamplingParams

_TEMPERATURE = 0.7
"""Where neither the user nor the model names one. At 1, which the Python interface keeps to, small models wander."""


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. '-' is standard input, as is no prompt with input piped in; else: a chat."),
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text as it is, without the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Shortest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; if not given: the model's, or 0.7.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens at least this likely against the likeliest.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Keep typical tokens up to this probability.")] = None,
    xtc_probability: Annotated[float | None, typer.Option(help="How often top choices are excluded.")] = None,
    dry_multiplier: Annotated[float | None, typer.Option(help="Above 0 keeps from saying passages again.")] = None,
    bad_word: Annotated[list[str] | None, typer.Option(help="Never say this. May be repeated.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages any token seen before.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Against tokens already generated.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, by how often.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeat.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many answers (one-shot only).")] = None,
    best_of: Annotated[int | None, typer.Option(help="Draw so many, and show the likeliest -n.")] = None,
    beam_width: Annotated[int | None, typer.Option(help="Above 1: beam search, with so many beams.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log probabilities, and so many alternatives.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text. May be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before the answer (one-shot only).")] = False,
    json_object: Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="A JSON Schema that the answer matches, in a file.")] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that the whole answer matches.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="One of the texts to answer with. Repeat it.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="A grammar that the answer matches, in llguidance's Lark, in a file.")
    ] = None,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the answer when it is whole (or MISTRALRS_NO_STREAM=1).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (one-shot only).")] = False,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file to use as the chat template.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="A JSON file of tools that the model may call: a list in OpenAI's shape.")
    ] = None,
    tool_choice: Annotated[str | None, typer.Option(help="auto, none, required, or the one tool to call.")] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Reason before answering, or not; else: as the model does."),
    ] = None,
    reasoning_effort: Annotated[str | None, typer.Option(help="low, medium, high, or what the model knows.")] = None,
    hide_reasoning: Annotated[bool, typer.Option("--hide-reasoning", help="Do not show it on the terminal.")] = False,
    adapter: Annotated[
        str | None, typer.Option(help='Answer with this LoRA adapter, of those of -o adapters={"NAME": "FOLDER"}.')
    ] = None,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
    option: Settings = None,
    profile: Profile = None,
) -> None:
    """Answer a prompt, or chat when there is none. The first run fetches the demo model (about 98 MB)."""
    from tramontane.config import flag
    from tramontane.types import SamplingParams

    stream = not (no_stream or as_json or flag("MISTRALRS_NO_STREAM"))
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        xtc_probability=xtc_probability,
        dry_multiplier=dry_multiplier,
        bad_words=tuple(bad_word) if bad_word else None,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        best_of=best_of,
        beam_width=beam_width,
        logprobs=logprobs,
        stop=tuple(stop) if stop else None,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos or None,
        echo=echo or None,
        grammar=_grammar(json_object, json_schema, regex, choice, grammar),
    )
    if logprobs is not None and not as_json:
        raise InvalidRequest("--logprobs", "they are only shown in JSON", "Add --json.")
    if raw and chat_template is not None:
        raise InvalidRequest("--raw", "a plain completion uses no chat template", "Leave out one of the two.")
    fields = _chat_fields(tools, tool_choice, think, reasoning_effort)
    if raw and fields:
        raise InvalidRequest("--raw", "a plain completion has no tools and no reasoning", "Leave out one of the two.")
    if adapter is not None:
        fields["adapter"] = adapter
    one_shot = {"--json": as_json, "--raw": raw, "--echo": echo, "-n": (n or 1) > 1}
    prompt = _prompt(prompt, [name for name, given in one_shot.items() if given])
    template = read_text(chat_template, "--chat-template") if chat_template else None
    with open_llm(model, device, threads, option, backend=backend, chat_template=template, profile=profile) as llm:
        _refuse_system(llm, system, raw)
        if llm.capabilities().defaults.temperature is None and (beam_width or 1) == 1:
            params = params.over(SamplingParams(temperature=_TEMPERATURE))
        if prompt is None:
            from tramontane.cli.chat import Chat

            Chat(llm, params, system=system, stream=stream, fields=fields, reasoning=not hide_reasoning).loop()
        else:
            asked = prompt if raw or not llm.capabilities().chat else _conversation(prompt, system)
            _answer(llm, asked, params, fields, stream=stream, as_json=as_json, reasoning=not hide_reasoning)


def _grammar(
    json_object: bool, schema: Path | None, regex: str | None, choice: list[str] | None, lark: Path | None
) -> Grammar | None:
    """The grammar that the options give. Raises InvalidRequest for two of them, and for a file that is none."""
    from tramontane.types import Grammar

    given: dict[str, Grammar] = {}
    if json_object:
        given["--json-object"] = Grammar("json_object")
    if schema is not None:
        given["--json-schema"] = Grammar("json_schema", read_json(schema, "--json-schema"))
    if regex is not None:
        given["--regex"] = Grammar("regex", regex)
    if choice:
        given["--choice"] = Grammar("choice", tuple(choice))
    if lark is not None:
        given["--grammar"] = Grammar("lark", read_text(lark, "--grammar"))
    if len(given) > 1:
        raise InvalidRequest(" and ".join(given), "an answer matches one grammar", "Give one of them.")
    return next(iter(given.values()), None)


def _chat_fields(tools: Path | None, choice: str | None, think: bool | None, effort: str | None) -> dict[str, Any]:
    """The fields of a chat request that the options give."""
    from tramontane.functions import tools_of

    fields: dict[str, Any] = {"thinking": think, "reasoning_effort": effort}
    if tools is not None:
        given = read_json(tools, "--tools")
        fields["tools"] = tools_of(given if isinstance(given, list) else [given])
    if choice is not None:
        named = choice not in ("auto", "none", "required")
        fields["tool_choice"] = {"name": choice} if named else choice
    return {name: value for name, value in fields.items() if value is not None}


def _prompt(given: str | None, one_shot: list[str]) -> str | None:
    """The prompt: as given, or from standard input; None for a chat, which only a terminal can hold."""
    if given is not None and given != "-":
        return _text(given.encode("utf-8", "surrogateescape"), "it")
    if given is None and sys.stdin is not None and sys.stdin.isatty():
        if one_shot:
            raise InvalidRequest("PROMPT", f"{', '.join(one_shot)} needs one", "Give a PROMPT, or pipe one in.")
        if not sys.stdout.isatty():
            raise InvalidRequest("PROMPT", "a chat needs a terminal to write to", "Give a PROMPT, or pipe one in.")
        return None
    prompt = "" if sys.stdin is None else _text(sys.stdin.buffer.read(), "standard input")
    if not prompt.strip():
        raise InvalidRequest("PROMPT", "standard input is empty", "Give a PROMPT, or run in a terminal to chat.")
    return prompt


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest("PROMPT", f"{where} is not UTF-8 text (byte {error.start})", "Convert it first.") from None


def _refuse_system(llm: LLM, system: str | None, raw: bool) -> None:
    if system is not None and (raw or not llm.capabilities().chat):
        why = "a plain completion has no system message" if raw else "this model has no chat template for it"
        raise InvalidRequest("--system", why, "Put it into the prompt.")


def _conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": prompt}]


def _answer(
    llm: LLM,
    asked: str | list[dict[str, str]],
    params: SamplingParams,
    fields: dict[str, Any],
    *,
    stream: bool,
    as_json: bool,
    reasoning: bool,
) -> None:
    if stream and (params.n or 1) == 1:
        from tramontane.cli.terminal import AnswerWriter

        with AnswerWriter(reasoning) as out:
            for chunk in llm.stream(asked, params, **fields):
                out.show(chunk)
        return
    from tramontane.types import Choice

    texts = [""] * (params.n or 1)

    def gather(chunk: Chunk) -> None:
        texts[chunk.index] += chunk.text

    try:
        if isinstance(asked, str):
            result = llm.generate(asked, params, on_token=gather, **fields)
        else:
            result = llm.chat(asked, params, on_token=gather, **fields)
    except KeyboardInterrupt:
        if not as_json:  # what there is so far is an answer's beginning, but no result
            _print_answers([Choice(index, text, (), "cancelled") for index, text in enumerate(texts)], reasoning)
        raise
    if as_json:
        from tramontane.cli.terminal import print_json

        print_json(_as_json(result))
    else:
        _print_answers(result.choices, reasoning)


def _print_answers(choices: Sequence[Choice], reasoning: bool) -> None:
    """Each answer, with an empty line between two."""
    from tramontane.cli.terminal import AnswerWriter

    for choice in choices:
        if choice.index:
            print()
        with AnswerWriter(reasoning) as out:
            out.show(choice)


def _as_json(result: Result) -> dict[str, Any]:
    from dataclasses import asdict

    fields = asdict(result)
    fields["text"] = result.text
    fields["usage"]["total_tokens"] = result.usage.total_tokens
    return fields
