"""Measure speed and memory beside diffusers and cog-sdxl in the same run.

`script/bench COMMAND --help` describes a command.
"""

import argparse
import importlib
import sys

from benchmarks import environment

COMMANDS = ("images", "host", "start", "training", "files", "plot")
ALIASES = {"pictures": "images"}


def main(argv: list[str]) -> None:
    """Run one command; its module is imported then, because some import much."""
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    parser.add_argument("command", choices=[*COMMANDS, *ALIASES])
    parser.add_argument("options", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    module = importlib.import_module(f"benchmarks.{ALIASES.get(given.command, given.command)}")
    command = argparse.ArgumentParser(
        prog=f"script/bench {given.command}", description=module.__doc__
    )
    module.add_arguments(command)
    options = command.parse_args(given.options)
    environment.check(options, command)
    module.run(options, command)


if __name__ == "__main__":
    main(sys.argv[1:])
