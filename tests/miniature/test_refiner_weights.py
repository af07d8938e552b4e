"""Images of the miniature refiner are no worse than the base model's, and show the same."""

import pytest

from tests.helpers.comparison import max_difference
from weights.miniature.evaluate import FOLDER
from weights.miniature.evaluate_refiner import REFINER_FOLDER, STYLES, Score, score_styles

CAPTIONS = 6  # of the 32 of `python -m weights.miniature.evaluate_refiner`
TOLERANCE = 0.1  # dB, for kernels that sum in another order


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    return score_styles(FOLDER, REFINER_FOLDER, CAPTIONS)


@pytest.mark.parametrize("style", STYLES[1:])
def test_refined_images_are_no_worse_than_the_bases(scores, style):
    assert scores[style].mean_psnr >= scores["base alone"].mean_psnr - TOLERANCE


@pytest.mark.parametrize("style", STYLES[1:])
def test_refining_changes_every_image_but_not_its_background(scores, style):
    for before, after in zip(scores["base alone"].rows, scores[style].rows, strict=True):
        assert max_difference(before.picture, after.picture) > 1
        assert before.seen.background == after.seen.background
