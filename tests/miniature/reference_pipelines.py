"""Stock diffusers, with trained weights loaded by its functions: the reference for our latents."""

import copy
from base64 import b64encode
from dataclasses import dataclass
from urllib.parse import quote

import diffusers
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save
from torch import Tensor

from generation.schedulers import SCHEDULERS
from generation.sizes import Margins
from tests.helpers.trained_files import (
    WIDTH,
    cog_embeddings,
    cog_lora_tensors,
    miniature_shapes,
    tar_bytes,
)
from weights.miniature.evaluate import FOLDER, load_pipeline

PARTS = ("unet", "text_encoder", "text_encoder_2")
TOLERANCE = 1e-3  # of latents, whose values reach to 2 or 3
CLEARLY = 0.05
PROMPT = "a large red circle on a blue background"
SEED = 5
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 4.0}
SIZE = {"width": 64, "height": 64}

# One name for each scheduler: some have two, cog-sdxl's and A1111's.
DISTINCT = list(
    {(spec.class_name, *spec.overrides.items()): name for name, spec in SCHEDULERS.items()}.values()
)

# What a diffusers user would write: class, then arguments of from_config.
REFERENCE_SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, {}),
    "DPMSolverMultistep": (diffusers.DPMSolverMultistepScheduler, {}),
    "HeunDiscrete": (diffusers.HeunDiscreteScheduler, {}),
    "KarrasDPM": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "K_EULER_ANCESTRAL": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "K_EULER": (diffusers.EulerDiscreteScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, {}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "LMS": (diffusers.LMSDiscreteScheduler, {}),
    "DPM2": (diffusers.KDPM2DiscreteScheduler, {}),
    "DPM2 a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler, {}),
    "DPM++ 2M SDE": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "DPM++ SDE": (diffusers.DPMSolverSDEScheduler, {"noise_sampler_seed": [5]}),
    "DPM++ 2S a": (
        diffusers.DPMSolverSinglestepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "DEIS": (diffusers.DEISMultistepScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
    "TCD": (diffusers.TCDScheduler, {}),
}


@dataclass(frozen=True)
class File:
    """A file of trained weights that a user uploads."""

    name: str
    content: bytes

    @property
    def url(self) -> str:
        return f"data:;name={quote(self.name)};base64,{b64encode(self.content).decode()}"


def for_inference(pipeline):
    """Return the pipeline, with frozen weights and without a progress bar.

    For weights that require gradients torch multiplies by other kernels (`should_fold` in ATen's
    LinearAlgebra.cpp), and a solver of second order can make 1e-4 of their last digits.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_reference() -> StableDiffusionXLPipeline:
    """Load a stock pipeline with the miniature SDXL's weights."""
    return for_inference(load_pipeline(FOLDER))


def copy_of(pipeline):
    """Return a copy of a pipeline to load weights into; the VAE, which has none, is shared."""
    parts = {name: copy.deepcopy(p) for name, p in pipeline.components.items() if name != "vae"}
    return for_inference(
        StableDiffusionXLPipeline(**parts, vae=pipeline.vae, add_watermarker=False)
    )


def seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(SEED)


def draw(pipeline, prompt: str = PROMPT, **changes) -> Tensor:
    """Return latents of a stock pipeline, which takes the size from an image where there is one."""
    size = {} if "image" in changes else SIZE
    settings = {**SETTINGS, **size, "negative_prompt": "", "generator": seeded(), **changes}
    return pipeline(prompt=prompt, **settings, output_type="latent").images


def assert_same(ours: Tensor, stock: Tensor, without: Tensor) -> None:
    """Check that our latents are stock's, and clearly not those `without` the weights."""
    assert ours.shape == stock.shape == without.shape
    assert (ours - stock).abs().max() <= TOLERANCE
    assert (stock - without).abs().max() > CLEARLY


# LoRAs


def modules_of(*ends: str) -> list[str]:
    return [name for name in miniature_shapes().modules() if name.endswith(ends)]


# What kohya trains: by default, with train_text_encoder, with conv_dim.
KOHYA_UNET = modules_of(
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"
)
KOHYA_TEXT = modules_of("q_proj", "k_proj", "v_proj", "self_attn.out_proj", "fc1", "fc2")
KOHYA_CONVOLUTIONS = modules_of(
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "samplers.0.conv"
)


def weak(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return matrices drawn from a normal distribution, made about as small as a training's."""
    return {name: value * 0.15 if value.ndim > 1 else value for name, value in tensors.items()}


def lora_file(tensors: dict[str, Tensor]) -> File:
    return File("lora.safetensors", save(tensors))


# Textual inversions


def rows(seed: int) -> Tensor:
    """Return vectors of two tokens."""
    return 0.3 * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))


def with_word(word: str) -> str:
    """Return a prompt in which words follow `word`, which the pooled embedding must include."""
    return f"a large {word} circle on a blue background"


def load_words(pipeline, first: Tensor, second: Tensor, tokens: list[str]) -> None:
    """Load vectors of the two text encoders; `tokens` are written in the prompt."""
    for vectors, number in ((first, ""), (second, "_2")):
        pipeline.load_textual_inversion(
            vectors,
            token=tokens if len(tokens) > 1 else tokens[0],
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )


def pool_at_the_end(pipeline) -> None:
    """Pool as kohya and ComfyUI do: as transformers does where a config names the real end token.

    SDXL's configs name 2, which means the highest token id, and a new word has that: so do
    cog-sdxl and stock diffusers.
    """
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id


# cog-sdxl's archive

COG_LORA = weak(cog_lora_tensors())
COG_WORDS = {name: vectors * 0.3 for name, vectors in cog_embeddings().items()}
COG_MEMBERS = {
    "lora.safetensors": save(COG_LORA),
    "embeddings.pti": save(COG_WORDS),
    "special_params.json": b'{"TOK": "<s0><s1>"}',
}
COG_ARCHIVE = File("trained_model.tar", tar_bytes(COG_MEMBERS))
TYPED, READ = with_word("TOK"), with_word("<s0><s1>")
TOKENS = ["<s0>", "<s1>"]


def load_cog(pipeline, scale: float) -> None:
    """Load the archive as cog-sdxl's predictor does, with diffusers' functions of today."""
    load_words(pipeline, *COG_WORDS.values(), TOKENS)
    pipeline.load_lora_weights({f"unet.{k}": v for k, v in COG_LORA.items()}, adapter_name="cog")
    pipeline.set_adapters("cog", scale)


# Requests of each mode and of other paths through the engine, as changes of a plain one; images by
# the names of the fixture `files`.
MODES = {
    "txt2img": {},
    "img2img": {"image": "image"},
    "inpaint": {"image": "image", "mask": "mask"},
    "outpaint": {"image": "image", "outpaint": Margins(16, 0, 0, 0)},
    "expert": {"refine": "expert_ensemble_refiner"},
    "base_image": {"refine": "base_image_refiner"},
    "ancestral": {"scheduler": "K_EULER_ANCESTRAL"},
    "trained": {"prompt": TYPED, "replicate_weights": COG_ARCHIVE.url},
}
