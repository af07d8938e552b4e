"""Fit images to sizes that models work at: nothing is distorted, nothing is resampled twice."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from generation.base_models import MINIATURE_SDXL, SDXL
from generation.crop import CoverFit, CropRegion, cover_crop, crop_region_for
from tests.helpers.comparison import max_difference
from tests.helpers.images import circle, noise

SPECS = st.sampled_from([SDXL, MINIATURE_SDXL])
SIDES = st.integers(1, 5000)

# Control images


@pytest.mark.parametrize("source", [(40, 24), (77, 31), (24, 96), (300, 200)])
@pytest.mark.parametrize("size", [(40, 24), (64, 64), (24, 40)])
def test_a_control_image_fits_as_cover_crop_fits_it(source, size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (*source[::-1], 3), dtype=np.uint8))
    whole = CoverFit(image, size).crop_to(CropRegion.whole(size, size), Image.Resampling.LANCZOS)
    expected = cover_crop(image, size)
    assert max_difference(whole, expected) <= 1


def test_a_region_of_a_control_image_at_any_size():
    x, y = np.meshgrid(np.arange(96), np.arange(48))
    ramp = np.stack([2 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8)
    cover_fit = CoverFit(Image.fromarray(ramp), (48, 48))  # the middle 48 columns, unscaled
    region = CropRegion((8, 16, 24, 32), (32, 32), (32, 32))
    seen = np.asarray(cover_fit.crop_to(region, Image.Resampling.BILINEAR)).astype(float)
    columns = 24 + 8 + (np.arange(32) + 0.5) / 2 - 0.5
    rows = 16 + (np.arange(32) + 0.5) / 2 - 0.5
    assert np.abs(seen[..., 0] - 2 * columns).max() <= 1.5
    assert np.abs(seen[..., 1] - 4 * rows[:, None]).max() <= 2.5
    exact = cover_fit.crop_to(
        CropRegion((8, 16, 24, 32), (16, 16), (16, 16)), Image.Resampling.LANCZOS
    )
    assert np.array_equal(np.asarray(exact), ramp[16:32, 32:48])


def test_a_region_lies_elsewhere_in_a_larger_image():
    region = CropRegion((1, 2, 11, 12), (16, 16), (16, 16))
    assert region.moved(5, 7) == CropRegion((6, 9, 16, 19), (16, 16), (16, 16))


# Cropping


@pytest.mark.parametrize("source", [(400, 300), (300, 400), (256, 256), (97, 61), (600, 200)])
@pytest.mark.parametrize("size", [(128, 128), (192, 96), (96, 192), (512, 384)])
def test_a_circle_stays_round_and_in_the_centre(source, size):
    cropped = cover_crop(circle(source, min(source) / 2), size)
    assert cropped.size == size
    left, top, right, bottom = cropped.convert("L").point(lambda v: 255 * (v > 127)).getbbox()
    scale = max(size[0] / source[0], size[1] / source[1])
    slack = 2 + scale
    assert abs((right - left) - (bottom - top)) <= slack
    assert right - left == pytest.approx(min(source) / 2 * scale, abs=slack)
    assert (left + right) / 2 == pytest.approx(size[0] / 2, abs=slack)
    assert (top + bottom) / 2 == pytest.approx(size[1] / 2, abs=slack)


def test_an_image_that_has_the_size_keeps_its_bytes():
    image = noise((40, 24))
    assert cover_crop(image, (40, 24)).tobytes() == image.tobytes()


@given(st.tuples(SIDES, SIDES), st.tuples(st.integers(1, 300), st.integers(1, 300)))
@settings(max_examples=50, deadline=None)
def test_any_image_covers_any_size(source, size):
    assume(source[0] * source[1] < 500_000)
    cropped = np.asarray(cover_crop(Image.new("RGB", source, (9, 99, 199)), size))
    assert cropped.shape == (size[1], size[0], 3)
    assert (cropped == (9, 99, 199)).all()


# Regions


@given(SIDES, SIDES, SPECS)
@settings(max_examples=300)
def test_a_region_has_a_size_the_model_can_work_at(width, height, spec):
    region = crop_region_for((3, 5, 3 + width, 5 + height), spec)
    for side, scaled in zip(region.size, region.scaled, strict=True):
        assert side % 8 == 0
        assert spec.min_side <= side <= spec.max_side
        assert 1 <= scaled <= side
        assert side - scaled < 8 or side == spec.min_side
    extreme = min(region.scaled) < spec.min_side and max(region.scaled) <= spec.min_side
    assert region.size[0] * region.size[1] <= spec.max_pixels or extreme


@given(SIDES, SIDES, SPECS)
@settings(max_examples=300)
def test_a_region_scales_both_sides_by_one_factor(width, height, spec):
    region = crop_region_for((0, 0, width, height), spec)
    ranges = [
        ((scaled - 0.5) / side, (scaled + 0.5) / side)
        for side, scaled in zip((width, height), region.scaled, strict=True)
        if scaled > 1
    ]
    lowest, highest = max(r[0] for r in ranges), min(r[1] for r in ranges)
    assert lowest <= highest + 1e-9


@given(st.floats(1.02, 1.48), st.floats(0.5, 2.0), SPECS)
@settings(max_examples=100)
def test_a_region_keeps_the_images_size_where_the_model_can_work_at_it(area, aspect, spec):
    width = round(spec.native_size * math.sqrt(area * aspect))
    height = round(spec.native_size * math.sqrt(area / aspect))
    assert spec.native_size**2 <= width * height <= 1.5 * spec.native_size**2
    padded = (-(-width // 8) * 8, -(-height // 8) * 8)
    assert crop_region_for((0, 0, width, height), spec) == CropRegion(
        (0, 0, width, height), (width, height), padded
    )


@pytest.mark.parametrize(
    ("size", "scaled", "size_for_model"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((1500, 1001), (1500, 1001), (1504, 1008)),
        ((512, 512), (1024, 1024), (1024, 1024)),
        ((3072, 3072), (1254, 1254), (1256, 1256)),
        ((8000, 100), (2048, 26), (2048, 256)),
    ],
)
def test_regions_of_known_sizes(size, scaled, size_for_model):
    assert crop_region_for((0, 0, *size), SDXL) == CropRegion((0, 0, *size), scaled, size_for_model)
