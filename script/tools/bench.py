"""How fast and with how much memory, beside peers in the same run."""

import argparse
import sys

from script.tools import bench_files, bench_pictures, bench_training

WORKLOADS = {"training": bench_training, "pictures": bench_pictures, "files": bench_files}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    workloads = parser.add_subparsers(dest="workload", required=True)
    parsers = {}
    for name, module in WORKLOADS.items():
        parsers[name] = workloads.add_parser(name, description=module.__doc__)
        module.add_arguments(parsers[name])
    arguments = parser.parse_args(argv)
    WORKLOADS[arguments.workload].run(arguments, parsers[arguments.workload])


if __name__ == "__main__":
    main(sys.argv[1:])
