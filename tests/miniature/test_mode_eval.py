"""The modes meet their thresholds; `python -m tests.evals.mode` prints the figures."""

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from generation.blending import feather
from tests.evals import inpainting, mode, outpainting
from tests.evals.cases import BLUR, CASES, FEW, cases
from tests.evals.harness import Harness
from tests.evals.inpainting import SEAM_RATIO, gradient, seam_band
from tests.miniature.reference_pipelines import DISTINCT


@pytest.fixture(
    params=[
        pytest.param(2, id="half"),
        pytest.param(1, id="all", marks=pytest.mark.slow),
    ]
)
def divisor(request) -> int:
    """Return by what to divide the report's number of cases, which divides the time too."""
    return request.param


@pytest.fixture
def harness(engine, divisor, tmp_path) -> Harness:
    steps = {1: None, 2: 10}  # the model's default is 20
    return Harness(engine, tmp_path, num_inference_steps=steps[divisor])


def _grows(values):
    return all(a < b for a, b in itertools.pairwise(values))


def test_image_to_image_goes_from_the_source_to_the_prompt(harness, divisor):
    seen = mode.image_to_image(harness, CASES // divisor)
    assert _grows(seen.distances.values())
    assert seen.background_kept[0.45] >= mode.BACKGROUND_KEPT
    assert seen.followed[0.95] >= mode.PROMPT_FOLLOWED


def test_few_steps_at_low_strength_never_fail(harness):
    grid = mode.few_steps(harness)
    assert Counter(g.scheduler for g in grid).keys() == set(DISTINCT)
    assert [g for g in grid if g.forward_passes < 1 or not g.finite] == []
    assert {g.size for g in grid} == {mode.GRID_SIZE}


def test_inpainting_shows_the_prompt_and_no_seam(harness, divisor):
    seen = inpainting.inpainting(harness, CASES // divisor)
    assert seen.changed_outside == 0
    assert seen.repainted >= inpainting.REPAINTED
    assert seen.mean_seam_ratio() <= SEAM_RATIO
    assert seen.seam_ratio("plain") <= SEAM_RATIO


def test_a_seam_would_be_seen():
    case = next(case for case in cases() if case.scene.texture == "plain")
    source, mask = case.source(), case.mask()
    blend = feather(np.asarray(mask), BLUR)[..., None] / 255
    pixels = np.asarray(source, dtype=float)
    darker = Image.fromarray((pixels - 12 * blend).clip(0, 255).astype(np.uint8))
    band = seam_band(mask, BLUR)
    assert gradient(darker)[band].mean() > 2 * SEAM_RATIO * gradient(source)[band].mean()


def test_inpainting_at_odd_sizes_changes_the_mask_only(harness, divisor):
    for seen in inpainting.odd_sizes(harness, FEW // divisor):
        assert seen.changed_outside == 0, seen
        assert seen.changed_inside > 20, seen


def test_masked_content_matters_only_below_full_strength(harness, divisor):
    rows = inpainting.hidden_content(harness, 2 // divisor, steps={1: 8, 2: 3}[divisor])
    assert [row for row in rows if row.strength == 1 and row.different] == []
    assert [row for row in rows if row.strength < 1 and not row.different] == []


def test_lighter_masks_change_more(harness):
    change = inpainting.soft_inpainting(harness)
    assert _grows([change[64], change[128], change[255]])
    assert change[192] > change[128]  # three quarters of the steps are as good as all of them


@pytest.mark.parametrize(
    ("measure", "count"),
    [(outpainting.outpainting, CASES), (outpainting.outpainting_in_two_stages, FEW)],
    ids=["one stage", "two stages"],
)
def test_outpainting_continues_the_image(harness, measure, count, divisor):
    seen = measure(harness, count // divisor)
    assert seen.changed_inside == 0
    assert seen.background_kept == 1
    assert seen.mean_step() <= outpainting.OUTPAINT_STEP
