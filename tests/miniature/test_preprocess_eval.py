"""The miniature's captions, masks and upscaled images meet the thresholds of tests/evals."""

import numpy as np
import pytest

from preprocess.upscale import REAL_ESRGAN, SWINIR
from tests.evals import preprocess as preprocess_eval

FEWER = 8  # scenes: the command measures 64
CHANCE = 0.05  # by which the mean of so few may be lower


def test_captions_name_the_colour_and_the_shape():
    right = [preprocess_eval.is_right(scene, text) for scene, text in preprocess_eval.captions()]
    assert np.mean(right) >= preprocess_eval.MIN_CAPTIONS


@pytest.mark.parametrize(
    "measure",
    [
        preprocess_eval.masks_of_single_shapes,
        preprocess_eval.masks_of_one_of_two,
        preprocess_eval.masks_of_both,
    ],
)
def test_masks_show_what_the_prompt_names(measure, monkeypatch):
    monkeypatch.setattr(preprocess_eval, "SCENES", FEWER)
    assert np.mean([masked.iou for masked in measure()]) >= preprocess_eval.MIN_IOU - CHANCE


@pytest.mark.parametrize("name", [SWINIR, REAL_ESRGAN])
def test_upscaled_images_are_sharper_than_a_filter_makes_them(name):
    assert (
        np.mean([e.gain for e in preprocess_eval.upscaled(preprocess_eval.SIDES[0], name)])
        >= preprocess_eval.MIN_GAIN
    )


def test_real_esrgan_repairs_what_swinir_keeps(monkeypatch):
    """Blur, noise and JPEG's blocks; the miniature SwinIR has seen clean images alone."""
    monkeypatch.setattr(preprocess_eval, "SCENES", FEWER)
    kept, repaired = (
        np.mean(
            [e.gain for e in preprocess_eval.upscaled(preprocess_eval.SIDES[0], name, worn=True)]
        )
        for name in (SWINIR, REAL_ESRGAN)
    )
    assert repaired > kept + 1
