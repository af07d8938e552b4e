"""openapi.json: what Cog's server validates requests against.

`cog build` writes an equal document but for `info.version`. Everything in the committed one that
does not follow from the inputs stays as it is; `script/sync` writes the rest.
"""

import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from inputs import REQUIRED, Input

FILE = "openapi.json"
Json = dict[str, Any]

_TYPES: dict[type, Json] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    Path: {"type": "string", "format": "uri"},
}
_SECRET = {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True}
_ENUMERATION = {"description": "An enumeration.", "type": "string"}


class OpenapiError(Exception):
    """The inputs have no document; the message says why."""


def document(root: Path) -> Json:
    """Return the committed document, its inputs in the order of the signatures."""
    schema: Json = json.loads((root / FILE).read_text(encoding="utf-8"))
    for component in ("Input", "TrainingInput"):
        properties = schema["components"]["schemas"][component]["properties"]
        ordered = dict(sorted(properties.items(), key=lambda item: item[1]["x-order"]))
        schema["components"]["schemas"][component]["properties"] = ordered
    return schema


def updated(text: str, components: Mapping[str, Iterable[Input]], version: str) -> str:
    """Return the document's text with other inputs; `components` is Input and TrainingInput."""
    schema: Json = json.loads(text)
    schema["info"]["version"] = version
    kept = {
        name: component
        for name, component in schema["components"]["schemas"].items()
        if name == "Status" or component.get("description") != _ENUMERATION["description"]
    }
    enums: Json = {}
    for title, entries in components.items():
        inputs = list(entries)
        kept[title] = _component(title, inputs)
        for entry in inputs:
            if not entry.option.choices:
                continue
            enum = {**_ENUMERATION, "title": entry.name, "enum": list(entry.option.choices)}
            if entry.name in kept or enums.setdefault(entry.name, enum) != enum:
                # Cog keeps one of them, and would validate the other's inputs against it.
                raise OpenapiError(f"{entry.name}: there is another component of this name")
    schema["components"]["schemas"] = kept | enums
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _component(title: str, inputs: list[Input]) -> Json:
    properties = {entry.name: _property(entry, order) for order, entry in enumerate(inputs)}
    component = {"title": title, "type": "object", "properties": properties}
    required = [entry.name for entry in inputs if entry.default is REQUIRED]
    return {**component, "required": required} if required else component


def _property(entry: Input, order: int) -> Json:
    schema: Json = {"x-order": order, "description": entry.option.description}
    if entry.option.choices:
        schema["allOf"] = [{"$ref": f"#/components/schemas/{entry.name}"}]
    else:
        schema["title"] = " ".join(word[:1].upper() + word[1:] for word in entry.name.split("_"))
        item = _SECRET if entry.option.secret else _TYPES[_base(entry.type)]
        schema |= {"type": "array", "items": item} if entry.is_list else item
    if entry.is_optional:
        schema["nullable"] = True
    if entry.default is not REQUIRED:
        default = entry.default
        schema["default"] = list(default) if isinstance(default, tuple) else _number(default)
    if not entry.is_list:
        limits = {"minimum": entry.option.ge, "maximum": entry.option.le}
        schema |= {key: _number(limit) for key, limit in limits.items() if limit is not None}
    return schema


def _base(kind: type) -> type:
    return str if issubclass(kind, StrEnum) else kind


def _number(value: object) -> object:
    """Go, which Cog is written in, writes 1.0 as 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
