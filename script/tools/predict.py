"""One prediction, as `cog predict` makes it, without Docker."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from script.tools.arguments import UsageError, as_cog_gives_them, parse_inputs
from script.tools.openapi import document

ROOT = Path(__file__).parents[2]


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
        inputs = parse_inputs(arguments.input, schema, "Input", caller)
        _check_output(output)
    except UsageError as error:
        print(f"script/predict: {error}", file=sys.stderr)
        return 2
    return _predict(as_cog_gives_them(inputs, schema, "Input"), output, caller)


def _check_output(output: Path | None) -> None:
    """Before minutes are spent on a picture that has no place to go."""
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"-o {output} is a folder; write -o {output / 'output.png'}")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")


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
