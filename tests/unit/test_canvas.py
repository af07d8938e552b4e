"""Pixels around the model: what fits where, what is hidden, and what must not change."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw
from scipy import ndimage

from generation import canvas
from generation.base_models import MINIATURE_SDXL, SDXL
from generation.blending import MAX_TONE_OFFSET, feather, fill, tone_offset
from generation.canvas import (
    Covering,
    FittedSource,
    Frame,
    Repaint,
    cover_crop,
    extend,
    fit,
    frame_of,
    margin_mask,
    outpaint_passes,
    repaint,
)
from generation.errors import InvalidRequest
from generation.request import GenerationPlan, Margins, resolve
from preprocess.images import SourceImage
from tests.comparison import max_difference
from tests.requests import REQUEST

SPECS = st.sampled_from([SDXL, MINIATURE_SDXL])
SIDES = st.integers(1, 5000)
SMALL = st.tuples(st.integers(1, 40), st.integers(1, 40))
QUICK = settings(max_examples=50, deadline=None)


def plan_of(size: tuple[int, int], **changes: object) -> GenerationPlan:
    """An inpainting plan for an image of `size`; no file is read for it."""
    images = {"image": Path("image"), "mask": Path("mask")}
    return resolve(replace(REQUEST, **{**images, **changes}), MINIATURE_SDXL, size)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def circle(size: tuple[int, int], diameter: float) -> Image.Image:
    picture = Image.new("RGB", size)
    x, y, r = size[0] / 2, size[1] / 2, diameter / 2
    ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r - 1, y + r - 1), fill="white")
    return picture


@pytest.mark.parametrize("source", [(40, 24), (77, 31), (24, 96), (300, 200)])
@pytest.mark.parametrize("size", [(40, 24), (64, 64), (24, 40)])
def test_a_covering_shows_what_cover_crop_would(source, size):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (*source[::-1], 3), dtype=np.uint8))
    whole = Covering(picture, size).look(Frame.whole(size, size), Image.Resampling.LANCZOS)
    expected = cover_crop(picture, size)
    assert max_difference(whole, expected) <= 1


def test_a_covering_shows_a_part_at_any_size():
    x, y = np.meshgrid(np.arange(96), np.arange(48))
    ramp = np.stack([2 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8)
    covering = Covering(Image.fromarray(ramp), (48, 48))  # the middle 48 columns, unscaled
    frame = Frame((8, 16, 24, 32), (32, 32), (32, 32))
    seen = np.asarray(covering.look(frame, Image.Resampling.BILINEAR)).astype(float)
    columns = 24 + 8 + (np.arange(32) + 0.5) / 2 - 0.5
    rows = 16 + (np.arange(32) + 0.5) / 2 - 0.5
    assert np.abs(seen[..., 0] - 2 * columns).max() <= 1.5
    assert np.abs(seen[..., 1] - 4 * rows[:, None]).max() <= 2.5
    exact = covering.look(Frame((8, 16, 24, 32), (16, 16), (16, 16)), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(exact), ramp[16:32, 32:48])


def test_a_frame_lies_elsewhere_in_a_larger_picture():
    frame = Frame((1, 2, 11, 12), (16, 16), (16, 16))
    assert frame.moved(5, 7) == Frame((6, 9, 16, 19), (16, 16), (16, 16))


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


def test_a_picture_that_has_the_size_keeps_its_bytes():
    picture = noise((40, 24))
    assert cover_crop(picture, (40, 24)).tobytes() == picture.tobytes()


@given(st.tuples(SIDES, SIDES), st.tuples(st.integers(1, 300), st.integers(1, 300)))
@QUICK
def test_any_picture_covers_any_size(source, size):
    assume(source[0] * source[1] < 500_000)
    cropped = np.asarray(cover_crop(Image.new("RGB", source, (9, 99, 199)), size))
    assert cropped.shape == (size[1], size[0], 3)
    assert (cropped == (9, 99, 199)).all()


# Frames


@given(SIDES, SIDES, SPECS)
@settings(max_examples=300)
def test_a_frame_is_a_size_the_model_can_work_at(width, height, spec):
    frame = frame_of((3, 5, 3 + width, 5 + height), spec)
    for side, scaled in zip(frame.size, frame.scaled, strict=True):
        assert side % 8 == 0
        assert spec.min_side <= side <= spec.max_side
        assert 1 <= scaled <= side
        assert side - scaled < 8 or side == spec.min_side
    extreme = min(frame.scaled) < spec.min_side and max(frame.scaled) <= spec.min_side
    assert frame.size[0] * frame.size[1] <= spec.max_pixels or extreme


@given(SIDES, SIDES, SPECS)
@settings(max_examples=300)
def test_a_frame_scales_both_sides_by_one_factor(width, height, spec):
    frame = frame_of((0, 0, width, height), spec)
    ranges = [
        ((scaled - 0.5) / side, (scaled + 0.5) / side)
        for side, scaled in zip((width, height), frame.scaled, strict=True)
        if scaled > 1
    ]
    lowest, highest = max(r[0] for r in ranges), min(r[1] for r in ranges)
    assert lowest <= highest + 1e-9


@given(st.floats(1.02, 1.48), st.floats(0.5, 2.0), SPECS)
@settings(max_examples=100)
def test_a_frame_has_the_pictures_own_size_where_the_model_can_work_at_it(area, aspect, spec):
    width = round(spec.native_size * math.sqrt(area * aspect))
    height = round(spec.native_size * math.sqrt(area / aspect))
    assert spec.native_size**2 <= width * height <= 1.5 * spec.native_size**2
    padded = (-(-width // 8) * 8, -(-height // 8) * 8)
    assert frame_of((0, 0, width, height), spec) == Frame(
        (0, 0, width, height), (width, height), padded
    )


@pytest.mark.parametrize(
    ("size", "scaled", "framed"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((1500, 1001), (1500, 1001), (1504, 1008)),
        ((512, 512), (1024, 1024), (1024, 1024)),
        ((3072, 3072), (1254, 1254), (1256, 1256)),
        ((8000, 100), (2048, 26), (2048, 256)),
    ],
)
def test_frames_of_known_sizes(size, scaled, framed):
    assert frame_of((0, 0, *size), SDXL) == Frame((0, 0, *size), scaled, framed)


# Feathers

MASKS = arrays.arrays(np.uint8, SMALL, elements=st.sampled_from([0, 0, 0, 0, 90, 255]))


@given(MASKS, st.integers(0, 20))
@QUICK
def test_a_feather_grows_the_mask_by_no_more_than_was_asked(mask, pixels):
    feathered = feather(mask, pixels)
    assert feathered.dtype == np.uint8
    assert (feathered >= mask).all()
    assert feathered.max() == mask.max()
    if mask.any():
        distance = ndimage.distance_transform_cdt(mask == 0, metric="chessboard")
        assert (feathered[distance > pixels] == 0).all()


@given(MASKS, st.integers(1, 20))
@QUICK
def test_more_mask_is_never_less_feather(mask, pixels):
    more = np.maximum(mask, np.roll(mask, 3, axis=0))
    assert (feather(more, pixels) >= feather(mask, pixels)).all()


@pytest.mark.parametrize("pixels", [2, 3, 8, 31])
@pytest.mark.parametrize("value", [255, 128])
def test_a_feather_fades_from_the_masks_own_value_to_nothing(pixels, value):
    mask = np.zeros((9, 100), np.uint8)
    mask[:, :40] = value
    (profile,) = np.unique(feather(mask, pixels), axis=0)
    assert (profile[:40] == value).all()
    assert (np.diff(profile.astype(int)) <= 0).all()
    assert 0 < profile[40 + pixels // 2] < value or pixels < 4
    assert profile[39 + pixels] > 0 or pixels > 8  # a long fade ends in less than 1 of 255
    assert (profile[40 + pixels :] == 0).all()


def test_no_feather_leaves_the_mask_alone():
    mask = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    assert (feather(mask, 0) == mask).all()


# Filling

WEIGHTS = st.sampled_from([0.0, 0.0, 0.25, 1.0])


@st.composite
def pictures_with_gaps(draw):
    weight = draw(arrays.arrays(np.float32, SMALL, elements=WEIGHTS))
    pixels = np.random.default_rng(draw(st.integers(0, 9))).uniform(20, 230, (*weight.shape, 3))
    return pixels.astype(np.float32), weight


@given(pictures_with_gaps())
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
def test_filling_continues_one_colour_as_it_is(size):
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


# Repainting one part


@st.composite
def repaints(draw):
    """A picture's size, a mask on it and a pass of either area; enlarged, reduced or as it is."""
    size = draw(
        st.sampled_from([(128, 128), (160, 136), (61, 47), (300, 211), (200, 40), (16, 400)])
    )
    x, y = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
    mask = np.zeros((size[1], size[0]), np.uint8)
    far = (y + draw(st.integers(1, 60)), x + draw(st.integers(1, 60)))
    mask[y : far[0], x : far[1]] = draw(st.sampled_from([1, 100, 255]))
    plan = plan_of(
        size,
        mask_blur=draw(st.sampled_from([0, 1, 8, 40])),
        inpaint_area=draw(st.sampled_from(["whole_picture", "masked_region"])),
        inpaint_padding=draw(st.sampled_from([0, 5, 32])),
        prompt_strength=draw(st.sampled_from([0.6, 1.0])),
    )
    return size, mask, plan, repaint(mask, plan, MINIATURE_SDXL)


@given(repaints())
@QUICK
def test_what_lies_outside_the_feathered_mask_keeps_its_bytes(drawn):
    size, mask, plan, part = drawn
    picture = noise(size)
    assert part.look(picture).size == part.frame.size
    assert part.change.shape == part.frame.size[::-1]
    pasted = part.paste(picture, noise(part.frame.size, seed=1))
    assert pasted.size == size
    changed = (np.asarray(pasted) != np.asarray(picture)).any(axis=-1)
    left, top, right, bottom = part.frame.box
    within = np.zeros_like(changed)
    within[top:bottom, left:right] = part.blend > 0
    assert not changed[~within].any()
    distance = ndimage.distance_transform_cdt(mask == 0, metric="chessboard")
    assert not changed[distance > plan.repaint.mask_blur].any()


def test_the_result_is_pasted_whole_under_the_mask():
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96] = 255
    part = repaint(mask, plan_of((128, 128), mask_blur=0), MINIATURE_SDXL)
    picture, result = noise((128, 128)), noise((128, 128), seed=1)
    pasted = np.asarray(part.paste(picture, result))
    assert (pasted[mask == 255] == np.asarray(result)[mask == 255]).all()
    assert (pasted[mask == 0] == np.asarray(picture)[mask == 0]).all()


@given(repaints())
@QUICK
def test_the_region_holds_the_mask_and_its_padding_and_is_no_strip(drawn):
    size, mask, plan, part = drawn
    left, top, right, bottom = part.frame.box
    if plan.repaint.area == "whole_picture":
        assert part.frame.box == (0, 0, *size)
        return
    rows, columns = np.nonzero(
        feather(np.where(mask > 0, 255, 0).astype(np.uint8), plan.repaint.mask_blur)
    )
    padding = plan.repaint.padding
    assert 0 <= left <= max(0, columns.min() - padding)
    assert 0 <= top <= max(0, rows.min() - padding)
    assert min(size[0], columns.max() + 1 + padding) <= right <= size[0]
    assert min(size[1], rows.max() + 1 + padding) <= bottom <= size[1]
    width, height = right - left, bottom - top
    assert width <= 2 * height or height == size[1]
    assert height <= 2 * width or width == size[0]


def painted_under(part: Repaint, mask: np.ndarray) -> list[bytes]:
    """What the model sees of two pictures that differ under the mask alone."""
    pixels = np.asarray(noise((mask.shape[1], mask.shape[0]))).copy()
    views = [part.look(Image.fromarray(pixels)).tobytes()]
    pixels[mask > 0] = (255, 0, 0)
    return [*views, part.look(Image.fromarray(pixels)).tobytes()]


@pytest.mark.parametrize(
    ("strength", "content", "value", "hidden"),
    [
        (1.0, "original", 255, True),
        (0.99, "original", 255, False),
        (0.6, "fill", 255, True),
        (0.6, "noise", 255, False),
        (1.0, "original", 200, False),  # what is changed in part must be known
        (0.6, "fill", 200, False),
    ],
)
@pytest.mark.parametrize("size", [(128, 128), (60, 40)])
def test_what_the_model_may_not_know_does_not_show_in_what_it_sees(
    size, strength, content, value, hidden
):
    mask = np.zeros(size[::-1], np.uint8)
    mask[8:24, 12:32] = value
    plan = plan_of(size, prompt_strength=strength, masked_content=content)
    first, second = painted_under(repaint(mask, plan, MINIATURE_SDXL), mask)
    assert (first == second) is hidden


@given(repaints())
@QUICK
def test_the_model_may_change_the_whole_mask_and_nothing_far_from_it(drawn):
    _, mask, plan, part = drawn
    left, top, right, bottom = part.frame.box
    grown = feather(mask, plan.repaint.mask_blur)[top:bottom, left:right]
    seen = Image.fromarray(part.change).crop((0, 0, *part.frame.scaled))
    if seen.size == grown.shape[::-1]:
        assert (np.asarray(seen) == grown).all()
    assert not part.change[part.frame.scaled[1] :].any()
    assert not part.change[:, part.frame.scaled[0] :].any()
    assert part.change.any() or part.frame.scaled < grown.shape[::-1]


# Tone


def test_without_a_feather_the_tone_is_left_alone():
    blend = np.zeros((40, 40), np.uint8)
    blend[10:30, 10:30] = 255
    assert not tone_offset(np.full((40, 40, 3), 9, np.float32), blend).any()


def test_equal_pictures_need_no_offset():
    blend = feather(margin_mask((64, 64), Margins(20, 20, 20, 20)), 12)
    assert not tone_offset(np.zeros((64, 64, 3), np.float32), blend).any()


@pytest.mark.parametrize("shift", [-15, 4, 15])
def test_a_result_of_another_tone_is_brought_to_the_sources(shift):
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 40:90] = 255
    part = repaint(mask, plan_of((128, 128), mask_blur=8), MINIATURE_SDXL)
    source = Image.new("RGB", (128, 128), (60, 120, 200))
    result = Image.new("RGB", (128, 128), (60 + shift, 120 + shift, 200 + shift))
    assert max_difference(part.paste(source, result), source) <= 1


def test_another_content_is_not_taken_for_another_tone():
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 40:90] = 255
    part = repaint(mask, plan_of((128, 128), mask_blur=8), MINIATURE_SDXL)
    source, result = (Image.new("RGB", (128, 128), colour) for colour in ("green", "red"))
    pasted = np.asarray(part.paste(source, result), int)
    assert np.abs(pasted[mask == 255] - (255, 0, 0)).max() <= 2


@given(
    arrays.arrays(np.uint8, SMALL, elements=st.sampled_from([0, 60, 128, 255])),
    st.floats(-255, 255, width=32),
)
@QUICK
def test_the_offset_is_never_more_than_the_difference_or_the_limit(blend, value):
    offset = tone_offset(np.full((*blend.shape, 3), value, np.float32), blend)
    assert offset.shape == (*blend.shape, 3)
    assert np.abs(offset).max() <= min(abs(value), MAX_TONE_OFFSET) * 1.25 + 0.01


# Outpainting

SIDE_MARGINS = st.builds(Margins, *[st.integers(0, 300)] * 4)


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), SIDE_MARGINS)
@example((2, 3), Margins(1, 0, 2, 3))
@settings(max_examples=300)
def test_the_passes_add_up_to_the_margins_in_small_parts(size, asked):
    sides = (size[0], size[1], size[0], size[1])
    names = ("left", "top", "right", "bottom")
    margins = Margins(
        **{n: min(getattr(asked, n), side) for n, side in zip(names, sides, strict=True)}
    )
    assume(margins)
    passes = list(outpaint_passes(size, margins))
    for name, side in zip(names, sides, strict=True):
        parts = [getattr(part, name) for part in passes]
        assert sum(parts) == getattr(margins, name)
        assert min(parts) >= 0
        assert max(parts) <= 0.3 * side + 1
    assert all(passes)  # none adds nothing


@pytest.mark.parametrize(
    ("margins", "count"),
    [
        (Margins(30, 0, 0, 0), 1),
        (Margins(28, 58, 29, 59), 1),
        (Margins(31, 0, 0, 0), 2),
        (Margins(0, 0, 0, 61), 2),
        (Margins(100, 0, 0, 200), 4),
    ],
)
def test_a_margin_of_up_to_30_percent_takes_one_pass(margins, count):
    assert len(list(outpaint_passes((100, 200), margins))) == count


@pytest.mark.parametrize("most", [canvas.FILL_PIXELS, 2000, 150])
@pytest.mark.parametrize(
    "margins",
    [Margins(20, 10, 5, 1), Margins(0, 0, 0, 30), Margins(61, 0, 0, 0), Margins(1, 1, 1, 1)],
)
def test_extending_keeps_the_picture_byte_for_byte(monkeypatch, most, margins):
    monkeypatch.setattr(canvas, "FILL_PIXELS", most)
    picture = noise((61, 43))
    extended = extend(picture, margins)
    assert extended.size == (61 + margins.left + margins.right, 43 + margins.top + margins.bottom)
    box = (margins.left, margins.top, margins.left + 61, margins.top + 43)
    assert extended.crop(box).tobytes() == picture.tobytes()


@pytest.mark.parametrize("most", [canvas.FILL_PIXELS, 2000, 150])
def test_extending_continues_the_colours(monkeypatch, most):
    monkeypatch.setattr(canvas, "FILL_PIXELS", most)
    picture = Image.new("RGB", (60, 40), (200, 30, 30))
    picture.paste((20, 30, 220), (30, 0, 60, 40))
    extended = np.asarray(extend(picture, Margins(20, 3, 20, 7)), int)
    assert np.abs(extended[23, 0] - (200, 30, 30)).max() < 90
    assert np.abs(extended[23, -1] - (20, 30, 220)).max() < 90
    plain = np.asarray(extend(Image.new("RGB", (61, 43), (9, 99, 199)), Margins(20, 10, 5, 1)), int)
    assert np.abs(plain - (9, 99, 199)).max() <= 1


@given(
    st.tuples(st.integers(1, 50), st.integers(1, 50)), st.builds(Margins, *[st.integers(0, 9)] * 4)
)
@QUICK
def test_the_margins_alone_are_repainted(size, margins):
    extended = extend(noise(size), margins)
    mask = margin_mask(extended.size, margins)
    assert mask.shape == extended.size[::-1]
    kept = mask[margins.top : margins.top + size[1], margins.left : margins.left + size[0]]
    assert (kept == 0).all()
    assert (mask == 0).sum() == size[0] * size[1]
    assert (mask == 255).sum() == mask.size - size[0] * size[1]


# Masks


def fitted(
    mask: Image.Image | None,
    size: tuple[int, int] = (120, 80),
    alpha: Image.Image | None = None,
    **changes: object,
) -> np.ndarray:
    images = {"mask": None, "mask_from_alpha": True} if mask is None else {}
    source = fit(SourceImage(noise(size), alpha), mask, plan_of(size, **images, **changes))
    assert isinstance(source, FittedSource)
    assert source.mask.shape == source.picture.size[::-1]
    return source.mask


def half_white(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_white_is_repainted_unless_inverted():
    white = half_white((120, 80))
    assert (fitted(white) == np.asarray(white)).all()
    assert (fitted(white, mask_invert=True) == 255 - np.asarray(white)).all()


@pytest.mark.parametrize("size", [(240, 160), (60, 40), (61, 40), (119, 80)])
def test_a_mask_of_another_size_and_the_same_aspect_is_resized(size):
    levels = fitted(half_white(size))
    assert levels.shape == (80, 120)
    assert (levels[:, :56] == 255).all()
    assert (levels[:, 64:] == 0).all()


@pytest.mark.parametrize("size", [(80, 120), (100, 80), (120, 100), (1, 1)])
def test_a_mask_of_another_aspect_is_refused(size):
    with pytest.raises(InvalidRequest, match="aspect ratios differ") as raised:
        fitted(half_white(size) if size[0] > 1 else Image.new("L", size, 255))
    assert f"mask is {size[0]}x{size[1]}, image 120x80" in str(raised.value)
    assert "send a mask of the image's size" in str(raised.value)


@pytest.mark.parametrize(
    ("value", "invert", "fragments"),
    [
        (0, False, ["mask leaves nothing to repaint", "all black", "turn mask_invert on"]),
        (12, False, ["all black", "turn mask_invert on"]),
        (255, True, ["mask leaves nothing to repaint", "all white", "turn mask_invert off"]),
        (243, True, ["all white", "turn mask_invert off"]),
    ],
)
def test_a_mask_that_leaves_nothing_to_repaint_is_refused_with_the_remedy(value, invert, fragments):
    with pytest.raises(InvalidRequest) as raised:
        fitted(Image.new("L", (120, 80), value), mask_invert=invert)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_the_noise_of_jpeg_in_a_mask_is_ignored():
    rng = np.random.default_rng(0)
    clean = np.asarray(half_white((120, 80)), int)
    noisy = np.abs(clean - rng.integers(0, 13, clean.shape)).astype(np.uint8)
    assert (fitted(Image.fromarray(noisy)) == clean).all()


def test_grey_stays_grey():
    assert (fitted(Image.new("L", (120, 80), 100)) == 100).all()
    assert (fitted(Image.new("L", (120, 80), 100), mask_invert=True) == 155).all()


def test_what_is_transparent_is_repainted():
    alpha = half_white((120, 80))
    assert (fitted(None, alpha=alpha) == 255 - np.asarray(alpha)).all()
    assert (fitted(None, alpha=alpha, mask_invert=True) == np.asarray(alpha)).all()


def test_transparency_of_an_opaque_image_is_refused():
    with pytest.raises(InvalidRequest, match="opaque everywhere; send one with transparent parts"):
        fitted(None)


def test_transparency_that_leaves_nothing_to_repaint_is_refused_by_its_own_name():
    alpha = Image.new("L", (120, 80), 250)
    with pytest.raises(InvalidRequest, match="mask_from_alpha leaves nothing to repaint"):
        fitted(None, alpha=alpha)


def test_a_width_and_height_that_cut_the_mask_away_are_refused():
    edge = Image.new("L", (200, 80))
    edge.paste(255, (0, 0, 10, 80))
    with pytest.raises(InvalidRequest, match="a width and height of 80x80 cut") as raised:
        fitted(edge, size=(200, 80), width=80, height=80)
    assert "leave width and height out" in str(raised.value)


def test_picture_and_mask_are_cropped_alike():
    picture = circle((200, 100), 60)
    mask = picture.convert("L")
    plan = plan_of((200, 100), width=128, height=128)
    source = fit(SourceImage(picture, None), mask, plan)
    difference = np.asarray(source.picture.convert("L"), int) - source.mask.astype(int)
    assert np.mean(np.abs(difference) > 64) < 0.01
