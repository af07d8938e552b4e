"""The inputs of a prediction. To add one, add a field here, use it, and run `script/sync`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from generation.base_models import BASE_MODEL_NAMES, MAX_OUTPUTS_DISTILLED
from generation.controlnets import ControlRequest
from generation.schedulers import SCHEDULERS, ScheduleType
from generation.sizes import AspectRatio, Margins
from inputs import grouped, option, repeated

MAX_NUM_INFERENCE_STEPS = 500
MAX_CONTROLNETS = 3
SEEDS = 2**32


class InpaintArea(StrEnum):
    """What the model sees of an image in which something is repainted."""

    WHOLE_PICTURE = "whole_picture"
    MASKED_REGION = "masked_region"


class MaskedContent(StrEnum):
    """What inpainting starts from under the mask."""

    ORIGINAL = "original"
    FILL = "fill"  # the surrounding colours, continued inwards
    NOISE = "noise"


class Refine(StrEnum):
    """Whether and how SDXL's refiner is used; replicate/cog-sdxl's names."""

    NO_REFINER = "no_refiner"
    EXPERT_ENSEMBLE = "expert_ensemble_refiner"
    BASE_IMAGE = "base_image_refiner"


class Upscale(StrEnum):
    """The factor by which the sides of the output images are enlarged at the end."""

    OFF = "off"
    TWICE = "2"
    FOUR_TIMES = "4"


class Upscaler(StrEnum):
    """The model that enlarges images."""

    SWINIR = "SwinIR"
    REAL_ESRGAN = "Real-ESRGAN"


class OutputFormat(StrEnum):
    """The format of the output files; the value is their suffix."""

    PNG = "png"  # lossless
    WEBP = "webp"
    JPG = "jpg"


@dataclass(frozen=True)
class GenerationRequest:
    """The inputs of one prediction, in the order of the signature.

    None stands for the model's default, and for a random seed.
    """

    prompt: str = option("An astronaut riding a rainbow unicorn", "Text prompt.")
    model: str | None = option(
        None,
        "Model to generate with. Defaults to the container's, sdxl unless set otherwise.",
        choices=BASE_MODEL_NAMES,
    )
    negative_prompt: str = option(
        "", "What the image must not show. Requires classifier-free guidance."
    )
    image: Path | None = option(
        None, "Input image for image-to-image, for inpainting (with a mask) and for outpainting."
    )
    mask: Path | None = option(
        None, "Inpainting mask. White is repainted, black is kept, grey is changed in part."
    )
    width: int | None = option(
        None,
        "Width in pixels, a multiple of 8. Defaults to the image's or the model's.",
        ge=8,
        le=8192,
    )
    height: int | None = option(
        None,
        "Height in pixels, a multiple of 8. Defaults to the image's or the model's.",
        ge=8,
        le=8192,
    )
    aspect_ratio: str | None = option(
        None,
        "Width to height, in place of both: the model's best size of that ratio is used.",
        choices=AspectRatio,
    )
    num_outputs: int = option(
        1,
        "Number of images: up to 4, or 16 with Turbo and LCM models. Each has the next seed.",
        ge=1,
        le=MAX_OUTPUTS_DISTILLED,
    )
    scheduler: str | None = option(
        None,
        "Noise scheduler (sampler). Defaults to the model's recommended one.",
        choices=SCHEDULERS,
    )
    schedule_type: str = option(
        ScheduleType.AUTOMATIC,
        "Spacing of the noise levels. Automatic uses the model's own.",
        choices=ScheduleType,
    )
    num_inference_steps: int | None = option(
        None,
        "Number of denoising steps. Defaults to the model's.",
        ge=1,
        le=MAX_NUM_INFERENCE_STEPS,
    )
    guidance_scale: float | None = option(
        None,
        "Classifier-free guidance scale. Up to 1 turns guidance off. Defaults to the model's.",
        ge=0,
        le=50,
    )
    guidance_start: float = option(
        0, "Fraction of the steps after which guidance starts.", ge=0, le=1
    )
    guidance_end: float = option(
        1,
        "Fraction of the steps after which guidance ends. The remaining steps take half the time.",
        ge=0,
        le=1,
    )
    clip_skip: int = option(
        1,
        "CLIP skip: text-encoder layer to use, counted from the end. SDXL models support only 1.",
        ge=1,
        le=22,
    )
    prompt_strength: float = option(
        0.8,
        "How much of the input image may change, from 0 (nothing) to 1 (everything).",
        ge=0,
        le=1,
    )
    seed: int | None = option(
        None,
        "Random seed. The same seed gives the same image. Defaults to a random one, which is"
        " logged.",
        ge=0,
        le=SEEDS - 1,
    )
    refine: str = option(
        Refine.NO_REFINER,
        "Whether SDXL's refiner takes over the last steps (expert ensemble) or runs on the result"
        " (base image).",
        choices=Refine,
    )
    high_noise_frac: float = option(
        0.8,
        "With expert_ensemble_refiner: fraction of the noise levels left to the base model.",
        ge=0,
        le=1,
    )
    refine_steps: int | None = option(
        None,
        "With base_image_refiner: number of refiner steps, of which the last 30 % run. Defaults to"
        " num_inference_steps.",
        ge=1,
        le=MAX_NUM_INFERENCE_STEPS,
    )
    replicate_weights: str = option(
        "", "Trained weights: an https URL, owner/name[:file] on Hugging Face, or a data URI."
    )
    lora_scale: float = option(
        0.6,
        "LoRA scale of replicate_weights. Negative values invert its effect.",
        ge=-10,
        le=10,
    )
    loras: tuple[str, ...] = option(
        (), "Up to 8 LoRAs and embeddings to apply, each given like replicate_weights."
    )
    lora_scales: tuple[float, ...] = option(
        (), "Scale of each of the loras, from -10 to 10. Defaults to 1 each.", ge=-10, le=10
    )
    hf_api_token: str | None = option(
        None, "Hugging Face token, for weights that require one.", secret=True
    )
    civitai_api_token: str | None = option(
        None, "Civitai token, for weights that require one.", secret=True
    )
    mask_from_alpha: bool = option(
        False, "Inpaint the transparent parts of the image instead of using a mask."
    )
    mask_invert: bool = option(False, "Invert the mask: black is repainted, white is kept.")
    mask_blur: int = option(
        8, "Width in pixels of the blend outside the edge of the mask.", ge=0, le=128
    )
    masked_content: str = option(
        MaskedContent.ORIGINAL,
        "What inpainting starts from: the image, the colours around the mask, or noise.",
        choices=MaskedContent,
    )
    inpaint_area: str = option(
        InpaintArea.WHOLE_PICTURE,
        "What the model sees: the whole image, or the masked region at the model's full"
        " resolution.",
        choices=InpaintArea,
    )
    inpaint_padding: int = option(
        32, "With masked_region: pixels to include around the mask.", ge=0, le=1024
    )
    hires_fix: float = option(
        1,
        "Enlarge the image by this factor and denoise it again for more detail. 1 turns it off.",
        ge=1,
        le=4,
    )
    hires_strength: float | None = option(
        None,
        "With hires_fix: how much may change, from 0 to 1. Defaults to the model's.",
        ge=0,
        le=1,
    )
    upscale: str = option(
        Upscale.OFF,
        "Factor by which the width and height of the images are upscaled at the end.",
        choices=Upscale,
    )
    upscaler: str = option(
        Upscaler.SWINIR, "Upscaling model for upscale and hires_fix.", choices=Upscaler
    )
    disable_safety_checker: bool = option(
        False, "Return images without running the safety checker."
    )
    apply_watermark: bool = option(
        True, "Add an invisible watermark that marks the images as generated."
    )
    output_format: str = option(
        OutputFormat.PNG,
        "File format. png is lossless, webp and jpg are smaller.",
        choices=OutputFormat,
    )
    output_quality: int = option(
        90, "Quality of webp and jpg files. 100 is the best and largest.", ge=1, le=100
    )
    embed_parameters: bool = option(
        True, "Write the prompt, the seed and all settings into the files' metadata."
    )
    outpaint: Margins = grouped("outpaint", Margins, order=("left", "right", "top", "bottom"))
    controls: tuple[ControlRequest, ...] = repeated(
        "controlnet_{n}", ControlRequest, count=MAX_CONTROLNETS
    )
    canny_low_threshold: int = option(
        100, "With edge_canny: lowest contrast at which an edge continues.", ge=1, le=255
    )
    canny_high_threshold: int = option(
        200, "With edge_canny: lowest contrast at which an edge starts.", ge=1, le=255
    )
    return_control_maps: bool = option(False, "Also return the control maps, before the images.")
    control_maps_only: bool = option(False, "Return only the control maps and generate no images.")

    @property
    def returns_control_maps(self) -> bool:
        """Whether control maps are returned, with or without images."""
        return self.return_control_maps or self.control_maps_only
