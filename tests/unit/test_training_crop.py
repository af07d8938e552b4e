"""Buckets and crops: inside the photo, near its shape, around what matters, and truly told."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocess.crop import (
    BucketRules,
    center_of_mass,
    choose_bucket,
    crop,
    is_short,
    make_buckets,
)
from preprocess.prepare import combine_masks

SDXL = BucketRules(1024, 64, 512, 2048)
MINIATURE = BucketRules(128, 16, 64, 256)
RULES = [SDXL, MINIATURE, BucketRules(768, 64, 384, 1536), BucketRules(100, 8, 50, 200)]

sides = st.integers(64, 400)
sizes = st.tuples(sides, sides)
fast = settings(max_examples=60, deadline=None)


def coordinates(size):
    """An image whose red and green are the pixel's place, as parts of 255."""
    width, height = size
    x = np.tile(np.linspace(0, 255, width), (height, 1))
    y = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([x, y, x * 0], -1).round().astype(np.uint8))


def time_ids(taken):
    """As training.dataset makes them."""
    return (*taken.original_size[::-1], *taken.crop_top_left, *taken.image.size[::-1])


def middle(size):
    return size[0] / 2, size[1] / 2


def white(size):
    return Image.new("L", size, 255)


def spot(size, box):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def cut(size, bucket, centre=None, enlarge=None):
    return crop(coordinates(size), white(size), bucket, centre or middle(size), enlarge)


# --- buckets


def test_the_buckets_of_sdxl():
    buckets = make_buckets(SDXL)
    assert len(buckets) == 33
    published = {  # arXiv:2307.01952, appendix I
        (512, 2048), (512, 1984), (512, 1920), (576, 1792), (640, 1600), (640, 1536), (704, 1472),
        (704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024), (1088, 960),
        (1152, 896), (1216, 832), (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640),
    }  # fmt: skip
    assert published <= set(buckets)


def test_the_buckets_of_the_miniature():
    """An eighth of SDXL's, with an eighth of its step."""
    eighths = tuple((width // 8, height // 8) for width, height in make_buckets(SDXL))
    assert make_buckets(BucketRules(128, 8, 64, 256)) == eighths
    assert len(make_buckets(MINIATURE)) == 17


@fast
@given(
    resolution=st.integers(32, 1536),
    step=st.sampled_from([8, 16, 32]),
    shorter=st.integers(1, 4),
    longer=st.integers(1, 4),
)
def test_any_buckets(resolution, step, shorter, longer):
    rules = BucketRules(resolution, step, resolution // shorter, resolution * longer)
    buckets = make_buckets(rules)
    square = resolution // step * step
    assert (square, square) in buckets
    assert len(set(buckets)) == len(buckets)
    for width, height in buckets:
        assert (height, width) in buckets
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        # No side could be a step longer for the same other side: that is the area's whole loss.
        assert (min(width, height) + step) * max(width, height) > resolution**2 or width == height
        if width != height:
            assert min(width, height) >= rules.min_side
            assert max(width, height) <= rules.max_side


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: str(rules.resolution))
def test_a_photo_of_a_buckets_size_stays_as_it_is(rules):
    buckets = make_buckets(rules)
    assert [choose_bucket(bucket, buckets) for bucket in buckets] == list(buckets)
    for bucket in buckets[:1]:
        taken = cut(bucket, bucket)
        assert taken.image.tobytes() == coordinates(bucket).tobytes()
        assert time_ids(taken) == (*bucket[::-1], 0, 0, *bucket[::-1])


@fast
@given(size=sizes, rules=st.sampled_from(RULES))
def test_the_bucket_is_near_in_aspect(size, rules):
    buckets = make_buckets(rules)
    chosen = choose_bucket(size, buckets)
    assert chosen in buckets
    turned = choose_bucket(size[::-1], buckets)
    assert turned == chosen[::-1]

    def error(bucket):
        return abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1]))

    assert error(chosen) <= min(map(error, buckets)) + 1e-9
    aspects = sorted(w / h for w, h in buckets)
    if aspects[0] <= size[0] / size[1] <= aspects[-1]:
        gaps = [math.log(b / a) for a, b in pairwise(aspects)]
        assert error(chosen) <= max(gaps) / 2 + 1e-9


def test_how_much_of_a_photo_is_lost_at_worst():
    """Between aspects 1:4 and 4:1; a side is cut by this at most."""
    for rules, lost in ((SDXL, 0.074), (MINIATURE, 0.141)):
        aspects = sorted(w / h for w, h in make_buckets(rules))
        assert 1 - min(math.sqrt(a / b) for a, b in pairwise(aspects)) <= lost


def test_square_only():
    assert choose_bucket((4000, 300), ((768, 768),)) == (768, 768)


def test_who_is_short():
    assert not is_short((1024, 1024), (1024, 1024))
    assert is_short((1023, 5000), (1024, 1024))
    assert is_short((5000, 1023), (1024, 1024))
    assert is_short((900, 1200), (832, 1216))


# --- where the centre is


def test_the_center_of_mass():
    assert center_of_mass(white((9, 4))) == middle((9, 4)) == (4.5, 2.0)
    assert center_of_mass(Image.new("L", (9, 4))) == (4.5, 2.0)
    assert center_of_mass(spot((100, 60), (10, 20, 20, 24))) == (15.0, 22.0)
    soft = Image.new("L", (2, 1))
    soft.putdata([1, 3])
    assert center_of_mass(soft) == (1.25, 0.5)


@fast
@given(size=sizes, at=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_centre_lies_in_the_image(size, at):
    left, top = (round(a * (s - 1)) for a, s in zip(at, size, strict=True))
    x, y = center_of_mass(spot(size, (left, top, left + 1, top + 1)))
    assert (x, y) == (left + 0.5, top + 0.5)


# --- crops


def ends(image):
    """Where the first and last pixel of an image of coordinates lie: x, y, x, y of 255."""
    first, last = image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))
    return (*first[:2], *last[:2])


@fast
@given(
    size=sizes,
    rules=st.sampled_from([MINIATURE, BucketRules(100, 8, 50, 200)]),
    at=st.tuples(st.floats(-0.2, 1.2), st.floats(-0.2, 1.2)),
)
def test_any_crop_lies_in_the_photo_and_is_truly_told(size, rules, at):
    bucket = choose_bucket(size, make_buckets(rules))
    centre = (at[0] * size[0], at[1] * size[1])
    taken = cut(size, bucket, centre)
    assert taken.image.size == taken.mask.size == bucket
    assert taken.original_size == size
    assert (np.asarray(taken.mask) == 255).all()

    original_h, original_w, top, left, target_h, target_w = time_ids(taken)
    assert (original_w, original_h, target_w, target_h) == (*size, *bucket)
    scale = max(target_w / original_w, target_h / original_h)
    assert 0 <= left <= round(original_w * scale) - target_w
    assert 0 <= top <= round(original_h * scale) - target_h
    assert 0 in (left, top)
    if min(original_w * scale - target_w, original_h * scale - target_h) > 1:
        pytest.fail("both axes are cut")

    # The pixels are those that the time ids say, to half a pixel and resampling's rounding.
    x0, y0, x1, y1 = ends(taken.image)
    for seen_0, seen_1, side, start, length in (
        (x0, x1, original_w, left, target_w),
        (y0, y1, original_h, top, target_h),
    ):
        unit = 255 / (side * scale)  # of one pixel of the scaled photo
        assert abs(seen_0 - start * unit) <= 1.5 * unit + 255 / side + 2
        assert abs(seen_1 - (start + length) * unit) <= 1.5 * unit + 255 / side + 2


@pytest.mark.parametrize(
    ("x", "left"),
    [(-9, 0), (50, 0), (100, 0), (200, 50), (201, 50), (202, 51), (300, 100), (399, 100)],
)
def test_the_crop_follows_the_centre_up_to_the_edges(x, left):
    assert cut((400, 200), (100, 100), (x, 50)).crop_top_left == (0, left)
    assert cut((200, 400), (100, 100), (50, x)).crop_top_left == (left, 0)


def test_salience_keeps_what_matters():
    """A shape at the right edge of a wide photo: the square around it has all of it."""
    size, box = (300, 100), (230, 30, 270, 70)
    mask = spot(size, box)
    salient = crop(mask.convert("RGB"), mask, (128, 128), center_of_mass(mask), None)
    centred = crop(mask.convert("RGB"), mask, (128, 128), middle(size), None)
    share = 128 * 128 * 0.4 * 0.4
    assert np.asarray(salient.mask).sum() / 255 == pytest.approx(share, rel=0.05)
    assert np.asarray(centred.mask).sum() == 0
    assert salient.crop_top_left == (0, 256)


def test_image_and_mask_stay_together():
    size, box = (333, 217), (120, 80, 200, 160)
    mask = spot(size, box)
    taken = crop(mask.convert("RGB"), mask, (112, 144), center_of_mass(mask), None)
    image, cut_mask = (np.asarray(x.convert("L"), float) for x in (taken.image, taken.mask))
    assert np.abs(image - cut_mask).mean() < 3
    assert abs(center_of_mass(taken.mask)[0] - 56) < 1


def test_a_mask_is_never_overshot():
    mask = spot((300, 200), (100, 50, 200, 150)).point(lambda v: 64 if v else 16)
    taken = crop(mask.convert("RGB"), mask, (128, 128), (150, 100), None)
    assert taken.mask.getextrema() == (16, 64)


# --- short photos


def test_enough_pixels_need_no_model():
    def enlarge(_):
        raise AssertionError("no side is short")

    assert cut((128, 200), (128, 128), enlarge=enlarge).original_size == (128, 200)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("size", [(70, 100), (100, 70), (127, 300), (64, 64)])
def test_a_short_photo_is_enlarged_before_it_is_scaled(size, factor):
    seen = []

    def enlarge(part):
        seen.append(part.size)
        return part.resize((part.width * factor, part.height * factor), Image.Resampling.BICUBIC)

    by_model, plain = cut(size, (128, 128), enlarge=enlarge), cut(size, (128, 128))
    short = min(size)
    assert len(seen) == 1
    assert all(short <= side <= short + 1 for side in seen[0]), "only what is cut out"
    assert by_model.original_size == (size[0] * factor, size[1] * factor)
    assert plain.original_size == size
    assert by_model.crop_top_left == plain.crop_top_left
    difference = np.abs(np.asarray(by_model.image, float) - np.asarray(plain.image, float))
    assert difference.mean() < 1.5


# --- masks


def test_masks_are_multiplied():
    size = (5, 3)
    assert combine_masks(size, []).getextrema() == (255, 255)
    assert combine_masks(size, [None, None]).getextrema() == (255, 255)
    half, third = Image.new("L", size, 128), Image.new("L", size, 85)
    assert combine_masks(size, [half, None]).getextrema() == (128, 128)
    assert combine_masks(size, [half, third]).getextrema() == (42, 42)
    assert (
        combine_masks(size, [third, half]).tobytes() == combine_masks(size, [half, third]).tobytes()
    )
    assert combine_masks(size, [half, Image.new("L", size, 0)]).getextrema() == (0, 0)
