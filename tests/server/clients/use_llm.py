"""llm: models of its own configuration, by its command line and from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import CITY, PARAMETERS, QUESTION, REAL, REAL_MODEL, SCRIPTED, SCRIPTED_MODEL, SUNNY, WIND

home = tempfile.TemporaryDirectory()
os.environ["LLM_USER_PATH"] = home.name
entries = [
    {"model_id": model, "model_name": model, "api_base": base, "api_key": "none", "supports_tools": True,
     "supports_schema": True}
    for model, base in ((SCRIPTED_MODEL, SCRIPTED), (REAL_MODEL, REAL))
]  # fmt: skip
(Path(home.name) / "extra-openai-models.yaml").write_text(json.dumps(entries))  # which is YAML

import llm  # noqa: E402  # reads where its models are when it is imported


def command(*arguments: str) -> str:
    program = [sys.executable, "-m", "llm", *arguments]
    return subprocess.run(program, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.strip()


assert command("-m", SCRIPTED_MODEL, QUESTION) == WIND
assert command("-m", SCRIPTED_MODEL, "--no-stream", QUESTION) == WIND
assert command("-m", SCRIPTED_MODEL, "-c", "And now?") == WIND  # a conversation that goes on
assert json.loads(command("-m", SCRIPTED_MODEL, "--schema", "name, people int", QUESTION)) == json.loads(CITY)


def weather(city: str) -> str:
    """The weather in a city now."""
    assert city == "Nice"
    return "sunny"


scripted, real = llm.get_model(SCRIPTED_MODEL), llm.get_model(REAL_MODEL)
for stream in (True, False):
    chain = scripted.chain(QUESTION, tools=[weather], stream=stream)
    assert "".join(chain) == SUNNY
    answer = real.prompt(QUESTION, schema=PARAMETERS, stream=stream, temperature=0, max_tokens=60)
    assert json.loads(answer.text())["city"] in ("Nice", "Oslo")
    assert answer.usage().output > 0
