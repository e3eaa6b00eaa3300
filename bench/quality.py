"""How far settings of the engine move a model's perplexity, on the same text and weights.

    python -m bench.quality MODEL.gguf cache_dtype=float32 default [--windows 64] [--threads 2]

Each argument after the model is one set of engine options, NAME=VALUE joined by commas, or `default`; changes are
relative to the first. The text is cut into windows of 512 tokens, which is what the engine takes at once: the kernels
for many rows are what is scored. $TRAMONTANE_TEST_DATA is where wikitext2-test.txt lies. The JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tramontane import LLM
from tramontane.cli.options import parse_settings
from tramontane.evaluate.perplexity import perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("settings", nargs="+", metavar="NAME=VALUE,...|default")
    parser.add_argument("--text", type=Path, help="another text")
    parser.add_argument("--windows", type=int, default=64, help="score the first so many; 0 is all")
    parser.add_argument("--tokens", type=int, default=512, help="of a window")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if not args.text and "TRAMONTANE_TEST_DATA" not in os.environ:
        parser.error("set TRAMONTANE_TEST_DATA, or give --text")
    text = (args.text or Path(os.environ["TRAMONTANE_TEST_DATA"]) / "wikitext2-test.txt").read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = []
    for settings in args.settings:
        options = {} if settings == "default" else parse_settings(settings.split(","))
        defaults = {"threads": args.threads, "context_length": args.tokens, "max_num_batched_tokens": args.tokens}
        with LLM(args.model, prefix_caching=False, **{**defaults, **options}) as llm:
            result = perplexity(llm, text, context=args.tokens, windows=args.windows or None)
        change = result.perplexity / lines[0]["perplexity"] - 1 if lines else 0.0
        lines.append({"settings": settings, **result.as_dict(), "change": change})
        print(f"{settings:<32}{result.perplexity:12.5f}{change:+10.4%}", flush=True)
    print(json.dumps({"model": args.model.name, "window": args.tokens, "results": lines}))


if __name__ == "__main__":
    main()
