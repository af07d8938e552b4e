"""A seed's noise is the same in every precision, so a GPU's picture is a CPU's, to rounding."""

import numpy as np
import pytest
import torch
from diffusers.utils import torch_utils
from generation.pipelines import PipelineStore

from generation import noise
from generation.engine import Engine
from weights.catalog import Edition
from weights.miniature import world

SMALL = {"width": 64, "height": 64, "num_inference_steps": 3}
CLOSE = 0.5  # mean difference in steps of 255: rounding gives 0.1, another noise 4 and more
SETTINGS = {
    "txt2img": SMALL,
    "two": {**SMALL, "num_outputs": 2},
    "ancestral": {**SMALL, "scheduler": "K_EULER_ANCESTRAL"},
    "img2img": {**SMALL, "image": True},
    "inpaint": {**SMALL, "image": True, "mask": True, "masked_content": "noise"},
}


@pytest.fixture(scope="module")
def half() -> Engine:
    """As on a GPU, in fp16."""
    store = PipelineStore(Edition.MINIATURE, torch.device("cpu"), torch.float16)
    engine = Engine(Edition.MINIATURE, "cpu", store)
    engine.load()
    return engine


@pytest.fixture
def files(tmp_path):
    scene = world.random_scene(np.random.default_rng(3))
    picture = world.render(scene, 64, 64)
    picture.save(tmp_path / "picture.png")
    picture.convert("L").point(lambda v: 255 * (v > 100)).save(tmp_path / "mask.png")
    return {"image": tmp_path / "picture.png", "mask": tmp_path / "mask.png"}


@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision_makes_the_same_pictures(half, make, files, name):
    changes = {k: files[k] if v is True else v for k, v in SETTINGS[name].items()}
    pairs = zip(
        make(engine=half, **changes).pictures,
        make(**changes).pictures,
        make(**{**changes, "seed": 99}).pictures,
        strict=True,
    )
    for here, there, other in pairs:
        first, second, third = (np.asarray(p, np.float32) for p in (here, there, other))
        assert np.abs(first - second).mean() < CLOSE < np.abs(second - third).mean()


def test_what_diffusers_draws_is_the_librarys_again_afterwards():
    def cancelled():
        with noise.drawn_in_fp32(torch.device("cpu")):
            assert torch_utils.torch is not torch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert torch_utils.torch is torch


def test_numbers_are_fp32s_rounded():
    def draw(dtype):
        generator = torch.Generator().manual_seed(4)
        return torch_utils.randn_tensor((2, 4, 8, 8), generator=generator, dtype=dtype)

    with noise.drawn_in_fp32(torch.device("cpu")):
        assert torch.equal(draw(torch.float16), draw(torch.float32).half())
        assert torch.equal(draw(torch.bfloat16), draw(torch.float32).bfloat16())
        assert draw(None).dtype == torch.float32
    assert not torch.equal(draw(torch.float16), draw(torch.float32).half())
