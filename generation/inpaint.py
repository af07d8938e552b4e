"""Inpainting: fit the mask, show the model a region, paste the result back.

Masks are uint8 arrays (H, W): 255 is repainted, 0 kept, grey changed in part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from generation.base_models import BaseModelSpec
from generation.blending import Mask, feather, fill, tone_offset, used_box
from generation.crop import Box, CropRegion, Size, cover_crop, crop_region_for
from generation.errors import InvalidRequest
from generation.options import GenerationRequest, InpaintArea, MaskedContent
from preprocess.images import SourceImage

# A mask saved as JPEG is not quite black and white: 5 % either way counts as noise.
_BLACK, _WHITE = 12, 243
MAX_REGION_ASPECT = 2.0  # of a masked region; the model draws narrower strips badly
MAX_ASPECT_DIFFERENCE = 0.02  # between mask and image; a rounded thumbnail has no more


@dataclass(frozen=True)
class InpaintRegion:
    """What may change in an image, and the region through which the model sees it.

    It fits every image of the size that the mask has.
    """

    crop: CropRegion
    content_mask: NDArray[np.bool_]  # (H, W) of the box: pixels that the model must not see
    blend: Mask  # (H, W) of the box: the opacity of what is pasted back
    change: Mask  # (h, w) of the crop's size: 255 changes from the first step on

    def model_input(self, image: Image.Image) -> Image.Image:
        """Return the region as the model sees it (RGB, of the crop's size)."""
        crop = image.crop(self.crop.box)
        if self.content_mask.all():
            crop = Image.new("RGB", crop.size, (128, 128, 128))  # nothing is left to continue
        elif self.content_mask.any():
            pixels = np.asarray(crop, dtype=np.float32)
            filled = fill(pixels, (~self.content_mask).astype(np.float32))
            pixels = np.where(self.content_mask[..., None], filled, pixels)
            crop = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        return self.crop.resize_into(crop)

    def paste_back(self, image: Image.Image, result: Image.Image) -> Image.Image:
        """Return the image with the result under the mask; where `blend` is 0, the same bytes."""
        result = result.crop((0, 0, *self.crop.scaled))
        size = (self.blend.shape[1], self.blend.shape[0])
        if result.size != size:
            result = result.resize(size, Image.Resampling.LANCZOS)
        # Only around what changes: a mask may be a small part of a large photo.
        part = used_box(self.blend)
        blend = self.blend[part[1] : part[3], part[0] : part[2]]
        corner = (self.crop.box[0] + part[0], self.crop.box[1] + part[1])
        target = (*corner, corner[0] + blend.shape[1], corner[1] + blend.shape[0])
        source = np.asarray(image.crop(target), dtype=np.float32)
        pixels = np.asarray(result.crop(part), dtype=np.float32)
        pixels = pixels + tone_offset(source - pixels, blend)
        opacity = (blend / np.float32(255))[..., None]
        # In this form, not source + opacity * (pixels - source), it is exact at both ends.
        mixed = (1 - opacity) * source + opacity * pixels
        pasted = image.copy()
        pasted.paste(Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8)), corner)
        return pasted


def inpaint_region(
    mask: Mask, request: GenerationRequest, strength: float, spec: BaseModelSpec
) -> InpaintRegion:
    """Plan the inpainting of `mask` (H, W), which is not all black."""
    blend = feather(np.where(mask > 0, np.uint8(255), np.uint8(0)), request.mask_blur)
    box: Box = (0, 0, mask.shape[1], mask.shape[0])
    if request.inpaint_area == InpaintArea.MASKED_REGION:
        box = _masked_box(blend, request.inpaint_padding)
    left, top, right, bottom = box
    inside = np.s_[top:bottom, left:right]
    crop = crop_region_for(box, spec)
    # At full strength the model starts from noise and must not see what it replaces: the VAE
    # mixes neighbouring pixels.
    hides = request.masked_content == MaskedContent.FILL or strength == 1.0
    change = feather(mask, request.mask_blur)[inside]
    # A reduced mask keeps the maximum, not the average: thin white lines are still repainted.
    reduction = math.ceil((right - left) / crop.scaled[0])
    if reduction > 1:
        change = ndimage.maximum_filter(change, size=2 * reduction - 1, mode="nearest")
    return InpaintRegion(
        crop=crop,
        content_mask=(mask[inside] == 255) & hides,
        blend=blend[inside],
        change=np.asarray(crop.resize_into(Image.fromarray(change))),
    )


def fit_mask(image: SourceImage, mask: Image.Image | None, size: Size, invert: bool) -> Mask:
    """Return the mask (H, W) at `size`, fitted like the image; without one, from its alpha.

    Raises:
        InvalidRequest: it does not fit the image, or leaves nothing to repaint.
    """
    name = "mask"
    if mask is None:
        if image.alpha is None:
            raise InvalidRequest(
                "mask_from_alpha is on, but the image is opaque everywhere; send one with "
                "transparent parts, or a mask"
            )
        mask, name = ImageOps.invert(image.alpha), "mask_from_alpha"
    if mask.size != image.rgb.size:
        (width, height), (mask_width, mask_height) = image.rgb.size, mask.size
        if abs((mask_width / mask_height) / (width / height) - 1) > MAX_ASPECT_DIFFERENCE:
            raise InvalidRequest(
                f"mask is {mask_width}x{mask_height} and image {width}x{height}: their aspect "
                "ratios differ, so it is not clear which part is meant; send a mask of the "
                "image's size"
            )
        mask = mask.resize(image.rgb.size, Image.Resampling.BILINEAR)
    levels = _snap(ImageOps.invert(mask) if invert else mask)
    if not np.asarray(levels).any():
        colour, switch = ("white", "off") if invert else ("black", "on")
        raise InvalidRequest(
            f"{name} leaves nothing to repaint: it is all {colour}; white is repainted (turn "
            f"mask_invert {switch} if yours means the opposite)"
        )
    fitted = np.asarray(_snap(cover_crop(levels, size)))
    if not fitted.any():
        raise InvalidRequest(
            f"{name} leaves nothing to repaint: a width and height of {size[0]}x{size[1]} cut its "
            "white part off; leave width and height out"
        )
    return fitted


def _snap(mask: Image.Image) -> Image.Image:
    """Make nearly black pixels black, and nearly white ones white."""
    return mask.point(lambda v: 0 if v <= _BLACK else 255 if v >= _WHITE else v)


def _masked_box(blend: Mask, padding: int) -> Box:
    """Return the blended pixels' bounding box with padding, widened to a sensible aspect ratio."""
    height, width = blend.shape
    left, top, right, bottom = used_box(blend)
    spans = (
        (max(0, left - padding), min(width, right + padding), width),
        (max(0, top - padding), min(height, bottom + padding), height),
    )
    longest = max(stop - start for start, stop, _ in spans)
    least = math.ceil(longest / MAX_REGION_ASPECT)
    (left, right), (top, bottom) = (_widen(*span, least) for span in spans)
    return left, top, right, bottom


def _widen(start: int, stop: int, length: int, least: int) -> tuple[int, int]:
    """Make a span at least `least` long around its middle, within 0 to `length`."""
    least = min(max(least, stop - start), length)
    start = min(max(0, (start + stop - least) // 2), length - least)
    return start, start + least
