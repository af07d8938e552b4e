"""Write what follows from declarations; with --check, only compare.

From the inputs (generation/options.py, training/config.py): the signatures of predict.py and
train.py, openapi.json, docs/reference/inputs.md and tables of the README. From the registries of
models and ControlNets: two more of its tables.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from generation.options import GenerationRequest
from inputs import Input, flatten
from script.tools import openapi, signature
from script.tools.control_table import control_table
from script.tools.input_table import input_table
from script.tools.model_table import model_table
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
README, REFERENCE = "README.md", "docs/reference/inputs.md"
_REFERENCE = """\
# Inputs

Written by `script/sync` from `generation/options.py` and `training/config.py`.

## Predictions

{predict}

## Trainings

{train}
"""


class SyncError(Exception):
    """A file is not as expected; the message says where and what to do."""


def main(argv: list[str], root: Path) -> int:
    """Run the command; return 0 when every file is (now) as its sources say."""
    parser = argparse.ArgumentParser(prog="script/sync", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args(argv).check
    try:
        wanted = synchronised(root, flatten(GenerationRequest), flatten(TrainConfig))
    except (SyncError, signature.SignatureError, openapi.OpenapiError) as error:
        print(f"script/sync: {error}", file=sys.stderr)
        return 1
    changed = [file for file, text in wanted.items() if text != _read(root, file)]
    for file in changed:
        if check:
            print(f"{file} differs from its sources; remedy: run script/sync", file=sys.stderr)
            continue
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(wanted[file], encoding="utf-8", newline="\n")
        print(f"{file} updated")
    return 1 if check and changed else 0


def synchronised(root: Path, predict: Sequence[Input], train: Sequence[Input]) -> Mapping[str, str]:
    """Return the wanted text of every file."""
    version = yaml.safe_load(_read(root, "cog.yaml"))["build"]["sdk_version"]
    components = {"TrainingInput": train, "Input": predict}
    tables = {"predict": input_table(predict), "train": input_table(train)}
    readme = _read(root, README)
    for name, table in (
        ("inputs", tables["predict"]),
        ("training-inputs", tables["train"]),
        ("models", model_table()),
        ("controls", control_table()),
    ):
        readme = replace_table(readme, name, table)
    return {
        "predict.py": _signature(root, "predict", predict),
        "train.py": _signature(root, "train", train),
        openapi.FILE: openapi.updated(_read(root, openapi.FILE), components, version),
        REFERENCE: _REFERENCE.format(**tables),
        README: readme,
    }


def _signature(root: Path, function: str, inputs: Sequence[Input]) -> str:
    """Return the text of a target; what Cog reads from it is checked."""
    file, wanted = f"{function}.py", signature.parameters(inputs)
    text = signature.replace_signature(_read(root, file), file, wanted)
    if signature.read_signature(text, file, function) != wanted:
        raise SyncError(f"{file}: Cog would read other inputs than those that are declared")
    return text


def replace_table(text: str, name: str, table: str) -> str:
    """Return the README's text with another table between the two marks of its name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SyncError(f"{README}: put {begin} and {end} once where the table belongs")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def _read(root: Path, file: str) -> str:
    path = root / file
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], ROOT))
