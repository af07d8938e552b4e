"""A seed's noise is the same on any device, in any precision and batch, so its image is, too."""

import numpy as np
import pytest
import torch

from generation.engine import Engine
from generation.latents import randn
from models.cache import ModelCache
from weights.catalog import Edition
from weights.miniature import world

SMALL = {"width": 64, "height": 64, "num_inference_steps": 3}
CLOSE = 0.5  # mean difference in steps of 255: rounding gives 0.1, other noise 4 and more
SETTINGS = {
    "txt2img": SMALL,
    "two": {**SMALL, "num_outputs": 2},
    "ancestral": {**SMALL, "scheduler": "K_EULER_ANCESTRAL"},
    "sde": {**SMALL, "scheduler": "DPM++ SDE"},
    "img2img": {**SMALL, "image": True},
    "inpaint": {**SMALL, "image": True, "mask": True, "masked_content": "noise"},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half() -> Engine:
    """Return an engine in fp16, as on a GPU."""
    models = ModelCache(Edition.MINIATURE, CPU, torch.float16)
    engine = Engine(Edition.MINIATURE, "cpu", models)
    engine.load()
    return engine


@pytest.fixture
def inputs(tmp_path):
    image = world.render(world.random_scene(np.random.default_rng(3)), 64, 64)
    image.save(tmp_path / "image.png")
    image.convert("L").point(lambda v: 255 * (v > 100)).save(tmp_path / "mask.png")
    return {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png"}


@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision_gives_the_same_images(half, make, inputs, name):
    changes = {k: inputs[k] if v is True else v for k, v in SETTINGS[name].items()}
    triples = zip(
        make(engine=half, **changes).images,
        make(**changes).images,
        make(**{**changes, "seed": 99}).images,
        strict=True,
    )
    for images in triples:
        in_fp16, in_fp32, other = (np.asarray(image, np.float32) for image in images)
        assert np.abs(in_fp16 - in_fp32).mean() < CLOSE < np.abs(in_fp32 - other).mean()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noise_is_drawn_on_the_cpu_in_fp32():
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(4))
    (noise,) = randn(generators(4), (4, 8, 8), CPU)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected)
    assert randn(generators(4), (4, 8, 8), torch.device("meta")).dtype == torch.float32


def test_each_image_has_the_noise_that_it_has_alone():
    together = randn(generators(4, 5), (4, 8, 8), CPU)
    assert torch.equal(together[1], randn(generators(5), (4, 8, 8), CPU)[0])
    assert not torch.equal(together[0], together[1])
