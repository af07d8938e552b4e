"""What the engine carries out: a request with every value settled. Torch is not imported."""

from dataclasses import dataclass
from enum import StrEnum

from generation.controlnets import ControlNetPlan
from generation.options import GenerationRequest
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
class StagePlan:
    """One run of encoding, denoising and decoding, which continues the images of the last one."""

    mode: Mode  # TXT2IMG, IMG2IMG or INPAINT
    size: Size  # of its results: that of the images before it, with `margins` or enlarged
    strength: float  # 1 starts from noise
    num_inference_steps: int  # of the whole schedule: the last strength x steps of it run
    is_refined: bool  # whether the refiner acts in it
    margins: Margins | None = None  # to add to its images; they are its mask
    offset: tuple[int, int] = (0, 0)  # (left, top) of its results in the final image, in pixels


@dataclass(frozen=True)
class GenerationPlan:
    """A request, and what follows from it and its model. It is never changed."""

    request: GenerationRequest
    mode: Mode
    width: int  # of the images before hires_fix and upscale, in pixels
    height: int
    scheduler: str
    schedule_type: ScheduleType
    num_inference_steps: int  # of the whole schedule, in all stages but that of hires_fix
    strength: float  # in all stages but that of hires_fix; 1 except where an image is given
    guidance_scale: float
    do_classifier_free_guidance: bool  # arXiv:2207.12598
    refine_steps: int  # of base_image_refiner
    stages: tuple[StagePlan, ...]  # one; more for outpainting in steps; then one for hires_fix
    controlnets: tuple[ControlNetPlan, ...]  # those whose maps are needed, in the inputs' order
    weights: tuple[WeightsUse, ...]  # the first: replicate_weights or the operator's
    tokens: Tokens
    seeds: tuple[int, ...]  # one per image
