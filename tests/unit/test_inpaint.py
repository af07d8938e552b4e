"""Inpainting's images and masks: what the model sees, and which pixels must not change."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from generation.base_models import MINIATURE_SDXL
from generation.blending import feather
from generation.errors import InvalidRequest
from generation.inpaint import InpaintRegion, inpaint_region
from generation.input_images import InputImages
from generation.options import GenerationRequest
from generation.plan import GenerationPlan
from generation.resolve import resolve
from preprocess.images import SourceImage
from tests.helpers.comparison import max_difference
from tests.helpers.images import circle, noise

QUICK = settings(max_examples=50, deadline=None)


def plan_of(size: tuple[int, int], **changes: object) -> GenerationPlan:
    """Return an inpainting plan for an image of `size`; no file is read for it."""
    images = {"image": Path("image"), "mask": Path("mask")}
    return resolve(replace(GenerationRequest(), **{**images, **changes}), MINIATURE_SDXL, size)


def region_of(mask: np.ndarray, plan: GenerationPlan) -> InpaintRegion:
    return inpaint_region(mask, plan.request, plan.strength, MINIATURE_SDXL)


# Regions


@st.composite
def regions(draw):
    """Draw an image's size, a mask, a plan of either area, and the region; of any scale."""
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
    return size, mask, plan, region_of(mask, plan)


@given(regions())
@QUICK
def test_pixels_outside_the_feathered_mask_keep_their_bytes(drawn):
    size, mask, plan, region = drawn
    image = noise(size)
    assert region.model_input(image).size == region.crop.size
    assert region.change.shape == region.crop.size[::-1]
    pasted = region.paste_back(image, noise(region.crop.size, seed=1))
    assert pasted.size == size
    changed = (np.asarray(pasted) != np.asarray(image)).any(axis=-1)
    left, top, right, bottom = region.crop.box
    within = np.zeros_like(changed)
    within[top:bottom, left:right] = region.blend > 0
    assert not changed[~within].any()
    distance = ndimage.distance_transform_cdt(mask == 0, metric="chessboard")
    assert not changed[distance > plan.request.mask_blur].any()


def test_the_result_is_pasted_whole_under_the_mask():
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96] = 255
    region = region_of(mask, plan_of((128, 128), mask_blur=0))
    image, result = noise((128, 128)), noise((128, 128), seed=1)
    pasted = np.asarray(region.paste_back(image, result))
    assert (pasted[mask == 255] == np.asarray(result)[mask == 255]).all()
    assert (pasted[mask == 0] == np.asarray(image)[mask == 0]).all()


@given(regions())
@QUICK
def test_the_region_contains_the_mask_and_its_padding_and_is_no_narrow_strip(drawn):
    size, mask, plan, region = drawn
    left, top, right, bottom = region.crop.box
    if plan.request.inpaint_area == "whole_picture":
        assert region.crop.box == (0, 0, *size)
        return
    rows, columns = np.nonzero(
        feather(np.where(mask > 0, 255, 0).astype(np.uint8), plan.request.mask_blur)
    )
    padding = plan.request.inpaint_padding
    assert 0 <= left <= max(0, columns.min() - padding)
    assert 0 <= top <= max(0, rows.min() - padding)
    assert min(size[0], columns.max() + 1 + padding) <= right <= size[0]
    assert min(size[1], rows.max() + 1 + padding) <= bottom <= size[1]
    width, height = right - left, bottom - top
    assert width <= 2 * height or height == size[1]
    assert height <= 2 * width or width == size[0]


def model_inputs(region: InpaintRegion, mask: np.ndarray) -> list[bytes]:
    """Return what the model sees of two images that differ under the mask alone."""
    pixels = np.asarray(noise((mask.shape[1], mask.shape[0]))).copy()
    views = [region.model_input(Image.fromarray(pixels)).tobytes()]
    pixels[mask > 0] = (255, 0, 0)
    return [*views, region.model_input(Image.fromarray(pixels)).tobytes()]


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
def test_masked_content_is_hidden_from_the_model_where_it_must_be(
    size, strength, content, value, hidden
):
    mask = np.zeros(size[::-1], np.uint8)
    mask[8:24, 12:32] = value
    plan = plan_of(size, prompt_strength=strength, masked_content=content)
    first, second = model_inputs(region_of(mask, plan), mask)
    assert (first == second) is hidden


@given(regions())
@QUICK
def test_the_model_may_change_the_whole_mask_and_nothing_far_from_it(drawn):
    _, mask, plan, region = drawn
    left, top, right, bottom = region.crop.box
    grown = feather(mask, plan.request.mask_blur)[top:bottom, left:right]
    seen = Image.fromarray(region.change).crop((0, 0, *region.crop.scaled))
    if seen.size == grown.shape[::-1]:
        assert (np.asarray(seen) == grown).all()
    assert not region.change[region.crop.scaled[1] :].any()
    assert not region.change[:, region.crop.scaled[0] :].any()
    assert region.change.any() or region.crop.scaled < grown.shape[::-1]


@pytest.mark.parametrize("shift", [-15, 4, 15])
def test_a_result_of_another_tone_is_brought_to_the_sources(shift):
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 40:90] = 255
    region = region_of(mask, plan_of((128, 128), mask_blur=8))
    source = Image.new("RGB", (128, 128), (60, 120, 200))
    result = Image.new("RGB", (128, 128), (60 + shift, 120 + shift, 200 + shift))
    assert max_difference(region.paste_back(source, result), source) <= 1


def test_another_content_is_not_taken_for_another_tone():
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 40:90] = 255
    region = region_of(mask, plan_of((128, 128), mask_blur=8))
    source, result = (Image.new("RGB", (128, 128), colour) for colour in ("green", "red"))
    pasted = np.asarray(region.paste_back(source, result), int)
    assert np.abs(pasted[mask == 255] - (255, 0, 0)).max() <= 2


# Masks


def fitted(
    mask: Image.Image | None,
    size: tuple[int, int] = (120, 80),
    alpha: Image.Image | None = None,
    **changes: object,
) -> np.ndarray:
    """Return the mask that is used for an image of `size`; without one, by mask_from_alpha."""
    images = {"mask": None, "mask_from_alpha": True} if mask is None else {}
    plan = plan_of(size, **images, **changes)
    source = SourceImage(noise(size), alpha)
    (image,), levels = InputImages(source, mask, {}, size, None).fit(plan)
    assert levels.shape == image.size[::-1]
    return levels


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
def test_a_mask_of_another_aspect_is_rejected(size):
    with pytest.raises(InvalidRequest, match="aspect ratios differ") as raised:
        fitted(half_white(size) if size[0] > 1 else Image.new("L", size, 255))
    assert f"mask is {size[0]}x{size[1]} and image 120x80" in str(raised.value)
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
def test_a_mask_that_leaves_nothing_to_repaint_is_rejected_with_the_remedy(
    value, invert, fragments
):
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


def test_transparent_parts_are_repainted():
    alpha = half_white((120, 80))
    assert (fitted(None, alpha=alpha) == 255 - np.asarray(alpha)).all()
    assert (fitted(None, alpha=alpha, mask_invert=True) == np.asarray(alpha)).all()


def test_mask_from_alpha_of_an_opaque_image_is_rejected():
    with pytest.raises(InvalidRequest, match="opaque everywhere; send one with transparent parts"):
        fitted(None)


def test_transparency_that_leaves_nothing_to_repaint_is_rejected_by_its_name():
    alpha = Image.new("L", (120, 80), 250)
    with pytest.raises(InvalidRequest, match="mask_from_alpha leaves nothing to repaint"):
        fitted(None, alpha=alpha)


def test_a_width_and_height_that_cut_the_mask_away_are_rejected():
    edge = Image.new("L", (200, 80))
    edge.paste(255, (0, 0, 10, 80))
    with pytest.raises(InvalidRequest, match="a width and height of 80x80 cut") as raised:
        fitted(edge, size=(200, 80), width=80, height=80)
    assert "leave width and height out" in str(raised.value)


def test_image_and_mask_are_cropped_alike():
    image = circle((200, 100), 60)
    mask = image.convert("L")
    plan = plan_of((200, 100), width=128, height=128)
    source = SourceImage(image, None)
    (cropped,), levels = InputImages(source, mask, {}, image.size, None).fit(plan)
    difference = np.asarray(cropped.convert("L"), int) - levels.astype(int)
    assert np.mean(np.abs(difference) > 64) < 0.01
