"""One training, as `cog train` makes it, without Docker.

With `accelerate launch` every process trains; the first one writes the files.
"""

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
COMPONENT = "TrainingInput"


def main(argv: list[str], caller: Path) -> int:
    """Return the process's exit status: 2 for wrong usage, 1 for a failed training."""
    parser = argparse.ArgumentParser(prog="script/train", description=__doc__)
    parser.add_argument("-i", "--input", action="append", default=[], metavar="key=value")
    parser.add_argument("-o", "--output", type=Path, default=Path("trained_model.tar"))
    arguments = parser.parse_args(argv)
    output = caller / arguments.output
    try:
        schema = document(ROOT)
        inputs = parse_inputs(arguments.input, schema, COMPONENT, caller)
        if not output.parent.is_dir() or output.is_dir():
            raise UsageError(f"-o {output} is no place for a file; write -o trained_model.tar")
    except UsageError as error:
        print(f"script/train: {error}", file=sys.stderr)
        return 2
    return _train(as_cog_gives_them(inputs, schema, COMPONENT), output)


def _train(arguments: dict[str, Any], output: Path) -> int:
    from preprocess.errors import PreprocessError
    from train import train
    from training.errors import TrainingError
    from weights.errors import WeightsError

    started = time.perf_counter()
    try:
        made = train(**arguments)
    except (PreprocessError, TrainingError, WeightsError) as error:
        print(f"script/train: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        shutil.move(made.weights, output)
        print(f"Wrote {output}")
        if made.exchange is not None:
            exchange = output.with_name(f"{output.stem}_exchange.zip")
            shutil.move(made.exchange, exchange)
            print(f"Wrote {exchange}")
    shutil.rmtree(Path(made.weights).parent, ignore_errors=True)
    print(f"training {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(os.environ.get("CALLER_DIRECTORY", Path.cwd()))))
