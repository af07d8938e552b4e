"""The memory of a process does not grow with the number of requests."""

import psutil
import pytest

from tests.miniature.reference_pipelines import COG_ARCHIVE, TYPED

REQUESTS, WARM = 500, 100
MAX_GROWTH = 16_000_000  # bytes, after the warm-up
SHAPES = [(64, 64), (64, 72), (72, 64), (80, 64), (64, 80)]


@pytest.mark.slow
def test_five_hundred_requests(make):
    """With different seeds, prompts, shapes, schedulers and weights."""
    process = psutil.Process()
    resident = []
    for k in range(REQUESTS):
        width, height = SHAPES[k % len(SHAPES)]
        changes = {"seed": k, "prompt": f"a large red circle {k}", "num_inference_steps": 1 + k % 2}
        if k % 3 == 0:
            changes |= {"prompt": f"{TYPED} {k}", "replicate_weights": COG_ARCHIVE.url}
        changes["scheduler"] = ("K_EULER", "DDIM", "K_EULER_ANCESTRAL")[k % 3]
        make(width=width, height=height, **changes)
        if k + 1 in (WARM, REQUESTS):
            resident.append(process.memory_info().rss)
    warm, last = resident
    print(f"{warm / 1e6:.1f} MB, then {last / 1e6:.1f}")
    assert last - warm < MAX_GROWTH
