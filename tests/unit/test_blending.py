"""Feathered masks, fills and tone: what they change, and what they keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from generation.blending import MAX_TONE_OFFSET, feather, fill, tone_offset
from generation.outpaint import margin_mask
from generation.sizes import Margins

SMALL = st.tuples(st.integers(1, 40), st.integers(1, 40))
QUICK = settings(max_examples=50, deadline=None)

# Feathering

MASKS = arrays.arrays(np.uint8, SMALL, elements=st.sampled_from([0, 0, 0, 0, 90, 255]))


@given(MASKS, st.integers(0, 20))
@QUICK
def test_a_feather_grows_the_mask_by_no_more_than_its_width(mask, pixels):
    feathered = feather(mask, pixels)
    assert feathered.dtype == np.uint8
    assert (feathered >= mask).all()
    assert feathered.max() == mask.max()
    if mask.any():
        distance = ndimage.distance_transform_cdt(mask == 0, metric="chessboard")
        assert (feathered[distance > pixels] == 0).all()


@given(MASKS, st.integers(1, 20))
@QUICK
def test_a_larger_mask_never_has_a_smaller_feather(mask, pixels):
    more = np.maximum(mask, np.roll(mask, 3, axis=0))
    assert (feather(more, pixels) >= feather(mask, pixels)).all()


@pytest.mark.parametrize("pixels", [2, 3, 8, 31])
@pytest.mark.parametrize("value", [255, 128])
def test_a_feather_fades_from_the_masks_value_to_0(pixels, value):
    mask = np.zeros((9, 100), np.uint8)
    mask[:, :40] = value
    (profile,) = np.unique(feather(mask, pixels), axis=0)
    assert (profile[:40] == value).all()
    assert (np.diff(profile.astype(int)) <= 0).all()
    assert 0 < profile[40 + pixels // 2] < value or pixels < 4
    assert profile[39 + pixels] > 0 or pixels > 8  # a long fade ends in less than 1 of 255
    assert (profile[40 + pixels :] == 0).all()


def test_a_feather_of_0_keeps_the_mask():
    mask = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    assert (feather(mask, 0) == mask).all()


# Filling

WEIGHTS = st.sampled_from([0.0, 0.0, 0.25, 1.0])


@st.composite
def images_with_gaps(draw):
    weight = draw(arrays.arrays(np.float32, SMALL, elements=WEIGHTS))
    pixels = np.random.default_rng(draw(st.integers(0, 9))).uniform(20, 230, (*weight.shape, 3))
    return pixels.astype(np.float32), weight


@given(images_with_gaps())
@QUICK
def test_filling_keeps_what_is_known_and_invents_nothing_beyond_it(gaps):
    pixels, weight = gaps
    filled = fill(pixels, weight)
    assert filled.shape == pixels.shape
    assert (filled[weight == 1] == pixels[weight == 1]).all()
    if not weight.any():
        assert (filled == 0).all()
        return
    known = pixels[weight > 0]
    assert (filled >= known.min(axis=0) - 0.01).all()
    assert (filled <= known.max(axis=0) + 0.01).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 37), (37, 1), (2, 3), (16, 16), (33, 17)])
def test_filling_continues_one_colour_unchanged(size):
    pixels = np.full((*size, 3), (10, 120, 250), np.float32)
    weight = np.zeros(size, np.float32)
    weight[size[0] // 2, size[1] // 2] = 1
    assert np.allclose(fill(pixels * weight[..., None], weight), (10, 120, 250), atol=0.01)


def test_filling_is_smooth_and_near_what_lies_nearest():
    pixels = np.zeros((64, 64, 1), np.float32)
    pixels[:, 48:] = 200
    weight = np.zeros((64, 64), np.float32)
    weight[:, :16] = weight[:, 48:] = 1
    row = fill(pixels, weight)[32, :, 0]
    assert row[17] < 60 < 140 < row[46]
    assert np.abs(np.diff(row)).max() < 40


# Tone


def test_without_a_feather_the_tone_is_kept():
    blend = np.zeros((40, 40), np.uint8)
    blend[10:30, 10:30] = 255
    assert not tone_offset(np.full((40, 40, 3), 9, np.float32), blend).any()


def test_equal_images_need_no_offset():
    blend = feather(margin_mask((64, 64), Margins(20, 20, 20, 20)), 12)
    assert not tone_offset(np.zeros((64, 64, 3), np.float32), blend).any()


@given(
    arrays.arrays(np.uint8, SMALL, elements=st.sampled_from([0, 60, 128, 255])),
    st.floats(-255, 255, width=32),
)
@QUICK
def test_the_offset_is_never_more_than_the_difference_or_the_limit(blend, value):
    offset = tone_offset(np.full((*blend.shape, 3), value, np.float32), blend)
    assert offset.shape == (*blend.shape, 3)
    assert np.abs(offset).max() <= min(abs(value), MAX_TONE_OFFSET) * 1.25 + 0.01
