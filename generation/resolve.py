"""From a request to a plan: every rule, every default. Pure: no model, no torch."""

import math
import secrets
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeVar

from generation.base_models import BaseModelSpec, GuidanceMode
from generation.controlnets import NO_CONTROL, ControlMapsPlan, resolve_controlnets
from generation.errors import InvalidRequest
from generation.options import (
    MAX_NUM_INFERENCE_STEPS,
    SEEDS,
    GenerationRequest,
    InpaintArea,
    MaskedContent,
    OutputFormat,
    Refine,
    Upscale,
    Upscaler,
)
from generation.plan import (
    BASE_IMAGE_STRENGTH,
    GenerationPlan,
    HiresPlan,
    Mode,
    OutputPlan,
    RefinePlan,
    RepaintPlan,
    StagePlan,
    WeightsUse,
    resolve_mode,
)
from generation.rules import check_request
from generation.schedulers import SCHEDULERS, ScheduleType
from generation.sizes import (
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
from preprocess.annotators import AnnotatorSettings
from preprocess.images import MAX_IMAGE_PIXELS
from weights.user.parse import Tokens, parse_source, shown

T = TypeVar("T")

UPSCALER_FACTOR = 4  # preprocess.upscale.FACTOR, which cannot be imported without torch

# Never written into files: secrets, the client's files, and what other fields of the metadata say.
_EXCLUDED_FROM_METADATA = {
    *("hf_api_token", "civitai_api_token", "image", "mask"),
    *("prompt", "negative_prompt", "seed", "num_outputs", "outpaint", "controls"),
    *("output_format", "output_quality", "embed_parameters"),
}


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
        InvalidRequest: naming the value, the rule and the remedy.
        InvalidSource: the same, for a reference to weights or a token.
    """
    mode = resolve_mode(request)
    check_request(request, spec)
    weights = _weights(request)
    control_maps = ControlMapsPlan(
        AnnotatorSettings(request.canny_low_threshold, request.canny_high_threshold),
        returned=request.return_control_maps or request.control_maps_only,
        only=request.control_maps_only,
    )
    controlnets = resolve_controlnets(request.controls, control_maps, spec)
    size = _size(request, mode, spec, image_size or control_size)
    steps = _default(request.num_inference_steps, spec.num_inference_steps)
    scheduler = _default(request.scheduler, spec.scheduler)
    most = _most_steps(scheduler, spec)
    hires = _hires(request, mode, spec, size, steps, most)
    strength = 1.0 if mode is Mode.TXT2IMG else request.prompt_strength
    strength, steps = _at_least_one_step(strength, steps, most)
    refine = _refine(request, steps, most)
    guidance_scale = _default(request.guidance_scale, spec.guidance_scale)
    cfg = spec.guidance is GuidanceMode.CLASSIFIER_FREE and guidance_scale > 1
    first = StagePlan(mode, *size, strength, steps, is_refined=bool(refine and not hires))
    return GenerationPlan(
        mode=mode,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=size[0],
        height=size[1],
        scheduler=scheduler,
        schedule_type=ScheduleType(request.schedule_type),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        do_classifier_free_guidance=cfg,
        guidance_start=request.guidance_start,
        guidance_end=request.guidance_end,
        clip_skip=request.clip_skip,
        strength=strength,
        repaint=_repaint(request) if mode in (Mode.INPAINT, Mode.OUTPAINT) else None,
        controlnets=controlnets,
        control_maps=control_maps,
        refine=refine,
        weights=weights,
        tokens=Tokens(request.hf_api_token or None, request.civitai_api_token or None),
        hires=hires,
        stages=tuple(_stages(first, request, image_size, hires)),
        upscale=_upscale(request, (hires.width, hires.height) if hires else size),
        upscaler=Upscaler(request.upscaler),
        check_safety=not request.disable_safety_checker,
        watermark=request.apply_watermark,
        output=OutputPlan(
            OutputFormat(request.output_format),
            request.output_quality,
            recorded_inputs(request) if request.embed_parameters else None,
        ),
        seeds=_seeds(request.seed, request.num_outputs),
    )


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


def _stages(
    first: StagePlan, request: GenerationRequest, image: Size | None, hires: HiresPlan | None
) -> Iterator[StagePlan]:
    """Yield the stages of a plan; `first` is the only one but for outpainting and hires."""
    if first.mode is Mode.OUTPAINT and image is not None:
        left, top = request.outpaint.left, request.outpaint.top  # that remain to be added
        size = image
        for margins in outpaint_steps(image, request.outpaint):
            left, top = left - margins.left, top - margins.top
            size = extended_size(size, margins)
            stage = replace(first, mode=Mode.INPAINT, width=size[0], height=size[1])
            yield replace(stage, margins=margins, offset=(left, top))
    else:
        yield first
    if hires is not None:
        size, steps = (hires.width, hires.height), hires.num_inference_steps
        is_refined = request.refine != Refine.NO_REFINER
        yield StagePlan(Mode.IMG2IMG, *size, hires.strength, steps, is_refined)


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
    if image is not None and not given:
        # Inpainting returns the image at the size it has.
        return image if mode is Mode.INPAINT else size_of_aspect(*image, spec)
    return valid_size(width, height, image, spec)


def _most_steps(scheduler: str, spec: BaseModelSpec) -> int:
    limits = (SCHEDULERS[scheduler].max_steps, spec.steps[1] if spec.steps else None)
    return min([MAX_NUM_INFERENCE_STEPS, *(limit for limit in limits if limit is not None)])


def _at_least_one_step(strength: float, steps: int, most: int) -> tuple[float, int]:
    """Return (strength, steps) so that int(strength x steps), diffusers' count, is not zero.

    The strength stays: the schedule gets finer until one of its steps fits in, up to `most` steps.
    """
    strength = max(strength, 1 / most)
    while int(steps * strength) < 1:
        steps += 1
    return strength, steps


def _refine(request: GenerationRequest, steps: int, most: int) -> RefinePlan | None:
    style = Refine(request.refine)
    if style is Refine.NO_REFINER:
        return None
    steps = _default(request.refine_steps, steps)
    if style is Refine.BASE_IMAGE:
        _, steps = _at_least_one_step(BASE_IMAGE_STRENGTH, steps, most)
    return RefinePlan(style, request.high_noise_frac, steps)


def _hires(
    request: GenerationRequest, mode: Mode, spec: BaseModelSpec, size: Size, steps: int, most: int
) -> HiresPlan | None:
    factor = request.hires_fix
    if factor == 1:
        return None
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
    strength = _default(request.hires_strength, spec.hires_strength)
    return HiresPlan(width, height, *_at_least_one_step(strength, steps, most))


def _repaint(request: GenerationRequest) -> RepaintPlan:
    return RepaintPlan(
        mask_invert=request.mask_invert,
        mask_blur=request.mask_blur,
        masked_content=MaskedContent(request.masked_content),
        area=InpaintArea(request.inpaint_area),
        padding=request.inpaint_padding,
        outpaint=request.outpaint,
    )


def _upscale(request: GenerationRequest, size: Size) -> int:
    if request.upscale == Upscale.OFF:
        return 1
    # The model makes four times the side, whatever is made of that.
    pixels = size[0] * size[1] * UPSCALER_FACTOR**2
    if pixels > MAX_IMAGE_PIXELS:
        raise InvalidRequest(
            f"upscale is {request.upscale}, and images of {size[0]}x{size[1]} are too large for it:"
            f" they may have at most {MAX_IMAGE_PIXELS // UPSCALER_FACTOR**2} pixels; ask for a"
            f" smaller width, height and hires_fix, or use upscale={Upscale.OFF}"
        )
    return int(request.upscale)


def _weights(request: GenerationRequest) -> tuple[WeightsUse, ...]:
    named = request.replicate_weights.strip()
    source = parse_source(named, "replicate_weights") if named else None
    uses = [WeightsUse("replicate_weights", source, request.lora_scale)]
    scales = request.lora_scales or (1.0,) * len(request.loras)
    for k, (reference, scale) in enumerate(zip(request.loras, scales, strict=True)):
        name = f"loras[{k}]"
        uses.append(WeightsUse(name, parse_source(reference, name), scale))
    return tuple(uses)


def _seeds(seed: int | None, count: int) -> tuple[int, ...]:
    """Return seed + k for image k, so that each can be made again alone."""
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    return tuple((seed + k) % SEEDS for k in range(count))


def recorded_inputs(request: GenerationRequest) -> dict[str, object]:
    """Return the inputs to record beside the prompts; addresses without queries and content."""
    recorded: dict[str, object] = {
        entry.name: value
        for entry in fields(request)
        if entry.name not in _EXCLUDED_FROM_METADATA
        and (value := getattr(request, entry.name)) not in (None, "", ())
    }
    recorded |= {f"outpaint_{side}": margin for side, margin in vars(request.outpaint).items()}
    for k, control in enumerate(request.controls, 1):
        if control.control_type != NO_CONTROL:
            recorded[f"controlnet_{k}"] = control.control_type
            for name in ("conditioning_scale", "start", "end", "is_map"):
                recorded[f"controlnet_{k}_{name}"] = getattr(control, name)
    if request.replicate_weights:
        recorded["replicate_weights"] = shown(request.replicate_weights.strip())
    if request.loras:
        recorded["loras"] = [shown(reference) for reference in request.loras]
        recorded["lora_scales"] = list(request.lora_scales)
    return recorded
