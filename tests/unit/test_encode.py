"""Files: the pixels that were given, and how they were made, for readers that are not ours."""

import io
import json
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from generation.encode import encode
from generation.parameters import MAX_PROMPT_CHARACTERS, describe
from PIL import Image

from generation.adapters import Adapter
from generation.base_models import MINIATURE_SDXL
from generation.errors import InvalidRequest
from generation.options import OutputFormat
from generation.resolve import resolve
from generation.schedulers import SCHEDULERS
from generation.sizes import Margins
from tests.requests import REQUEST
from weights.formats.types import Pooling, TrainedWeights

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (37, 53, 3)).astype(np.uint8)
SMOOTH = np.add.outer(np.arange(64), np.arange(96))[..., None].repeat(3, -1).astype(np.uint8)
PICTURES = {"noise": NOISE, "smooth": SMOOTH, "one pixel": NOISE[:1, :1], "column": NOISE[:, :1]}


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def parameters_of(content: bytes) -> str | None:
    """As other programs read them, from any of the formats."""
    picture = opened(content)
    if picture.format == "PNG":
        return picture.info.get("parameters")
    comment = picture.getexif().get_ifd(0x8769).get(0x9286)
    if comment is None:
        return None
    assert comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("parameters", [None, "a\nSteps: 1"])
def test_a_png_has_every_pixel(name, parameters):
    pixels = PICTURES[name]
    content = encode(pixels, OutputFormat.PNG, 1, parameters)
    picture = opened(content)
    picture.verify()  # checksums
    assert np.array_equal(np.asarray(opened(content)), pixels)
    by_opencv = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(by_opencv[..., ::-1], pixels)


@pytest.mark.parametrize(("kind", "name"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_the_others_are_close_and_better_with_quality(kind, name):
    sizes, errors = [], []
    for quality in (10, 50, 90, 100):
        content = encode(NOISE, OutputFormat(kind), quality, None)
        picture = opened(content)
        assert picture.format == name
        assert picture.size == (53, 37)
        sizes.append(len(content))
        difference = np.asarray(picture.convert("RGB"), int) - NOISE
        errors.append(float(np.abs(difference).mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    smooth = opened(encode(SMOOTH, OutputFormat(kind), 90, None)).convert("RGB")
    assert np.abs(np.asarray(smooth, int) - SMOOTH).max() <= 12


TEXTS = ["a red circle\nSteps: 20", "ein Kätzchen 😀 Ω", "x" * 30_000, 'a, b: "c" \\ (d:1.2)']


@pytest.mark.parametrize("kind", OutputFormat)
@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t[:8])
def test_parameters_are_where_others_look(kind, text):
    assert parameters_of(encode(NOISE, kind, 90, text)) == text
    assert parameters_of(encode(NOISE, kind, 90, None)) is None


# What parameters say

# AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py
A1111_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_as_a1111_does(text: str) -> dict[str, str]:
    *lines, last = text.strip().split("\n")
    found = {}
    prompt, negative, is_negative = [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            is_negative, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if is_negative else prompt).append(line)
    for name, value in A1111_SETTING.findall(last):
        found[name] = json.loads(value) if value.startswith('"') else value
    return {**found, "Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}


WEIGHTS = TrainedWeights({}, {}, False, (), {}, Pooling.EOS, "none")


def told(adapters=(), image=None, asked_image=None, **changes) -> dict[str, str]:
    """What a request's picture says; `image` is the size of the one that was sent."""
    request = replace(REQUEST, image=asked_image, embed_parameters=True, **changes)
    plan = resolve(request, MINIATURE_SDXL, image)
    return read_as_a1111_does(describe(plan, MINIATURE_SDXL, adapters, 0))


def test_settings_as_a1111_reads_them():
    found = told(
        prompt="a (red:1.2) circle,\non blue: background",
        negative_prompt='star, "quoted"',
        guidance_scale=5.5,
        num_inference_steps=12,
        scheduler="KarrasDPM",
        width=64,
        height=128,
        seed=4294967295,
    )
    inputs = json.loads(found.pop("Inputs"))
    assert found == {
        "Prompt": "a (red:1.2) circle,\non blue: background",
        "Negative prompt": 'star, "quoted"',
        "Steps": "12",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "5.5",
        "Seed": "4294967295",
        "Size": "64x128",
        "Model": "sdxl",
        "Version": "cog-stable-diffusion",
    }
    assert inputs["scheduler"] == "KarrasDPM"
    assert inputs["guidance_scale"] == 5.5


def test_samplers_have_different_names():
    """But for those that go by cog-sdxl's name and by A1111's."""
    kinds: dict[str, set[object]] = {}
    for spec in SCHEDULERS.values():
        kinds.setdefault(spec.a1111, set()).add((spec.class_name, *spec.overrides.items()))
    assert [name for name, found in kinds.items() if len(found) > 1] == []


def test_images_and_refiners_are_told(tmp_path):
    without = told(refine="expert_ensemble_refiner")
    assert (without["Refiner"], without["Refiner switch at"]) == ("sdxl-refiner", "0.8")
    assert "Denoising strength" not in without
    found = told(
        image=(128, 128),
        asked_image=tmp_path / "secret-name.png",
        prompt_strength=0.6,
        outpaint=Margins(8, 0, 0, 0),
    )
    assert found["Denoising strength"] == "0.6"
    assert json.loads(found["Inputs"])["outpaint_left"] == 8
    assert "secret-name" not in str(found)
    assert "Refiner" not in found


def test_weights_are_told_by_their_hashes():
    weights = replace(WEIGHTS, digest="0123456789abcdef" * 4)
    found = told([Adapter(weights, 0.6), Adapter(WEIGHTS, 1.0)])
    assert found["Lora hashes"] == "0123456789: 0.6"


def test_no_secret_is_written():
    secrets = {
        "hf_api_token": "hf_verysecret",
        "civitai_api_token": "civitai-verysecret",
        "replicate_weights": "data:application/octet-stream;base64,dmVyeXNlY3JldA==",
        "loras": ("https://files.example/b.tar?token=verysecret#verysecret", "owner/name:c.tar"),
    }
    text = str(told(**secrets))
    assert "verysecret" not in text
    assert "dmVyeXNlY3JldA" not in text
    assert "files.example/b.tar" in text
    assert "owner/name:c.tar" in text


@pytest.mark.parametrize(
    "prompt", ["a\0b", "\ud83d", "word " * 10_000, "😀" * 20_000, "\nSteps: 1", ""]
)
@pytest.mark.parametrize("kind", OutputFormat)
def test_any_prompt_can_be_written(prompt, kind):
    request = replace(REQUEST, prompt=prompt, negative_prompt=prompt, embed_parameters=True)
    plan = resolve(request, MINIATURE_SDXL, None)
    text = describe(plan, MINIATURE_SDXL, (), 1)
    assert len(text) < 2 * MAX_PROMPT_CHARACTERS + 2000
    assert parameters_of(encode(NOISE, kind, 90, text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output_format": "gif"},
            "output_format 'gif' is not known; choose one of png, webp, jpg",
        ),
        ({"output_quality": 0}, "output_quality is 0; it must be from 1 to 100"),
        ({"output_quality": 101}, "output_quality is 101; it must be from 1 to 100"),
    ],
)
def test_what_cannot_be_asked(changes, message):
    with pytest.raises(InvalidRequest) as caught:
        resolve(replace(REQUEST, **changes), MINIATURE_SDXL, None)
    assert str(caught.value) == message
