"""From the wheel's chunks to ours: one choice's text, tokens, calls and end.

Owns text assembly: the space that the wheel strips, stop strings, echo, token ids. Must not know: threads, the wheel's
classes beyond the names of their attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tramontane.backends.mistralrs.requests import Plan
from tramontane.errors import TramontaneError
from tramontane.text.stops import StopMatcher
from tramontane.types import Chunk, FinishReason, TokenLogprob, ToolCallDelta, Usage

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "canceled": "cancelled",
    "error": "error",
}

_CALLS = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]")
"""What begins a call of a tool: the wheel lets it slip into the text before it sees what it is."""

Identify = Callable[[bytes, int], int]
"""The id of the token with these bytes, or else the number given."""


class Answer:
    """The state of one choice. `push` takes chunks of the wheel's as long as `done` is False."""

    def __init__(self, plan: Plan, index: int, identify: Identify | None) -> None:
        self._plan, self._index, self._identify = plan, index, identify
        params = plan.params
        self._stops = StopMatcher(params.stop or (), bool(params.include_stop))
        self._held = ""
        """The end of the text where it may begin a call."""
        self._lead = plan.echo
        self._first = b""
        """The bytes before the first text, while there is none."""
        self._begun = False
        self._prompt_told = index != 0
        self._tokens = 0
        self._calls = 0
        self.done = False

    @property
    def id(self) -> str:
        """The request's."""
        return self._plan.id

    @property
    def prompt_tokens(self) -> int:
        """As far as known before the wheel says."""
        return len(self._plan.prompt_ids or ())

    def push(self, told: Any) -> Chunk | None:
        """Our chunk of one of the wheel's, or None where it holds nothing to tell."""
        choice = told.choices[0]
        token = self._token(choice.logprobs)
        reason = None if choice.finish_reason is None else _REASONS.get(choice.finish_reason, "stop")
        stop: str | int | None = None
        text = self._text(choice.delta.content, choice.logprobs)
        if "tool_schemas" in self._plan.arguments:
            text = self._without_call(text, reason)
        if token is not None and token.token_id in (self._plan.params.stop_token_ids or ()):
            text, reason, stop = text if self._plan.params.include_stop else "", "stop", token.token_id
        text, found = self._stops.push(text)
        if found is not None:
            reason, stop = "stop", found
        elif reason is not None:
            text += self._stops.flush()
        if stop is None and reason == "stop":
            text, stop = self._special_stop(text, choice.stop_sequence)
        return self._chunk(
            text,
            token=token,
            reasoning=choice.delta.reasoning_content or "",
            calls=self._tool_calls(choice.delta.tool_calls),
            reason=reason,
            stop=stop,
            usage=None if reason is None else self._usage(told.usage),
        )

    def end(self, reason: FinishReason, error: TramontaneError | None = None) -> Chunk:
        """The final chunk of a choice that ends between tokens: cancelled or failed. What was held back comes out."""
        text = self._stops.flush()
        chunk = self._chunk(text, reason=reason, usage=self._usage(None), error=error)
        assert chunk is not None  # it has a reason
        return chunk

    def _chunk(
        self,
        text: str,
        *,
        token: TokenLogprob | None = None,
        reasoning: str = "",
        calls: tuple[ToolCallDelta, ...] = (),
        reason: FinishReason | None = None,
        stop: str | int | None = None,
        usage: Usage | None = None,
        error: TramontaneError | None = None,
    ) -> Chunk | None:
        known = token is not None and token.token_id >= 0
        if not (text or known or reasoning or calls or reason or not self._prompt_told):
            return None
        self.done = reason is not None
        text, self._lead = self._lead + text, ""
        prompt_ids = None if self._prompt_told else self._plan.prompt_ids
        self._prompt_told = True
        wanted = token is not None and self._plan.params.logprobs is not None
        return Chunk(
            request_id=self._plan.id,
            index=self._index,
            text=text,
            token_ids=(token.token_id,) if token is not None and known else (),
            logprobs=(token,) if token is not None and wanted else (),
            prompt_ids=prompt_ids,
            finish_reason=reason,
            stop_reason=stop,
            usage=usage,
            error=error,
            reasoning=reasoning,
            tool_calls=calls,
        )

    def _text(self, content: str | None, told: Any) -> str:
        """The wheel strips white space off the first text; the token's bytes still have it."""
        if self._begun or content is None:
            return content or ""
        self._first += bytes(told.bytes) if told is not None and told.bytes is not None else b""
        whole = self._first.decode("utf-8", "replace")
        if whole.endswith("\ufffd") and not content:
            return ""  # a character that later tokens complete
        self._begun = True
        stripped = whole[: len(whole) - len(content)] if whole.endswith(content) else ""
        return stripped + content if stripped.isspace() else content

    def _without_call(self, text: str, reason: FinishReason | None) -> str:
        """Text less what a call of a tool begins with; if no call comes of it, the end brings it back."""
        text, self._held = self._held + text, ""
        begun = min((at for mark in _CALLS if (at := text.find(mark)) >= 0), default=_unsure(text))
        if reason is None:
            text, self._held = text[:begun], text[begun:]
        elif reason == "tool_calls":
            text = text[:begun]
        return text

    def _token(self, told: Any) -> TokenLogprob | None:
        """The token's report. Its id is one of the alternatives', else what the vocabulary says of its bytes, else -1;
        its rank is 0 where it is not among the alternatives, as the wheel does not say."""
        if told is None:
            return None
        self._tokens += 1
        top = [(int(one.token), str(one.bytes or ""), float(one.logprob)) for one in told.top_logprobs]
        text, logprob = str(told.token), float(told.logprob)
        same = [i for i, (_, shown, value) in enumerate(top) if value == logprob and shown == text]
        if same:
            id_ = top[same[0]][0]
        else:
            raw = bytes(told.bytes) if told.bytes is not None else text.encode()
            id_ = -1 if self._identify is None else self._identify(raw, -1)
        rank = same[0] + 1 if same else 0
        return TokenLogprob(id_, text, logprob, rank, tuple(top[: self._plan.params.logprobs or 0]))

    def _special_stop(self, text: str, shown: str | None) -> tuple[str, str | int | None]:
        """What the wheel stopped at, where that was one of the request's special tokens."""
        ids = self._plan.params.stop_token_ids or ()
        if shown is None or not ids:
            return text, None
        specials = dict(zip(self._plan.arguments.get("stop_seqs", ()), self._plan.stops, strict=False))
        stop = specials.get(shown)
        return (text + shown if stop is not None and self._plan.params.include_stop else text), stop

    def _tool_calls(self, calls: Any) -> tuple[ToolCallDelta, ...]:
        """The wheel tells calls whole."""
        found = []
        for call in calls or ():
            found.append(ToolCallDelta(self._calls, call.id, call.function.name, call.function.arguments))
            self._calls += 1
        return tuple(found)

    def _usage(self, told: Any) -> Usage:
        if told is None:
            return Usage(self.prompt_tokens, self._tokens)
        details = getattr(told, "prompt_tokens_details", None)
        return Usage(told.prompt_tokens, told.completion_tokens, getattr(details, "cached_tokens", None) or 0)


def _unsure(text: str) -> int:
    """Where the text ends, less what may be the start of a mark that later text completes."""
    longest = max(map(len, _CALLS)) - 1
    ends = range(max(len(text) - longest, 0), len(text))
    return next((at for at in ends if any(mark.startswith(text[at:]) for mark in _CALLS)), len(text))
