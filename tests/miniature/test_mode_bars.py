"""The modes keep their bars; `python -m tests.miniature.mode_bars` prints the figures."""

import itertools
from collections import Counter

import numpy as np
import pytest

from tests.miniature import mode_bars
from tests.miniature.mode_bars import (
    BLUR,
    CASES,
    FEW,
    SEAM_RATIO,
    Bench,
    cases,
    gradient,
    seam_band,
)
from tests.miniature.stock import DISTINCT


@pytest.fixture(
    params=[
        pytest.param(2, id="half"),
        pytest.param(1, id="all", marks=pytest.mark.slow),
    ]
)
def divisor(request) -> int:
    """Of the number of the report's cases, each of which takes about as much less time."""
    return request.param


@pytest.fixture
def bench(engine, divisor, tmp_path) -> Bench:
    steps = {1: None, 2: 10}  # the model's own number is 20
    return Bench(engine, tmp_path, num_inference_steps=steps[divisor])


def _grows(values):
    return all(a < b for a, b in itertools.pairwise(values))


def test_image_to_image_goes_from_the_source_to_the_prompt(bench, divisor):
    seen = mode_bars.image_to_image(bench, CASES // divisor)
    assert _grows(seen.distances.values())
    assert seen.background_kept[0.45] >= mode_bars.BACKGROUND_KEPT
    assert seen.followed[0.95] >= mode_bars.PROMPT_FOLLOWED


def test_few_steps_at_low_strength_never_fail(bench):
    grid = mode_bars.few_steps(bench)
    assert Counter(g.scheduler for g in grid).keys() == set(DISTINCT)
    assert [g for g in grid if g.forwards < 1 or not g.finite] == []
    assert {g.size for g in grid} == {mode_bars.GRID_SIZE}


def test_inpainting_shows_the_prompt_and_no_seam(bench, divisor):
    seen = mode_bars.inpainting(bench, CASES // divisor)
    assert seen.changed_outside == 0
    assert seen.repainted >= mode_bars.REPAINTED
    assert seen.mean_seam_ratio() <= SEAM_RATIO
    assert seen.seam_ratio("plain") <= SEAM_RATIO


def test_a_seam_would_be_seen():
    case = next(case for case in cases() if case.scene.texture == "plain")
    source, mask = case.source(), case.mask()
    feather = mode_bars.canvas.feather(np.asarray(mask), BLUR)[..., None] / 255
    pixels = np.asarray(source, dtype=float)
    darker = mode_bars.Image.fromarray((pixels - 12 * feather).clip(0, 255).astype(np.uint8))
    band = seam_band(mask, BLUR)
    assert gradient(darker)[band].mean() > 2 * SEAM_RATIO * gradient(source)[band].mean()


def test_inpainting_at_odd_sizes_changes_the_mask_only(bench, divisor):
    for seen in mode_bars.odd_sizes(bench, FEW // divisor):
        assert seen.changed_outside == 0, seen
        assert seen.changed_inside > 20, seen


def test_what_is_under_the_mask_matters_only_below_full_strength(bench, divisor):
    rows = mode_bars.hidden_content(bench, 2 // divisor)
    assert [row for row in rows if row.strength == 1 and row.different] == []
    assert [row for row in rows if row.strength < 1 and not row.different] == []


def test_lighter_masks_change_more(bench):
    change = mode_bars.soft_inpainting(bench)
    assert _grows([change[64], change[128], change[255]])
    assert change[192] > change[128]  # three quarters of the steps are as good as all of them


@pytest.mark.parametrize(
    ("measure", "count"),
    [(mode_bars.outpainting, CASES), (mode_bars.outpainting_in_two_passes, FEW)],
    ids=["one pass", "two passes"],
)
def test_outpainting_continues_the_picture(bench, measure, count, divisor):
    seen = measure(bench, count // divisor)
    assert seen.changed_inside == 0
    assert seen.background_kept == 1
    assert seen.mean_step() <= mode_bars.OUTPAINT_STEP
