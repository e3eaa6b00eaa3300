"""What a client's script is given: two servers, and what to ask them.

The scripted model calls the tool `weather` for Nice when it is offered tools, says SUNNY once it has been told the
weather, CITY as JSON when it is held to a schema, and WIND otherwise. The real one is SmolLM2.
"""

from __future__ import annotations

import sys

SCRIPTED, REAL = f"{sys.argv[1]}/v1", f"{sys.argv[2]}/v1"
SCRIPTED_MODEL, REAL_MODEL = "scripted", "smollm2"
WIND, SUNNY, CITY = "The wind is up.", "It is sunny in Nice.", '{"name": "Nice", "people": 342669}'
"""How long it is in tokens is how many characters it has."""
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Nice", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city now.", "parameters": PARAMETERS},
}
QUESTION = "What is the weather in Nice?"
