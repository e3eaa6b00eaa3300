"""lm-eval: local tasks by `local-completions` (loglikelihood and generation) and `local-chat-completions`.

`python use_lm_eval.py SCRIPTED REAL TOKENIZER OUT`: writes to OUT the log-likelihoods that lm-eval read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="none")
from common import REAL, REAL_MODEL

TOKENIZER, OUT = sys.argv[3:5]
ROWS = [
    {"question": "The capital of France is", "choices": [" Paris.", " a small green apple."], "answer": 0},
    {"question": "Two and two make", "choices": [" purple", " four"], "answer": 1},
    {"question": "Größe: the sun is", "choices": [" hot", " 冷たい"], "answer": 0},
]
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(folder: Path, task: str, kind: str, path: str, *more: str, **arguments: Any) -> list[dict[str, Any]]:
    """The samples that lm-eval logged."""
    given = {"model": REAL_MODEL, "base_url": f"{REAL}/{path}", "num_concurrent": 2, "max_retries": 1, **arguments}
    out = folder / f"out-{task}-{kind}"
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", task, "--include_path", str(folder),
        "--model_args", ",".join(f"{name}={value}" for name, value in given.items()),
        "--output_path", str(out), "--log_samples", *more,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    (log,) = out.rglob("samples_*.jsonl")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for task, text in (("choose", CHOOSE), ("write", WRITE)):
        (folder / f"{task}.yaml").write_text(text.format(rows=rows), encoding="utf-8")

    with_tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": TOKENIZER, "tokenized_requests": True}
    samples = evaluate(folder, "choose", "local-completions", "completions", "--batch_size", "2", **with_tokenizer)
    likelihoods = [
        [row["question"], choice, float(value), str(greedy) == "True"]
        for sample in samples
        for row in [sample["doc"]]
        for choice, ((value, greedy),) in zip(row["choices"], sample["resps"], strict=True)
    ]
    Path(OUT).write_text(json.dumps(likelihoods), encoding="utf-8")

    for kind, path, more, arguments in (
        ("local-completions", "completions", [], {"tokenizer_backend": "None"}),
        ("local-chat-completions", "chat/completions", ["--apply_chat_template"], {}),
    ):
        written = evaluate(folder, "write", kind, path, *more, **arguments)
        assert len(written) == len(ROWS)
        assert all(sample["resps"][0][0].strip() and "\n" not in sample["resps"][0][0] for sample in written), written
