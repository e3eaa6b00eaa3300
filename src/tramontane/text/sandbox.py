"""The Jinja environment chat templates run in: what transformers offers them, within bounds.

Owns the sandbox and its budgets. Must not know: messages, tokens, models. Templates come out of downloaded files, so
they see plain data, reach no attribute that leads anywhere, and spend a budget of steps and of characters: an endless
loop, a doubling text or a padding to a billion columns is refused before it is built.
Sources: the Jinja documentation (sandbox, extensions); transformers' documentation on chat templates, for the
environment that template authors rely on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # loop turns, calls and filters of one rendering; a long conversation takes some thousands
MAX_CHARS = 16 << 20  # of all that one rendering puts out, and of any text or list made on the way


@dataclass
class _Budget:
    steps: int = MAX_STEPS
    chars: int = MAX_CHARS

    def spend(self, chars: int = 0) -> None:
        """Pay for one step that puts out `chars` characters."""
        self.steps -= 1
        self.chars -= chars
        if self.steps < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")
        check_size(MAX_CHARS - self.chars)


_budget: ContextVar[_Budget] = ContextVar("budget")


def start_budget() -> None:
    """Give the rendering about to start, in this thread or task, a fresh budget."""
    _budget.set(_Budget())


def check_size(size: int) -> None:
    """Refuse a text of more than MAX_CHARS characters, or as large a list."""
    if size > MAX_CHARS:
        raise SecurityError(f"the template builds a text of more than {MAX_CHARS} characters")


def _size(value: Any) -> int:
    """Characters of a text; for a list, those of its texts and one for each other item."""
    if isinstance(value, (list, tuple)):
        return sum(len(item) + 1 if isinstance(item, str) else 1 for item in value)
    return len(value) if isinstance(value, (str, dict)) else 0


def _watched(items: Iterator[Any]) -> Iterator[Any]:
    """A generator's items, their sizes summed as they come."""
    total = 0
    for item in items:
        total += _size(item) + 1
        check_size(total)
        yield item


# Methods of texts, and filters, whose result can be larger than the sum of what they are given.
_AMPLIFYING = {"replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs"}
_AMPLIFYING |= {"indent", "batch", "slice", "wordwrap"}


def _check_amplified(args: Iterable[Any]) -> None:
    """Bound the result by the product of the two largest arguments, where a number counts as its value."""
    sizes = sorted((abs(arg) if isinstance(arg, int) else _size(arg) for arg in args), reverse=True)
    largest, second = [*sizes, 0, 0][:2]
    check_size(largest * max(second, 1) // 16)  # replacing each 16th character is already more than any template does


def _check_widths(text: Any) -> None:
    """Formatting pads to the widths its pattern names; one that comes from the values cannot be bounded."""
    if not isinstance(text, str):
        return
    if re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", text):
        raise SecurityError("the template formats with a width that is itself a value")
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", text)]
    check_size(len(text) + sum(widths))


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        _check_widths(left)
    elif operator == "+":
        check_size(_size(left) + _size(right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        check_size(bits)
    elif operator == "*":
        check_size(max(_size(left), 1) * right if isinstance(right, int) else max(_size(right), 1) * left)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    marks = getattr(function, "__dict__", {})  # jinja2's, of what it hands to the filter
    passed = 1 if "jinja_pass_arg" in marks else 0  # a context or the environment, before the value

    def bounded(*args: Any, **kwargs: Any) -> Any:
        _budget.get().spend()
        given = [_watched(arg) if isinstance(arg, Iterator) else arg for arg in args[passed:]]
        if name in _AMPLIFYING:
            _check_amplified([*given, *kwargs.values()])
        if name == "format" and given:
            _check_widths(given[0])
        result = function(*args[:passed], *given, **kwargs)
        check_size(_size(result))
        return result

    bounded.__dict__.update(marks)
    return bounded


class _Turns:
    """An iterable that pays for each turn of a loop, and still knows its length for `loop.length`."""

    def __init__(self, items: Any, chars: int) -> None:
        self._items, self._chars = items, chars

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _budget.get().spend(self._chars)
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Metered(NodeTransformer):
    """Puts meters into a parsed template: on each loop, with the literal text of its body, and on each `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """`for x in y` becomes `for x in y | (turns of y)`."""
        chars = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _TURNS, [nodes.Const(chars)], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` becomes `[a, b] | join`."""
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "join", [], [], None, None, lineno=node.lineno)


_TURNS = " turns"  # no template can name a filter with a space in it


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Hand the tag's body on."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes HTML, which a prompt is not."""
    check_size(1024 * (indent or 0))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict` and `dict.fromkeys` for templates, without the class behind them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Jinja's namespace; names that begin with an underscore, which Python itself may read, are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works as in Jinja's
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the template stores {str(name)!r:.40} in a namespace")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _pay_output(value: Any) -> Any:
    _budget.get().spend(len(value) if isinstance(value, str) else 0)
    return value


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with transformers' additions and with budgets.

    Call `start_budget` before each rendering; SecurityError is raised when it is spent.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_pay_output,
            optimized=False,  # constants folded at parse time would escape the budget
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters[_TURNS] = _Turns
        del self.globals["lipsum"]
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for operators."""
        _check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's hook for `str.format`, which it replaces by one within the sandbox."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Jinja's hook for calls."""
        _budget.get().spend()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in _AMPLIFYING:
            args = tuple(_watched(arg) if isinstance(arg, Iterator) else arg for arg in args)
            _check_amplified([owner, *args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        check_size(_size(result))
        return result
