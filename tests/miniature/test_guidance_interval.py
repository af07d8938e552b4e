"""Guidance in a part of the steps: as diffusers' own recipe, and without the other passes."""

import numpy as np
import pytest
import torch

from generation.base_models import MINIATURE_SDXL
from tests.miniature.stock import STOCK
from weights.miniature.evaluate import FOLDER, load_pipeline

STEPS = 8


@pytest.fixture
def rows(engine):
    """How many rows the UNets of the base and the refiner saw at each of their calls."""
    seen: list[int] = []
    handles = [
        model.parts["unet"].conv_in.register_forward_pre_hook(
            lambda _, args: seen.append(len(args[0]))
        )
        for model in (
            engine._store.load(MINIATURE_SDXL),
            engine._store.load_refiner(MINIATURE_SDXL),
        )
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
        # Of the whole schedule, of which the refiner makes the last steps.
        ({"guidance_end": 0.9, "refine": "expert_ensemble_refiner"}, [2] * 7 + [1]),
        # Of a schedule of its own.
        ({"guidance_end": 0.5, "refine": "base_image_refiner"}, [2] * 4 + [1] * 4 + [2, 1]),
        # Heun's method looks twice at each level but the last.
        ({"guidance_end": 0.5, "scheduler": "HeunDiscrete"}, [2] * 7 + [1] * 8),
    ],
)
def test_the_pass_without_the_prompt_runs_between(make, rows, changes, expected):
    make(**changes)
    assert rows == expected


@pytest.mark.parametrize("scheduler", ["K_EULER", "DPMSolverMultistep"])
def test_as_diffusers_callback_does_it(make, scheduler):
    """From a step on, a callback sets the guidance to nothing and halves what the UNet is told."""
    first = 5

    def callback(pipeline, step, timestep, state):
        if step + 1 == first:
            pipeline._guidance_scale = 0.0  # what its properties ask
            return {name: value.chunk(2)[1] for name, value in state.items()}
        return {}

    pipeline = load_pipeline(FOLDER)
    kind, overrides = STOCK[scheduler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **overrides)
    stock = pipeline(
        prompt="a large red circle on a blue background",
        negative_prompt="",
        width=128,
        height=128,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(5),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds", "add_time_ids"],
        output_type="latent",
    ).images
    ours = make(seed=5, scheduler=scheduler, guidance_end=first / STEPS).latents
    assert (ours - stock).abs().max() < 1e-4


def test_less_guidance_is_another_picture(make, capfd):
    pictures = [
        np.asarray(make(**changes).pictures[0], int)
        for changes in ({}, {"guidance_end": 0.5}, {"guidance_start": 0.5}, {"guidance_scale": 1})
    ]
    for k, one in enumerate(pictures):
        for other in pictures[:k]:
            assert np.abs(one - other).mean() > 0.2
    capfd.readouterr()
    make(guidance_scale=1, guidance_end=0.5)
    told = "guidance_start and guidance_end have no effect: no guidance pass runs"
    assert told in capfd.readouterr().out
