"""Write into docs/backends.md which backend takes what, from what the backends declare.

python docs/make_backends.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tramontane.backends.base import REQUEST_FIELDS
from tramontane.backends.declared import Declared
from tramontane.backends.registry import BUILT_IN, declared
from tramontane.inputs import SAMPLING_FIELDS

PAGE = Path(__file__).parent / "backends.md"
BEGIN, END = "<!-- what each declares: made by make_backends.py -->", "<!-- end of what make_backends.py made -->"
ABILITIES = ("generate", "chat", "tokenize", "embed", "rerank", "stats", "listen", "adapt")


def table(backends: list[Declared], title: str, names: Iterable[str], of: Callable[[Declared], frozenset[str]]) -> str:
    """A row a name, a column a backend."""
    lines = [
        f"| {title} | {' | '.join(one.name for one in backends)} |",
        f"|---|{'---|' * len(backends)}",
        *(f"| `{name}` | {' | '.join('yes' if name in of(one) else '' for one in backends)} |" for name in names),
    ]
    return "\n".join(" ".join(line.split()) for line in lines)


def matrix() -> str:
    """The Markdown between the marks."""
    backends = [declared(name) for name in BUILT_IN]
    options = sorted({name for one in backends for name in one.options})
    return "\n\n".join(
        [
            table(backends, "ability", ABILITIES, lambda one: one.abilities),
            table(backends, "sampling field", sorted(SAMPLING_FIELDS), lambda one: one.sampling_fields),
            table(backends, "field of a request", sorted(REQUEST_FIELDS), lambda one: one.request_fields),
            table(backends, "option", options, lambda one: one.options),
        ]
    )


def made(text: str) -> str:
    """The page with the matrix as of now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{matrix()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
