"""The Jinja environment chat templates run in: what transformers offers them, within bounds.

Owns what templates may reach. Must not know: messages, tokens, models, what steps cost (`metering`). Templates come out
of downloaded files, so they see plain data, reach no attribute that leads anywhere, and spend a budget: an endless
loop, a doubling text or a padding to a billion columns is refused before it is built.
Sources: the Jinja documentation (sandbox, extensions); transformers' documentation on chat templates, for the
environment that template authors rely on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tramontane.text import metering
from tramontane.text.metering import MAX_CHARS as MAX_CHARS
from tramontane.text.metering import check_size as check_size
from tramontane.text.metering import start_budget as start_budget

# Filters that lay out pages: no prompt needs them, and some take the square of their text in time.
_UNFIT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Bytes have codecs behind them that are as slow; texts are all that a prompt is made of.
_BYTES = frozenset(("encode", "decode", "to_bytes", "from_bytes"))
_MAX_INDENT = 64
_MAX_FORMAT = 1000  # characters of a date's
_MAX_SAID = 2000  # of an error that a template raises


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
    if indent is not None and (not isinstance(indent, int) or indent > _MAX_INDENT):
        raise SecurityError(f"the template indents JSON by {indent!r:.40}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces: list[str] = []
    size = 0
    for piece in encoder.iterencode(value):  # what is nested deep and indented is larger than it looks
        size += len(piece)
        check_size(size)
        pieces.append(piece)
    return "".join(pieces)


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

    def __repr__(self) -> str:  # not what it holds, which may be itself
        return "<Namespace>"


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the template stores {str(name)!r:.40} in a namespace")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:_MAX_SAID])


def _strftime_now(format: str) -> str:
    check_size(len(format) * (MAX_CHARS // _MAX_FORMAT))
    return datetime.now().strftime(format)


def _pay_output(value: Any) -> Any:
    metering.spend(len(value) if isinstance(value, str) else 0)
    return value


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with transformers' additions and with budgets.

    Call `start_budget` before each rendering; SecurityError is raised when it is spent.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_pay_output,
            optimized=False,  # constants folded at parse time would escape the budget
        )
        self.filters["tojson"] = _tojson
        for name in _UNFIT:
            del self.filters[name]
        self.filters = {name: metering.bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters.update(metering.METERS)
        self.tests = {name: metering.bounded_test(function) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = metering.Metered().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's hook for attributes."""
        return attr not in _BYTES and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for operators."""
        metering.check_operator(operator, left, right)
        return metering.computed(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's hook for `str.format`, which it replaces by one within the sandbox."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            metering.check_widths(value.__self__)
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Jinja's hook for calls."""
        call = super().call
        return metering.bounded_call(lambda given: call(__context, __obj, *given, **kwargs), __obj, args, kwargs)
