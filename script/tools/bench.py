"""How fast and with how much memory, beside peers in the same run."""

import argparse
import sys

from script.tools import (
    bench_files,
    bench_host,
    bench_pictures,
    bench_plot,
    bench_start,
    bench_training,
)

COMMANDS = {
    "pictures": bench_pictures,
    "host": bench_host,
    "start": bench_start,
    "training": bench_training,
    "files": bench_files,
    "plot": bench_plot,
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, module in COMMANDS.items():
        parsers[name] = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(parsers[name])
    arguments = parser.parse_args(argv)
    COMMANDS[arguments.command].run(arguments, parsers[arguments.command])


if __name__ == "__main__":
    main(sys.argv[1:])
