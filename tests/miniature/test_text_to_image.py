"""Text to image: images show what the prompt describes, and every input has its effect."""

import numpy as np
import pytest
import torch

from generation.errors import InvalidRequest
from generation.schedulers import SCHEDULERS
from tests.helpers.comparison import nearly_equal
from tests.helpers.engines import base_model
from tests.miniature.reference_pipelines import DISTINCT
from weights.miniature.captions import held_out_captions
from weights.miniature.evaluate import (
    ATTRIBUTES,
    CAPTION_SEED,
    CAPTIONS,
    MIN_PSNR,
    judge_captions,
    load_pipeline,
    shares,
)
from weights.miniature.evaluate import FOLDER as WEIGHTS
from weights.miniature.train_vae import reconstruction_psnr
from weights.miniature.world import Expectation, judge, read_picture

RED_CIRCLE_ON_BLUE = Expectation(shape="circle", colour="red", background="blue", size="large")
SMALL = {"width": 64, "height": 64, "num_inference_steps": 3}
ONE_CAPTION = 1 / CAPTIONS  # may turn out otherwise where kernels sum in another order


def test_the_vae_reconstructs_images():
    assert reconstruction_psnr(load_pipeline(WEIGHTS).vae, count=32, seed=12345) >= MIN_PSNR


@pytest.mark.slow  # test_model_eval.py generates an eighth of them with the engine
def test_held_out_captions_are_followed():
    pipeline = load_pipeline(WEIGHTS)
    rows = judge_captions(pipeline, held_out_captions(CAPTIONS, CAPTION_SEED))
    measured = shares(rows)
    assert {
        n: measured[n] for n, least in ATTRIBUTES.items() if measured[n] < least - ONE_CAPTION
    } == {}


def test_the_readmes_first_image(make):
    made = make(num_inference_steps=None)
    assert made.result.plan.num_inference_steps == 20
    assert made.images[0].size == (128, 128)
    assert judge(made.images[0], RED_CIRCLE_ON_BLUE).all_right


@pytest.mark.slow  # test_schedulers.py generates one image of each
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_most_images_of_every_scheduler_show_the_prompt(make, scheduler):
    made = make(scheduler=scheduler, num_inference_steps=20, num_outputs=4, seed=100)
    right = [judge(image, RED_CIRCLE_ON_BLUE).all_right for image in made.images]
    assert sum(right) >= 3


# In image to image test_mode_eval.py tries 1 and 3.
@pytest.mark.parametrize(
    "steps", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("scheduler", DISTINCT)
def test_every_scheduler_works_with_very_few_steps(make, scheduler, steps):
    made = make(scheduler=scheduler, num_inference_steps=steps, width=64, height=64)
    assert torch.isfinite(made.latents).all()


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a small green star on a yellow background"},
        {"negative_prompt": "red circle"},
        {"num_inference_steps": 4},
        {"guidance_scale": 3.0},
        {"guidance_scale": 0.0},
        {"scheduler": "DPMSolverMultistep"},  # not DDIM: without noise it is Euler
        {"scheduler": "K_EULER_ANCESTRAL"},
        {"seed": 2},
    ],
)
def test_every_input_changes_the_image(make, change):
    made = (make(**SMALL), make(**{**SMALL, **change}))
    before, after = (np.asarray(m.images[0], dtype=int) for m in made)
    assert np.abs(before - after).mean() > 0.5


@pytest.mark.parametrize(("width", "height"), [(160, 104), (104, 160), (144, 144), (64, 64)])
def test_the_image_has_the_requested_size(make, width, height):
    made = make(width=width, height=height)
    assert made.images[0].size == (width, height)
    assert read_picture(made.images[0]).background == "blue"


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 2), (1.0, 2), (1.5, 4)])
def test_guidance_of_one_or_less_evaluates_the_prompt_alone(make, engine, scale, rows):
    unet = base_model(engine).components.unet
    batches = []
    handle = unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    try:
        make(**SMALL, guidance_scale=scale, num_outputs=2)
    finally:
        handle.remove()
    assert batches == [rows] * 3


def test_an_image_of_a_batch_equals_the_one_made_alone(make):
    batch = make(**SMALL, num_outputs=3, seed=40)
    for k in range(3):
        alone = make(**SMALL, seed=40 + k)
        assert torch.allclose(batch.latents[k], alone.latents[0], atol=1e-4, rtol=0)


def test_the_seed_is_printed_and_an_open_one_can_be_used_again(make, capsys):
    first = make(**SMALL, seed=None)
    seed = int(capsys.readouterr().out.split("Using seed: ")[1].split()[0])
    assert seed == first.result.plan.seeds[0]
    assert make(**SMALL, seed=seed).bytes == first.bytes


def test_a_negative_prompt_without_guidance_is_logged_as_without_effect(make, capsys):
    guided = make(**SMALL, negative_prompt="red")
    unguided = make(**SMALL, negative_prompt="red", guidance_scale=1.0)
    assert not nearly_equal(guided.images, unguided.images)
    assert capsys.readouterr().out.count("negative_prompt has no effect") == 1
    assert make(**SMALL, guidance_scale=1.0).bytes == unguided.bytes


def test_progress_shows_as_one_bar(make, capfd):
    make(**{**SMALL, "num_inference_steps": 8})
    text = capfd.readouterr().err
    assert "8/8" in text
    assert text.count(" 0/8 ") == 1  # drawn once a bar; "100%" may be drawn twice


def test_time_and_memory_are_measured(make):
    result = make(**SMALL).result
    assert set(result.seconds) == {"load", "weights", "text", "denoise", "decode", "save"}
    assert all(seconds >= 0 for seconds in result.seconds.values())
    assert result.seconds["denoise"] > 0
    assert 100e6 < result.peak_memory < 20e9


def test_invalid_input_is_rejected_before_anything_is_generated(make, tmp_path):
    with pytest.raises(InvalidRequest, match="nearest valid size is width=104"):
        make(width=100)
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[]]
