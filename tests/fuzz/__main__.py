"""Coverage-guided fuzzing of one reader: `python -m tests.fuzz TARGET FOLDER [SECONDS]`, with atheris installed.

FOLDER keeps the corpus, the inputs that were found to fail, and goes on where an earlier run ended. A reader that
leaks anything but an error of the family, takes ten seconds or two gibibytes over an input ends the run with its
input saved; put it into `tests/fuzz/found/TARGET/`, where the ordinary tests read it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tramontane", "jinja2"]):
    from tests.fuzz.targets import TARGETS, read


def main(name: str, folder: str, seconds: str = "600") -> None:
    corpus = Path(folder) / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        f"-artifact_prefix={folder}/",
        "-max_len=400000",
    ]
    if TARGETS[name].words:
        words = Path(folder) / "words"
        words.write_text("".join(f'"{word}"\n' for word in TARGETS[name].words))
        options.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: read(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
