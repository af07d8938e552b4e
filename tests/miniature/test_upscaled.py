"""The upscale input: larger images of the same content, in every mode, and its limits."""

from dataclasses import replace

import numpy as np
import pytest
from imwatermark import WatermarkDecoder
from PIL import Image

from generation.base_models import MINIATURE_SDXL, SDXL
from generation.errors import InvalidRequest
from generation.resolve import UPSCALER_FACTOR, resolve
from generation.sizes import Margins
from generation.watermark import BITS
from preprocess import upscale
from preprocess.images import MAX_IMAGE_PIXELS
from tests.helpers.request import REQUEST
from weights.miniature import world

QUICK = {"num_inference_steps": 4, "width": 72, "height": 64}


def test_the_factor_is_the_models():
    assert UPSCALER_FACTOR == upscale.FACTOR


@pytest.mark.parametrize("factor", [2, 4])
def test_images_are_larger_and_the_same(make, factor):
    settings = {**QUICK, "num_outputs": 2, "embed_parameters": True}
    plain, large = make(**settings), make(**settings, upscale=str(factor))
    assert len(large.images) == 2
    for small, big in zip(plain.images, large.images, strict=True):
        assert big.size == (72 * factor, 64 * factor)
        shrunk = np.asarray(big.resize(small.size, Image.Resampling.BOX), int)
        assert np.abs(shrunk - np.asarray(small)).mean() < 4
        simple = small.resize(big.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(simple, int) - np.asarray(big)).max() > 3  # it adds detail
    assert large.result.seconds["upscale"] > 0
    assert large.images[0].info["parameters"].count(f"Postprocess upscale by: {factor}") == 1
    assert make(**settings).bytes == plain.bytes


def test_other_modes_are_upscaled_too(make, tmp_path):
    scene = world.random_scene(np.random.default_rng(3))
    world.render(scene, 64, 64).save(tmp_path / "image.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    image = {"image": tmp_path / "image.png", "num_inference_steps": 2}
    inpainted = make(**image, mask=tmp_path / "mask.png", upscale="4")
    assert inpainted.images[0].size == (256, 256)
    wider = make(**image, outpaint=Margins(16, 0, 0, 0), upscale="2")
    assert wider.images[0].size == (160, 128)


def test_the_watermark_is_on_the_large_image(make):
    """By the stock decoder's wrapper, which wants 256 x 256 pixels at least."""
    large = make(**{**QUICK, "width": 64}, upscale="4", apply_watermark=True)
    bgr = np.ascontiguousarray(np.asarray(large.images[0])[..., ::-1])
    assert list(WatermarkDecoder("bits", len(BITS)).decode(bgr, "dwtDct")) == list(BITS)


@pytest.mark.parametrize("spec", [SDXL, MINIATURE_SDXL])
def test_every_size_of_a_model_can_be_upscaled(spec):
    assert spec.max_pixels * upscale.FACTOR**2 <= MAX_IMAGE_PIXELS


def test_invalid_requests_are_rejected(tmp_path):
    inpainted = replace(REQUEST, image=tmp_path, mask=tmp_path, upscale="2")
    with pytest.raises(InvalidRequest, match="upscale is 2, and images of 2048x2048 are too la"):
        resolve(inpainted, SDXL, (2048, 2048))
    resolve(replace(inpainted, upscale="off"), SDXL, (2048, 2048))
    with pytest.raises(InvalidRequest, match="upscale '3' is not known; choose one of off, 2, 4"):
        resolve(replace(REQUEST, upscale="3"), SDXL, None)
