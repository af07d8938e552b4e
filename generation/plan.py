"""What the engine carries out: a request with every value settled. Torch is not imported."""

from dataclasses import dataclass, field
from enum import StrEnum

from generation.controlnets import ControlMapsPlan, ControlNetPlan
from generation.errors import InvalidRequest
from generation.options import (
    GenerationRequest,
    InpaintArea,
    MaskedContent,
    OutputFormat,
    Refine,
    Upscaler,
)
from generation.schedulers import ScheduleType
from generation.sizes import Margins, Size
from weights.user.parse import Source, Tokens

BASE_IMAGE_STRENGTH = 0.3  # replicate/cog-sdxl: diffusers' default for image-to-image


class Mode(StrEnum):
    """What a request or a stage does, decided by the images it has."""

    TXT2IMG = "txt2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"
    OUTPAINT = "outpaint"  # of a request only: its stages inpaint


@dataclass(frozen=True)
class WeightsUse:
    """Trained weights to apply; without a source, those that the operator has set up."""

    name: str  # of the input, for messages
    source: Source | None
    scale: float


@dataclass(frozen=True)
class RepaintPlan:
    """The settings of inpainting and outpainting."""

    mask_invert: bool
    mask_blur: int  # pixels
    masked_content: MaskedContent
    area: InpaintArea
    padding: int  # pixels
    outpaint: Margins


@dataclass(frozen=True)
class RefinePlan:
    """The settings of the refiner."""

    style: Refine
    high_noise_frac: float
    num_inference_steps: int


@dataclass(frozen=True)
class HiresPlan:
    """The settings of the last stage, which denoises the enlarged images again."""

    width: int  # of its results in pixels
    height: int
    strength: float
    num_inference_steps: int  # of the whole schedule


@dataclass(frozen=True)
class OutputPlan:
    """How images become files."""

    format: OutputFormat
    quality: int
    parameters: dict[str, object] | None  # inputs to record in the files; None: record nothing


@dataclass(frozen=True)
class StagePlan:
    """One run of encoding, denoising and decoding, which continues the images of the last one."""

    mode: Mode  # TXT2IMG, IMG2IMG or INPAINT
    width: int  # of its results in pixels: of the images before it, with `margins` or enlarged
    height: int
    strength: float  # 1 starts from noise
    num_inference_steps: int  # of the whole schedule: the last strength x steps of it run
    is_refined: bool  # whether the refiner acts in it
    margins: Margins = field(default_factory=Margins)  # to add to its images; they are its mask
    offset: tuple[int, int] = (0, 0)  # (left, top) of its results in the final image, in pixels

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.width, self.height

    @property
    def skipped_steps(self) -> int:
        """Steps of the schedule that `strength` leaves out, counted as diffusers does."""
        return self.num_inference_steps - int(self.num_inference_steps * self.strength)


@dataclass(frozen=True)
class GenerationPlan:
    """What to generate, and how. It is never changed."""

    mode: Mode
    prompt: str
    negative_prompt: str
    width: int  # of the images before hires and upscale, in pixels
    height: int
    scheduler: str
    schedule_type: ScheduleType
    num_inference_steps: int  # of the whole schedule, in all stages but that of hires
    guidance_scale: float
    do_classifier_free_guidance: bool  # arXiv:2207.12598
    guidance_start: float  # fractions of the steps between which it is done (arXiv:2404.07724)
    guidance_end: float
    clip_skip: int  # as A1111's: 1 is the text encoder's last layer, 2 the one before
    strength: float  # in all stages but that of hires; 1 except where an image is given
    repaint: RepaintPlan | None
    controlnets: tuple[ControlNetPlan, ...]  # those whose maps are needed, in the inputs' order
    control_maps: ControlMapsPlan
    refine: RefinePlan | None
    weights: tuple[WeightsUse, ...]  # the first: replicate_weights or the operator's
    tokens: Tokens
    hires: HiresPlan | None
    stages: tuple[StagePlan, ...]  # one; more for outpainting in steps; then one for hires
    upscale: int  # factor of each side after all stages; 1: none
    upscaler: Upscaler
    check_safety: bool
    watermark: bool  # the invisible one
    output: OutputPlan
    seeds: tuple[int, ...]  # one per image

    @property
    def skipped_steps(self) -> int:
        """Steps of the schedule that `strength` leaves out, counted as diffusers does."""
        return self.num_inference_steps - int(self.num_inference_steps * self.strength)


def resolve_mode(request: GenerationRequest) -> Mode:
    """Return what the request does: replicate/cog-sdxl's rule, and outpainting.

    Raises:
        InvalidRequest: the images do not add up to a mode.
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
