"""The boundary to Cog's predictions: inputs become a GenerationRequest, files a list of paths.

Cog reads this file without running it, and silently drops what it cannot read: literals only, one
plain string per description (`script/sync` writes and checks this).
"""

import time
import traceback
from typing import List, Optional  # noqa: UP035  the spelling that every version of Cog's parser reads

from cog import BasePredictor, Input, Path, Secret

from generation.base_models import (
    BASE_MODEL_NAMES,
    BASE_MODELS,
    DEFAULT_BASE_MODEL,
    SAFETY_ENTRIES,
)
from generation.errors import InvalidRequest
from generation.options import GenerationRequest
from generation.outputs import OutputFolders
from inputs import from_inputs
from weights.edition import (
    model_budget,
    requested_compiling,
    requested_models,
    resolve_device,
    resolve_edition,
)
from weights.read_ahead import read_ahead


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Choose the edition and the device, and load the models; print the traceback of a failure.

        `weights` is COG_WEIGHTS: a path or a URL, as a string whatever the annotation says.
        """
        try:
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
            traceback.print_exc()  # Cog's server reports the message alone,
            time.sleep(1)  # and then drops the lines that are still on their way to its log
            raise

    def predict(
        self,
        # script/sync: begin
        prompt: str = Input(
            default="An astronaut riding a rainbow unicorn", description="Text prompt."
        ),
        model: Optional[str] = Input(
            default=None,
            description="Model to generate with. Defaults to the container's, sdxl unless set otherwise.",
            choices=[
                "sdxl",
                "sdxl-turbo",
                "sdxl-lcm",
                "sd15",
                "sd15-lcm",
                "lcm-dreamshaper",
                "sd21",
                "sd-turbo",
            ],
        ),
        negative_prompt: str = Input(
            default="",
            description="What the image must not show. Requires classifier-free guidance.",
        ),
        image: Optional[Path] = Input(
            default=None,
            description="Input image for image-to-image, for inpainting (with a mask) and for outpainting.",
        ),
        mask: Optional[Path] = Input(
            default=None,
            description="Inpainting mask. White is repainted, black is kept, grey is changed in part.",
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, a multiple of 8. Defaults to the image's or the model's.",
            ge=8,
            le=8192,
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, a multiple of 8. Defaults to the image's or the model's.",
            ge=8,
            le=8192,
        ),
        aspect_ratio: Optional[str] = Input(
            default=None,
            description="Width to height, in place of both: the model's best size of that ratio is used.",
            choices=["1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16"],
        ),
        num_outputs: int = Input(
            default=1,
            description="Number of images: up to 4, or 16 with Turbo and LCM models. Each has the next seed.",
            ge=1,
            le=16,
        ),
        scheduler: Optional[str] = Input(
            default=None,
            description="Noise scheduler (sampler). Defaults to the model's recommended one.",
            choices=[
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
            ],
        ),
        schedule_type: str = Input(
            default="automatic",
            description="Spacing of the noise levels. Automatic uses the model's own.",
            choices=["automatic", "karras", "exponential", "sgm_uniform"],
        ),
        num_inference_steps: Optional[int] = Input(
            default=None,
            description="Number of denoising steps. Defaults to the model's.",
            ge=1,
            le=500,
        ),
        guidance_scale: Optional[float] = Input(
            default=None,
            description="Classifier-free guidance scale. Up to 1 turns guidance off. Defaults to the model's.",
            ge=0,
            le=50,
        ),
        guidance_start: float = Input(
            default=0, description="Fraction of the steps after which guidance starts.", ge=0, le=1
        ),
        guidance_end: float = Input(
            default=1,
            description="Fraction of the steps after which guidance ends. The remaining steps take half the time.",
            ge=0,
            le=1,
        ),
        clip_skip: int = Input(
            default=1,
            description="CLIP skip: text-encoder layer to use, counted from the end. SDXL models support only 1.",
            ge=1,
            le=22,
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="How much of the input image may change, from 0 (nothing) to 1 (everything).",
            ge=0,
            le=1,
        ),
        seed: Optional[int] = Input(
            default=None,
            description="Random seed. The same seed gives the same image. Defaults to a random one, which is logged.",
            ge=0,
            le=4294967295,
        ),
        refine: str = Input(
            default="no_refiner",
            description="Whether SDXL's refiner takes over the last steps (expert ensemble) or runs on the result (base image).",
            choices=["no_refiner", "expert_ensemble_refiner", "base_image_refiner"],
        ),
        high_noise_frac: float = Input(
            default=0.8,
            description="With expert_ensemble_refiner: fraction of the noise levels left to the base model.",
            ge=0,
            le=1,
        ),
        refine_steps: Optional[int] = Input(
            default=None,
            description="With base_image_refiner: number of refiner steps, of which the last 30 % run. Defaults to num_inference_steps.",
            ge=1,
            le=500,
        ),
        replicate_weights: str = Input(
            default="",
            description="Trained weights: an https URL, owner/name[:file] on Hugging Face, or a data URI.",
        ),
        lora_scale: float = Input(
            default=0.6,
            description="LoRA scale of replicate_weights. Negative values invert its effect.",
            ge=-10,
            le=10,
        ),
        loras: List[str] = Input(
            default=[],
            description="Up to 8 LoRAs and embeddings to apply, each given like replicate_weights.",
        ),
        lora_scales: List[float] = Input(
            default=[],
            description="Scale of each of the loras, from -10 to 10. Defaults to 1 each.",
        ),
        hf_api_token: Optional[Secret] = Input(
            default=None, description="Hugging Face token, for weights that require one."
        ),
        civitai_api_token: Optional[Secret] = Input(
            default=None, description="Civitai token, for weights that require one."
        ),
        mask_from_alpha: bool = Input(
            default=False,
            description="Inpaint the transparent parts of the image instead of using a mask.",
        ),
        mask_invert: bool = Input(
            default=False, description="Invert the mask: black is repainted, white is kept."
        ),
        mask_blur: int = Input(
            default=8,
            description="Width in pixels of the blend outside the edge of the mask.",
            ge=0,
            le=128,
        ),
        masked_content: str = Input(
            default="original",
            description="What inpainting starts from: the image, the colours around the mask, or noise.",
            choices=["original", "fill", "noise"],
        ),
        inpaint_area: str = Input(
            default="whole_picture",
            description="What the model sees: the whole image, or the masked region at the model's full resolution.",
            choices=["whole_picture", "masked_region"],
        ),
        inpaint_padding: int = Input(
            default=32,
            description="With masked_region: pixels to include around the mask.",
            ge=0,
            le=1024,
        ),
        hires_fix: float = Input(
            default=1,
            description="Enlarge the image by this factor and denoise it again for more detail. 1 turns it off.",
            ge=1,
            le=4,
        ),
        hires_strength: Optional[float] = Input(
            default=None,
            description="With hires_fix: how much may change, from 0 to 1. Defaults to the model's.",
            ge=0,
            le=1,
        ),
        upscale: str = Input(
            default="off",
            description="Factor by which the width and height of the images are upscaled at the end.",
            choices=["off", "2", "4"],
        ),
        upscaler: str = Input(
            default="SwinIR",
            description="Upscaling model for upscale and hires_fix.",
            choices=["SwinIR", "Real-ESRGAN"],
        ),
        disable_safety_checker: bool = Input(
            default=False, description="Return images without running the safety checker."
        ),
        apply_watermark: bool = Input(
            default=True,
            description="Add an invisible watermark that marks the images as generated.",
        ),
        output_format: str = Input(
            default="png",
            description="File format. png is lossless, webp and jpg are smaller.",
            choices=["png", "webp", "jpg"],
        ),
        output_quality: int = Input(
            default=90,
            description="Quality of webp and jpg files. 100 is the best and largest.",
            ge=1,
            le=100,
        ),
        embed_parameters: bool = Input(
            default=True,
            description="Write the prompt, the seed and all settings into the files' metadata.",
        ),
        outpaint_left: int = Input(
            default=0, description="Pixels to add on the left of the image.", ge=0, le=4096
        ),
        outpaint_right: int = Input(
            default=0, description="Pixels to add on the right of the image.", ge=0, le=4096
        ),
        outpaint_top: int = Input(
            default=0, description="Pixels to add above the image.", ge=0, le=4096
        ),
        outpaint_bottom: int = Input(
            default=0, description="Pixels to add below the image.", ge=0, le=4096
        ),
        controlnet_1: str = Input(
            default="none",
            description="Control type of ControlNet 1: what is taken from controlnet_1_image.",
            choices=[
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
            ],
        ),
        controlnet_1_image: Optional[Path] = Input(
            default=None,
            description="Control image 1, or its control map. Cropped to the size of the output.",
        ),
        controlnet_1_conditioning_scale: float = Input(
            default=0.75,
            description="Conditioning scale of ControlNet 1. 0 turns it off.",
            ge=0,
            le=4,
        ),
        controlnet_1_start: float = Input(
            default=0,
            description="Fraction of the steps after which ControlNet 1 starts.",
            ge=0,
            le=1,
        ),
        controlnet_1_end: float = Input(
            default=1,
            description="Fraction of the steps after which ControlNet 1 ends.",
            ge=0,
            le=1,
        ),
        controlnet_1_is_map: bool = Input(
            default=False,
            description="Use controlnet_1_image as the control map: edges, a depth map, a skeleton.",
        ),
        controlnet_2: str = Input(
            default="none",
            description="Control type of ControlNet 2: what is taken from controlnet_2_image.",
            choices=[
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
            ],
        ),
        controlnet_2_image: Optional[Path] = Input(
            default=None,
            description="Control image 2, or its control map. Cropped to the size of the output.",
        ),
        controlnet_2_conditioning_scale: float = Input(
            default=0.75,
            description="Conditioning scale of ControlNet 2. 0 turns it off.",
            ge=0,
            le=4,
        ),
        controlnet_2_start: float = Input(
            default=0,
            description="Fraction of the steps after which ControlNet 2 starts.",
            ge=0,
            le=1,
        ),
        controlnet_2_end: float = Input(
            default=1,
            description="Fraction of the steps after which ControlNet 2 ends.",
            ge=0,
            le=1,
        ),
        controlnet_2_is_map: bool = Input(
            default=False,
            description="Use controlnet_2_image as the control map: edges, a depth map, a skeleton.",
        ),
        controlnet_3: str = Input(
            default="none",
            description="Control type of ControlNet 3: what is taken from controlnet_3_image.",
            choices=[
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
            ],
        ),
        controlnet_3_image: Optional[Path] = Input(
            default=None,
            description="Control image 3, or its control map. Cropped to the size of the output.",
        ),
        controlnet_3_conditioning_scale: float = Input(
            default=0.75,
            description="Conditioning scale of ControlNet 3. 0 turns it off.",
            ge=0,
            le=4,
        ),
        controlnet_3_start: float = Input(
            default=0,
            description="Fraction of the steps after which ControlNet 3 starts.",
            ge=0,
            le=1,
        ),
        controlnet_3_end: float = Input(
            default=1,
            description="Fraction of the steps after which ControlNet 3 ends.",
            ge=0,
            le=1,
        ),
        controlnet_3_is_map: bool = Input(
            default=False,
            description="Use controlnet_3_image as the control map: edges, a depth map, a skeleton.",
        ),
        canny_low_threshold: int = Input(
            default=100,
            description="With edge_canny: lowest contrast at which an edge continues.",
            ge=1,
            le=255,
        ),
        canny_high_threshold: int = Input(
            default=200,
            description="With edge_canny: lowest contrast at which an edge starts.",
            ge=1,
            le=255,
        ),
        return_control_maps: bool = Input(
            default=False, description="Also return the control maps, before the images."
        ),
        control_maps_only: bool = Input(
            default=False, description="Return only the control maps and generate no images."
        ),
        # script/sync: end
    ) -> List[Path]:
        """Generate images from a prompt, or from images and a prompt."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        request = from_inputs(GenerationRequest, inputs, InvalidRequest)
        result = self.engine.generate(request, self.folders.fresh())
        self.record_metric("seed", result.plan.seeds[0])
        self.record_metric("num_inference_steps", result.plan.num_inference_steps)
        self.record_metric("peak_memory_bytes", result.peak_memory)
        for stage, seconds in result.seconds.items():
            self.record_metric(f"seconds.{stage}", seconds)
        return [Path(file) for file in result.files]
