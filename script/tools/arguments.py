"""The flags of `cog predict` and `cog train`: `-i key=value` to the arguments of a target."""

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema
from jsonschema.exceptions import relevance


class UsageError(Exception):
    """The command line does not fit the target's inputs."""


def parse_inputs(
    flags: list[str], schema: dict[str, Any], component: str, directory: Path
) -> dict[str, Any]:
    """A target's arguments from `key=value` flags, with defaults filled in.

    `schema` is the OpenAPI document, and `component` the one in it that describes the target's
    inputs: "Input" or "TrainingInput". `key=@file` reads a file, its path relative
    to `directory`, where the input is a file, or a text and the file is there: then it becomes a
    data: URL. A list is JSON, or one flag for each of its items.

    Raises:
        UsageError: an unknown key, no "=", a missing file or a value that the schema refuses.
    """
    schemas = schema["components"]["schemas"]
    properties = schemas[component]["properties"]
    given: dict[str, Any] = {}  # files as Path
    for flag in flags:
        key, equals, text = flag.partition("=")
        if not equals:
            raise UsageError(f"-i {flag!r} has no value; write -i key=value")
        if key not in properties:
            raise UsageError(f"there is no input {key!r}; the inputs are {', '.join(properties)}")
        spec = _resolved(properties[key], schemas)
        if spec.get("type") == "array" and not text.lstrip().startswith("["):
            item = _parse_value(key, text, spec["items"], directory)
            given[key] = [*given.get(key, []), item]
        else:
            given[key] = _parse_value(key, text, spec, directory)
    for key in schemas[component].get("required", []):
        if key not in given:
            raise UsageError(f"the input {key!r} is required; give it with -i {key}=…")
    _check(given, properties, schemas)
    defaults = {key: spec.get("default") for key, spec in properties.items()}
    return defaults | given


def _parse_value(key: str, text: str, spec: dict[str, Any], directory: Path) -> Any:  # noqa: ANN401
    if spec.get("format") == "uri":
        if not text.startswith("@"):
            raise UsageError(f"{key} is a file: write -i {key}=@path")
        path = directory / text[1:]
        if not path.is_file():
            raise UsageError(f"{key}: there is no file {path}")
        return path
    if spec["type"] == "string":
        path = directory / text[1:]
        return _data_url(path) if text.startswith("@") and path.is_file() else text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise UsageError(f"{key} is {text!r}; it must be of type {spec['type']}") from None


def _data_url(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:application/octet-stream;name={quote(path.name)};base64,{content}"


def _resolved(spec: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The property together with the component that holds its choices, if it has any."""
    references = [part["$ref"].rpartition("/")[2] for part in spec.get("allOf", [])]
    return {**spec, **{key: value for name in references for key, value in schemas[name].items()}}


def _check(given: dict[str, Any], properties: dict[str, Any], schemas: dict[str, Any]) -> None:
    """The same rules as the server's, with the same schema."""
    for key, value in given.items():
        rule = {**properties[key], "components": {"schemas": schemas}}
        json_value = str(value) if isinstance(value, Path) else value
        errors = jsonschema.Draft7Validator(rule).iter_errors(json_value)
        error = max(errors, key=relevance, default=None)
        if error is not None:
            raise UsageError(f"{key}: {error.message}")


def as_cog_gives_them(
    inputs: dict[str, Any], schema: dict[str, Any], component: str
) -> dict[str, Any]:
    """The values in the types that Cog gives them."""
    from cog import Path as CogPath
    from cog import Secret

    properties = schema["components"]["schemas"][component]["properties"]
    arguments = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Path):
            arguments[key] = CogPath(value)
        elif value is not None and "x-cog-secret" in properties[key]:
            arguments[key] = Secret(value)
    return arguments
