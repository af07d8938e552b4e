"""hires_fix: a second pass at a larger size, and the choice of what enlarges."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import generation.painter
from generation.base_models import MINIATURE_SDXL, SDXL
from generation.errors import InvalidRequest
from generation.request import Margins, resolve
from preprocess.upscale import Upscaler
from tests.comparison import max_difference, nearly_equal
from tests.requests import REQUEST
from weights.catalog import Edition
from weights.miniature.evaluate import FOLDER, load_pipeline
from weights.miniature.world import Expectation, judge

SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
FIGURES = [
    ("a large red circle on a blue background", Expectation("circle", "red", "blue")),
    ("a small yellow heart on a purple background", Expectation("heart", "yellow", "purple")),
]


@pytest.mark.parametrize(("prompt", "expected"), FIGURES)
def test_the_same_composition_with_sharper_edges(make, prompt, expected):
    asked = {"prompt": prompt, "num_inference_steps": 12}
    redrawn, enlarged = (
        make(**asked, hires_fix=2).pictures[0],
        make(**asked, upscale="2").pictures[0],
    )
    assert redrawn.size == enlarged.size == (256, 256)
    assert judge(redrawn, expected).all_right
    difference = np.abs(np.asarray(redrawn, int) - np.asarray(enlarged, int)).mean()
    assert 0.5 < difference < 16
    assert steepest(redrawn) > 1.1 * steepest(enlarged)


def steepest(picture: Image.Image) -> float:
    """How much brightness changes from pixel to pixel at the steepest hundredth of them."""
    grey = np.asarray(picture.convert("L"), float)
    across, along = np.gradient(grey)
    return float(np.quantile(np.hypot(across, along)[8:-8, 8:-8], 0.99))


def test_it_is_image_to_image_on_the_enlarged_picture(make):
    """Stock diffusers' own, with the noise that goes on where the first pass has stopped."""
    asked = {"num_inference_steps": 8, "seed": 5, "scheduler": "K_EULER"}
    first = make(**asked)
    ours = make(**asked, hires_fix=2, hires_strength=0.5).latents
    generator = torch.Generator("cpu").manual_seed(5)
    torch.randn(1, 4, 16, 16, generator=generator)  # the first pass's
    with Upscaler(Edition.MINIATURE, "cpu") as upscaler:
        large = upscaler.upscale(first.pictures[0], 2)
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**load_pipeline(FOLDER).components)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        prompt=REQUEST.prompt,
        negative_prompt="",
        image=large,
        strength=0.5,
        num_inference_steps=8,
        guidance_scale=MINIATURE_SDXL.guidance_scale,
        generator=[generator],
        output_type="latent",
    ).images
    assert (ours - stock).abs().max() < 1e-4


def test_strength_says_how_much_changes(make):
    asked = {**SMALL, "num_inference_steps": 10}
    plain = make(**asked, upscale="2").pictures[0]
    changes = []
    for strength in (0.0, 0.3, 0.9):
        redrawn = make(**asked, hires_fix=2, hires_strength=strength).pictures[0]
        changes.append(np.abs(np.asarray(redrawn, int) - np.asarray(plain, int)).mean())
    assert changes[0] < changes[1] < changes[2]
    own = make(**SMALL, hires_fix=2, hires_strength=MINIATURE_SDXL.hires_strength)
    assert make(**SMALL, hires_fix=2).bytes == own.bytes


def test_each_picture_of_a_batch_is_as_it_is_alone(make):
    both = make(**SMALL, hires_fix=1.5, num_outputs=2, seed=7)
    alone = make(**SMALL, hires_fix=1.5, seed=8)
    assert both.pictures[0].size == (96, 96)
    assert max_difference(both.pictures[1], alone.pictures[0]) <= 1


def test_an_image_is_redrawn_and_enlarged_once_more(make, tmp_path):
    Image.new("RGB", (96, 64), (30, 60, 200)).save(tmp_path / "image.png")
    asked = {"image": tmp_path / "image.png", "width": 96, "height": 64, "num_inference_steps": 4}
    made = make(**asked, hires_fix=1.25, upscale="2", embed_parameters=True)
    assert made.pictures[0].size == (240, 160)
    text = made.pictures[0].info["parameters"]
    for told in ("Size: 96x64", "Hires resize: 120x80", "Hires upscaler: SwinIR 4x"):
        assert told in text
    assert "Denoising strength: 0.8" in text  # the image's; the second pass's is in Inputs


def test_sizes_are_rounded_to_whole_latents_and_the_aspect_is_kept(make):
    made = make(**{**SMALL, "width": 104}, hires_fix=1.3)
    assert made.pictures[0].size == (136, 80)  # 135.2 x 83.2
    assert make(**SMALL, hires_fix=1.01).pictures[0].size == (64, 64)


@pytest.mark.parametrize("style", ["base_image_refiner", "expert_ensemble_refiner"])
def test_the_refiner_works_in_the_second_pass_alone(make, monkeypatch, style):
    refine, sizes = generation.painter.refine.refine, []

    def watched(pipeline, plan, embeddings, generators, latents, start):
        sizes.append(start.size)
        return refine(pipeline, plan, embeddings, generators, latents, start)

    monkeypatch.setattr(generation.painter.refine, "refine", watched)
    asked = {**SMALL, "num_inference_steps": 10, "hires_fix": 2, "hires_strength": 0.5}
    refined = make(**asked, refine=style)
    assert sizes == [(128, 128)]
    assert not nearly_equal(refined.pictures, make(**asked).pictures)


def test_either_upscaler_enlarges_and_they_differ(make):
    for change in ({"upscale": "4"}, {"hires_fix": 2}):
        made = {name: make(**SMALL, **change, upscaler=name) for name in ("SwinIR", "Real-ESRGAN")}
        one, other = (np.asarray(m.pictures[0], int) for m in made.values())
        assert 0 < np.abs(one - other).mean() < 12
    told = make(**SMALL, upscale="2", upscaler="Real-ESRGAN", embed_parameters=True).pictures[0]
    assert "Postprocess upscaler: R-ESRGAN 4x+" in told.info["parameters"]
    nothing = make(**SMALL, upscaler="Real-ESRGAN")
    assert nothing.bytes == make(**SMALL).bytes


def test_what_is_refused(tmp_path):
    asked = replace(REQUEST, hires_fix=2.5)
    with pytest.raises(
        InvalidRequest,
        match=r"hires_fix is 2.5, which makes 2560x2560 of 1024x1024; sdxl draws at most 4194304"
        r" pixels: use hires_fix up to 2, and upscale for more",
    ):
        resolve(asked, SDXL, None)
    resolve(replace(asked, hires_fix=2), SDXL, None)
    painted = replace(asked, hires_fix=1.5, image=tmp_path, mask=tmp_path)
    with pytest.raises(InvalidRequest, match=r"hires_fix is 1.5, and this is inpaint: .* upscale"):
        resolve(painted, SDXL, (1024, 1024))
    wider = replace(painted, mask=None, outpaint=Margins(8, 0, 0, 0))
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
