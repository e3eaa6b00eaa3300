"""`tramontane run`: one answer, or a chat.

Owns the command's options and the one-shot answer; the conversation is in `chat`. Must not know: the engine.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli.options import Device, Model, Settings, Threads, open_llm
from tramontane.errors import InvalidRequest

if TYPE_CHECKING:
    from tramontane.llm import LLM
    from tramontane.types import SamplingParams


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. '-' reads standard input, as does no prompt with input piped in; else: a chat."),
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text as it is, without the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Shortest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens at least this likely against the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages any token seen before.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Against tokens already generated.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, by how often.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeat.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many answers (one-shot only).")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Log probabilities, with so many alternatives (with --json).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text. May be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before the answer.")] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the answer when it is whole (or MISTRALRS_NO_STREAM=1).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file to use as the chat template.")] = None,
    device: Device = None,
    threads: Threads = None,
    option: Settings = None,
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
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        logprobs=logprobs,
        stop=tuple(stop) if stop else None,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos or None,
        echo=echo or None,
    )
    if logprobs is not None and not as_json:
        raise InvalidRequest("--logprobs", "they are only shown in JSON", "Add --json.")
    interactive = prompt is None and sys.stdin.isatty()
    if interactive and (as_json or raw or (n or 1) > 1):
        raise InvalidRequest("PROMPT", "--json, --raw and -n answer one prompt", "Give a PROMPT, or pipe one in.")
    if prompt == "-" or (prompt is None and not interactive):
        prompt = sys.stdin.read()
        if not prompt.strip():
            raise InvalidRequest("PROMPT", "standard input is empty", "Give a PROMPT, or run in a terminal to chat.")
    template = chat_template.read_text(encoding="utf-8") if chat_template else None
    with open_llm(model, device, threads, option, chat_template=template) as llm:
        if prompt is None:
            from tramontane.cli.chat import Chat

            Chat(llm, params, system=system, stream=stream).loop()
        else:
            _answer(llm, _conversation(llm, prompt, system, raw), params, stream=stream, as_json=as_json)


def _conversation(llm: LLM, prompt: str, system: str | None, raw: bool) -> str | list[dict[str, str]]:
    """The prompt as messages, or as plain text for a model without a chat template."""
    if raw or not llm.capabilities().chat:
        if system is not None:
            raise InvalidRequest("--system", "a plain completion has no system message", "Put it into the prompt.")
        return prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": prompt}]


def _answer(
    llm: LLM, asked: str | list[dict[str, str]], params: SamplingParams, *, stream: bool, as_json: bool
) -> None:
    from tramontane.cli.terminal import AnswerWriter

    if stream and (params.n or 1) == 1:
        with AnswerWriter() as out:
            for chunk in llm.stream(asked, params):
                out.write(chunk.text)
        return
    result = llm.chat(asked, params) if isinstance(asked, list) else llm.generate(asked, params)
    if as_json:
        print(json.dumps(_as_json(result), ensure_ascii=False))
        return
    for choice in result.choices:
        with AnswerWriter() as out:
            out.write(choice.text)


def _as_json(result: Any) -> dict[str, Any]:
    fields = asdict(result)
    fields["text"] = result.text
    fields["usage"]["total_tokens"] = result.usage.total_tokens
    return fields
