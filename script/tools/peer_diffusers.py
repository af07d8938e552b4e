"""What a person writes with diffusers alone, to be measured.

Plain: `from_pretrained`, a call with defaults, PIL's pictures as PNG by Pillow's default. On a GPU
in fp16 with SDXL's VAE in fp32, as its published config says. Compiled: the strongest that its
documentation recommends (huggingface/diffusion-fast): channels last, and torch.compile's most
thorough mode around the UNet and the VAE's decoder, in bf16 on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from script.tools import bench_models
from script.tools.bench_workloads import PROMPT, Workload

# As the models' own pages say: the scheduler's class, and what its config lacks.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": ("EulerDiscreteScheduler", {}),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "sdxl-lcm": ("LCMScheduler", {}),
    "sd15-lcm": ("LCMScheduler", {}),
    "sd-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
}
HIGH_NOISE_SHARE = 0.8  # of an ensemble's base model
CANNY_THRESHOLDS = (100, 200)
CONTROL_SCALE, CANNY_OF_UNION = 0.75, 3


class Diffusers:
    """The stock pipeline of one model, with parts of its own."""

    stages: dict[str, float] = {}  # noqa: RUF012  it measures none

    def __init__(self, model: str, control_picture: Path, compiled: bool = False) -> None:
        import torch

        self.spec = bench_models.spec(model)
        self.device = bench_models.device()
        on_gpu = self.device.type == "cuda"
        half = torch.bfloat16 if compiled else torch.float16
        self.dtype = half if on_gpu else torch.float32
        self._control_picture = control_picture
        self.base = _quiet(self._load().to(self.device))
        name, overrides = SCHEDULERS[model]
        self.base.scheduler = _class(name).from_config(self.base.scheduler.config, **overrides)
        self.refiner: Any = None
        self._control: Any = None
        if compiled:
            _compile(self.base)

    def _load(self) -> Any:  # noqa: ANN401
        from generation.base_models import Architecture

        xl = self.spec.architecture is Architecture.SDXL
        name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
        alone = {"safety_checker": None, "requires_safety_checker": False}
        more: dict[str, Any] = {"add_watermarker": False} if xl else alone
        if "vae" in self.spec.components_from:
            more["vae"] = self._vae()
        pipeline = _class(name).from_pretrained(
            bench_models.folder(self.spec.weights), variant="fp16", dtype=self.dtype, **more
        )
        if xl:  # which diffusers heeds in fp16 alone
            pipeline.vae.register_to_config(force_upcast=True)
        if self.spec.adapter is not None:
            (file,) = bench_models.folder(self.spec.adapter).glob("*.safetensors")
            _merge(pipeline, file)
        return pipeline

    def _vae(self) -> Any:  # noqa: ANN401
        folder = bench_models.folder(self.spec.components_from["vae"])
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        variant = "fp16" if any(folder.glob("*.fp16.*")) else None
        return _class("AutoencoderKL").from_pretrained(folder, variant=variant, dtype=self.dtype)

    def prepare(self, workload: Workload) -> None:
        """Load what the workload needs beside the model."""
        if "refine" in workload.asked and self.refiner is None:
            self.refiner = self._load_refiner()
        if workload.control and self._control is None:
            folder = bench_models.folder("controlnet-union-sdxl")
            net = _class("ControlNetUnionModel").from_pretrained(
                folder, variant="fp16", dtype=self.dtype
            )
            parts = {**self.base.components, "controlnet": net.to(self.device)}
            pipeline = _class("StableDiffusionXLControlNetUnionPipeline")
            self._control = _quiet(pipeline(**parts, add_watermarker=False))

    def _load_refiner(self) -> Any:  # noqa: ANN401
        """With the base model's second text encoder and VAE."""
        assert self.spec.refiner is not None
        shared = {n: self.base.components[n] for n in ("text_encoder_2", "tokenizer_2", "vae")}
        refiner = _class("StableDiffusionXLImg2ImgPipeline").from_pretrained(
            bench_models.folder(self.spec.refiner.weights),
            variant="fp16",
            dtype=self.dtype,
            text_encoder=None,
            tokenizer=None,
            add_watermarker=False,
            **shared,
        )
        return _quiet(refiner.to(self.device))

    def run(self, workload: Workload, seed: int, folder: Path) -> list[Path]:
        """The request, its files in `folder`."""
        files = []
        for number, picture in enumerate(self._draw(workload, seed)):
            files.append(folder / f"stock-{number}.png")
            picture.save(files[-1])
        return files

    def _draw(self, workload: Workload, seed: int) -> Any:  # noqa: ANN401
        size = {"width": self.spec.native_size, "height": self.spec.native_size}
        common = arguments(workload, seed)
        if workload.control:
            return self._control(
                **common,
                **size,
                control_image=[_edges(self._control_picture, self.spec.native_size)],
                control_mode=[CANNY_OF_UNION],
                controlnet_conditioning_scale=CONTROL_SCALE,
            ).images
        if "refine" in workload.asked:
            share = HIGH_NOISE_SHARE
            latents = self.base(**common, **size, denoising_end=share, output_type="latent").images
            return self.refiner(**common, image=latents, denoising_start=share).images
        return self.base(**common, **size).images


def _merge(pipeline: Any, file: Path) -> None:  # noqa: ANN401
    """The LoRA that makes it the model: for good, as `fuse_lora` does it.

    diffusers' own loader passes over alphas where modules are called as in the miniature's files.
    """
    import torch

    from weights.formats.read import read_trained
    from weights.formats.types import ModelShapes

    lora = read_trained(file, file.name, ModelShapes.of({"unet": pipeline.unet})).lora
    for path, delta in lora.items():
        weight = pipeline.unet.get_submodule(path.removeprefix("unet.")).weight
        up, down = delta.up.float().flatten(1), delta.down.float().flatten(1)
        change = (up @ down).view(weight.shape) * (delta.alpha / delta.rank)
        with torch.no_grad():
            weight.copy_(weight.float() + change)


def arguments(workload: Workload, seed: int) -> dict[str, Any]:
    """Of a pipeline's call."""
    import torch

    generators = [torch.Generator().manual_seed(seed + k) for k in range(workload.pictures)]
    return {
        "prompt": PROMPT,
        "negative_prompt": "",  # as at ours; without one, SDXL takes zeros
        "num_inference_steps": workload.asked["num_inference_steps"],
        "guidance_scale": workload.asked["guidance_scale"],
        "generator": generators,  # ours draws every picture's noise by itself, on the CPU
        "num_images_per_prompt": workload.pictures,
    }


def _compile(pipeline: Any) -> None:  # noqa: ANN401
    """As diffusion-fast; the first call compiles."""
    import torch

    how: dict[str, Any] = {"mode": "max-autotune", "fullgraph": True}
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, **how)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, **how)


def _edges(picture: Path, size: int) -> Any:  # noqa: ANN401
    """As the ControlNets' own pages take them."""
    import cv2
    import numpy as np
    from PIL import Image

    pixels = np.array(Image.open(picture).convert("RGB").resize((size, size)))
    edges = cv2.Canny(pixels, *CANNY_THRESHOLDS)
    return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


def _class(name: str) -> Any:  # noqa: ANN401
    import diffusers

    return getattr(diffusers, name)


def _quiet(pipeline: Any) -> Any:  # noqa: ANN401
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
