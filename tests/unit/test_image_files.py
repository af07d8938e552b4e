"""Image files: their pixels and their metadata, as other programs read them."""

import io
import json
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from generation.base_models import MINIATURE_SDXL
from generation.errors import InvalidRequest
from generation.lora import Adapter
from generation.metadata import MAX_PROMPT_CHARACTERS, describe
from generation.options import GenerationRequest, OutputFormat
from generation.outputs import encode
from generation.resolve import resolve
from generation.schedulers import SCHEDULERS
from generation.sizes import Margins
from weights.formats.types import Pooling, TrainedWeights

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (37, 53, 3)).astype(np.uint8)
SMOOTH = np.add.outer(np.arange(64), np.arange(96))[..., None].repeat(3, -1).astype(np.uint8)
IMAGES = {"noise": NOISE, "smooth": SMOOTH, "one pixel": NOISE[:1, :1], "column": NOISE[:, :1]}


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def parameters_of(content: bytes) -> str | None:
    """Return the metadata as other programs read it, from any of the formats."""
    image = opened(content)
    if image.format == "PNG":
        return image.info.get("parameters")
    comment = image.getexif().get_ifd(0x8769).get(0x9286)
    if comment is None:
        return None
    assert comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("parameters", [None, "a\nSteps: 1"])
def test_a_png_has_every_pixel(name, parameters):
    pixels = IMAGES[name]
    content = encode(pixels, OutputFormat.PNG, 1, parameters)
    image = opened(content)
    image.verify()  # checksums
    assert np.array_equal(np.asarray(opened(content)), pixels)
    by_opencv = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(by_opencv[..., ::-1], pixels)


@pytest.mark.parametrize(("kind", "name"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_the_others_are_close_and_better_with_quality(kind, name):
    sizes, errors = [], []
    for quality in (10, 50, 90, 100):
        content = encode(NOISE, OutputFormat(kind), quality, None)
        image = opened(content)
        assert image.format == name
        assert image.size == (53, 37)
        sizes.append(len(content))
        difference = np.asarray(image.convert("RGB"), int) - NOISE
        errors.append(float(np.abs(difference).mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    smooth = opened(encode(SMOOTH, OutputFormat(kind), 90, None)).convert("RGB")
    assert np.abs(np.asarray(smooth, int) - SMOOTH).max() <= 12


TEXTS = ["a red circle\nSteps: 20", "ein Kätzchen 😀 Ω", "x" * 30_000, 'a, b: "c" \\ (d:1.2)']


@pytest.mark.parametrize("kind", OutputFormat)
@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t[:8])
def test_metadata_is_where_other_programs_read_it(kind, text):
    assert parameters_of(encode(NOISE, kind, 90, text)) == text
    assert parameters_of(encode(NOISE, kind, 90, None)) is None


# The contents of the metadata

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


def described(adapters=(), image_size=None, **changes) -> dict[str, str]:
    """Return the metadata of a request's image; `image_size` is that of the input image."""
    plan = resolve(GenerationRequest(**changes), MINIATURE_SDXL, image_size)
    return read_as_a1111_does(describe(plan, MINIATURE_SDXL, adapters, 0))


def test_settings_as_a1111_reads_them():
    found = described(
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


def test_the_sampler_names_the_schedule_type():
    found = described(scheduler="Euler a", schedule_type="sgm_uniform")
    assert found["Sampler"] == "Euler a SGM Uniform"


def test_schedulers_have_different_names():
    """Except those that have a cog-sdxl name beside A1111's."""
    kinds: dict[str, set[object]] = {}
    for spec in SCHEDULERS.values():
        kinds.setdefault(spec.a1111, set()).add((spec.class_name, *spec.overrides.items()))
    assert [name for name, found in kinds.items() if len(found) > 1] == []


def test_images_and_refiners_are_recorded(tmp_path):
    without = described(refine="expert_ensemble_refiner")
    assert (without["Refiner"], without["Refiner switch at"]) == ("sdxl-refiner", "0.8")
    assert "Denoising strength" not in without
    found = described(
        image_size=(128, 128),
        image=tmp_path / "secret-name.png",
        prompt_strength=0.6,
        outpaint=Margins(8, 0, 0, 0),
    )
    assert found["Denoising strength"] == "0.6"
    assert json.loads(found["Inputs"])["outpaint_left"] == 8
    assert "secret-name" not in str(found)
    assert "Refiner" not in found


def test_weights_are_recorded_by_their_hashes():
    weights = replace(WEIGHTS, digest="0123456789abcdef" * 4)
    found = described([Adapter(weights, 0.6), Adapter(WEIGHTS, 1.0)])
    assert found["Lora hashes"] == "0123456789: 0.6"


def test_no_secret_is_written():
    secrets = {
        "hf_api_token": "hf_verysecret",
        "civitai_api_token": "civitai-verysecret",
        "replicate_weights": "data:application/octet-stream;base64,dmVyeXNlY3JldA==",
        "loras": ("https://files.example/b.tar?token=verysecret#verysecret", "owner/name:c.tar"),
    }
    text = str(described(**secrets))
    assert "verysecret" not in text
    assert "dmVyeXNlY3JldA" not in text
    assert "files.example/b.tar" in text
    assert "owner/name:c.tar" in text


@pytest.mark.parametrize(
    "prompt", ["a\0b", "\ud83d", "word " * 10_000, "😀" * 20_000, "\nSteps: 1", ""]
)
@pytest.mark.parametrize("kind", OutputFormat)
def test_any_prompt_can_be_written(prompt, kind):
    request = GenerationRequest(prompt=prompt, negative_prompt=prompt)
    plan = resolve(request, MINIATURE_SDXL, None)
    text = describe(plan, MINIATURE_SDXL, (), 0)
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
def test_invalid_formats_are_rejected(changes, message):
    with pytest.raises(InvalidRequest) as caught:
        resolve(GenerationRequest(**changes), MINIATURE_SDXL, None)
    assert str(caught.value) == message
