"""The images of a request: read before anything is loaded, and fitted to the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from generation.blending import Mask
from generation.crop import CoverFit, Size, cover_crop
from generation.inpaint import fit_mask
from generation.options import GenerationRequest
from generation.plan import GenerationPlan, Mode
from generation.resolve import resolve_mode
from preprocess.images import SourceImage, read_image, read_mask


@dataclass(frozen=True)
class InputImages:
    """The images that a request has."""

    image: SourceImage | None
    mask: Image.Image | None  # L
    controls: Mapping[str, SourceImage]  # by the inputs of their ControlNets: controlnet_1 ...
    image_size: Size | None  # (width, height) of the image
    control_size: Size | None  # of the first control image

    def fit(self, plan: GenerationPlan) -> tuple[list[Image.Image], Mask | None]:
        """Return the image, covering the plan's size, in a list, and its mask.

        Raises:
            InvalidRequest: the mask fits the image badly, or leaves nothing to repaint.
        """
        assert self.image is not None
        # Outpainting reaches the plan's size step by step.
        size = self.image.rgb.size if plan.mode is Mode.OUTPAINT else (plan.width, plan.height)
        mask = None
        if plan.mode is Mode.INPAINT:
            mask = fit_mask(self.image, self.mask, size, plan.request.mask_invert)
        return [cover_crop(self.image.rgb, size)], mask

    def fit_controls(self, plan: GenerationPlan) -> dict[str, CoverFit]:
        """Return the control images, covering the plan's size."""
        size = (plan.width, plan.height)
        return {name: CoverFit(control.rgb, size) for name, control in self.controls.items()}


def read_inputs(request: GenerationRequest) -> InputImages:
    """Read a request's images.

    Raises:
        InvalidRequest: they do not add up to a mode.
        BadImage: one cannot be read.
    """
    resolve_mode(request)
    image = read_image(request.image, "image") if request.image else None
    controls = {
        f"controlnet_{n}": read_image(control.image, f"controlnet_{n}_image")
        for n, control in enumerate(request.controls, 1)
        if control.image is not None
    }
    return InputImages(
        image,
        read_mask(request.mask, "mask") if request.mask else None,
        controls,
        image.rgb.size if image else None,
        next((control.rgb.size for control in controls.values()), None),
    )
