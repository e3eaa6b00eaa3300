"""instructor: a model of pydantic's out of a tool's call, JSON or a schema, whole and as it grows."""

from __future__ import annotations

import json
from typing import Literal

import instructor
import openai
from common import CITY, QUESTION, REAL, REAL_MODEL, SCRIPTED, SCRIPTED_MODEL
from pydantic import BaseModel


class City(BaseModel):
    name: str
    people: int


class Choice(BaseModel):
    city: Literal["Nice", "Oslo"]


asked = {"messages": [{"role": "user", "content": QUESTION}], "max_retries": 0}
modes = instructor.Mode
with openai.OpenAI(base_url=SCRIPTED, api_key="none") as client:
    for mode in (modes.JSON, modes.JSON_SCHEMA):
        wrapped = instructor.from_openai(client, mode=mode)
        one = wrapped.chat.completions.create(model=SCRIPTED_MODEL, response_model=City, **asked)
        assert one.model_dump() == json.loads(CITY), mode
        grown = [*wrapped.chat.completions.create_partial(model=SCRIPTED_MODEL, response_model=City, **asked)]
        assert grown[-1].model_dump() == one.model_dump(), mode
        assert grown[0].people is None, mode
with openai.OpenAI(base_url=REAL, api_key="none") as client:
    options = {"model": REAL_MODEL, "response_model": Choice, "max_tokens": 80, "temperature": 0, **asked}
    for mode in (modes.TOOLS, modes.TOOLS_STRICT, modes.JSON_SCHEMA):
        wrapped = instructor.from_openai(client, mode=mode)
        assert wrapped.chat.completions.create(**options).city in ("Nice", "Oslo"), mode
    *_, last = instructor.from_openai(client).chat.completions.create_partial(**options)
    assert last.city in ("Nice", "Oslo")
