"""Geometry around the model: frames, masks, canvases, and pasting back.

Pictures are PIL images of mode RGB; masks are uint8 arrays (H, W), 255 = repaint. A picture is
never squashed: scaled by one factor for both sides, then cropped or padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from generation.base_models import BaseModelSpec
from generation.blending import Mask, feather, fill, tone_offset, used_box
from generation.errors import InvalidRequest
from generation.options import InpaintArea, MaskedContent
from generation.plan import GenerationPlan, Mode
from generation.sizes import SIDE_MULTIPLE, Margins
from preprocess.images import SourceImage

# A mask that went through JPEG is not quite black and white: 5 % either way is taken for noise.
_BLACK, _WHITE = 12, 243
MAX_REGION_ASPECT = 2.0  # of a masked region; beyond it the model sees strips, not pictures
MAX_ASPECT_DIFFERENCE = 0.02  # between mask and image: a rounded thumbnail's
# What the model is shown has at most this many times the area it was trained at: beyond, it repeats
# subjects (measured on the miniature: a shape asked for is drawn right in 0.38 of the cases at 1.8
# times the area, in 0.75 where that is reduced to 1.5).
MAX_FRAME_AREA = 1.5
FILL_PIXELS = 4_000_000


def cover_crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale the picture until it covers `size` (width, height), then cut what hangs over."""
    return ImageOps.fit(picture, size, _smooth(picture))


@dataclass(frozen=True)
class Frame:
    """The part of a picture that the model works on, and at what size.

    The model sees `box` scaled to `scaled`, in the upper left of a picture of `size`; what is left
    of that, at most a few pixels except for extreme strips, repeats the edge.
    """

    box: tuple[int, int, int, int]  # left, top, right, bottom, in the picture's pixels
    scaled: tuple[int, int]
    size: tuple[int, int]  # multiples of 8

    @classmethod
    def whole(cls, size: tuple[int, int], scaled: tuple[int, int]) -> Frame:
        """All of a picture of `size`, seen at `scaled`."""
        return cls((0, 0, *size), scaled, scaled)

    def moved(self, left: int, top: int) -> Frame:
        """The same part of a picture in which this one lies so far from the upper left."""
        box = self.box
        return replace(self, box=(box[0] + left, box[1] + top, box[2] + left, box[3] + top))


@dataclass(frozen=True)
class Covering:
    """A picture scaled until it covers `size` and cut, as `cover_crop`, but not yet resampled."""

    picture: Image.Image
    size: tuple[int, int]  # (width, height) in pixels

    def look(self, frame: Frame, resampling: Image.Resampling) -> Image.Image:
        """The frame's part of it, at the frame's size, from the picture's own pixels."""
        (width, height), (own_width, own_height) = self.size, self.picture.size
        scale = max(width / own_width, height / own_height)
        cut_x, cut_y = (own_width - width / scale) / 2, (own_height - height / scale) / 2
        left, top, right, bottom = (side / scale for side in frame.box)
        box = (  # rounding may lead a little outside
            max(cut_x + left, 0),
            max(cut_y + top, 0),
            min(cut_x + right, own_width),
            min(cut_y + bottom, own_height),
        )
        view = self.picture.resize(frame.scaled, resampling, box=box)
        return _into_frame(view, frame)


def frame_of(box: tuple[int, int, int, int], spec: BaseModelSpec) -> Frame:
    """At its own size if the model works well at it; otherwise enlarged or reduced."""
    width, height = box[2] - box[0], box[3] - box[1]
    area, native = width * height, spec.native_size**2
    most = min(spec.max_pixels, MAX_FRAME_AREA * native)
    scale = 1.0
    if area < native:
        scale = math.sqrt(native / area)
    elif area > most:
        scale = math.sqrt(most / area)
    scale = min(scale, spec.max_side / max(width, height))
    while True:
        scaled = max(1, round(width * scale)), max(1, round(height * scale))
        size = tuple(
            max(-(-side // SIDE_MULTIPLE) * SIDE_MULTIPLE, spec.min_side) for side in scaled
        )
        if size[0] * size[1] <= spec.max_pixels or max(scaled) <= spec.min_side:
            return Frame(box, scaled, (size[0], size[1]))
        scale *= 0.995  # the padding has put it over the limit


@dataclass(frozen=True)
class Repaint:
    """One pass: what may change in a picture, and the frame through which the model sees it.

    The mask applies to pictures of one size; the same pass serves every picture of a batch.
    """

    frame: Frame
    hidden: NDArray[np.bool_]  # (H, W) of the box: content that the model must not see
    blend: Mask  # (H, W) of the box: how much of the result is pasted
    change: Mask  # (h, w) of the frame's size: 255 changes from the first step on

    def look(self, picture: Image.Image) -> Image.Image:
        """What the model sees, of the frame's size."""
        view = picture.crop(self.frame.box)
        if self.hidden.all():
            view = Image.new("RGB", view.size, (128, 128, 128))  # nothing is known of it
        elif self.hidden.any():
            pixels = np.asarray(view, dtype=np.float32)
            filled = fill(pixels, (~self.hidden).astype(np.float32))
            pixels = np.where(self.hidden[..., None], filled, pixels)
            view = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        return _into_frame(view, self.frame)

    def paste(self, picture: Image.Image, result: Image.Image) -> Image.Image:
        """The picture with the result in the mask; where `blend` is 0, the same bytes."""
        shown = result.crop((0, 0, *self.frame.scaled))
        size = (self.blend.shape[1], self.blend.shape[0])
        if shown.size != size:
            shown = shown.resize(size, Image.Resampling.LANCZOS)
        # Only around what changes: a mask may be a small part of a large photo.
        part = used_box(self.blend)
        blend = self.blend[part[1] : part[3], part[0] : part[2]]
        corner = (self.frame.box[0] + part[0], self.frame.box[1] + part[1])
        there = (*corner, corner[0] + blend.shape[1], corner[1] + blend.shape[0])
        source = np.asarray(picture.crop(there), dtype=np.float32)
        pixels = np.asarray(shown.crop(part), dtype=np.float32)
        pixels = pixels + tone_offset(source - pixels, blend)
        share = (blend / np.float32(255))[..., None]
        # In this form, not source + share * (pixels - source), it is exact at both ends.
        mixed = (1 - share) * source + share * pixels
        mixed = mixed.round().clip(0, 255).astype(np.uint8)
        pasted = picture.copy()
        pasted.paste(Image.fromarray(mixed), corner)
        return pasted


def repaint(mask: Mask, plan: GenerationPlan, spec: BaseModelSpec) -> Repaint:
    """The pass that repaints `mask` (H, W), which has at least one white or grey pixel."""
    settings = plan.repaint
    assert settings is not None
    blend = feather(np.where(mask > 0, np.uint8(255), np.uint8(0)), settings.mask_blur)
    box = (0, 0, mask.shape[1], mask.shape[0])
    if settings.area is InpaintArea.MASKED_REGION:
        box = _region(blend, settings.padding)
    left, top, right, bottom = box
    inside = np.s_[top:bottom, left:right]
    frame = frame_of(box, spec)
    # At full strength the model starts from noise; what it must not know it must not see either,
    # for the VAE mixes neighbours.
    hides = settings.masked_content is MaskedContent.FILL or plan.strength == 1.0
    hidden = (mask[inside] == 255) & hides
    change = feather(mask, settings.mask_blur)[inside]
    # Of a reduced mask the most counts, not the average: what is white is repainted, however thin.
    reduction = math.ceil((box[2] - box[0]) / frame.scaled[0])
    if reduction > 1:
        change = ndimage.maximum_filter(change, size=2 * reduction - 1, mode="nearest")
    seen = _into_frame(Image.fromarray(change), frame)
    return Repaint(frame, hidden, blend[inside], np.asarray(seen))


@dataclass(frozen=True)
class FittedSource:
    """The picture that work starts from, at the size it is worked on, and what to repaint."""

    picture: Image.Image  # RGB
    mask: Mask | None  # (H, W) of the picture; None: no inpainting


def fit(image: SourceImage, mask: Image.Image | None, plan: GenerationPlan) -> FittedSource:
    """What was sent, covering the size the plan asks for.

    Raises:
        InvalidRequest: the mask fits the image badly, or leaves nothing to repaint.
    """
    # An outpainted picture has its final size later.
    size = image.rgb.size if plan.mode is Mode.OUTPAINT else (plan.width, plan.height)
    fitted = None
    if plan.mode is Mode.INPAINT:
        assert plan.repaint is not None
        fitted = _fitted_mask(image, mask, size, plan.repaint.mask_invert)
    return FittedSource(cover_crop(image.rgb, size), fitted)


def _fitted_mask(
    image: SourceImage, mask: Image.Image | None, size: tuple[int, int], invert: bool
) -> Mask:
    picture, name = image.rgb, "mask"
    if mask is None:
        if image.alpha is None:
            raise InvalidRequest(
                "mask_from_alpha is on, but the image is opaque everywhere; send one with "
                "transparent parts, or a mask"
            )
        mask, name = ImageOps.invert(image.alpha), "mask_from_alpha"
    if mask.size != picture.size:
        difference = (mask.width / mask.height) / (picture.width / picture.height) - 1
        if abs(difference) > MAX_ASPECT_DIFFERENCE:
            raise InvalidRequest(
                f"mask is {mask.width}x{mask.height}, image {picture.width}x{picture.height}: "
                "their aspect ratios differ, so it is not clear which part is meant; send a mask "
                "of the image's size"
            )
        mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    levels = _snapped(ImageOps.invert(mask) if invert else mask)
    if not np.asarray(levels).any():
        colour, switch = ("white", "off") if invert else ("black", "on")
        raise InvalidRequest(
            f"{name} leaves nothing to repaint: it is all {colour}; white is repainted (turn "
            f"mask_invert {switch} if yours means the opposite)"
        )
    fitted = np.asarray(_snapped(cover_crop(levels, size)))
    if not fitted.any():
        raise InvalidRequest(
            f"{name} leaves nothing to repaint: a width and height of {size[0]}x{size[1]} cut its "
            "white part off; leave width and height out"
        )
    return fitted


def _snapped(mask: Image.Image) -> Image.Image:
    """Nearly black to black, nearly white to white."""
    return mask.point(lambda v: 0 if v <= _BLACK else 255 if v >= _WHITE else v)


def margin_mask(size: tuple[int, int], margins: Margins) -> Mask:
    """The mask (H, W) of the margins of an extended picture of `size` (width, height)."""
    mask = np.full((size[1], size[0]), 255, np.uint8)
    mask[margins.top : size[1] - margins.bottom, margins.left : size[0] - margins.right] = 0
    return mask


def extend(picture: Image.Image, margins: Margins) -> Image.Image:
    """The picture, byte for byte, on a canvas with `margins` that continue its colours."""
    width = picture.width + margins.left + margins.right
    height = picture.height + margins.top + margins.bottom
    # What continues the picture is smooth: of a large one, a reduced copy tells it as well.
    step = max(1, math.ceil(math.sqrt(width * height / FILL_PIXELS)))
    small = np.asarray(picture.reduce(step), dtype=np.float32)
    pad = [
        (-(-before // step), -(-after // step))
        for before, after in ((margins.top, margins.bottom), (margins.left, margins.right))
    ]
    known = np.pad(np.ones(small.shape[:2], np.float32), pad)
    filled = fill(np.pad(small, (*pad, (0, 0))), known).round().clip(0, 255).astype(np.uint8)
    start = (pad[1][0] * step - margins.left, pad[0][0] * step - margins.top)
    canvas = Image.fromarray(filled)
    if step > 1:
        canvas = canvas.resize((canvas.width * step, canvas.height * step))
    canvas = canvas.crop((*start, start[0] + width, start[1] + height))
    canvas.paste(picture, (margins.left, margins.top))
    return canvas


def _region(blend: Mask, padding: int) -> tuple[int, int, int, int]:
    """The blended pixels' bounding box with padding, wide enough to be seen as a picture."""
    height, width = blend.shape
    left, top, right, bottom = used_box(blend)
    spans = (
        (max(0, left - padding), min(width, right + padding), width),
        (max(0, top - padding), min(height, bottom + padding), height),
    )
    longest = max(stop - start for start, stop, _ in spans)
    least = math.ceil(longest / MAX_REGION_ASPECT)
    (left, right), (top, bottom) = (_widened(*span, least) for span in spans)
    return left, top, right, bottom


def _widened(start: int, stop: int, length: int, least: int) -> tuple[int, int]:
    """The span made at least `least` long, around its middle, within 0..length."""
    least = min(max(least, stop - start), length)
    start = min(max(0, (start + stop - least) // 2), length - least)
    return start, start + least


def _into_frame(view: Image.Image, frame: Frame) -> Image.Image:
    """A crop of the frame's box, scaled and padded: a mask with 0, a picture by its edge."""
    if view.size != frame.scaled:
        view = view.resize(frame.scaled, _smooth(view))
    if frame.scaled == frame.size:
        return view
    pixels = np.asarray(view)
    pad = [(0, frame.size[1] - frame.scaled[1]), (0, frame.size[0] - frame.scaled[0])]
    if pixels.ndim == 2:
        return Image.fromarray(np.pad(pixels, pad))
    return Image.fromarray(np.pad(pixels, [*pad, (0, 0)], mode="edge"))


def _smooth(image: Image.Image) -> Image.Resampling:
    """How to resize: Lanczos keeps most detail, but it rings, which a mask must not."""
    return Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
