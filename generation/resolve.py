"""From a request to a plan: every rule, every default. Pure: no model, no torch."""

import math
import secrets
from dataclasses import replace

from generation.base_models import BaseModelSpec, GuidanceMode
from generation.errors import InvalidRequest
from generation.options import (
    MAX_NUM_INFERENCE_STEPS,
    SEEDS,
    GenerationRequest,
    Refine,
    Upscale,
)
from generation.plan import BASE_IMAGE_STRENGTH, GenerationPlan, Mode, StagePlan, WeightsUse
from generation.rules import check_request, resolve_controlnets
from generation.schedulers import SCHEDULERS, ScheduleType
from generation.sizes import (
    NO_MARGINS,
    AspectRatio,
    Size,
    extended_size,
    outpaint_steps,
    outpainted_size,
    round_to_multiple,
    size_of_aspect,
    size_of_ratio,
    valid_size,
)
from preprocess.images import MAX_IMAGE_PIXELS
from weights.user.parse import Tokens, parse_source

UPSCALER_FACTOR = 4  # preprocess.upscale.FACTOR, which cannot be imported without torch


def resolve(
    request: GenerationRequest,
    spec: BaseModelSpec,
    image_size: Size | None,
    control_size: Size | None = None,
) -> GenerationPlan:
    """Check every rule and fill in the model's defaults.

    Args:
        image_size: (width, height) in pixels of the image, if there is one.
        control_size: that of the first control image; without an image, outputs have its shape.

    Raises:
        InvalidRequest, or InvalidSource for a reference to weights or a token.
    """
    mode = resolve_mode(request)
    check_request(request, spec)
    controlnets = resolve_controlnets(request, spec)
    size = _size(request, mode, spec, image_size or control_size)
    steps = request.num_inference_steps or spec.num_inference_steps
    scheduler = request.scheduler or spec.scheduler
    limits = (SCHEDULERS[scheduler].max_steps, spec.steps[1] if spec.steps else None)
    most = min([MAX_NUM_INFERENCE_STEPS, *(limit for limit in limits if limit is not None)])
    is_refined, hires = request.refine != Refine.NO_REFINER, None
    if request.hires_fix != 1:
        hires = _hires_stage(request, mode, spec, size, steps, most, is_refined)
    strength = 1.0
    if mode is not Mode.TXT2IMG:
        strength = max(request.prompt_strength, 1 / most)
        steps = at_least_one_step(strength, steps, most)
    refine_steps = request.refine_steps or steps
    if request.refine == Refine.BASE_IMAGE:
        refine_steps = at_least_one_step(BASE_IMAGE_STRENGTH, refine_steps, most)
    first = StagePlan(mode, size, strength, steps, is_refined and hires is None)
    stages = [first] if mode is not Mode.OUTPAINT else _outpaint_stages(first, request, image_size)
    if hires is not None:
        stages.append(hires)
    if request.upscale != Upscale.OFF:
        _check_upscale(request, stages[-1].size)
    guidance = spec.guidance_scale if request.guidance_scale is None else request.guidance_scale
    seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
    return GenerationPlan(
        request=request,
        mode=mode,
        width=size[0],
        height=size[1],
        scheduler=scheduler,
        schedule_type=ScheduleType(request.schedule_type),
        num_inference_steps=steps,
        strength=strength,
        guidance_scale=guidance,
        do_classifier_free_guidance=spec.guidance is GuidanceMode.CLASSIFIER_FREE and guidance > 1,
        refine_steps=refine_steps,
        stages=tuple(stages),
        controlnets=controlnets,
        weights=_weights(request),
        tokens=Tokens(request.hf_api_token or None, request.civitai_api_token or None),
        # seed + k for image k, so that each can be made again alone
        seeds=tuple((seed + k) % SEEDS for k in range(request.num_outputs)),
    )


def at_least_one_step(strength: float, steps: int, most: int) -> int:
    """Return a number of steps from `steps` to `most` of which `strength` leaves one to run.

    The strength stays: the schedule gets finer until int(strength x steps), diffusers' count of
    steps, is not zero.
    """
    while int(steps * strength) < 1 and steps < most:
        steps += 1
    return steps


def _outpaint_stages(
    first: StagePlan, request: GenerationRequest, size: Size | None
) -> list[StagePlan]:
    """Return the stages that extend an image of `size` step by step."""
    assert size is not None
    stages = []
    left, top = request.outpaint.left, request.outpaint.top  # that remain to be added
    for margins in outpaint_steps(size, request.outpaint):
        left, top = left - margins.left, top - margins.top
        size, offset = extended_size(size, margins), (left, top)
        stages.append(replace(first, mode=Mode.INPAINT, size=size, margins=margins, offset=offset))
    return stages


def _hires_stage(
    request: GenerationRequest,
    mode: Mode,
    spec: BaseModelSpec,
    size: Size,
    steps: int,
    most: int,
    is_refined: bool,
) -> StagePlan:
    """Return the stage that denoises the enlarged images again."""
    factor = request.hires_fix
    if mode not in (Mode.TXT2IMG, Mode.IMG2IMG):
        raise InvalidRequest(
            f"hires_fix is {factor:g}, and this is {mode}: denoising again would change what has"
            " to stay; leave hires_fix at 1, and use upscale for a larger image"
        )
    width, height = (round_to_multiple(side * factor) for side in size)
    if width * height > spec.max_hires_pixels:
        largest = math.floor(100 * math.sqrt(spec.max_hires_pixels / (size[0] * size[1]))) / 100
        raise InvalidRequest(
            f"hires_fix is {factor:g}, which makes {width}x{height} of {size[0]}x{size[1]};"
            f" {spec.name} generates at most {spec.max_hires_pixels} pixels: use hires_fix up to"
            f" {largest:g}, and upscale for more"
        )
    strength = request.hires_strength
    strength = max(spec.hires_strength if strength is None else strength, 1 / most)
    steps = at_least_one_step(strength, steps, most)
    return StagePlan(Mode.IMG2IMG, (width, height), strength, steps, is_refined)


def _size(request: GenerationRequest, mode: Mode, spec: BaseModelSpec, image: Size | None) -> Size:
    """Return the size of the images before hires and upscale."""
    width, height, ratio = request.width, request.height, request.aspect_ratio
    given = [name for name in ("width", "height") if getattr(request, name) is not None]
    if ratio is not None and given:
        raise InvalidRequest(
            f"aspect_ratio={ratio} is given together with {' and '.join(given)}; give one or the"
            " other"
        )
    if mode is Mode.OUTPAINT:
        if ratio is not None or given:
            name = "aspect_ratio" if ratio else given[0]
            raise InvalidRequest(
                f"{name}={getattr(request, name)} is given together with outpaint_*; the size"
                f" follows from the image and the margins, so leave {name} out"
            )
        assert image is not None
        return outpainted_size(image, request.outpaint)
    if ratio is not None:
        return size_of_ratio(AspectRatio(ratio), spec)
    if image is None and not given:
        return spec.native_size, spec.native_size
    if image is not None and not given:
        # Inpainting returns the image at the size it has.
        return image if mode is Mode.INPAINT else size_of_aspect(*image, spec)
    return valid_size(width, height, image, spec)


def _check_upscale(request: GenerationRequest, size: Size) -> None:
    # The model makes four times the side, whatever is made of that.
    pixels = size[0] * size[1] * UPSCALER_FACTOR**2
    if pixels > MAX_IMAGE_PIXELS:
        raise InvalidRequest(
            f"upscale is {request.upscale}, and images of {size[0]}x{size[1]} are too large for it:"
            f" they may have at most {MAX_IMAGE_PIXELS // UPSCALER_FACTOR**2} pixels; ask for a"
            f" smaller width, height and hires_fix, or use upscale={Upscale.OFF}"
        )


def _weights(request: GenerationRequest) -> tuple[WeightsUse, ...]:
    named = request.replicate_weights.strip()
    source = parse_source(named, "replicate_weights") if named else None
    uses = [WeightsUse("replicate_weights", source, request.lora_scale)]
    scales = request.lora_scales or (1.0,) * len(request.loras)
    for k, (reference, scale) in enumerate(zip(request.loras, scales, strict=True)):
        name = f"loras[{k}]"
        uses.append(WeightsUse(name, parse_source(reference, name), scale))
    return tuple(uses)


def resolve_mode(request: GenerationRequest) -> Mode:
    """Return what the request does: replicate/cog-sdxl's rule, and outpainting.

    Raises:
        InvalidRequest: the images do not add up to a mode.
    """
    masks = [name for name in ("mask", "mask_from_alpha") if getattr(request, name)]
    if request.image is None:
        for name in [*masks, *(["outpaint_*"] if request.outpaint != NO_MARGINS else [])]:
            raise InvalidRequest(f"{name} is given without an image; give the image it is about")
        return Mode.TXT2IMG
    if len(masks) > 1:
        raise InvalidRequest("mask and mask_from_alpha are both given; give one of them")
    if request.outpaint != NO_MARGINS:
        if masks:
            raise InvalidRequest(
                f"{masks[0]} and outpaint_* are both given; repaint and extend in two requests"
            )
        return Mode.OUTPAINT
    return Mode.INPAINT if masks else Mode.IMG2IMG
