"""The miniature's captions, masks and enlarged images keep their bars; see preprocess_bars."""

import numpy as np
import pytest

from preprocess.upscale import REAL_ESRGAN, SWINIR
from tests.miniature import preprocess_bars as bars

FEWER = 8  # scenes: the command measures 64
CHANCE = 0.05  # by which the mean of so few may be lower


def test_captions_name_the_colour_and_the_shape():
    right = [bars.is_right(scene, text) for scene, text in bars.captions()]
    assert np.mean(right) >= bars.CAPTION_BAR


@pytest.mark.parametrize(
    "measure", [bars.masks_of_single_shapes, bars.masks_of_one_of_two, bars.masks_of_both]
)
def test_masks_show_what_the_prompt_names(measure, monkeypatch):
    monkeypatch.setattr(bars, "SCENES", FEWER)
    assert np.mean([masked.iou for masked in measure()]) >= bars.IOU_BAR - CHANCE


@pytest.mark.parametrize("name", [SWINIR, REAL_ESRGAN])
def test_enlarged_images_are_sharper_than_a_filter_makes_them(name):
    assert np.mean([e.gain for e in bars.enlarged(bars.SIDES[0], name)]) >= bars.GAIN_BAR


def test_real_esrgan_repairs_what_swinir_keeps(monkeypatch):
    """Blur, noise and JPEG's blocks; the miniature SwinIR has seen clean images alone."""
    monkeypatch.setattr(bars, "SCENES", FEWER)
    kept, repaired = (
        np.mean([e.gain for e in bars.enlarged(bars.SIDES[0], name, worn=True)])
        for name in (SWINIR, REAL_ESRGAN)
    )
    assert repaired > kept + 1
