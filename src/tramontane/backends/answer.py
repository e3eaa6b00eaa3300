"""Answer: from the tokens of one choice to the chunks that its reader gets.

Owns text assembly: detokenizing, stop strings, echo, logprobs' texts, usage. Must not know: the engine's thread,
how tokens are chosen, how reasoning and calls are written. Stop strings look at all that the model writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.backends.prepare import Prepared
from tramontane.engine.step import TokenInfo
from tramontane.text.detokenizer import Detokenizer
from tramontane.text.stops import StopMatcher
from tramontane.text.tokenizer import Tokenizer
from tramontane.text.toolcalls.output import Piece
from tramontane.types import Chunk, FinishReason, TokenLogprob, Usage


class Answer:
    """The state of one choice."""

    def __init__(self, tokenizer: Tokenizer, prepared: Prepared, *, index: int) -> None:
        request = prepared.request
        params = request.params
        self._tokenizer = tokenizer
        skip = bool(params.skip_special_tokens)
        self._detokenizer = Detokenizer(tokenizer, skip, request.prompt_ids, prepared.shown)
        self._parser = prepared.parser() if prepared.parser is not None else None
        if params.grammar is not None:
            self._detokenizer.continue_text()
        self._ends = request.ends
        self._stops = StopMatcher(params.stop or (), bool(params.include_stop))
        self._min_tokens = params.min_tokens or 0
        self._show_end = params.include_stop or not params.skip_special_tokens
        self._request_id, self._index = request.id, index
        self._prompt_tokens = len(request.prompt_ids)
        self._completion_tokens = 0
        self._lead = prepared.echo

    def push(
        self,
        tokens: Sequence[TokenInfo],
        reason: FinishReason | None = None,
        stop_token: int | None = None,
        cached_tokens: int = 0,
        prompt_logprobs: Sequence[TokenInfo | None] | None = None,
    ) -> Chunk:
        """The next tokens, and with `reason` set the end; `stop_token` ended the choice if it is not None.

        A stop string may end the choice here, as may the one call that it may make: then the chunk is final though
        `reason` was not given, and what comes after is dropped.
        """
        text: list[str] = []
        taken = 0
        stop: str | None = None
        for info in tokens:
            taken += 1
            ends = reason == "stop" and taken == len(tokens) and info.token_id in self._ends
            piece = "" if ends and not self._show_end else self._detokenizer.push(info.token_id)
            if self._completion_tokens + taken < self._min_tokens:
                text.append(piece)
                continue
            safe, stop = self._stops.push(piece)
            text.append(safe)
            if stop is not None:
                break
        if stop is None and reason is not None:
            safe, stop = self._stops.push(self._detokenizer.flush())
            text += [safe, self._stops.flush()]
        self._completion_tokens += taken
        if stop is not None:
            reason = "stop"
        said = self._said("".join(text), ended=reason is not None)
        if self._parser is not None and (
            self._parser.done or (self._parser.made_calls and reason == "stop" and stop is None)
        ):
            reason = "tool_calls"
        return Chunk(
            request_id=self._request_id,
            index=self._index,
            text=said.text,
            reasoning=said.reasoning,
            tool_calls=said.calls,
            token_ids=tuple(info.token_id for info in tokens[:taken]),
            logprobs=tuple(token_logprob(self._tokenizer, info) for info in tokens[:taken] if info.logprob is not None),
            prompt_logprobs=None if prompt_logprobs is None else tuple(map(self._prompt_logprob, prompt_logprobs)),
            finish_reason=reason,
            stop_reason=stop if stop is not None else stop_token,
            usage=self._usage(cached_tokens) if reason is not None else None,
        )

    def end(self, reason: FinishReason, error: Exception | None = None, cached_tokens: int = 0) -> Chunk:
        """The final chunk of a choice that ends between tokens: cancelled or failed. What was held back comes out."""
        said = self._said(self._stops.push(self._detokenizer.flush())[0] + self._stops.flush(), ended=True)
        return Chunk(
            request_id=self._request_id,
            index=self._index,
            text=said.text,
            reasoning=said.reasoning,
            tool_calls=said.calls,
            finish_reason=reason,
            usage=self._usage(cached_tokens),
            error=error,
        )

    def _said(self, text: str, ended: bool) -> Piece:
        lead, self._lead = self._lead, ""
        if self._parser is None:
            return Piece(lead + text)
        piece = self._parser.push(text, ended)
        return Piece(lead + piece.text, piece.reasoning, piece.calls)

    def _prompt_logprob(self, info: TokenInfo | None) -> TokenLogprob | None:
        return None if info is None else token_logprob(self._tokenizer, info)

    def _usage(self, cached_tokens: int) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens, cached_tokens)


def token_logprob(tokenizer: Tokenizer, info: TokenInfo) -> TokenLogprob:
    """What is reported of a token, with texts. `info` must carry a log probability."""
    if info.logprob is None or info.rank is None:
        raise ValueError(f"token {info.token_id} carries no log probability")
    top = tuple((id_, tokenizer.token_text(id_), logprob) for id_, logprob in info.top)
    return TokenLogprob(info.token_id, tokenizer.token_text(info.token_id), info.logprob, info.rank, top)
