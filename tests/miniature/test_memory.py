"""A process that serves for a long time takes no more memory than one that has warmed up."""

import psutil
import pytest

from tests.miniature.reference_pipelines import COG_ARCHIVE, TYPED

REQUESTS, WARM = 500, 100
MOST_BYTES = 16_000_000  # more after all than after the warm-up
SHAPES = [(64, 64), (64, 72), (72, 64), (80, 64), (64, 80)]


@pytest.mark.slow
def test_five_hundred_requests(make):
    """Of all kinds of seeds, prompts, shapes and schedulers, with trained weights or none."""
    process = psutil.Process()
    taken = []
    for k in range(REQUESTS):
        width, height = SHAPES[k % len(SHAPES)]
        changes = {"seed": k, "prompt": f"a large red circle {k}", "num_inference_steps": 1 + k % 2}
        if k % 3 == 0:
            changes |= {"prompt": f"{TYPED} {k}", "replicate_weights": COG_ARCHIVE.url}
        changes["scheduler"] = ("K_EULER", "DDIM", "K_EULER_ANCESTRAL")[k % 3]
        make(width=width, height=height, **changes)
        if k + 1 in (WARM, REQUESTS):
            taken.append(process.memory_info().rss)
    warm, all_of_them = taken
    print(f"{warm / 1e6:.1f} MB, then {all_of_them / 1e6:.1f}")
    assert all_of_them - warm < MOST_BYTES
