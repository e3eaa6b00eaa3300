"""The conversation of `tramontane run` on a terminal.

Owns the loop, its commands and the history. Must not know: the engine, how text is generated.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tramontane.cli.terminal import BOLD, DIM, AnswerWriter, style
from tramontane.errors import ContextLengthExceeded, TramontaneError

if TYPE_CHECKING:
    from tramontane.llm import LLM
    from tramontane.types import SamplingParams

HELP = """\
/help            this text
/system [TEXT]   set the system message and start anew; without TEXT, show it
/reset           forget the conversation
/stats           tokens, speed and cache
/save FILE       write the conversation as JSON
/exit            leave (or Ctrl-D)
Ctrl-C stops an answer."""


class Chat:
    """A conversation: messages so far, and what to do with a line that was typed.

    A model without a chat template continues the text instead: each line is completed on its own.
    """

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None = None, stream: bool = True) -> None:
        self.llm = llm
        self.params = params
        self.stream = stream
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.templated = llm.capabilities().chat
        self._last = (0, 0.0)
        self._commands = {
            "/help": self._help,
            "/system": self._set_system,
            "/reset": self._reset,
            "/stats": self._stats,
            "/save": self._save,
        }

    def loop(self) -> None:
        """Read and answer until the end of input."""
        try:
            import readline  # noqa: F401  (importing it gives input() editing and history)
        except ImportError:
            print(style("Line editing is not available here.", DIM))
        caps = self.llm.capabilities()
        print(style(f"{caps.model}, context {caps.context_length}. /help lists the commands.", DIM))
        if not self.templated:
            print(style("This model has no chat template: it completes each line.", DIM))
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            if line in ("/exit", "/quit"):
                return
            self.handle(line)

    def handle(self, line: str) -> None:
        """One typed line: a command, or something to answer. Errors are shown; the conversation goes on."""
        if not line:
            return
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                command = self._commands.get(name)
                if command is None:
                    print(f"There is no {name}. /help lists the commands.")
                else:
                    command(rest.strip())
            else:
                self._turn(line)
        except ContextLengthExceeded as error:
            print(
                f"The conversation no longer fits: {error.prompt_tokens} tokens in a context of {error.context_length}. "
                "Your last message was not sent. /reset starts anew; /save FILE keeps what is there."
            )
        except (TramontaneError, OSError) as error:
            print(f"{style('error:', BOLD)} {error}")

    def _turn(self, line: str) -> None:
        history = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*history, *self.messages, {"role": "user", "content": line}] if self.templated else line
        text, tokens, reason, began = "", 0, None, time.perf_counter()
        chunks = self.llm.stream(asked, self.params)
        try:
            with AnswerWriter() as out:
                try:
                    for chunk in chunks:
                        text += chunk.text
                        tokens += len(chunk.token_ids)
                        reason = chunk.finish_reason or reason
                        if self.stream:
                            out.write(chunk.text)
                except KeyboardInterrupt:
                    reason = "cancelled"
                if not self.stream:
                    out.write(text)
        finally:
            chunks.close()
        self._last = (tokens, time.perf_counter() - began)
        if reason == "cancelled":
            print(style("(stopped)", DIM))
        elif reason == "length" and self.params.max_tokens is None:
            print(style("(the context is full; /reset starts anew)", DIM))
        elif reason == "length":
            print(style(f"(cut at {self.params.max_tokens} tokens)", DIM))
        if self.templated:
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]

    def _help(self, _: str) -> None:
        print(HELP)

    def _set_system(self, text: str) -> None:
        if not text:
            print(self.system or "There is no system message.")
            return
        self.system, self.messages = text, []
        print(style("System message set; the conversation starts anew.", DIM))

    def _reset(self, _: str) -> None:
        self.messages = []
        print(style("Forgotten.", DIM))

    def _stats(self, _: str) -> None:
        stats = self.llm.stats()
        tokens, seconds = self._last
        if tokens:
            print(f"last answer   {tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s")
        print(f"tokens        {stats.prompt_tokens} of prompts ({stats.cached_tokens} from the cache), "
              f"{stats.generated_tokens} generated")  # fmt: skip
        print(f"cache         {stats.blocks_used} of {stats.blocks_total} blocks in use, {stats.blocks_cached} kept")
        print(f"memory        {stats.weight_bytes / 1e6:.0f} MB weights, {stats.cache_bytes / 1e6:.0f} MB cache at most")

    def _save(self, name: str) -> None:
        if not name:
            print("Name a file: /save FILE")
            return
        history = [{"role": "system", "content": self.system}] if self.system else []
        content = json.dumps({"messages": [*history, *self.messages]}, ensure_ascii=False, indent=1)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(content + "\n")
        except FileExistsError:
            print(f"{name} exists already and is left as it is. Name another file.")
            return
        print(style(f"Saved {len(self.messages)} messages to {name}.", DIM))
