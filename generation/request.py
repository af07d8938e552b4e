"""What is asked, and every rule about it. Nothing here loads a model or imports torch."""

import math
import secrets
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path

from generation.base_models import FEW_STEPS_OUTPUTS, BaseModelSpec, Guidance
from generation.controlnets import NO_CONTROL, ControlRequest, ControlsPlan, resolve_controls
from generation.errors import InvalidRequest
from generation.rules import one_of, within
from generation.schedulers import SCHEDULERS, ScheduleType
from preprocess.annotators import AnnotatorSettings
from preprocess.images import MAX_IMAGE_PIXELS
from weights.user.parse import Source, Tokens, parse_source, shown

SIDE_MULTIPLE = 8  # pixels per latent
MAX_NUM_OUTPUTS = FEW_STEPS_OUTPUTS  # of any model
MAX_NUM_INFERENCE_STEPS = 500
MAX_GUIDANCE_SCALE = 50.0
MAX_MASK_BLUR = 128  # pixels
MAX_INPAINT_PADDING = 1024  # pixels
MAX_OUTPUT_QUALITY = 100
MAX_HIRES_FACTOR = 4.0
UPSCALER_FACTOR = 4  # preprocess.upscale.FACTOR, which cannot be imported without torch
MAX_LORAS = 8
MAX_LORA_SCALE = 10.0  # either way; beyond about 3 most LoRAs leave nothing of a picture
SEEDS = 2**32
BASE_IMAGE_STRENGTH = 0.3  # replicate/cog-sdxl: diffusers' default for image to image


class Mode(StrEnum):
    """The kinds of work, told apart by which images a request brings."""

    TXT2IMG = "txt2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"
    OUTPAINT = "outpaint"


class InpaintArea(StrEnum):
    """What the model sees of a picture in which something is repainted."""

    WHOLE_PICTURE = "whole_picture"
    MASKED_REGION = "masked_region"


class MaskedContent(StrEnum):
    """What repainting starts from under the mask."""

    ORIGINAL = "original"
    FILL = "fill"  # the surroundings' colours, continued inwards
    NOISE = "noise"


class Refine(StrEnum):
    """Whether and how SDXL's refiner works on the picture; replicate/cog-sdxl's names."""

    NO_REFINER = "no_refiner"
    EXPERT_ENSEMBLE = "expert_ensemble_refiner"
    BASE_IMAGE = "base_image_refiner"


class Upscale(StrEnum):
    """How many times as wide and high pictures become in the end."""

    OFF = "off"
    TWICE = "2"
    FOUR_TIMES = "4"


class AspectRatio(StrEnum):
    """Width to height."""

    SQUARE = "1:1"
    LANDSCAPE_3_2 = "3:2"
    PORTRAIT_2_3 = "2:3"
    LANDSCAPE_4_3 = "4:3"
    PORTRAIT_3_4 = "3:4"
    LANDSCAPE_16_9 = "16:9"
    PORTRAIT_9_16 = "9:16"


# Of one megapixel, close to the ratio and among the sizes that SDXL was trained at
# (arXiv:2307.01952, appendix I); other models' are these, scaled to their own area.
_SIZES = {
    AspectRatio.SQUARE: (1024, 1024),
    AspectRatio.LANDSCAPE_3_2: (1216, 832),
    AspectRatio.PORTRAIT_2_3: (832, 1216),
    AspectRatio.LANDSCAPE_4_3: (1152, 896),
    AspectRatio.PORTRAIT_3_4: (896, 1152),
    AspectRatio.LANDSCAPE_16_9: (1344, 768),
    AspectRatio.PORTRAIT_9_16: (768, 1344),
}


class Upscaler(StrEnum):
    """Which model enlarges pictures."""

    SWINIR = "SwinIR"
    REAL_ESRGAN = "Real-ESRGAN"


class OutputFormat(StrEnum):
    """What kind of files pictures become; the value is their suffix."""

    PNG = "png"  # lossless
    WEBP = "webp"
    JPG = "jpg"


@dataclass(frozen=True)
class Margins:
    """Pixels to add on each side of a picture."""

    left: int
    top: int
    right: int
    bottom: int

    def __bool__(self) -> bool:
        return self != Margins(0, 0, 0, 0)


@dataclass(frozen=True)
class GenerationRequest:
    """What was asked. None leaves a value to the model's own default, or the seed to chance."""

    model: str | None  # None: the container's own
    prompt: str
    negative_prompt: str
    image: Path | None
    mask: Path | None  # white = repaint
    width: int | None  # pixels
    height: int | None  # pixels
    aspect_ratio: str | None  # in the place of width and height
    num_outputs: int
    scheduler: str | None
    schedule_type: str
    num_inference_steps: int | None
    guidance_scale: float | None  # 1 or less: no guidance pass
    guidance_start: float  # shares of the steps between which that pass runs
    guidance_end: float
    clip_skip: int  # A1111's: 1 reads the text encoder's last layer, 2 the one before
    prompt_strength: float  # 0 keeps the image, 1 ignores it
    mask_from_alpha: bool  # transparent = repaint
    mask_invert: bool
    mask_blur: int  # pixels of the picture that comes out
    masked_content: str
    inpaint_area: str
    inpaint_padding: int  # pixels
    outpaint: Margins
    controls: tuple[ControlRequest, ...]
    canny_low_threshold: int  # of a gradient, 1 to 255: an edge goes on down to this
    canny_high_threshold: int  # and starts at this
    return_control_maps: bool  # before the pictures
    control_maps_only: bool  # instead of pictures
    refine: str
    high_noise_frac: float  # the base model's share of the noise levels
    refine_steps: int | None
    replicate_weights: str  # a reference, see weights.references; empty: the operator's
    lora_scale: float  # of replicate_weights, or of the operator's
    loras: tuple[str, ...]  # references
    lora_scales: tuple[float, ...]  # one each, or none: 1
    hf_api_token: str | None = field(repr=False)
    civitai_api_token: str | None = field(repr=False)
    hires_fix: float  # times the side of a second pass; 1: none
    hires_strength: float | None  # 0 keeps what the first pass has drawn, 1 ignores it
    upscale: str
    upscaler: str
    disable_safety_checker: bool
    apply_watermark: bool  # the invisible one
    output_format: str
    output_quality: int  # 1 to 100; of webp and jpg
    embed_parameters: bool  # write into the files how they were made
    seed: int | None


@dataclass(frozen=True)
class WeightsUse:
    """Trained weights in a request; without a source, those that the operator has set up."""

    name: str  # of the input, for messages
    source: Source | None
    scale: float


@dataclass(frozen=True)
class RepaintPlan:
    """How a part of a picture is repainted; inpainting's and outpainting's own settings."""

    mask_invert: bool
    mask_blur: int  # pixels
    masked_content: MaskedContent
    area: InpaintArea
    padding: int  # pixels
    outpaint: Margins


@dataclass(frozen=True)
class RefinePlan:
    """What the refiner does."""

    style: Refine
    high_noise_frac: float
    num_inference_steps: int


@dataclass(frozen=True)
class HiresPlan:
    """A second pass over the picture, enlarged."""

    width: int  # of the pictures that come out of it
    height: int
    strength: float
    num_inference_steps: int  # of the whole schedule


@dataclass(frozen=True)
class OutputPlan:
    """How pictures become files."""

    format: OutputFormat
    quality: int
    parameters: dict[str, object] | None  # what was asked, by predict's names; None: not written


@dataclass(frozen=True)
class GenerationPlan:
    """A request with every value settled; what the engine carries out."""

    mode: Mode
    prompt: str
    negative_prompt: str
    width: int  # of the pictures that come out, but for hires and upscale
    height: int
    scheduler: str
    schedule_type: ScheduleType
    num_inference_steps: int  # of the whole schedule: the last strength x steps of it run
    guidance_scale: float
    guided: bool  # whether a second, unconditional pass runs at each step (arXiv:2207.12598)
    guidance_start: float  # shares of the steps: outside of them it does not (arXiv:2404.07724)
    guidance_end: float
    clip_skip: int
    strength: float  # 1 except where an image is given
    repaint: RepaintPlan | None
    controls: ControlsPlan
    refine: RefinePlan | None
    weights: tuple[WeightsUse, ...]  # the first: replicate_weights or the operator's
    tokens: Tokens
    hires: HiresPlan | None
    upscale: int  # times the side, after every pass; 1: as they are
    upscaler: Upscaler
    check_safety: bool
    watermark: bool
    output: OutputPlan
    seeds: tuple[int, ...]  # one per picture

    @property
    def skipped_steps(self) -> int:
        """Steps of the schedule that an image's strength leaves out, counted as diffusers does."""
        return self.num_inference_steps - int(self.num_inference_steps * self.strength)


def resolve_mode(request: GenerationRequest) -> Mode:
    """Which kind of work the request is: replicate/cog-sdxl's rule, and outpainting.

    Raises:
        InvalidRequest: the images do not add up to one.
    """
    masks = [name for name in ("mask", "mask_from_alpha") if getattr(request, name)]
    if request.image is None:
        for name in [*masks, *(["outpaint_*"] if request.outpaint else [])]:
            raise InvalidRequest(f"{name} is given without an image; give the image it is about")
        return Mode.TXT2IMG
    if len(masks) > 1:
        raise InvalidRequest("mask and mask_from_alpha are both given; give one of them")
    if request.outpaint:
        if masks:
            raise InvalidRequest(
                f"{masks[0]} and outpaint_* are both given; repaint and extend in two requests"
            )
        return Mode.OUTPAINT
    return Mode.INPAINT if masks else Mode.IMG2IMG


def resolve(
    request: GenerationRequest,
    spec: BaseModelSpec,
    image_size: tuple[int, int] | None,
    control_size: tuple[int, int] | None = None,
) -> GenerationPlan:
    """Check every rule and fill in the model's defaults.

    Args:
        image_size: (width, height) in pixels of the image, if there is one.
        control_size: the same of the first control's; without an image, pictures have its shape.

    Raises:
        InvalidRequest: naming the value, the rule and the remedy.
        InvalidSource: the same, for a reference to weights or a token.
    """
    mode = resolve_mode(request)
    _check(request)
    weights = _weights(request)
    _check_model(request, spec)
    controls = resolve_controls(
        request.controls,
        AnnotatorSettings(request.canny_low_threshold, request.canny_high_threshold),
        request.return_control_maps,
        request.control_maps_only,
        spec,
    )
    width, height = _size(request, mode, spec, image_size or control_size)
    guidance = request.guidance_scale
    guidance = spec.guidance_scale if guidance is None else guidance
    scheduler = spec.scheduler if request.scheduler is None else request.scheduler
    most = _most_steps(scheduler, spec)
    steps = request.num_inference_steps
    steps = spec.num_inference_steps if steps is None else steps
    schedule_type = _schedule_type(request.schedule_type, scheduler)
    _check_scheduler_steps("num_inference_steps", steps, scheduler)
    strength = 1.0 if mode is Mode.TXT2IMG else request.prompt_strength
    asked_steps = steps
    strength, steps = _at_least_one_step(strength, steps, most)
    hires = _hires(request, mode, spec, (width, height), asked_steps, most)
    drawn = (hires.width, hires.height) if hires else (width, height)
    return GenerationPlan(
        mode=mode,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        scheduler=scheduler,
        schedule_type=schedule_type,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guided=spec.guidance is Guidance.SECOND_PASS and guidance > 1,
        guidance_start=request.guidance_start,
        guidance_end=request.guidance_end,
        clip_skip=_clip_skip(request, spec),
        strength=strength,
        repaint=_repaint(request) if mode in (Mode.INPAINT, Mode.OUTPAINT) else None,
        controls=controls,
        refine=_refine(request, spec, scheduler, steps),
        weights=weights,
        tokens=Tokens(request.hf_api_token or None, request.civitai_api_token or None),
        hires=hires,
        upscale=_upscale(request, *drawn),
        upscaler=Upscaler(request.upscaler),
        check_safety=not request.disable_safety_checker,
        watermark=request.apply_watermark,
        output=OutputPlan(
            OutputFormat(request.output_format),
            request.output_quality,
            _asked(request) if request.embed_parameters else None,
        ),
        seeds=_seeds(request.seed, request.num_outputs),
    )


def _check(request: GenerationRequest) -> None:
    """The rules that concern one value each."""
    one_of("scheduler", request.scheduler, list(SCHEDULERS))
    one_of("aspect_ratio", request.aspect_ratio, list(AspectRatio))
    one_of("schedule_type", request.schedule_type, list(ScheduleType))
    one_of("masked_content", request.masked_content, list(MaskedContent))
    one_of("inpaint_area", request.inpaint_area, list(InpaintArea))
    one_of("refine", request.refine, list(Refine))
    one_of("upscale", request.upscale, list(Upscale))
    one_of("upscaler", request.upscaler, list(Upscaler))
    within("hires_fix", request.hires_fix, 1, MAX_HIRES_FACTOR)
    within("hires_strength", request.hires_strength, 0, 1)
    one_of("output_format", request.output_format, list(OutputFormat))
    within("output_quality", request.output_quality, 1, MAX_OUTPUT_QUALITY)
    within("num_outputs", request.num_outputs, 1, MAX_NUM_OUTPUTS)
    within("num_inference_steps", request.num_inference_steps, 1, MAX_NUM_INFERENCE_STEPS)
    within("guidance_scale", request.guidance_scale, 0, MAX_GUIDANCE_SCALE)
    within("guidance_start", request.guidance_start, 0, 1)
    within("guidance_end", request.guidance_end, 0, 1)
    if request.guidance_start >= request.guidance_end:
        raise InvalidRequest(
            f"guidance_start is {request.guidance_start:g} and guidance_end"
            f" {request.guidance_end:g}: guidance would never count; start before the end, or take"
            " guidance_scale 1 for none"
        )
    within("prompt_strength", request.prompt_strength, 0, 1)
    within("mask_blur", request.mask_blur, 0, MAX_MASK_BLUR)
    within("inpaint_padding", request.inpaint_padding, 0, MAX_INPAINT_PADDING)
    within("high_noise_frac", request.high_noise_frac, 0, 1)
    within("refine_steps", request.refine_steps, 1, MAX_NUM_INFERENCE_STEPS)
    within("lora_scale", request.lora_scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
    for k, scale in enumerate(request.lora_scales):
        within(f"lora_scales[{k}]", scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
    within("seed", request.seed, 0, SEEDS - 1)


def _at_least_one_step(strength: float, steps: int, most: int) -> tuple[float, int]:
    """(strength, steps) so that int(strength x steps), diffusers' count of steps, is not zero.

    The strength is what was asked; the schedule gets finer until one of its steps fits in, up to
    as many steps as it may have.
    """
    strength = max(strength, 1 / most)
    while int(steps * strength) < 1:
        steps += 1
    return strength, steps


# Never written into files: secrets, files of the client's, and what other lines say.
_NOT_TOLD = {
    *("hf_api_token", "civitai_api_token", "image", "mask"),
    *("prompt", "negative_prompt", "seed", "num_outputs", "outpaint", "controls"),
    *("output_format", "output_quality", "embed_parameters"),
}


def _asked(request: GenerationRequest) -> dict[str, object]:
    """What else was asked, by predict's names; addresses without their queries and content."""
    told: dict[str, object] = {
        entry.name: value
        for entry in fields(request)
        if entry.name not in _NOT_TOLD
        and (value := getattr(request, entry.name)) not in (None, "", ())
    }
    for side, margin in vars(request.outpaint).items():
        told[f"outpaint_{side}"] = margin
    for k, control in enumerate(request.controls, 1):
        if control.kind != NO_CONTROL:
            told |= {
                f"controlnet_{k}": control.kind,
                f"controlnet_{k}_conditioning_scale": control.conditioning_scale,
                f"controlnet_{k}_start": control.start,
                f"controlnet_{k}_end": control.end,
                f"controlnet_{k}_is_map": control.is_map,
            }
    if request.replicate_weights:
        told["replicate_weights"] = shown(request.replicate_weights.strip())
    if request.loras:
        told["loras"] = [shown(reference) for reference in request.loras]
        told["lora_scales"] = list(request.lora_scales)
    return told


def _check_model(request: GenerationRequest, spec: BaseModelSpec) -> None:
    """The rules that the model has for single values."""
    name, asked = spec.name, request.num_outputs
    if asked > spec.max_num_outputs:
        raise InvalidRequest(
            f"num_outputs is {asked}, and {name} makes at most {spec.max_num_outputs} pictures at"
            " once; ask for fewer, or for a model of few steps (Turbo or LCM)"
        )
    if spec.schedulers and request.scheduler not in (None, *spec.schedulers):
        raise InvalidRequest(
            f"scheduler is {request.scheduler}, and {name} works with"
            f" {' and '.join(spec.schedulers)} only; use one of them, or leave it empty"
        )
    steps, guidance = request.num_inference_steps, request.guidance_scale
    if spec.steps and steps is not None and not spec.steps[0] <= steps <= spec.steps[1]:
        raise InvalidRequest(
            f"num_inference_steps is {steps}; {name} was made for {spec.steps[0]} to"
            f" {spec.steps[1]}: use so many, or leave it empty for {spec.num_inference_steps}"
        )
    if spec.guidance_scales and guidance is not None:
        low, high = spec.guidance_scales
        if not low <= guidance <= high:
            why = "works without guidance" if spec.guidance is Guidance.NONE else "needs little"
            if spec.guidance is Guidance.INPUT:
                why = f"knows guidance from {low:g} to {high:g}"
            raise InvalidRequest(
                f"guidance_scale is {guidance:g}, and {name} {why}; use {low:g} to {high:g}, or"
                f" leave it empty for {spec.guidance_scale:g}"
            )
    if spec.guidance is not Guidance.SECOND_PASS and request.negative_prompt.strip():
        raise InvalidRequest(
            f"negative_prompt is {request.negative_prompt[:80]!r}, and {name} has no second pass"
            " that could hear it; leave it empty, say it in the prompt, or use another model"
        )


def _most_steps(scheduler: str, spec: BaseModelSpec) -> int:
    limits = (SCHEDULERS[scheduler].max_steps, spec.steps[1] if spec.steps else None)
    return min([MAX_NUM_INFERENCE_STEPS, *(limit for limit in limits if limit is not None)])


def _check_scheduler_steps(name: str, steps: int, scheduler: str) -> None:
    most = SCHEDULERS[scheduler].max_steps
    if most is not None and steps > most:
        raise InvalidRequest(
            f"{name} is {steps}, and scheduler {scheduler} has at most {most}; use fewer, or"
            " another scheduler"
        )


def _schedule_type(name: str, scheduler: str) -> ScheduleType:
    schedule_type, possible = ScheduleType(name), SCHEDULERS[scheduler].schedule_types
    if schedule_type not in possible:
        raise InvalidRequest(
            f"schedule_type is {schedule_type}, and scheduler {scheduler} has only"
            f" {', '.join(possible)}; use one of those, or another scheduler"
        )
    return schedule_type


def _clip_skip(request: GenerationRequest, spec: BaseModelSpec) -> int:
    if not 1 <= request.clip_skip <= spec.max_clip_skip:
        possible = f"from 1 to {spec.max_clip_skip}" if spec.max_clip_skip > 1 else "1"
        raise InvalidRequest(
            f"clip_skip is {request.clip_skip}; with {spec.name} it must be {possible}"
        )
    return request.clip_skip


def _repaint(request: GenerationRequest) -> RepaintPlan:
    return RepaintPlan(
        mask_invert=request.mask_invert,
        mask_blur=request.mask_blur,
        masked_content=MaskedContent(request.masked_content),
        area=InpaintArea(request.inpaint_area),
        padding=request.inpaint_padding,
        outpaint=request.outpaint,
    )


def _refine(
    request: GenerationRequest, spec: BaseModelSpec, scheduler: str, steps: int
) -> RefinePlan | None:
    style = Refine(request.refine)
    if style is Refine.NO_REFINER:
        return None
    if spec.refiner is None:
        raise InvalidRequest(
            f"refine is {style}, but {spec.name} has no refiner; use refine={Refine.NO_REFINER}"
        )
    steps = steps if request.refine_steps is None else request.refine_steps
    _check_scheduler_steps("refine_steps", steps, scheduler)
    if style is Refine.BASE_IMAGE:
        most = _most_steps(scheduler, spec)
        _, steps = _at_least_one_step(BASE_IMAGE_STRENGTH, steps, most)
    return RefinePlan(style, request.high_noise_frac, steps)


def _hires(
    request: GenerationRequest,
    mode: Mode,
    spec: BaseModelSpec,
    size: tuple[int, int],
    steps: int,
    most: int,
) -> HiresPlan | None:
    factor = request.hires_fix
    if factor == 1:
        return None
    width, height = (_rounded(side * factor) for side in size)
    if mode not in (Mode.TXT2IMG, Mode.IMG2IMG):
        raise InvalidRequest(
            f"hires_fix is {factor:g}, and this is {mode}: a second pass would change what is to"
            " stay; leave hires_fix at 1, and use upscale for a larger picture"
        )
    if width * height > spec.max_hires_pixels:
        largest = math.floor(100 * math.sqrt(spec.max_hires_pixels / (size[0] * size[1]))) / 100
        raise InvalidRequest(
            f"hires_fix is {factor:g}, which makes {width}x{height} of {size[0]}x{size[1]};"
            f" {spec.name} draws at most {spec.max_hires_pixels} pixels: use hires_fix up to"
            f" {largest:g}, and upscale for more"
        )
    strength = spec.hires_strength if request.hires_strength is None else request.hires_strength
    strength, steps = _at_least_one_step(strength, steps, most)
    return HiresPlan(width, height, strength, steps)


def _upscale(request: GenerationRequest, width: int, height: int) -> int:
    if request.upscale == Upscale.OFF:
        return 1
    # The model makes four times the side, whatever is made of that.
    pixels = width * height * UPSCALER_FACTOR**2
    if pixels > MAX_IMAGE_PIXELS:
        raise InvalidRequest(
            f"upscale is {request.upscale}, and pictures of {width}x{height} are too large for it:"
            f" they may have at most {MAX_IMAGE_PIXELS // UPSCALER_FACTOR**2} pixels; ask for a"
            f" smaller width, height and hires_fix, or use upscale={Upscale.OFF}"
        )
    return int(request.upscale)


def _weights(request: GenerationRequest) -> tuple[WeightsUse, ...]:
    count, scales = len(request.loras), request.lora_scales
    if count > MAX_LORAS:
        raise InvalidRequest(f"loras names {count} files; at most {MAX_LORAS} can be combined")
    if scales and len(scales) != count:
        raise InvalidRequest(
            f"lora_scales has {len(scales)} entries and loras {count}; give one for each, or none"
        )
    named = request.replicate_weights.strip()
    source = parse_source(named, "replicate_weights") if named else None
    uses = [WeightsUse("replicate_weights", source, request.lora_scale)]
    for k, (reference, scale) in enumerate(
        zip(request.loras, scales or (1.0,) * count, strict=True)
    ):
        name = f"loras[{k}]"
        uses.append(WeightsUse(name, parse_source(reference, name), scale))
    return tuple(uses)


def _seeds(seed: int | None, count: int) -> tuple[int, ...]:
    """Picture k has the seed s + k, so that each can be made again on its own."""
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    return tuple((seed + k) % SEEDS for k in range(count))


def _size(
    request: GenerationRequest, mode: Mode, spec: BaseModelSpec, image: tuple[int, int] | None
) -> tuple[int, int]:
    """(width, height) of the pictures that come out."""
    width, height = request.width, request.height
    if request.aspect_ratio is not None:
        if width is not None or height is not None:
            given = " and ".join(name for name in ("width", "height") if getattr(request, name))
            raise InvalidRequest(
                f"aspect_ratio={request.aspect_ratio} is given together with {given}; give one or"
                " the other"
            )
        if mode is Mode.OUTPAINT:
            raise InvalidRequest(
                f"aspect_ratio={request.aspect_ratio} is given together with outpaint_*; the size"
                " follows from the image and the margins, so leave it out"
            )
        return size_of_ratio(AspectRatio(request.aspect_ratio), spec)
    if mode is Mode.OUTPAINT:
        if width is not None or height is not None:
            raise InvalidRequest(
                f"width={width} height={height} is given together with outpaint_*; the size "
                "follows from the image and the margins, so leave width and height out"
            )
        return _outpainted_size(request.outpaint, image)
    if image is None:
        native = spec.native_size
        return _valid_size(
            native if width is None else width, native if height is None else height, spec
        )
    if width is None and height is None:
        # Inpainting returns the picture it was given, at that picture's own size.
        return image if mode is Mode.INPAINT else size_of_aspect(*image, spec)
    aspect = image[0] / image[1]
    return _valid_size(
        width if width is not None else _rounded((height or 0) * aspect),
        height if height is not None else _rounded((width or 0) / aspect),
        spec,
    )


def _outpainted_size(margins: Margins, image: tuple[int, int] | None) -> tuple[int, int]:
    assert image is not None
    for name, margin, side in (
        ("left", margins.left, image[0]),
        ("right", margins.right, image[0]),
        ("top", margins.top, image[1]),
        ("bottom", margins.bottom, image[1]),
    ):
        if not 0 <= margin <= side:
            raise InvalidRequest(
                f"outpaint_{name} is {margin}; it must be from 0 to {side}, the image's own "
                "side: extend further in a second request"
            )
    width = image[0] + margins.left + margins.right
    height = image[1] + margins.top + margins.bottom
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidRequest(
            f"the extended picture would be {width}x{height}; it may have at most "
            f"{MAX_IMAGE_PIXELS} pixels: extend by less or send a smaller image"
        )
    return width, height


def _valid_size(width: int, height: int, spec: BaseModelSpec) -> tuple[int, int]:
    nearest = nearest_valid_size(width, height, spec)
    if nearest == (width, height):
        return nearest
    raise InvalidRequest(
        f"a picture of width={width} height={height} is not possible with {spec.name}: each side "
        f"must be a multiple of {SIDE_MULTIPLE} from {spec.min_side} to {spec.max_side} "
        f"and the area at most {spec.max_pixels} pixels; the nearest valid size is "
        f"width={nearest[0]} height={nearest[1]}"
    )


def size_of_ratio(ratio: AspectRatio, spec: BaseModelSpec) -> tuple[int, int]:
    """The model's (width, height) in pixels for the ratio, at the area it was trained at."""
    scale = spec.native_size / 1024
    width, height = _SIZES[ratio]
    return nearest_valid_size(width * scale, height * scale, spec)


def size_of_aspect(width: float, height: float, spec: BaseModelSpec) -> tuple[int, int]:
    """The valid (width, height) of this aspect ratio with the area the model was trained at."""
    scale = spec.native_size / math.sqrt(width * height)
    return nearest_valid_size(width * scale, height * scale, spec)


def _rounded(length: float) -> int:
    return math.floor(length / SIDE_MULTIPLE + 0.5) * SIDE_MULTIPLE


def nearest_valid_size(width: float, height: float, spec: BaseModelSpec) -> tuple[int, int]:
    """The valid (width, height) in pixels closest to the given one; the same one if it is valid."""

    def side(length: float) -> int:
        return min(max(_rounded(length), spec.min_side), spec.max_side)

    w, h = side(width), side(height)
    if w * h > spec.max_pixels:
        shrink = math.sqrt(spec.max_pixels / (w * h))
        w = max(math.floor(w * shrink / SIDE_MULTIPLE) * SIDE_MULTIPLE, spec.min_side)
        h = max(math.floor(h * shrink / SIDE_MULTIPLE) * SIDE_MULTIPLE, spec.min_side)
    return w, h
