"""guidellm: a short benchmark of streams, with made-up prompts of given lengths.

`python use_guidellm.py SCRIPTED REAL TOKENIZER`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1")
from common import REAL, REAL_MODEL

TOKENIZER = sys.argv[3]
REQUESTS, TOKENS = 6, 12

for path in ("/v1/chat/completions", "/v1/completions"):
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "guidellm", "run", "--disable-console",
            "--backend", f"kind=openai_http,target={REAL.removesuffix('/v1')},model={REAL_MODEL},request_format={path}",
            "--profile", "kind=concurrent,streams=3", "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=hf_auto,model={TOKENIZER}",
            "--data", f"kind=synthetic_text,prompt_tokens=24,output_tokens={TOKENS}",
            "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"], requests["incomplete"]) == (REQUESTS, [], [])
    for one in requests["successful"]:
        assert one["output_metrics"]["text_tokens"] == TOKENS  # ignore_eos was honoured
        assert one["input_metrics"]["text_tokens"] >= 24
        assert one["output"]
