"""Try a tiny random model of every causal language model that transformers has, and tell in docs/models.md how it ran.

    python docs/make_models.py [MODEL_TYPE ...]

With model types it tries these, prints how they fare, and writes nothing. Needs the extra transformers, and pytest.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402
from tests.models.zoo import TOLERANCE, Trial, attempt, model_types  # noqa: E402

from tramontane.kernels import for_device  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- every model of transformers: made by make_models.py -->", "<!-- end of what make_models.py made -->"
WAYS = {
    "own decoder": "by its own decoder",
    "one row": "by the fallback, all sequences as one row",
    "sequence by sequence": "by the fallback, sequence by sequence",
    "token by token": "by the fallback, token by token",
}


def table(trials: list[Trial]) -> str:
    """The Markdown between the marks."""
    counts = Counter(trial.how if trial.right else "" for trial in trials)
    share = 100 * (len(trials) - counts[""]) / len(trials)
    lines = [
        f"transformers {transformers.__version__} has {len(trials)} types of causal language models. A tiny random "
        f"model of {len(trials) - counts['']} of them, {share:.1f} %, gives the logits that transformers gives:",
        "",
        *(f"- {counts[how]} {words}" for how, words in WAYS.items() if counts[how]),
        "",
        "Each was loaded from safetensors and run whole, in chunks, decoding, behind a shared prefix and in mixed "
        "batches, in float32. The difference is the largest between two logits; what counts as right is "
        f"{TOLERANCE:g}, or that part of the largest logit where that is above 1.",
        "",
        "| model type | runs | difference |",
        "|---|---|---|",
        *(f"| `{t.model_type}` | {t.how} | {t.difference:.1e} |" for t in trials if t.right),
        "",
        "| model type | why not |",
        "|---|---|",
        *(f"| `{t.model_type}` | {why(t)} |" for t in trials if not t.right),
    ]
    return "\n".join(lines)


def why(trial: Trial) -> str:
    if trial.how:
        return f"{trial.how}: its logits differ by {trial.difference:.1e}"
    return trial.reason.replace("|", "/")


def main(chosen: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ops = for_device("cpu")
    trials = []
    for model_type in chosen or model_types():
        with tempfile.TemporaryDirectory() as folder:
            trial = attempt(model_type, Path(folder), ops)
        trials.append(trial)
        verdict = f"{trial.how}, {trial.difference:.1e}" if trial.right else f"NOT: {why(trial)}"
        print(f"{len(trials):3d} {model_type}: {verdict}", flush=True)
    print(f"{sum(trial.right for trial in trials)} of {len(trials)} run")
    if chosen:
        return
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(trials)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
