"""The same numbers as stock diffusers with the same weights, to 1e-4 in fp32."""

import diffusers
import pytest
import torch

from tests.helpers.comparison import max_difference
from tests.miniature.reference_pipelines import REFERENCE_SCHEDULERS, load_reference
from weights.miniature.evaluate import FOLDER as WEIGHTS

COG_SDXLS = list(REFERENCE_SCHEDULERS)[:7]  # test_schedulers.py compares the others


@pytest.fixture(scope="module")
def stock():
    return load_reference()


# Whether there is guidance, and the size, is nothing to a scheduler: one stands for the others.
CASES = [
    pytest.param(
        name,
        guidance,
        width,
        marks=() if (guidance, width) == (7.5, 64) or name == "K_EULER" else pytest.mark.slow,
    )
    for name in COG_SDXLS
    for guidance, width in ((7.5, 64), (1.0, 64), (5.0, 96))
]


@pytest.mark.parametrize(("name", "guidance", "width"), CASES)
def test_equal_to_the_stock_pipeline(stock, make, name, guidance, width):
    scheduler_class, overrides = REFERENCE_SCHEDULERS[name]
    pristine = diffusers.EulerDiscreteScheduler.load_config(WEIGHTS / "scheduler")
    stock.scheduler = scheduler_class.from_config(pristine, **overrides)
    arguments = {
        "prompt": "a large red circle on a blue background",
        "negative_prompt": "",
        "width": width,
        "height": 64,
        "num_inference_steps": 8,
        "guidance_scale": guidance,
    }
    seen = []
    image = stock(
        **arguments,
        generator=torch.Generator("cpu").manual_seed(5),
        callback_on_step_end=lambda _, step, t, given: seen.append(given["latents"]) or given,
    ).images[0]

    ours = make(scheduler=name, guidance_scale=guidance, width=width, height=64, seed=5)
    assert torch.allclose(ours.latents, seen[-1], atol=1e-4, rtol=0)
    assert max_difference(ours.images[0], image) <= 1
