"""hires_fix: a second stage at a larger size, and the choice of the upscaler."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from generation.base_models import MINIATURE_SDXL, SDXL
from generation.errors import InvalidRequest
from generation.resolve import resolve
from generation.sizes import Margins
from preprocess.upscale import Upscaler
from tests.helpers.comparison import max_difference, nearly_equal
from tests.helpers.engines import refiner
from tests.helpers.request import REQUEST
from tests.miniature.reference_pipelines import for_inference, load_reference
from weights.catalog import Edition
from weights.miniature.world import Expectation, judge

SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
FIGURES = [
    ("a large red circle on a blue background", Expectation("circle", "red", "blue")),
    pytest.param(
        "a small yellow heart on a purple background",
        Expectation("heart", "yellow", "purple"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("prompt", "expected"), FIGURES)
def test_the_same_composition_with_sharper_edges(make, prompt, expected):
    settings = {"prompt": prompt, "num_inference_steps": 12}
    with_hires, enlarged = (
        make(**settings, hires_fix=2).images[0],
        make(**settings, upscale="2").images[0],
    )
    assert with_hires.size == enlarged.size == (256, 256)
    assert judge(with_hires, expected).all_right
    difference = np.abs(np.asarray(with_hires, int) - np.asarray(enlarged, int)).mean()
    assert 0.5 < difference < 16
    assert steepest(with_hires) > 1.1 * steepest(enlarged)


def steepest(image: Image.Image) -> float:
    """Return how much brightness changes from pixel to pixel at the steepest hundredth of them."""
    grey = np.asarray(image.convert("L"), float)
    across, along = np.gradient(grey)
    return float(np.quantile(np.hypot(across, along)[8:-8, 8:-8], 0.99))


def test_it_is_image_to_image_on_the_upscaled_image(make):
    """As stock diffusers does it, with a generator that continues after the first stage."""
    settings = {**SMALL, "seed": 5, "scheduler": "K_EULER"}
    first = make(**settings)
    ours = make(**settings, hires_fix=2, hires_strength=0.5).latents
    generator = torch.Generator("cpu").manual_seed(5)
    torch.randn(1, 4, 8, 8, generator=generator)  # the first stage's
    with Upscaler(Edition.MINIATURE, "cpu") as upscaler:
        large = upscaler.upscale(first.images[0], 2)
    pipeline = for_inference(
        diffusers.StableDiffusionXLImg2ImgPipeline(**load_reference().components)
    )
    stock = pipeline(
        prompt=REQUEST.prompt,
        negative_prompt="",
        image=large,
        strength=0.5,
        num_inference_steps=SMALL["num_inference_steps"],
        guidance_scale=MINIATURE_SDXL.guidance_scale,
        generator=[generator],
        output_type="latent",
    ).images
    assert (ours - stock).abs().max() < 1e-4


def test_strength_is_how_much_changes(make):
    settings = {**SMALL, "num_inference_steps": 8}
    plain = make(**settings, upscale="2").images[0]
    changes = []
    for strength in (0.0, 0.3, 0.9):
        with_hires = make(**settings, hires_fix=2, hires_strength=strength).images[0]
        changes.append(np.abs(np.asarray(with_hires, int) - np.asarray(plain, int)).mean())
    assert changes[0] < changes[1] < changes[2]
    default = make(**SMALL, hires_fix=2, hires_strength=MINIATURE_SDXL.hires_strength)
    assert make(**SMALL, hires_fix=2).bytes == default.bytes


def test_each_image_of_a_batch_equals_the_one_made_alone(make):
    both = make(**SMALL, hires_fix=1.5, num_outputs=2, seed=7)
    alone = make(**SMALL, hires_fix=1.5, seed=8)
    assert both.images[0].size == (96, 96)
    assert max_difference(both.images[1], alone.images[0]) <= 1


def test_an_input_image_is_denoised_again_and_upscaled(make, tmp_path):
    Image.new("RGB", (96, 64), (30, 60, 200)).save(tmp_path / "image.png")
    settings = {
        "image": tmp_path / "image.png",
        "width": 96,
        "height": 64,
        "num_inference_steps": 4,
    }
    made = make(**settings, hires_fix=1.25, upscale="2", embed_parameters=True)
    assert made.images[0].size == (240, 160)
    text = made.images[0].info["parameters"]
    for entry in ("Size: 96x64", "Hires resize: 120x80", "Hires upscaler: SwinIR 4x"):
        assert entry in text
    assert "Denoising strength: 0.8" in text  # the first stage's; the second's is in Inputs


def test_sizes_are_rounded_to_whole_latents_and_the_aspect_is_kept(make):
    made = make(**{**SMALL, "width": 104}, hires_fix=1.3)
    assert made.images[0].size == (136, 80)  # 135.2 x 83.2
    assert make(**SMALL, hires_fix=1.01).images[0].size == (64, 64)


@pytest.mark.parametrize("style", ["base_image_refiner", "expert_ensemble_refiner"])
def test_the_refiner_runs_in_the_second_stage_alone(make, engine, style):
    sizes: set[tuple[int, ...]] = set()
    unet = refiner(engine).components.unet
    handle = unet.register_forward_pre_hook(lambda _, args: sizes.add(tuple(args[0].shape[-2:])))
    settings = {**SMALL, "num_inference_steps": 10, "hires_fix": 2, "hires_strength": 0.5}
    try:
        refined = make(**settings, refine=style)
    finally:
        handle.remove()
    assert sizes == {(16, 16)}  # latents of 128x128 pixels
    assert not nearly_equal(refined.images, make(**settings).images)


def test_both_upscalers_work_and_differ(make):
    for change in ({"upscale": "2"}, {"hires_fix": 2}):
        made = {name: make(**SMALL, **change, upscaler=name) for name in ("SwinIR", "Real-ESRGAN")}
        one, other = (np.asarray(m.images[0], int) for m in made.values())
        assert 0 < np.abs(one - other).mean() < 12
    image = make(**SMALL, upscale="4", upscaler="Real-ESRGAN", embed_parameters=True).images[0]
    assert "Postprocess upscaler: R-ESRGAN 4x+" in image.info["parameters"]
    unused = make(**SMALL, upscaler="Real-ESRGAN")
    assert unused.bytes == make(**SMALL).bytes


def test_invalid_requests_are_rejected(tmp_path):
    settings = replace(REQUEST, hires_fix=2.5)
    with pytest.raises(
        InvalidRequest,
        match=r"hires_fix is 2.5, which makes 2560x2560 of 1024x1024; sdxl generates at most"
        r" 4194304 pixels: use hires_fix up to 2, and upscale for more",
    ):
        resolve(settings, SDXL, None)
    resolve(replace(settings, hires_fix=2), SDXL, None)
    inpainted = replace(settings, hires_fix=1.5, image=tmp_path, mask=tmp_path)
    with pytest.raises(InvalidRequest, match=r"hires_fix is 1.5, and this is inpaint: .* upscale"):
        resolve(inpainted, SDXL, (1024, 1024))
    wider = replace(inpainted, mask=None, outpaint=Margins(8, 0, 0, 0))
    with pytest.raises(InvalidRequest, match=r"hires_fix is 1.5, and this is outpaint"):
        resolve(wider, SDXL, (1024, 1024))
    with pytest.raises(InvalidRequest, match="smaller width, height and hires_fix"):
        resolve(replace(REQUEST, hires_fix=2, upscale="4"), SDXL, None)
    with pytest.raises(InvalidRequest, match=r"hires_fix is 0.5; it must be from 1 to 4"):
        resolve(replace(REQUEST, hires_fix=0.5), SDXL, None)
    with pytest.raises(InvalidRequest, match=r"hires_fix is nan"):
        resolve(replace(REQUEST, hires_fix=float("nan")), SDXL, None)
    with pytest.raises(InvalidRequest, match=r"hires_strength is 1.5; it must be from 0 to 1"):
        resolve(replace(REQUEST, hires_strength=1.5), SDXL, None)
    with pytest.raises(InvalidRequest, match="upscaler 'ESRGAN' is not known; choose one of Swin"):
        resolve(replace(REQUEST, upscaler="ESRGAN"), SDXL, None)
