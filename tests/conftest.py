"""What every test may ask of the command line, and which tests run side by side."""

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("test_replaceable_state.py")
    group.addoption("--state-sequences", type=int, metavar="N", help="N sequences, not always 200")
    group.addoption("--state-seed", type=int, metavar="S", help="the first sequence's number")


# Cog's servers, and whatever else makes a prediction's files, look for one another on the machine.
TOGETHER = ("tests/server/", "test_predict_tool.py", "test_bench.py")


def pytest_collection_modifyitems(items):
    """Run in parallel by file, so that fixtures are shared; servers one after the other."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        group = "servers" if any(name in file for name in TOGETHER) else file
        item.add_marker(pytest.mark.xdist_group(group))
