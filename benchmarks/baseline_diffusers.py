"""What a user of diffusers writes, as a baseline.

Plain: `from_pretrained`, a call with defaults, and Pillow's PNG. On a GPU in fp16 with SDXL's VAE
in fp32, as its published config says. Compiled: the strongest that its documentation recommends
(huggingface/diffusion-fast): channels last, and torch.compile's most thorough mode around the UNet
and the VAE's decoder, in bf16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class PipelineCall:
    """The arguments that all pipelines take alike."""

    num_inference_steps: int
    guidance_scale: float
    generator: list[torch.Generator]  # one for each image, on the CPU, as ours
    prompt: str | list[str] = PROMPT
    negative_prompt: str | list[str] = ""  # as ours; without one, SDXL takes zeros
    num_images_per_prompt: int = 1

    @classmethod
    def of(cls, workload: Workload, seed: int) -> PipelineCall:
        """Return the arguments of a workload."""
        count = workload.num_outputs
        generators = [torch.Generator().manual_seed(seed + k) for k in range(count)]
        return cls(workload.steps, workload.guidance_scale, generators, num_images_per_prompt=count)


class Diffusers(Side):
    """The stock pipeline of one model."""

    def __init__(self, model: str, pipeline: Any, size: int, control_image: Path | None) -> None:  # noqa: ANN401
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
        """Load what the workload needs beside the model."""
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
        """Make one request, its files in `folder`."""
        return save(self._generate(workload, seed), folder, "diffusers")

    def _generate(self, workload: Workload, seed: int) -> Any:  # noqa: ANN401
        size = {"width": self.size, "height": self.size}
        call = dict(vars(PipelineCall.of(workload, seed)))
        pipeline: Any = self.base
        if workload.control_type:
            pipeline = self._controlnet
            call |= {
                "control_image": [self._edges()],
                "control_mode": [UNION_CANNY],
                "controlnet_conditioning_scale": CONTROL_SCALE,
            }
        if not workload.is_refined:
            return pipeline(**call, **size).images
        ensemble = {"denoising_end": HIGH_NOISE_FRAC, "output_type": "latent"}
        latents = pipeline(**call, **size, **ensemble).images
        return self.refiner(**call, image=latents, denoising_start=HIGH_NOISE_FRAC).images

    def _edges(self) -> Image.Image:
        """Return the control map, made as the ControlNets' own pages make it."""
        assert self._control_image is not None
        image = Image.open(self._control_image).convert("RGB").resize((self.size, self.size))
        edges = cv2.Canny(np.array(image), *CANNY_THRESHOLDS)
        return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


def save(images: Sequence[Image.Image], folder: Path, name: str) -> list[Path]:
    """Save images as Pillow's PNG."""
    files = [folder / f"{name}-{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


def _load(spec: BaseModelSpec, dtype: torch.dtype) -> Any:  # noqa: ANN401
    replaced = {}
    if "vae" in spec.components_from:
        folder = environment.folder(spec.components_from["vae"])
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        variant = "fp16" if any(folder.glob("*.fp16.*")) else None
        replaced["vae"] = diffusers.AutoencoderKL.from_pretrained(
            folder, variant=variant, dtype=dtype
        )
    folder = environment.folder(spec.weights)
    if spec.architecture is Architecture.SDXL:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
            folder, variant="fp16", dtype=dtype, add_watermarker=False, **replaced
        )
        # As published; diffusers heeds it in fp16 alone.
        pipeline.vae.register_to_config(force_upcast=True)
    else:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder,
            variant="fp16",
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
            **replaced,
        )
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
