"""Token ids to text, one at a time: only text that no later token can change is given out.

Owns the state of one stream. Must not know: stop strings, requests, how tokens are chosen. The pieces given out,
joined, equal `tokenizer.decode` of all the ids, invalid UTF-8 included.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tramontane.text.tokenizer import Tokenizer

# A character has at most four bytes, so an unfinished one lies within the last few tokens of a prompt.
_PROMPT_TAIL = 16


class Detokenizer:
    """One stream of tokens. Constant time a token, amortised.

    With `prompt_ids` the text continues the prompt's: a leading space that starts a text, and would be dropped
    there, is kept; a character begun by the prompt's last tokens is completed and given out whole. `shown`: special
    tokens that are not skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - shown if skip_special_tokens else frozenset()
        self._strip_left = tokenizer.rules.strip_left
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()  # consecutive fallback bytes: good or bad as a whole, once the run has ended
        if prompt_ids:
            self._start_after(prompt_ids)

    def continue_text(self) -> None:
        """Read the next token as in mid-text, whatever came before it: nothing is dropped at its beginning."""
        self._strip_left, self._first = 0, False

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain (often the token's own, sometimes none)."""
        if token_id in self._skipped:
            return ""
        piece, is_byte = self._tokenizer.piece(token_id, self._first)
        self._first = self._first and not self._tokenizer.knows(token_id)
        if self._tokenizer.rules.byte_level:
            return self._utf8.decode(piece)
        if is_byte:
            self._run += piece
            return ""
        return self._strip((self._end_run() + piece.decode("utf-8")) if piece else "")

    def flush(self) -> str:
        """The rest, at the end of the stream: U+FFFD stands for bytes that make no character. Idempotent."""
        if self._tokenizer.rules.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        # One bad byte spoils the run: each of its bytes becomes U+FFFD. That is the reference's rule
        # (tokenizers' ByteFallback), and why bytes wait for the token that ends their run.
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != " ":
                self._strip_left = 0
                break
            text, self._strip_left = text[1:], self._strip_left - 1
        return text

    def _start_after(self, prompt_ids: Sequence[int]) -> None:
        if any(id_ not in self._skipped and self._tokenizer.piece(id_)[0] for id_ in prompt_ids):
            self.continue_text()
        for id_ in prompt_ids[-_PROMPT_TAIL:]:
            self.push(id_)
        if self._run:
            # Whole characters of the prompt's last run are already the reader's; an unfinished one is ours.
            unfinished = codecs.getincrementaldecoder("utf-8")("replace")
            unfinished.decode(bytes(self._run))
            self._run = bytearray(unfinished.getstate()[0])
