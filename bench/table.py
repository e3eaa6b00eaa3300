"""The table of docs/benchmarks.md from reports of bench/compare.py: `python -m bench.table REPORT.json ...`.

A report may also be the log of a run: its last line counts. Ratios hold within a report, so each has a table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

OURS = "tramontane"
LABELS = {
    "prefill": "prefill {prompt}",
    "decode": "decode, 1 sequence",
    "prefill4096": "prefill {prompt}",
    "decode8000": "decode behind {prompt}",
    "memory": "peak memory, 1 sequence, MB",
    "memory_batch": "peak memory, batches, MB",
}


def table(report: Mapping[str, Any]) -> str:
    """What was measured on what, a row a model, threads and task, and why others are missing."""
    cells = {(c["model"], c["threads"], c["task"], c["engine"]): c for c in report["cells"]}
    peers = [name for name in report["versions"] if name != OURS and any(key[3] == name for key in cells)]
    rows = list(dict.fromkeys(key[:3] for key in cells))
    head = ["model", "threads", "task", OURS, "share of the roof", *peers]
    lines = [*_preamble(report), "", _row(head), _row(["---"] * len(head))]
    for model, threads, task in rows:
        ours, *theirs = (cells.get((model, threads, task, name)) for name in (OURS, *peers))
        share = f"{ours['roof_share']:.0%}" if ours and "roof_share" in ours else ""
        label = _label(task, report["tasks"])
        lines.append(_row([model, str(threads), label, _figure(ours), share, *map(_figure, theirs)]))
    failed = {(c["engine"], c["model"], c["failed"]) for c in report["cells"] if "failed" in c}
    lines += ["", *(f"- {engine} on {model} failed: {reason}" for engine, model, reason in sorted(failed))]
    lines += [f"- {name} was left out: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _preamble(report: Mapping[str, Any]) -> Iterable[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    clock = "of processor time" if report["cpu_time"] else "of time"
    yield f"{report['date'][:10]}, {report['cores']} cores of {report['processor']}; {versions}."
    rounds = f"{report['rounds']} rounds" if report["rounds"] > 1 else "one round"
    yield f"Medians of {rounds}, tokens a second {clock}; in brackets, ours over theirs."
    for threads, roof in report["roof"].items():
        figures = ", ".join(f"{name} {value:.3g}" for name, value in roof.items() if name != "threads")
        yield f"The machine's roof at {threads} thread{'s' if threads != '1' else ''}: {figures}."
    if shares := [share for share in report["others"].values() if share is not None]:
        yield f"Other programs took {min(shares):.0%} to {max(shares):.0%} of the processors meanwhile."


def _label(task: str, tasks: Mapping[str, Mapping[str, int]]) -> str:
    if task in LABELS:
        return LABELS[task].format(**tasks.get(task, {}))
    return f"{tasks[task]['sequences']} sequences"


def _figure(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "failed" in cell:
        return "failed"
    memory = cell["task"].startswith("memory")
    value = cell["median"] / 1e6 if memory else cell["median"]
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    if "files" in cell:
        text += f" = {cell['files']:.2f} files"
    return text + (f" ({cell['ours_over_this']:.2f} ×)" if "ours_over_this" in cell else "")


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def main() -> None:
    for name in sys.argv[1:]:
        lines = Path(name).read_text(encoding="utf-8").strip().splitlines()
        print(table(json.loads(lines[-1])))


if __name__ == "__main__":
    main()
