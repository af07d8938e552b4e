"""Pictures that start from a picture, sent through the server as data URIs."""

import base64
import io
import secrets

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.server.conftest import picture
from weights.miniature.world import place, render

PLAIN = {"prompt": "a medium yellow square on a green background", "seed": 1}
QUICK = {**PLAIN, "num_inference_steps": 3}
EXACT = {**QUICK, "apply_watermark": False}
SCENE = place("square", "yellow", "green", "medium", "center", np.random.default_rng(3))
SOURCE = render(SCENE, 128, 128)


def uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def box_mask(*box: int) -> Image.Image:
    mask = Image.new("L", SOURCE.size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


def made(result: dict) -> np.ndarray:
    """The only picture of a prediction that succeeded."""
    assert result["status"] == "succeeded", result["error"]
    (output,) = result["output"]
    return pixels(picture(output))


def test_image_to_image_starts_from_the_image(server):
    settings = {**PLAIN, "num_inference_steps": 10, "image": uri(SOURCE)}
    near = server.predict(**settings, prompt_strength=0.2)
    far = server.predict(**settings, prompt_strength=1.0)
    distances = [np.abs(made(result) - pixels(SOURCE)).mean() for result in (near, far)]
    assert distances[0] < 10
    assert distances[0] < distances[1]
    stages = {
        "load",
        "weights",
        "text",
        "encode",
        "denoise",
        "decode",
        "safety",
        "watermark",
        "save",
    }
    assert set(near["metrics"]["seconds"]) == stages


def test_image_to_image_takes_a_size(server):
    result = server.predict(**QUICK, image=uri(SOURCE), width=160, height=96)
    assert made(result).shape == (96, 160, 3)


def test_inpainting_repaints_the_mask_and_keeps_the_rest(server):
    mask = box_mask(40, 40, 80, 90)
    result = made(server.predict(**EXACT, image=uri(SOURCE), mask=uri(mask), mask_blur=4))
    source = pixels(SOURCE)
    inside = np.asarray(mask) > 0
    outside = ~inside & (np.asarray(box_mask(36, 36, 84, 94)) == 0)
    assert (result[outside] == source[outside]).all()
    assert (result[inside] != source[inside]).any()


def test_inpainting_where_the_image_is_transparent(server):
    image = SOURCE.convert("RGBA")
    image.putalpha(box_mask(40, 40, 80, 90).point(lambda v: 255 - v))
    result = made(server.predict(**EXACT, image=uri(image), mask_from_alpha=True))
    assert result.shape == (128, 128, 3)
    assert (result[:24] == pixels(SOURCE)[:24]).all()


def test_outpainting_extends_the_image(server):
    margins = {"outpaint_left": 16, "outpaint_top": 8, "outpaint_right": 24, "outpaint_bottom": 3}
    result = made(server.predict(**EXACT, image=uri(SOURCE), **margins))
    assert result.shape == (128 + 11, 128 + 40, 3)
    kept = np.s_[8 + 8 : 8 + 120, 16 + 8 : 16 + 120]
    assert (result[kept] == pixels(SOURCE)[8:120, 8:120]).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"mask": uri(SOURCE)}, "mask is given without an image; give the image it is about"),
        ({"outpaint_left": 8}, "outpaint_* is given without an image"),
        ({"image": uri(SOURCE), "mask": uri(Image.new("L", (128, 128)))}, "turn mask_invert on"),
        ({"image": uri(SOURCE), "outpaint_left": 129}, "outpaint_left is 129"),
        ({"image": uri(SOURCE), "mask": uri(Image.new("L", (64, 128), 255))}, "aspect ratios"),
    ],
    ids=["mask alone", "margin alone", "black mask", "wide margin", "other aspect"],
)
def test_images_that_do_not_add_up_are_explained_and_the_server_goes_on(server, inputs, message):
    result = server.predict(**EXACT, **inputs)
    assert result["status"] == "failed"
    assert message in result["error"]
    assert server.predict(**QUICK, width=64, height=64)["status"] == "succeeded"


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_file_of_the_server_is_not_disclosed(server, tmp_path, name):
    secret = secrets.token_hex(16)
    file = tmp_path / "secret.txt"
    file.write_text(secret)
    image = {} if name == "image" else {"image": uri(SOURCE)}
    for address in ("/etc/hostname", "file:///etc/hostname", str(file), file.as_uri()):
        result = server.predict(**QUICK, **image, **{name: address})
        assert result["status"] == "failed"
        assert "must be a URL or a data URI" in result["error"]
        assert secret not in result["error"] + result["logs"]


@pytest.mark.parametrize("value", ["", "data:image/png;base64,", "http://127.0.0.1:9/none.png"])
def test_an_image_that_cannot_be_had_fails_the_prediction_alone(server, value):
    assert server.predict(**QUICK, image=value)["status"] == "failed"
    assert server.predict(**QUICK, width=64, height=64)["status"] == "succeeded"
