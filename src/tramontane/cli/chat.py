"""The conversation of `tramontane run` on a terminal.

Owns the loop, its commands and the history. Must not know: the engine, how text is generated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tramontane.cli.terminal import DIM, AnswerWriter, complain, one_line, style
from tramontane.errors import ContextLengthExceeded, TramontaneError
from tramontane.records import dataclass

if TYPE_CHECKING:
    from tramontane.llm import LLM
    from tramontane.types import FinishReason, SamplingParams, ToolCall, ToolCallDelta, Usage

HELP = """\
/help            this text
/system [TEXT]   set the system message and start anew; without TEXT, show it
/reset           forget the conversation
/stats           tokens, speed and cache
/save FILE       write the conversation as JSON; an existing file is left alone
/exit            leave (or Ctrl-D)
Ctrl-C stops an answer."""


@dataclass
class _Answer:
    """What one answer came to, and how long it took. Seconds count from the question."""

    text: str = ""
    tokens: int = 0
    reason: FinishReason | None = None
    usage: Usage | None = None
    first_seconds: float = 0.0
    """Until the first tokens came, of which there were `first_tokens`."""
    first_tokens: int = 0
    seconds: float = 0.0
    calls: tuple[ToolCall, ...] = ()

    def message(self) -> dict[str, Any]:
        """The answer as a turn of the conversation."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls
        ]
        return {"role": "assistant", "content": self.text, **({"tool_calls": calls} if calls else {})}


class Chat:
    """A conversation: messages so far, and what to do with a line that was typed.

    A model without a chat template completes each line on its own: then nothing is sent but the line.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None = None,
        stream: bool = True,
        fields: Mapping[str, Any] | None = None,
        reasoning: bool = True,
    ) -> None:
        """`fields`: those of a chat request, such as its tools; `reasoning`: whether to show it."""
        self.llm = llm
        self.params = params
        self.stream = stream
        self.system = system
        self.fields = fields or {}
        self.reasoning = reasoning
        self.messages: list[dict[str, Any]] = []
        self.templated = llm.capabilities().chat
        self._last = _Answer()
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
            _note("Line editing is not available here.")
        caps = self.llm.capabilities()
        _note(f"{one_line(caps.model)}, context of {caps.context_length} tokens. /help lists the commands.")
        if not self.templated:
            _note("This model has no chat template: it completes each line on its own.")
        while True:
            try:
                print()
                line = input("> ").strip()  # a prompt without colours: line editing counts its characters
                line.encode("utf-8")  # some systems smuggle other bytes in, to fail later
                if line in ("/exit", "/quit"):
                    return
                self.handle(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                _note("(/exit or Ctrl-D leaves)")
            except UnicodeError:
                complain("error", "that is not UTF-8 text; nothing was sent.")

    def handle(self, line: str) -> None:
        """One typed line: a command, or something to answer. Errors are shown; the conversation goes on."""
        name, _, rest = line.partition(" ")
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            elif name.startswith("/"):
                print(f"There is no {name}. /help lists the commands.")
            elif line:
                self._turn(line)
        except ContextLengthExceeded as error:
            if self.messages and self.templated:
                print(
                    f"The conversation no longer fits: {error.prompt_tokens} tokens in a context of "
                    f"{error.context_length}. Your last message was not sent. /reset starts anew; /save FILE keeps "
                    "what there is."
                )
            else:
                complain("error", str(error))
        except TramontaneError as error:
            complain("error", str(error))

    def _turn(self, line: str) -> None:
        turns: list[dict[str, Any]] = [{"role": "user", "content": line}]
        before = len(self.messages)
        while True:
            answer = self._ask([*self._history(), *turns] if self.templated else line)
            self._last = answer
            self._tell_end(answer)
            if answer.text or answer.calls:
                self.messages += [*turns, answer.message()]
            if not answer.calls or answer.reason != "tool_calls":
                return
            try:
                results = [_result_of(call) for call in answer.calls]
            except (KeyboardInterrupt, EOFError):
                del self.messages[before:]  # a call without its result cannot be gone on from
                raise
            turns = [
                {"role": "tool", "tool_call_id": call.id, "content": result}
                for call, result in zip(answer.calls, results, strict=True)
            ]

    def _tell_end(self, answer: _Answer) -> None:
        context_length = self.llm.capabilities().context_length
        if answer.reason == "cancelled":
            _note("(stopped)")
        elif answer.reason == "length":
            full = answer.usage is not None and answer.usage.total_tokens >= context_length
            limit = f"the context of {context_length} tokens is full; /reset starts anew"
            _note(f"({limit if full else f'cut at {answer.tokens} tokens, as asked for'})")

    def _ask(self, asked: str | list[dict[str, Any]]) -> _Answer:
        """Print the answer as it comes, or when it is whole. Ctrl-C ends it with what there is."""
        from tramontane.gather import joined_calls
        from tramontane.types import Choice

        answer, began = _Answer(), time.perf_counter()
        chunks = self.llm.stream(asked, self.params, **self.fields)
        deltas: list[ToolCallDelta] = []
        reasoning = ""
        with AnswerWriter(self.reasoning) as out:
            try:
                for chunk in chunks:
                    answer.text += chunk.text
                    reasoning += chunk.reasoning
                    deltas += chunk.tool_calls
                    answer.tokens += len(chunk.token_ids)
                    answer.reason, answer.usage = chunk.finish_reason, chunk.usage
                    answer.seconds = time.perf_counter() - began
                    if not answer.first_tokens:
                        answer.first_tokens, answer.first_seconds = answer.tokens, answer.seconds
                    if self.stream:
                        out.show(chunk)
            except KeyboardInterrupt:
                answer.reason = "cancelled"
            finally:
                chunks.close()
            answer.calls = joined_calls(deltas)
            if not self.stream:
                out.show(Choice(0, answer.text, (), "stop", reasoning=reasoning, tool_calls=answer.calls))
        return answer

    def _history(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _help(self, _: str) -> None:
        print(HELP)

    def _set_system(self, text: str) -> None:
        if not self.templated:
            print("This model has no chat template, so it takes no system message.")
        elif not text:
            print(self.system or "There is no system message.")
        else:
            self.system, self.messages = text, []
            _note("System message set; the conversation starts anew.")

    def _reset(self, _: str) -> None:
        self.messages = []
        _note("Forgotten.")

    def _stats(self, _: str) -> None:
        stats, last = self.llm.stats(), self._last
        if last.tokens:
            rate = (last.tokens - last.first_tokens) / max(last.seconds - last.first_seconds, 1e-9)
            then = f", then {rate:.1f} tokens/s" if last.tokens > last.first_tokens else ""
            print(f"last answer  {last.tokens} tokens, the first after {last.first_seconds:.2f} s{then}")
        cached = f"{stats.cached_tokens} of them from the cache"
        print(f"tokens       {stats.prompt_tokens} of prompts ({cached}), {stats.generated_tokens} generated")
        print(f"cache        {stats.blocks_used} of {stats.blocks_total} blocks in use, {stats.blocks_cached} kept")
        sizes = (stats.weight_bytes, stats.cache_bytes, stats.workspace_bytes)
        weights, cache, workspace = (f"{size / 1e6:.0f} MB" for size in sizes)
        print(f"memory       {weights} weights, {cache} cache, {workspace} workspace")

    def _save(self, name: str) -> None:
        if not name:
            print("Name a file: /save FILE")
            return
        content = json.dumps({"messages": self._history()}, ensure_ascii=False, indent=1)
        try:
            _write_new(Path(name).expanduser(), content + "\n")
        except FileExistsError:
            print(f"{name} exists already and is left as it is. Name another file.")
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ without a home
            complain("error", f"cannot save to {name}: {getattr(error, 'strerror', None) or error}.")
        else:
            _note(f"Saved {len(self.messages)} messages to {name}.")


def _result_of(call: ToolCall) -> str:
    """What the user says that a call came to."""
    return input(f"result of {one_line(call.name)}> ").strip()


def _note(text: str) -> None:
    print(style(text, DIM))


def _write_new(path: Path, content: str) -> None:
    """Write a file that does not exist yet, or nothing: half a file on a full disk is taken away again."""
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:
            path.unlink()
            raise
