"""The boundary to Cog's predictions: the signature becomes a request, the result becomes paths.

Cog reads this file without running it, and silently drops what it cannot read: literals only, one
plain string per description (`script/schema --check` holds this).
"""

import time
import traceback
from typing import List, Optional  # noqa: UP035  the spelling that every version of Cog's parser reads

from cog import BasePredictor, Input, Path, Secret

from generation.errors import InvalidRequest
from generation.options import GenerationRequest
from generation.outputs import OutputFolders
from inputs import from_inputs

# script/sync: generation.base_models.BASE_MODEL_NAMES
MODEL_CHOICES = [
    "sdxl",
    "sdxl-turbo",
    "sdxl-lcm",
    "sd15",
    "sd15-lcm",
    "lcm-dreamshaper",
    "sd21",
    "sd-turbo",
]
# script/sync: generation.sizes.AspectRatio
ASPECT_RATIO_CHOICES = ["1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16"]
# script/sync: generation.schedulers.SCHEDULERS
SCHEDULER_CHOICES = [
    "DDIM",
    "DPMSolverMultistep",
    "HeunDiscrete",
    "KarrasDPM",
    "K_EULER_ANCESTRAL",
    "K_EULER",
    "PNDM",
    "Euler",
    "Euler a",
    "Heun",
    "LMS",
    "DPM2",
    "DPM2 a",
    "DPM++ 2M",
    "DPM++ 2M SDE",
    "DPM++ SDE",
    "DPM++ 2S a",
    "UniPC",
    "DEIS",
    "LCM",
    "TCD",
]

# script/sync: generation.schedulers.ScheduleType
SCHEDULE_TYPE_CHOICES = ["automatic", "karras", "exponential", "sgm_uniform"]
# script/sync: generation.options.Refine
REFINE_CHOICES = ["no_refiner", "expert_ensemble_refiner", "base_image_refiner"]
# script/sync: generation.options.Upscale
UPSCALE_CHOICES = ["off", "2", "4"]
# script/sync: generation.options.Upscaler
UPSCALER_CHOICES = ["SwinIR", "Real-ESRGAN"]
# script/sync: generation.options.OutputFormat
OUTPUT_FORMAT_CHOICES = ["png", "webp", "jpg"]
# script/sync: generation.options.MaskedContent
MASKED_CONTENT_CHOICES = ["original", "fill", "noise"]
# script/sync: generation.options.InpaintArea
INPAINT_AREA_CHOICES = ["whole_picture", "masked_region"]

# script/sync: generation.controlnets.CHOICES
CONTROLNET_CHOICES = [
    "none",
    "edge_canny",
    "depth_midas",
    "depth_leres",
    "depth_zoe",
    "soft_edge_hed",
    "soft_edge_pidi",
    "lineart",
    "lineart_anime",
    "mlsd",
    "scribble",
    "openpose",
    "segmentation",
    "normal_bae",
    "tile",
    "illusion",
]


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Choose edition and device, load the models; a failure prints its own traceback.

        `weights` is COG_WEIGHTS, a path or an address as plain text whatever the annotation says.
        """
        try:
            from generation.base_models import (
                BASE_MODEL_NAMES,
                BASE_MODELS,
                DEFAULT_BASE_MODEL,
                SAFETY_ENTRIES,
            )
            from weights.edition import (
                model_budget,
                requested_compiling,
                requested_models,
                resolve_device,
                resolve_edition,
            )
            from weights.read_ahead import read_ahead

            device = resolve_device()
            edition = resolve_edition(cuda_available=device == "cuda")
            model, preload = requested_models(BASE_MODEL_NAMES, DEFAULT_BASE_MODEL)
            models = BASE_MODELS[edition]
            entries = [entry for name in preload for entry in models[name].catalog_entries]
            read_ahead([*SAFETY_ENTRIES, *entries], edition)
            from generation.engine import Engine  # seconds, in which the files are read

            self.folders = OutputFolders()
            self.engine = Engine(
                edition,
                device,
                model=model,
                budget=model_budget(device),
                compiles=requested_compiling(device),
            )
            self.engine.load(str(weights) if weights else None, preload)
        except Exception:
            traceback.print_exc()  # Cog's server reports the message alone, and having heard it
            time.sleep(1)  # drops the lines that are still on their way to its log
            raise

    def predict(
        self,
        prompt: str = Input(
            default="An astronaut riding a rainbow unicorn", description="What the picture shows"
        ),
        model: Optional[str] = Input(
            default=None,
            description="Which model draws; empty for the container's own, sdxl",
            choices=MODEL_CHOICES,
        ),
        negative_prompt: str = Input(
            default="", description="What the picture must not show; works with guidance only"
        ),
        image: Optional[Path] = Input(
            default=None,
            description="Picture to start from: image to image, or inpainting with a mask",
        ),
        mask: Optional[Path] = Input(
            default=None,
            description="Inpainting: white is repainted, black kept, grey changed in part",
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, a multiple of 8; empty: the image's or the model's own",
            ge=8,
            le=8192,
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, a multiple of 8; empty: the image's or the model's own",
            ge=8,
            le=8192,
        ),
        aspect_ratio: Optional[str] = Input(
            default=None,
            description="Instead of width and height: the model's own size of this width to height",
            choices=ASPECT_RATIO_CHOICES,
        ),
        num_outputs: int = Input(
            default=1,
            description="Number of pictures, up to 4, or 16 with Turbo and LCM; seeds count up",
            ge=1,
            le=16,
        ),
        scheduler: Optional[str] = Input(
            default=None,
            description="How noise is taken away; empty for the default of the model",
            choices=SCHEDULER_CHOICES,
        ),
        schedule_type: str = Input(
            default="automatic",
            description="How noise levels are spaced over steps; automatic: the model's own way",
            choices=SCHEDULE_TYPE_CHOICES,
        ),
        num_inference_steps: Optional[int] = Input(
            default=None,
            description="Number of denoising steps; empty for the default of the model",
            ge=1,
            le=500,
        ),
        guidance_scale: Optional[float] = Input(
            default=None,
            description="How closely to follow the prompt; up to 1 skips the guidance pass",
            ge=0,
            le=50,
        ),
        guidance_start: float = Input(
            default=0,
            description="Share of the steps after which guidance begins",
            ge=0,
            le=1,
        ),
        guidance_end: float = Input(
            default=1,
            description="Share of the steps after which guidance ends; the rest take half as long",
            ge=0,
            le=1,
        ),
        clip_skip: int = Input(
            default=1,
            description="Which of the text encoder's last layers is read; sdxl and its kin: 1 only",
            ge=1,
            le=22,
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="With an image: how much may change, from 0 (nothing) to 1 (everything)",
            ge=0,
            le=1,
        ),
        seed: Optional[int] = Input(
            default=None,
            description="Same seed, same picture; empty for a random one, which the log names",
            ge=0,
            le=4294967295,
        ),
        refine: str = Input(
            default="no_refiner",
            description="Let a refiner make the last steps, or some more after the base model",
            choices=REFINE_CHOICES,
        ),
        high_noise_frac: float = Input(
            default=0.8,
            description="With expert_ensemble_refiner: the base model's share of the noise levels",
            ge=0,
            le=1,
        ),
        refine_steps: Optional[int] = Input(
            default=None,
            description="With base_image_refiner: its steps; the last 30 % run; empty: as many",
            ge=1,
            le=500,
        ),
        replicate_weights: str = Input(
            default="",
            description="Trained weights: an https address, owner/name[:file] on the hub, or data:",
        ),
        lora_scale: float = Input(
            default=0.6,
            description="How strongly the LoRA in replicate_weights counts; negative: the opposite",
            ge=-10,
            le=10,
        ),
        loras: List[str] = Input(
            default=[],
            description="LoRAs and embeddings to add, up to 8, each named like replicate_weights",
        ),
        lora_scales: List[float] = Input(
            default=[],
            description="How strongly each of loras counts, from -10 to 10; empty: 1 each",
        ),
        hf_api_token: Optional[Secret] = Input(
            default=None, description="Hugging Face token, for weights that need one"
        ),
        civitai_api_token: Optional[Secret] = Input(
            default=None, description="Civitai token, for weights that need one"
        ),
        mask_from_alpha: bool = Input(
            default=False,
            description="Inpainting without a mask: repaint where the image is transparent",
        ),
        mask_invert: bool = Input(
            default=False, description="Repaint what the mask shows black and keep what is white"
        ),
        mask_blur: int = Input(
            default=8,
            description="Width in pixels, outside the mask, over which old and new are blended",
            ge=0,
            le=128,
        ),
        masked_content: str = Input(
            default="original",
            description="What repainting starts from: the image, what surrounds the mask, or noise",
            choices=MASKED_CONTENT_CHOICES,
        ),
        inpaint_area: str = Input(
            default="whole_picture",
            description="What the model sees; masked_region gives small parts its full resolution",
            choices=INPAINT_AREA_CHOICES,
        ),
        inpaint_padding: int = Input(
            default=32,
            description="With masked_region: pixels seen around the mask",
            ge=0,
            le=1024,
        ),
        hires_fix: float = Input(
            default=1,
            description="Draw it again, this many times as wide and high, for more detail; 1: once",
            ge=1,
            le=4,
        ),
        hires_strength: Optional[float] = Input(
            default=None,
            description="With hires_fix: how much may change, 0 to 1; empty: the model's default",
            ge=0,
            le=1,
        ),
        upscale: str = Input(
            default="off",
            description="How many times as wide and high pictures become in the end",
            choices=UPSCALE_CHOICES,
        ),
        upscaler: str = Input(
            default="SwinIR",
            description="Model that enlarges pictures, for upscale and hires_fix",
            choices=UPSCALER_CHOICES,
        ),
        disable_safety_checker: bool = Input(
            default=False,
            description="Give out pictures without looking whether they are safe for work",
        ),
        apply_watermark: bool = Input(
            default=True,
            description="Mark pictures invisibly as made by a model, over their whole area",
        ),
        output_format: str = Input(
            default="png",
            description="Kind of the files: png is lossless, webp and jpg are smaller",
            choices=OUTPUT_FORMAT_CHOICES,
        ),
        output_quality: int = Input(
            default=90, description="With webp or jpg: 100 is best and largest", ge=1, le=100
        ),
        embed_parameters: bool = Input(
            default=True,
            description="Write prompt, seed and settings into the files, where other programs look",
        ),
        outpaint_left: int = Input(
            default=0, description="Pixels to add on the left of the image", ge=0, le=4096
        ),
        outpaint_right: int = Input(
            default=0, description="Pixels to add on the right of the image", ge=0, le=4096
        ),
        outpaint_top: int = Input(
            default=0, description="Pixels to add above the image", ge=0, le=4096
        ),
        outpaint_bottom: int = Input(
            default=0, description="Pixels to add below the image", ge=0, le=4096
        ),
        controlnet_1: str = Input(
            default="none",
            description="What the picture in controlnet_1_image controls",
            choices=CONTROLNET_CHOICES,
        ),
        controlnet_1_image: Optional[Path] = Input(
            default=None,
            description="Picture that control 1 is taken from, or its map; fitted like image",
        ),
        controlnet_1_conditioning_scale: float = Input(
            default=0.75,
            description="How strongly control 1 counts; 0: not at all",
            ge=0,
            le=4,
        ),
        controlnet_1_start: float = Input(
            default=0,
            description="Share of the steps after which control 1 begins to count",
            ge=0,
            le=1,
        ),
        controlnet_1_end: float = Input(
            default=1,
            description="Share of the steps after which control 1 no longer counts",
            ge=0,
            le=1,
        ),
        controlnet_1_is_map: bool = Input(
            default=False,
            description="controlnet_1_image is a map already: edges, depths, a skeleton",
        ),
        controlnet_2: str = Input(
            default="none",
            description="What the picture in controlnet_2_image controls",
            choices=CONTROLNET_CHOICES,
        ),
        controlnet_2_image: Optional[Path] = Input(
            default=None,
            description="Picture that control 2 is taken from, or its map; fitted like image",
        ),
        controlnet_2_conditioning_scale: float = Input(
            default=0.75,
            description="How strongly control 2 counts; 0: not at all",
            ge=0,
            le=4,
        ),
        controlnet_2_start: float = Input(
            default=0,
            description="Share of the steps after which control 2 begins to count",
            ge=0,
            le=1,
        ),
        controlnet_2_end: float = Input(
            default=1,
            description="Share of the steps after which control 2 no longer counts",
            ge=0,
            le=1,
        ),
        controlnet_2_is_map: bool = Input(
            default=False,
            description="controlnet_2_image is a map already: edges, depths, a skeleton",
        ),
        controlnet_3: str = Input(
            default="none",
            description="What the picture in controlnet_3_image controls",
            choices=CONTROLNET_CHOICES,
        ),
        controlnet_3_image: Optional[Path] = Input(
            default=None,
            description="Picture that control 3 is taken from, or its map; fitted like image",
        ),
        controlnet_3_conditioning_scale: float = Input(
            default=0.75,
            description="How strongly control 3 counts; 0: not at all",
            ge=0,
            le=4,
        ),
        controlnet_3_start: float = Input(
            default=0,
            description="Share of the steps after which control 3 begins to count",
            ge=0,
            le=1,
        ),
        controlnet_3_end: float = Input(
            default=1,
            description="Share of the steps after which control 3 no longer counts",
            ge=0,
            le=1,
        ),
        controlnet_3_is_map: bool = Input(
            default=False,
            description="controlnet_3_image is a map already: edges, depths, a skeleton",
        ),
        canny_low_threshold: int = Input(
            default=100,
            description="With edge_canny: edges go on down to this contrast",
            ge=1,
            le=255,
        ),
        canny_high_threshold: int = Input(
            default=200,
            description="With edge_canny: edges start at this contrast",
            ge=1,
            le=255,
        ),
        return_control_maps: bool = Input(
            default=False, description="Give out the controls' maps too, before the pictures"
        ),
        control_maps_only: bool = Input(
            default=False, description="Give out the controls' maps and make no pictures"
        ),
    ) -> List[Path]:
        """Make pictures from a prompt, or from a picture and a prompt."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        request = from_inputs(GenerationRequest, inputs, InvalidRequest)
        result = self.engine.generate(request, self.folders.fresh())
        self.record_metric("seed", result.plan.seeds[0])
        self.record_metric("num_inference_steps", result.plan.num_inference_steps)
        self.record_metric("peak_memory_bytes", result.peak_memory)
        for stage, seconds in result.seconds.items():
            self.record_metric(f"seconds.{stage}", seconds)
        return [Path(file) for file in result.files]
