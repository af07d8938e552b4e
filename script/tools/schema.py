"""Write openapi.json from predict.py and train.py, or check that it is current.

`openapi.json` is committed; `.cog/openapi_schema.json` holds the same and is what Cog's server
reads. `cog build` writes its own, equal one.
"""

import argparse
import json
import sys
from pathlib import Path

from script.tools.cog_config import CogConfig, ConfigError, read_config
from script.tools.cog_model import Json, Mode, Signature
from script.tools.cog_rules import SchemaError
from script.tools.cog_source import read_signature
from script.tools.compatibility import breaking_changes
from script.tools.openapi import build_document, dump

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str], root: Path) -> int:
    """The command; 0 when the committed document is (now) right, 1 when not."""
    arguments = _arguments(argv)
    try:
        config = read_config(root)
        predict = _signature(root, config, Mode.PREDICT, arguments.source)
        train = _signature(root, config, Mode.TRAIN, arguments.train)
        assert predict is not None
        text = dump(build_document(predict, train, config.sdk_version))
        committed = _committed(root)
    except (ConfigError, SchemaError) as error:
        print(f"script/schema: {error}", file=sys.stderr)
        return 1
    breaks = [] if committed is None else breaking_changes(json.loads(committed), json.loads(text))
    if breaks and not arguments.allow_breaking:
        print("script/schema: clients of openapi.json would break:", file=sys.stderr)
        for change in breaks:
            print(f"  {change}", file=sys.stderr)
        remedy = "keep the old input, or accept the break with script/schema --allow-breaking"
        print(f"  remedy: {remedy}", file=sys.stderr)
        return 1
    if arguments.check:
        return _check(committed, text)
    _write(root, text)
    return 0


def signatures(root: Path) -> tuple[Signature, Signature | None]:
    """The signatures of the targets that cog.yaml names."""
    config = read_config(root)
    predict = _signature(root, config, Mode.PREDICT, None)
    assert predict is not None
    return predict, _signature(root, config, Mode.TRAIN, None)


def document(root: Path) -> dict[str, Json]:
    """The document of the sources under `root`."""
    predict, train = signatures(root)
    return build_document(predict, train, read_config(root).sdk_version)


def _signature(
    root: Path, config: CogConfig, mode: Mode, override: Path | None
) -> Signature | None:
    target = config.predict if mode is Mode.PREDICT else config.train
    if target is None:
        if override is None:
            return None
        raise ConfigError(f"--train {override}: cog.yaml names no train target")
    file = override or target.file
    label = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{label}, the {mode.value} target of cog.yaml, is unreadable: {error}"
        ) from error
    return read_signature(text, label, target.name, mode)


def _committed(root: Path) -> str | None:
    path = root / "openapi.json"
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "remove it and run script/schema"
        raise ConfigError(f"openapi.json is not JSON: {error}; {remedy}") from error
    return text


def _check(committed: str | None, text: str) -> int:
    if committed == text:
        print("openapi.json is current")
        return 0
    state = "is missing" if committed is None else "does not match the sources"
    print(f"script/schema: openapi.json {state}; remedy: run script/schema", file=sys.stderr)
    return 1


def _write(root: Path, text: str) -> None:
    for name in ("openapi.json", ".cog/openapi_schema.json"):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {name}")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/schema", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if not current")
    parser.add_argument("--source", type=Path, help="read this file as the prediction target's")
    parser.add_argument("--train", type=Path, help="read this file as the training target's")
    parser.add_argument(
        "--allow-breaking", action="store_true", help="accept a change that breaks clients"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], ROOT))
