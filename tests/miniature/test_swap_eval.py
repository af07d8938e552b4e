"""Memory does not grow with swaps of adapters; `python -m tests.evals.swap` measures time too."""

import subprocess
import sys

from tests.evals.swap import MAX_GROWTH

FRESH_PROCESS = """
from tests.evals.swap import memory, open_engine
with open_engine() as (engine, folder):
    print(memory(engine, folder, swaps=50).growth)
"""


def test_memory_does_not_grow_with_swaps():
    command = [sys.executable, "-c", FRESH_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) <= MAX_GROWTH
