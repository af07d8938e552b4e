"""Modes with an image and the refiner: the same numbers as stock diffusers, to 1e-4 in fp32."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from generation.base_models import MINIATURE_SDXL
from generation.inpaint import InpaintRegion
from generation.plan import BASE_IMAGE_STRENGTH
from tests.miniature.reference_pipelines import REFERENCE_SCHEDULERS, for_inference, load_reference
from tests.miniature.test_parity import COG_SDXLS
from weights import cache
from weights.catalog import Edition
from weights.miniature.evaluate import FOLDER as WEIGHTS
from weights.miniature.world import place, render

PROMPT = "a large red circle on a blue background"
SEED, STEPS, GUIDANCE = 5, 8, 7.5
SMALL = {"width": 64, "height": 64}  # inpainting works at the model's own size
MASK_BOX = (32, 40, 96, 88)  # on the grid of 8x8 pixels that latents have


@pytest.fixture(scope="module")
def base():
    return load_reference()


@pytest.fixture(scope="module")
def image2image(base):
    return for_inference(diffusers.StableDiffusionXLImg2ImgPipeline(**base.components))


@pytest.fixture(scope="module")
def inpainting(base):
    return for_inference(diffusers.StableDiffusionXLInpaintPipeline(**base.components))


@pytest.fixture(scope="module")
def refiner(base):
    """As diffusers' documentation has it: the base's VAE and second text encoder serve both."""
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
        cache.ensure(MINIATURE_SDXL.refiner.weights, Edition.MINIATURE),
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        variant="fp16",
        dtype=torch.float32,
        add_watermarker=False,
    )
    return for_inference(refiner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    scene = place("square", "yellow", "green", "medium", "center", np.random.default_rng(3))
    render(scene, 128, 128).save(folder / "image.png")
    render(scene, 64, 64).save(folder / "small.png")
    render(scene, 152, 96).save(folder / "wide.png")
    mask = Image.new("L", (128, 128))
    left, top, right, bottom = MASK_BOX
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    mask.save(folder / "mask.png")
    return folder


def read(path) -> Image.Image:
    return Image.open(path).convert("RGB")


def fresh(name: str):
    """The scheduler that a stock user would build from the model's own config."""
    scheduler_class, overrides = REFERENCE_SCHEDULERS[name]
    config = scheduler_class.load_config(WEIGHTS / "scheduler")
    return scheduler_class.from_config(config, **overrides)


def seeds(count: int = 1) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(SEED + k) for k in range(count)]


def run(pipeline, scheduler: str, generators: list[torch.Generator], **arguments):
    """Latents (N, 4, h, w) of a stock pipeline, for the prompt as text."""
    pipeline.scheduler = fresh(scheduler)
    return pipeline(
        prompt=PROMPT,
        negative_prompt="",
        num_images_per_prompt=len(generators),
        generator=generators,
        **{"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **arguments},
        output_type="latent",
    ).images


@pytest.fixture
def ours(make):
    """`ours(scheduler, ...)`: our latents at the same settings."""

    def ours(scheduler: str, **changes: object) -> torch.Tensor:
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED}
        return make(prompt=PROMPT, scheduler=scheduler, **{**settings, **changes}).latents

    return ours


def same(ours: torch.Tensor, stock: torch.Tensor) -> bool:
    assert ours.shape == stock.shape
    return torch.allclose(ours, stock, atol=1e-4, rtol=0)


# Image to image


@pytest.mark.parametrize("scheduler", COG_SDXLS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(image2image, ours, folder, scheduler, strength):
    path = folder / "small.png"
    stock = run(image2image, scheduler, seeds(), image=read(path), strength=strength)
    assert same(ours(scheduler, image=path, prompt_strength=strength, **SMALL), stock)


@pytest.mark.parametrize("scheduler", ["K_EULER", "K_EULER_ANCESTRAL", "HeunDiscrete"])
def test_image_to_image_of_two_at_another_size_without_guidance(
    image2image, ours, folder, scheduler
):
    path = folder / "wide.png"
    settings = {"guidance_scale": 1.0, "num_inference_steps": 7}
    stock = run(image2image, scheduler, seeds(2), image=read(path), strength=0.6, **settings)
    size = {"width": 152, "height": 96}
    made = ours(scheduler, image=path, prompt_strength=0.6, num_outputs=2, **size, **settings)
    assert same(made, stock)


# Inpainting


@pytest.fixture
def model_inputs(monkeypatch):
    """The images that the VAE encodes for inpainting, in order."""
    seen: list[Image.Image] = []
    model_input = InpaintRegion.model_input

    def watched(region: InpaintRegion, image: Image.Image) -> Image.Image:
        seen.append(model_input(region, image))
        return seen[-1]

    monkeypatch.setattr(InpaintRegion, "model_input", watched)
    return seen


@pytest.mark.parametrize("scheduler", COG_SDXLS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(inpainting, ours, model_inputs, folder, scheduler, strength):
    image, mask = folder / "image.png", folder / "mask.png"
    made = ours(scheduler, image=image, mask=mask, mask_blur=0, prompt_strength=strength)
    # At full strength what is under the mask is hidden before the VAE sees it.
    (seen,) = model_inputs
    assert (seen.tobytes() == read(image).tobytes()) is (strength < 1)
    stock = run(
        inpainting,
        scheduler,
        seeds(),
        image=seen,
        mask_image=Image.open(mask),
        # Without it, the pipeline of 4-channel models encodes an image that it never uses, which
        # takes a number from the generator and so moves the noise of ancestral schedulers.
        masked_image_latents=torch.zeros(1, 4, 16, 16),
        strength=strength,
        width=128,
        height=128,
    )
    assert same(made, stock)


def test_inpainting_of_two_is_stock_inpainting_of_each(inpainting, ours, folder):
    """One by one: a stock batch takes the first generator's sample of the image for all."""
    image, mask = folder / "image.png", folder / "mask.png"
    settings = {"guidance_scale": 1.0, "num_inference_steps": 7}
    stock = [
        run(
            inpainting,
            "K_EULER",
            [generator],
            image=read(image),
            mask_image=Image.open(mask),
            strength=0.6,
            width=128,
            height=128,
            **settings,
        )
        for generator in seeds(2)
    ]
    masked = {"image": image, "mask": mask, "mask_blur": 0, "prompt_strength": 0.6}
    assert same(ours("K_EULER", num_outputs=2, **masked, **settings), torch.cat(stock))


# The refiner: diffusers' recipes, both pipelines drawing from the same generators


@pytest.mark.parametrize("scheduler", COG_SDXLS)
@pytest.mark.parametrize("count", [1, 2])
def test_expert_ensemble_after_text(base, refiner, ours, scheduler, count):
    generators = seeds(count)
    latents = run(base, scheduler, generators, denoising_end=0.8, **SMALL)
    stock = run(refiner, scheduler, generators, image=latents, denoising_start=0.8)
    made = ours(scheduler, refine="expert_ensemble_refiner", num_outputs=count, **SMALL)
    assert same(made, stock)


@pytest.mark.parametrize("scheduler", COG_SDXLS)
def test_base_image_after_text(base, refiner, ours, scheduler):
    generators = seeds(2)
    latents = run(base, scheduler, generators, **SMALL)
    again = {"num_inference_steps": 11, "strength": BASE_IMAGE_STRENGTH}
    stock = run(refiner, scheduler, generators, image=latents, **again)
    made = ours(scheduler, refine="base_image_refiner", refine_steps=11, num_outputs=2, **SMALL)
    assert same(made, stock)


@pytest.mark.parametrize("scheduler", COG_SDXLS)
def test_expert_ensemble_after_an_image(image2image, refiner, ours, folder, scheduler):
    path, generators = folder / "small.png", seeds()
    settings = {"strength": 0.6, "num_inference_steps": 10, "guidance_scale": 1.0}
    latents = run(
        image2image, scheduler, generators, image=read(path), denoising_end=0.7, **settings
    )
    del settings["strength"]
    stock = run(refiner, scheduler, generators, image=latents, denoising_start=0.7, **settings)
    refine = {"refine": "expert_ensemble_refiner", "high_noise_frac": 0.7}
    made = ours(scheduler, image=path, prompt_strength=0.6, **refine, **settings, **SMALL)
    assert same(made, stock)


@pytest.mark.parametrize("scheduler", ["K_EULER", "K_EULER_ANCESTRAL", "PNDM"])
def test_base_image_after_an_image(image2image, refiner, ours, folder, scheduler):
    path, generators = folder / "small.png", seeds()
    latents = run(image2image, scheduler, generators, image=read(path), strength=0.6)
    stock = run(refiner, scheduler, generators, image=latents, strength=BASE_IMAGE_STRENGTH)
    refine = {"refine": "base_image_refiner"}
    made = ours(scheduler, image=path, prompt_strength=0.6, **refine, **SMALL)
    assert same(made, stock)
