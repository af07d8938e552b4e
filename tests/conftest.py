"""What every test may ask of the command line, and which tests run side by side."""

import os

import pytest
from xdist.scheduler import LoadScopeScheduling


def pytest_addoption(parser):
    group = parser.getgroup("test_adapter_state.py")
    group.addoption("--state-sequences", type=int, metavar="N", help="N sequences, not always 64")
    group.addoption("--state-seed", type=int, metavar="S", help="the first sequence's number")


# Cog's servers, and whatever else makes a prediction's files, look for one another on the machine.
TOGETHER = ("tests/server/", "test_predict_tool.py", "test_bench.py")


class ByFile(LoadScopeScheduling):
    """Files run in parallel, so that fixtures are shared; servers one after the other.

    Not by xdist's own groups: 3.8 writes them where pytest 9.2 does not look.
    """

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return "servers" if any(name in file for name in TOGETHER) else file


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


@pytest.fixture
def cpp_compiler(tmp_path_factory, monkeypatch):
    """Have torch.compile's check find a compiler, which nothing may call."""
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "g++").touch(mode=0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
