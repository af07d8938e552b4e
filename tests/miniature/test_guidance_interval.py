"""Guidance interval: equal to diffusers' recipe; outside it only the prompts are evaluated."""

import numpy as np
import pytest
import torch

from tests.helpers.engines import base_model, refiner
from tests.miniature.reference_pipelines import REFERENCE_SCHEDULERS, load_reference

STEPS = 8
SIZE = {"width": 64, "height": 64}


@pytest.fixture
def rows(engine):
    """Record the batch size of each forward pass of the base model's and the refiner's UNet."""
    seen: list[int] = []
    handles = [
        model.components.unet.conv_in.register_forward_pre_hook(
            lambda _, args: seen.append(len(args[0]))
        )
        for model in (base_model(engine), refiner(engine))
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [2] * 8),
        ({"guidance_end": 0.5}, [2] * 4 + [1] * 4),
        ({"guidance_start": 0.25}, [1] * 2 + [2] * 6),
        (
            {"guidance_start": 0.25, "guidance_end": 0.75, "num_outputs": 2},
            [2] * 2 + [4] * 4 + [2] * 2,
        ),
        ({"guidance_end": 0.5, "guidance_scale": 1.0}, [1] * 8),
        # Shares of the whole schedule, of which the refiner makes the last steps.
        ({"guidance_end": 0.9, "refine": "expert_ensemble_refiner"}, [2] * 7 + [1]),
        # Shares of the refiner's schedule, which is another one.
        ({"guidance_end": 0.5, "refine": "base_image_refiner"}, [2] * 4 + [1] * 4 + [2, 1]),
        # Heun's method evaluates each noise level twice but the last.
        ({"guidance_end": 0.5, "scheduler": "HeunDiscrete"}, [2] * 7 + [1] * 8),
    ],
)
def test_negative_prompts_are_evaluated_within_the_interval(make, rows, changes, expected):
    make(**SIZE, **changes)
    assert rows == expected


@pytest.mark.parametrize("scheduler", ["K_EULER", "DPMSolverMultistep"])
def test_as_diffusers_callback_does_it(make, scheduler):
    """From a step on, a callback turns guidance off and halves the UNet's conditioning."""
    first = 5

    def callback(pipeline, step, timestep, state):
        if step + 1 == first:
            pipeline._guidance_scale = 0.0  # which its properties read
            return {name: value.chunk(2)[1] for name, value in state.items()}
        return {}

    pipeline = load_reference()
    kind, overrides = REFERENCE_SCHEDULERS[scheduler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **overrides)
    stock = pipeline(
        prompt="a large red circle on a blue background",
        negative_prompt="",
        **SIZE,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(5),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds", "add_time_ids"],
        output_type="latent",
    ).images
    ours = make(**SIZE, seed=5, scheduler=scheduler, guidance_end=first / STEPS).latents
    assert (ours - stock).abs().max() < 1e-4


def test_less_guidance_is_another_image(make, capfd):
    images = [
        np.asarray(make(**changes).images[0], int)
        for changes in ({}, {"guidance_end": 0.5}, {"guidance_start": 0.5}, {"guidance_scale": 1})
    ]
    for k, one in enumerate(images):
        for other in images[:k]:
            assert np.abs(one - other).mean() > 0.2
    capfd.readouterr()
    make(guidance_scale=1, guidance_end=0.5)
    message = "guidance_start and guidance_end have no effect: guidance is off"
    assert message in capfd.readouterr().out
