"""What rendering a chat template costs, and when that is too much.

Owns the budget of a rendering, the size of values, and the meters that a parsed template gets. Must not know: how
templates are found, what they are given, which names they may reach (`sandbox`). A budget is of steps: turns of loops,
calls and filters, and their like in characters worked on, so that it bounds the time. Nothing may be made that takes
more than MAX_CHARS characters when written out, so that whatever walks over a value (printing, comparing, sorting)
finds an end: a list of two lists of two lists ... is small in memory, and endless.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from tramontane.records import dataclass

MAX_STEPS = 1_000_000  # of one rendering; a long conversation takes some ten thousands
MAX_CHARS = 16 << 20  # of all that one rendering puts out, and of any value made on the way
MAX_BITS = 4096  # of a number; division takes the square of them

_ITEM = 64  # characters that an item of a list counts as: its memory
# How many characters are worked on in the time of one step, as powers of two.
_COPIED, _READ, _FILTERED = 12, 8, 6
_WALKED = 3  # the same for items of lists within lists
_CALL = 4  # steps
_NODES = 16  # of a template, evaluated in the time of one step


@dataclass
class _Budget:
    steps: int = MAX_STEPS
    chars: int = MAX_CHARS

    def spend(self, chars: int = 0) -> None:
        """Pay for one step that puts out `chars` characters."""
        self.chars -= chars
        check_size(MAX_CHARS - self.chars)
        self.work(1, 0)

    def work(self, size: int, speed: int) -> None:
        """Pay for work on `size` characters."""
        self.steps -= size >> speed
        if self.steps < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")


_budget: ContextVar[_Budget] = ContextVar("budget")


def start_budget() -> None:
    """Give the rendering about to start, in this thread or task, a fresh budget."""
    _budget.set(_Budget())


def spend(chars: int = 0) -> None:
    """Pay for one step that puts out `chars` characters. SecurityError where that is too much, as everywhere here."""
    _budget.get().spend(chars)


def check_size(size: int) -> None:
    """Refuse a text of more than MAX_CHARS characters, or as large a list."""
    if size > MAX_CHARS:
        raise SecurityError(f"the template builds a text of more than {MAX_CHARS} characters")


# ---- the size of values -----------------------------------------------------------------------------------------


def _shallow(value: Any) -> int:
    """What work on a value goes over, not counting what lies within its items."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return len(value) * _ITEM if isinstance(value, (list, tuple, dict)) else 0


_VIEWS: tuple[type[Any], ...] = (type({}.keys()), type({}.values()), type({}.items()), MappingProxyType)
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, *_VIEWS)


def size_of(value: Any) -> int:
    """Characters that a value takes when written out, however often it holds the same thing. Refuses too many."""
    total, visits, waiting = 0, 0, [value]
    while waiting:
        visits += 1
        item = waiting.pop()
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int):
            if item.bit_length() > MAX_BITS:
                raise SecurityError(f"the template computes with a number of more than {MAX_BITS} bits")
        elif isinstance(item, _CONTAINERS):
            total += len(item) * _ITEM
            check_size(total)
            waiting.extend(item)
            if isinstance(item, (dict, MappingProxyType)):
                waiting.extend(item.values())
    check_size(total)
    _budget.get().work(visits, _WALKED)
    return total


def computed(value: Any) -> Any:
    """What an operator made, paid for."""
    _budget.get().work(1, 0)
    return made(value)


def made(value: Any) -> Any:
    """A value that was just made, paid for."""
    size = size_of(value)
    if isinstance(value, str):
        _budget.get().work(size, _COPIED)
    return value


def _read(value: Any) -> Any:
    """A value that is about to be compared or cut, paid for."""
    _budget.get().work(_shallow(value), _READ)
    return value


def _joined(values: list[Any]) -> str:
    """What `~` makes."""
    texts = [str(value) for value in values]
    size = sum(map(len, texts))
    check_size(size)
    _budget.get().work(size, _COPIED)
    return "".join(texts)


def _watched(items: Iterator[Any]) -> Iterator[Any]:
    """A generator's items, their sizes summed as they come."""
    total = 0
    for item in items:
        total += _shallow(item) + _ITEM
        check_size(total)
        yield item


# ---- calls, filters and operators -------------------------------------------------------------------------------

# Methods of texts, and filters, whose result or time can be the product of what they are given.
_AMPLIFYING = {"replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "tojson"}
_AMPLIFYING |= {"indent", "batch", "slice", "rfind", "rindex", "rsplit", "rpartition"}
_INSTANT = {"length", "count", "first", "last"}
_WORDWISE = {"title", "wordcount"}  # make a text of each word: memory, and time


def _check_amplified(args: Iterable[Any]) -> None:
    """Bound the result by the product of the two largest arguments, where a number counts as its value."""
    sizes = sorted((abs(arg) if isinstance(arg, int) else size_of(arg) for arg in args), reverse=True)
    largest, second = [*sizes, 0, 0][:2]
    product = largest * max(second, 1) // 16  # replacing each 16th character is already more than any template does
    check_size(product)
    _budget.get().work(product, _READ)


def check_widths(text: Any) -> None:
    """Formatting pads to the widths its pattern names; one that comes from the values cannot be bounded."""
    if not isinstance(text, str):
        return
    if re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", text):
        raise SecurityError("the template formats with a width that is itself a value")
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", text)]
    check_size(len(text) + sum(widths))


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation of too large a result, before it is made."""
    if operator == "%":
        check_widths(left)
    elif operator == "+":
        check_size(_shallow(left) + _shallow(right))
    elif isinstance(left, int) and isinstance(right, int):
        size_of((left, right))
        if operator == "**" and left.bit_length() * max(right, 1) > MAX_BITS:
            raise SecurityError(f"the template computes a number of more than {MAX_BITS} bits")
    elif operator == "*" and isinstance(right, int):
        check_size(max(size_of(left), 1) * right)
    elif operator == "*" and isinstance(left, int):
        check_size(max(size_of(right), 1) * left)


def bounded_call(call: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`call(args)`, which is to call `function` with them, paid for."""
    budget = _budget.get()
    budget.work(_CALL, 0)
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    args = tuple(_watched(arg) if isinstance(arg, Iterator) else arg for arg in args)
    if isinstance(owner, str):
        budget.work(len(owner) + sum(map(_shallow, args)), _READ)
        if name in _AMPLIFYING:
            _check_amplified([owner, *args, *kwargs.values()])
    return made(call(args))


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, paid for."""
    marks = getattr(function, "__dict__", {})  # jinja2's, of what it hands to the filter
    passed = 1 if "jinja_pass_arg" in marks else 0  # a context or the environment, before the value

    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.work(_CALL, 0)
        given = [_watched(arg) if isinstance(arg, Iterator) else arg for arg in args[passed:]]
        if name not in _INSTANT:
            budget.work(sum(map(_shallow, given)), _FILTERED)
        if name in _AMPLIFYING:
            _check_amplified([*given, *kwargs.values()])
        if name in _WORDWISE:
            check_size(16 * _shallow(given[0]))
            budget.work(_shallow(given[0]), _FILTERED - 2)
        if name == "format" and given:
            check_widths(given[0])
        return made(function(*args[:passed], *given, **kwargs))

    bounded.__dict__.update(marks)
    return bounded


def bounded_test(function: Any) -> Callable[..., Any]:
    """The test (`is NAME`), paid for where it goes over large values."""
    marks = getattr(function, "__dict__", {})

    def bounded(*args: Any, **kwargs: Any) -> Any:
        _budget.get().work(sum(map(_shallow, args)), _READ)
        return function(*args, **kwargs)

    bounded.__dict__.update(marks)
    return bounded


# ---- meters in the template -------------------------------------------------------------------------------------


class _Turns:
    """An iterable that pays for each turn of a loop, and still knows its length for `loop.length`."""

    def __init__(self, items: Any, chars: int, steps: int) -> None:
        self._items, self._chars, self._steps = items, chars, steps

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _entered(self._chars, self._steps)
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _entered(chars: int, steps: int) -> None:
    """Pay for going once through a body of so much literal text and so many steps."""
    budget = _budget.get()
    budget.spend(chars)
    budget.work(steps, 0)


# No template can name a filter with a space in it.
METERS: Mapping[str, Callable[..., Any]] = {
    " turns": _Turns,
    " entered": _entered,
    " made": made,
    " read": _read,
    " joined": _joined,
}


def _meter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [*args], [], None, None, lineno=node.lineno)


class Metered(NodeTransformer):
    """Puts meters into a parsed template, at all that takes time or memory and is no call, filter or operator."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """`for x in y` becomes `for x in y | (turns of y)`, which pay for what is in its body."""
        costs = _costs(node)
        self.generic_visit(node)
        node.iter = _meter(node.iter, " turns", *costs)
        return node

    def _visit_callable(self, node: Any) -> nodes.Node:
        """What may be gone through again without a loop pays at its beginning."""
        chars, steps = _costs(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_meter(chars, " entered", steps), lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _visit_callable

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b`."""
        self.generic_visit(node)
        return _meter(nodes.List(node.nodes, lineno=node.lineno), " joined")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """`[a, b]`."""
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _meter(node, " made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """`(a, b)`, where it is a value and not what is assigned to."""
        self.generic_visit(node)
        constant = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant else _meter(node, " made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """`{a: b}`."""
        self.generic_visit(node)
        return _meter(node, " made")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """`a < b in c`."""
        self.generic_visit(node)
        node.expr = _paid(node.expr)
        for operand in node.ops:
            operand.expr = _paid(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """`a[1:]`."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _paid(node.node)
        return node


def _costs(node: nodes.Node) -> tuple[nodes.Const, nodes.Const]:
    """Characters of literal text within, and steps for what is evaluated and has no meter of its own."""
    chars = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
    count = sum(1 for _ in node.find_all(nodes.Node))
    return nodes.Const(chars), nodes.Const(count // _NODES)


def _paid(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _meter(node, " read")
