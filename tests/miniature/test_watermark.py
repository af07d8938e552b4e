"""The stock decoder reads the invisible watermark; apply_watermark acts on one request alone."""

import io

import numpy as np
import pytest
import torch
from imwatermark.maxDct import EmbedMaxDct
from PIL import Image

from benchmarks.photo import photo
from generation import watermark
from generation.sizes import Margins
from generation.watermark import BITS
from tests.helpers.comparison import max_difference
from weights.miniature.world import COLOURS


def read(image) -> float:
    """Return the share of the message's bits that the stock decoder finds; half by chance.

    Its wrapper refuses images of less than 256 x 256 pixels; the function that it calls does not.
    """
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    return float((EmbedMaxDct(wmLen=len(BITS)).decode(bgr).astype(int) == np.array(BITS)).mean())


def marked(pixels: np.ndarray) -> Image.Image:
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    return Image.fromarray(watermark.apply(tensor)[0].permute(1, 2, 0).contiguous().numpy())


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    output = io.BytesIO()
    image.save(output, "JPEG", quality=quality, subsampling=0)
    return Image.open(output)


@pytest.mark.parametrize(
    "size",
    [pytest.param((1024, 1024), marks=pytest.mark.slow), (512, 392), (256, 256), (130, 133)],
    ids=str,
)
def test_the_stock_decoder_reads_it(size):
    pixels = photo(*size)
    assert read(Image.fromarray(pixels)) < 0.8
    image = marked(pixels)
    assert read(image) == 1
    assert read(as_jpeg(image, 90)) == 1
    error = np.asarray(image, float) - pixels
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 36  # the stock encoder: 35.1 dB


@pytest.mark.parametrize("colour", sorted(COLOURS.values()))
def test_flat_colours_hold_it_too(colour):
    image = marked(np.full((256, 256, 3), colour, np.uint8))
    if colour == COLOURS["white"]:  # nothing bluer is as bright: dots would show
        assert np.abs(np.asarray(image, int) - 245).max() <= 20
    else:
        assert read(image) == 1
    luma = np.asarray(image.convert("L"), int)
    assert np.ptp(luma) <= 3  # brightness is what the eye sees best


def test_colours_that_cannot_get_bluer_are_kept():
    for colour in ((255, 255, 255), (0, 0, 255)):
        pixels = np.full((64, 64, 3), colour, np.uint8)
        assert np.array_equal(np.asarray(marked(pixels)), pixels)


@pytest.mark.parametrize("size", [(8, 8), (7, 64), (8, 500), (9, 15)], ids=str)
def test_small_images_keep_their_size(size):
    pixels = photo(*size)
    image = marked(pixels)
    assert image.size == (size[1], size[0])
    assert np.array_equal(np.asarray(image), pixels) == (min(size) < 8)


def test_images_of_a_batch_are_marked_as_they_are_alone():
    both = torch.stack([torch.from_numpy(photo(64, 72)), torch.from_numpy(photo(64, 72)) // 2])
    both = both.permute(0, 3, 1, 2).contiguous()
    alone = torch.cat([watermark.apply(both[:1]), watermark.apply(both[1:])])
    assert max_difference(watermark.apply(both).numpy(), alone.numpy()) <= 1


@pytest.fixture
def files(tmp_path):
    Image.fromarray(photo(128, 128)).save(tmp_path / "image.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 88, 88))
    mask.save(tmp_path / "mask.png")
    return {name: tmp_path / f"{name}.png" for name in ("image", "mask")}


MODES = {
    "txt2img": {},
    "img2img": {"image": True},
    "inpaint": {"image": True, "mask": True},
    "outpaint": {"image": True, "outpaint": Margins(16, 0, 0, 0)},
    "refined": {"refine": "expert_ensemble_refiner", "num_outputs": 2},
    "jpg": {"output_format": "jpg"},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_marked_on_request_and_only_then(make, files, mode):
    changes = {k: files[k] if v is True else v for k, v in MODES[mode].items()}
    settings = {"num_inference_steps": 2, **changes}
    before = make(**settings)
    made = make(apply_watermark=True, **settings)
    after = make(**settings)
    assert after.bytes == before.bytes
    for image, plain in zip(made.images, before.images, strict=True):
        # An image of the miniature has each bit five times only.
        assert read(image) >= 0.95
        assert read(plain) < 0.8
        error = np.asarray(image.convert("RGB"), float) - np.asarray(plain.convert("RGB"))
        assert np.abs(error).mean() < 4
