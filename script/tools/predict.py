"""One prediction, as `cog predict` makes it, without Docker."""

import argparse
import base64
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema
from jsonschema.exceptions import relevance

from script.tools.cog_config import ConfigError
from script.tools.cog_rules import SchemaError
from script.tools.schema import document

ROOT = Path(__file__).parents[2]


class UsageError(Exception):
    """The command line does not fit the predictor's inputs."""


def parse_inputs(flags: list[str], schema: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The predictor's arguments from `key=value` flags, with defaults filled in.

    `schema` is the OpenAPI document; `key=@file` reads a file, its path relative to `directory`,
    where the input is a file, or a text and the file is there: then it becomes a data: URL. A list
    is JSON, or one flag for each of its items.

    Raises:
        UsageError: an unknown key, no "=", a missing file or a value that the schema refuses.
    """
    schemas = schema["components"]["schemas"]
    properties = schemas["Input"]["properties"]
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
    for key in schemas["Input"].get("required", []):
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


def place(files: list[Path], output: Path | None, directory: Path) -> list[Path]:
    """Copy the files to where the caller wants them: one to exactly `output`, several numbered."""
    placed = []
    for index, file in enumerate(files):
        if output is None:
            target = directory / f"output.{index}{file.suffix}"
        elif len(files) == 1:
            target = output
        else:
            target = output.with_name(f"{output.stem}.{index}{output.suffix or file.suffix}")
        shutil.copyfile(file, target)
        placed.append(target)
    return placed


def main(argv: list[str], caller: Path) -> int:
    """Return the process's exit status: 2 for wrong usage, 1 for a failed prediction."""
    parser = argparse.ArgumentParser(prog="script/predict", description=__doc__)
    parser.add_argument("-i", "--input", action="append", default=[], metavar="key=value")
    parser.add_argument("-o", "--output", type=Path, help="where the picture goes")
    arguments = parser.parse_args(argv)
    output = None if arguments.output is None else caller / arguments.output
    try:
        schema = document(ROOT)
        inputs = parse_inputs(arguments.input, schema, caller)
        _check_output(output)
    except UsageError as error:
        print(f"script/predict: {error}", file=sys.stderr)
        return 2
    except (ConfigError, SchemaError) as error:
        print(f"script/predict: {error}", file=sys.stderr)
        return 1
    return _predict(_as_cog(inputs, schema), output, caller)


def _check_output(output: Path | None) -> None:
    """Before minutes are spent on a picture that has no place to go."""
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"-o {output} is a folder; write -o {output / 'output.png'}")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")


def _as_cog(inputs: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The values in the types that Cog gives them."""
    from cog import Path as CogPath
    from cog import Secret

    properties = schema["components"]["schemas"]["Input"]["properties"]
    arguments = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Path):
            arguments[key] = CogPath(value)
        elif value is not None and "x-cog-secret" in properties[key]:
            arguments[key] = Secret(value)
    return arguments


def _predict(arguments: dict[str, Any], output: Path | None, caller: Path) -> int:
    from generation.errors import GenerationError
    from predict import Predictor
    from preprocess.errors import PreprocessError
    from weights.errors import WeightsError

    started = time.perf_counter()
    predictor = Predictor()
    try:
        predictor.setup(os.environ.get("COG_WEIGHTS") or None)
        ready = time.perf_counter()
        try:
            files = predictor.predict(**arguments)
            done = time.perf_counter()
            for path in place([Path(file) for file in files], output, caller):
                print(f"Wrote {path}")
        finally:
            predictor.folders.remove()
    except (GenerationError, PreprocessError, WeightsError) as error:
        print(f"script/predict: {error}", file=sys.stderr)
        return 1
    print(f"setup {ready - started:.1f} s, prediction {done - ready:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(os.environ.get("CALLER_DIRECTORY", Path.cwd()))))
