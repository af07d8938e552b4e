"""Memory does not grow with swaps of adapters; `python -m tests.evals.swap` measures time too."""

import subprocess
import sys

import pytest

from tests.evals.swap import MAX_GROWTH

FRESH_PROCESS = """
import sys
from tests.evals.swap import memory, open_engine
with open_engine() as (engine, folder):
    print(memory(engine, folder, swaps=int(sys.argv[1])).growth)
"""


@pytest.mark.parametrize("swaps", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_swaps(swaps):
    command = [sys.executable, "-c", FRESH_PROCESS, str(swaps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) <= MAX_GROWTH
