"""Fifty JSON Schemas of the kinds that people ask for: each with a request that it answers."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def obj(required: Schema, optional: Schema | None = None, **more: Any) -> Schema:
    """An object with all of `required` and nothing besides `optional`."""
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": [*required],
        "additionalProperties": False,
        **more,
    }


def array(items: Schema, low: int = 0, high: int = 4) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def text(high: int = 24, **more: Any) -> Schema:
    return {"type": "string", "maxLength": high, **more}


def number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


STRING: Schema = {"type": "string"}
INT: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOL: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
TREE: Schema = {
    "$defs": {"node": obj({"value": integer(0, 9)}, {"children": array({"$ref": "#/$defs/node"}, 0, 2)})},
    "$ref": "#/$defs/node",
}
LIST: Schema = {
    "$defs": {"cell": obj({"head": text(8), "tail": {"anyOf": [NULL, {"$ref": "#/$defs/cell"}]}})},
    "$ref": "#/$defs/cell",
}
PYDANTIC: Schema = {  # as pydantic writes a class with a nested one, an enum, a default and an optional field
    "$defs": {
        "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
        "Wheel": {
            "properties": {"size": {"title": "Size", "type": "integer"}},
            "required": ["size"],
            "title": "Wheel",
            "type": "object",
        },
    },
    "properties": {
        "color": {"$ref": "#/$defs/Color"},
        "wheels": {"items": {"$ref": "#/$defs/Wheel"}, "maxItems": 3, "title": "Wheels", "type": "array"},
        "owner": {"anyOf": [{"maxLength": 16, "type": "string"}, {"type": "null"}], "default": None, "title": "Owner"},
    },
    "required": ["color", "wheels"],
    "title": "Car",
    "type": "object",
}

SCHEMAS: dict[str, Schema] = {
    "a person": obj({"name": text(), "age": integer(0, 120)}),
    "a person with an optional e-mail address": obj({"name": text()}, {"email": {"type": "string", "format": "email"}}),
    "a colour": {"enum": ["red", "green", "blue"]},
    "a mixed choice": {"enum": ["one", 2, None, True, 4.5]},
    "always the same": obj({"kind": {"const": "fixed"}, "version": {"const": 3}}),
    "whether the sky is blue": BOOL,
    "nothing": NULL,
    "a number between 0 and 1": number(0, 1),
    "the number of legs of a spider": integer(1, 100),
    "a negative integer": integer(-1000, -1),
    "any integer": INT,
    "any number": NUMBER,
    "a word": text(12, minLength=2),
    "a short sentence": text(60),
    "a telephone number": {"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"},
    "a product code": {"type": "string", "pattern": "^(SKU|REF)-[A-Z]{2}[0-9]{1,4}$"},
    "a date": {"type": "string", "format": "date"},
    "a time": {"type": "string", "format": "time"},
    "a moment": obj({"at": {"type": "string", "format": "date-time"}}),
    "an identifier": {"type": "string", "format": "uuid"},
    "an IPv4 address": {"type": "string", "format": "ipv4"},
    "a list of words": array(text(10), 1),
    "exactly three integers": array(integer(0, 99), 3, 3),
    "a list of lists": array(array(integer(0, 9), 0, 3), 0, 3),
    "an empty list or one of null": array(NULL, 0, 1),
    "a pair": {"type": "array", "prefixItems": [text(8), INT], "items": False, "minItems": 2},
    "a book": obj({"title": text(30), "authors": array(text(20), 1, 2), "year": integer(1450, 2030), "sold": BOOL}),
    "an address": obj({"street": text(), "city": text(16), "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}),
    "a customer": obj({"name": text(16), "address": obj({"city": text(16), "country": {"enum": ["FR", "ES", "IT"]}})}),
    "an order": obj({"id": integer(1, 9999), "lines": array(obj({"sku": text(8), "count": integer(1, 9)}), 1, 3)}),
    "a weather report": obj({"temperature": number(-50, 60), "wind": {"enum": ["N", "E", "S", "W"]}, "rain": BOOL}),
    "a verdict": obj({"reasoning": text(60), "verdict": {"enum": ["yes", "no", "unclear"]}}),
    "a number or a word": {"anyOf": [integer(0, 9), text(8)]},
    "a word or nothing": {"type": ["string", "null"], "maxLength": 10},
    "a circle or a square": {
        "anyOf": [
            obj({"shape": {"const": "circle"}, "radius": number(0, 10)}),
            obj({"shape": {"const": "square"}, "side": number(0, 10)}),
        ]
    },
    "an event of one kind or another": {
        "oneOf": [
            obj({"kind": {"const": "opened"}, "by": text(10)}),
            obj({"kind": {"const": "closed"}, "after": integer(1, 60)}),
        ]
    },
    "two demands at once": {"allOf": [{"type": "integer", "minimum": 10}, {"type": "integer", "maximum": 20}]},
    "a tree": TREE,
    "a linked list": LIST,
    "a car": PYDANTIC,
    "open settings": {"type": "object", "additionalProperties": BOOL, "maxProperties": 3},
    "scores by name": {"type": "object", "additionalProperties": integer(0, 9), "properties": {"total": INT}},
    "names that begin with x": {
        "type": "object",
        "patternProperties": {"^x[a-z]{1,5}$": INT},
        "additionalProperties": False,
    },
    "only optional fields": obj({}, {"a": BOOL, "b": BOOL, "c": integer(0, 9)}),
    "optional before required": {
        "type": "object",
        "properties": {"first": INT, "second": BOOL, "third": text(6)},
        "required": ["third"],
        "additionalProperties": False,
    },
    "an even number": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 1000},
    "a number strictly between": {"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 9},
    "names in other scripts": obj({"名前": text(8), "größe": integer(1, 3), 'naïve "key"': BOOL}),
    "a call of a tool": obj(
        {"name": {"const": "search"}, "arguments": obj({"query": text(20)}, {"limit": integer(1, 9)})}
    ),
    "a deep one": obj({"a": obj({"b": obj({"c": obj({"d": array(obj({"e": BOOL}), 1, 2)})})})}),
}
