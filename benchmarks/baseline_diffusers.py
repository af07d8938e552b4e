"""What a user of diffusers writes, as a baseline.

Plain: `from_pretrained`, a call with defaults, and Pillow's PNG. On a GPU in fp16 with SDXL's VAE
in fp32, as its published config says. Compiled: the strongest that its documentation recommends
(huggingface/diffusion-fast): channels last, and torch.compile's most thorough mode around the UNet
and the VAE's decoder, in bf16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import torch
from PIL import Image

from benchmarks import environment
from benchmarks.sides import CONTROLNET, Side
from benchmarks.workloads import PROMPT, Workload
from generation.base_models import Architecture, BaseModelSpec

# As the models' own pages say: the scheduler's class, and what its config lacks.
SCHEDULERS: dict[str, tuple[str, dict[str, str]]] = {
    "sdxl": ("EulerDiscreteScheduler", {}),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "sdxl-lcm": ("LCMScheduler", {}),
    "sd15-lcm": ("LCMScheduler", {}),
    "sd-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
}
HIGH_NOISE_FRAC = 0.8  # of an ensemble's base model
CANNY_THRESHOLDS = (100, 200)
CONTROL_SCALE, UNION_CANNY = 0.75, 3  # and the type's number in ControlNetUnionModel


class Diffusers(Side):
    """The stock pipeline of one model."""

    def __init__(
        self,
        model: str,
        pipeline: Any,  # noqa: ANN401
        size: int,
        control_image: Path | None = None,
    ) -> None:
        """`size` is that of its square images, in pixels."""
        super().__init__()
        self.spec, self.size = environment.spec(model), size
        self.base = _without_progress_bar(pipeline)
        self.refiner: Any = None
        self.device, self.dtype = pipeline.device, pipeline.dtype
        name, overrides = SCHEDULERS[model]
        scheduler = getattr(diffusers, name)
        self.base.scheduler = scheduler.from_config(self.base.scheduler.config, **overrides)
        self._control_image = control_image
        self._controlnet: Any = None

    @classmethod
    def load(cls, model: str, control_image: Path, compiled: bool = False) -> Diffusers:
        """Load the pipeline from the model's files."""
        spec, device = environment.spec(model), environment.device()
        half = torch.bfloat16 if compiled else torch.float16
        dtype = half if device.type == "cuda" else torch.float32
        side = cls(model, _load(spec, dtype).to(device), spec.native_size, control_image)
        if compiled:
            _compile(side.base)
        return side

    def prepare(self, workload: Workload) -> None:
        if workload.is_refined and self.refiner is None:
            self.refiner = self._load_refiner()
        if workload.control_type and self._controlnet is None:
            controlnet = diffusers.ControlNetUnionModel.from_pretrained(
                environment.folder(CONTROLNET), variant="fp16", dtype=self.dtype
            ).to(self.device)
            pipeline = diffusers.StableDiffusionXLControlNetUnionPipeline(
                **self.base.components, controlnet=controlnet, add_watermarker=False
            )
            self._controlnet = _without_progress_bar(pipeline)

    def _load_refiner(self) -> Any:  # noqa: ANN401
        """Load the refiner around the base model's second text encoder and VAE."""
        assert self.spec.refiner is not None
        shared = {n: self.base.components[n] for n in ("text_encoder_2", "tokenizer_2", "vae")}
        refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
            environment.folder(self.spec.refiner.weights),
            variant="fp16",
            dtype=self.dtype,
            text_encoder=None,
            tokenizer=None,
            add_watermarker=False,
            **shared,
        )
        return _without_progress_bar(refiner.to(self.device))

    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        return save(self._generate(workload, seed), folder, "diffusers")

    def _generate(self, workload: Workload, seed: int) -> Any:  # noqa: ANN401
        common = call(workload, seed)
        size = {"width": self.size, "height": self.size}
        if workload.control_type:
            return self._controlnet(
                **common,
                **size,
                control_image=[self._edges()],
                control_mode=[UNION_CANNY],
                controlnet_conditioning_scale=CONTROL_SCALE,
            ).images
        if not workload.is_refined:
            return self.base(**common, **size).images
        share = HIGH_NOISE_FRAC
        latents = self.base(**common, **size, denoising_end=share, output_type="latent").images
        return self.refiner(**common, image=latents, denoising_start=share).images

    def _edges(self) -> Image.Image:
        """Return the control map, made as the ControlNets' own pages make it."""
        assert self._control_image is not None
        image = Image.open(self._control_image).convert("RGB").resize((self.size, self.size))
        edges = cv2.Canny(np.array(image), *CANNY_THRESHOLDS)
        return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


def call(workload: Workload, seed: int) -> dict[str, Any]:
    """Return the arguments that all pipelines take alike."""
    count = workload.num_outputs
    return {
        "prompt": PROMPT,
        "negative_prompt": "",  # as ours; without one, SDXL takes zeros
        "num_inference_steps": workload.steps,
        "guidance_scale": workload.guidance_scale,
        # One for each image, on the CPU, as ours.
        "generator": [torch.Generator().manual_seed(seed + k) for k in range(count)],
        "num_images_per_prompt": count,
    }


def save(images: Sequence[Image.Image], folder: Path, name: str) -> list[Path]:
    """Save images as Pillow's PNG."""
    files = [folder / f"{name}-{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


def _load(spec: BaseModelSpec, dtype: torch.dtype) -> Any:  # noqa: ANN401
    is_sdxl = spec.architecture is Architecture.SDXL
    options: dict[str, Any] = {"add_watermarker": False}
    if not is_sdxl:
        options = {"safety_checker": None, "requires_safety_checker": False}
    if "vae" in spec.components_from:
        folder = environment.folder(spec.components_from["vae"])
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        variant = "fp16" if any(folder.glob("*.fp16.*")) else None
        options["vae"] = diffusers.AutoencoderKL.from_pretrained(
            folder, variant=variant, dtype=dtype
        )
    cls = diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline
    folder = environment.folder(spec.weights)
    pipeline = cls.from_pretrained(folder, variant="fp16", dtype=dtype, **options)
    if is_sdxl:  # as published; diffusers heeds it in fp16 alone
        pipeline.vae.register_to_config(force_upcast=True)
    if spec.adapter is not None:
        (file,) = environment.folder(spec.adapter).glob("*.safetensors")
        _merge_lora(pipeline.unet, file)
    return pipeline


def _merge_lora(unet: Any, file: Path) -> None:  # noqa: ANN401
    """Merge the LoRA that makes the weights this model, as `fuse_lora` does.

    diffusers' own loader ignores the alphas of modules named as in the miniature's files.
    """
    from weights.formats.read import read_trained
    from weights.formats.types import ModelShapes

    lora = read_trained(file, file.name, ModelShapes.of({"unet": unet})).lora
    for path, delta in lora.items():
        weight = unet.get_submodule(path.removeprefix("unet.")).weight
        up, down = delta.up.float().flatten(1), delta.down.float().flatten(1)
        change = (up @ down).view(weight.shape) * (delta.alpha / delta.rank)
        with torch.no_grad():
            weight.copy_(weight.float() + change)


def _compile(pipeline: Any) -> None:  # noqa: ANN401
    """Compile UNet and decoder at their first call."""
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune", fullgraph=True)


def _without_progress_bar(pipeline: Any) -> Any:  # noqa: ANN401
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
