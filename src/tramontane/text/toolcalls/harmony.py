"""Harmony, the channels of gpt-oss: analysis is reasoning, commentary may be a call, final is the answer.

Owns that syntax. Must not know: templates, tokens. Source: OpenAI's page on the harmony response format.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from tramontane.text.toolcalls.output import Output
from tramontane.text.toolcalls.reader import Reader, Reading

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


def harmony(reader: Reader, out: Output, known: Collection[str] | None) -> Reading[None]:
    """Messages, each with a header that says on which channel and to whom. `known`: the tools that may be called;
    None where there are none, and what looks like a call is text."""
    while (yield from reader.peek()):
        head: list[str] = []
        if not (yield from reader.starts(START)) and not (yield from _headed(reader)):
            yield from reader.until((START, CHANNEL, *ENDS), out.text, take=False)
            yield from reader.starts(*ENDS)
            continue
        reader.save()
        if not (yield from reader.until((MESSAGE, START, *ENDS), head.append)):
            reader.back()  # a header that never ended
            yield from reader.until((), out.text)
            return
        reader.forget()
        yield from _body(reader, out, "".join(head), known)


def _headed(reader: Reader) -> Reading[bool]:
    """Whether a header comes next; it stays where it is."""
    reader.save()
    found = yield from reader.starts(CHANNEL, MESSAGE, " to=", "to=")
    reader.back()
    return bool(found)


def _body(reader: Reader, out: Output, head: str, known: Collection[str] | None) -> Reading[None]:
    channel, recipient = _CHANNEL.search(head), _RECIPIENT.search(head)
    to = recipient[1] if recipient else ""
    name = to.removeprefix("functions.")
    ends = (*ENDS, START)
    if known is not None and to and (name != to or name in known):
        yield from reader.space()
        out.call(name)
        written: list[str] = []

        def write(text: str) -> None:
            written.append(text)
            out.arguments(text)

        yield from reader.until(ends, write, take=False)
        if not written:
            out.arguments("{}")
        out.close()
    else:
        out.paragraph()
        analysis = channel is not None and channel[1] == "analysis" and not to
        yield from reader.until(ends, out.think if analysis else out.text, take=False)
    yield from reader.starts(*ENDS)
