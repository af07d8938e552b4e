"""Files of real requests: their kinds, and that what they say makes the same picture again."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import generation.painter
from generation.passes import Acceleration, Passes
from generation.request import Margins
from tests.brought_weights import data_uri, visible_lora
from tests.comparison import max_difference, nearly_equal
from weights.miniature.evaluate import FOLDER, load_pipeline

SMALL = {"width": 64, "height": 72, "num_inference_steps": 3, "guidance_scale": 4.5, "seed": 77}
SMALL["embed_parameters"] = True
LINE = re.compile(r'(\w[\w \-/]+): ("(?:\\.|[^\\"])+"|[^,]*)(?:, |$)')


def read_back(path) -> dict[str, object]:
    """A request, from a file alone."""
    picture = Image.open(path)
    if picture.format == "PNG":
        text = picture.info["parameters"]
    else:
        text = picture.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
    prompt, _, rest = text.partition("\nNegative prompt: ")
    negative, _, last = rest.rpartition("\n")
    settings = dict(LINE.findall(last))
    inputs = json.loads(json.loads(settings["Inputs"]))
    margins = {side: inputs.pop(f"outpaint_{side}") for side in vars(Margins(0, 0, 0, 0))}
    inputs = {k: tuple(v) if isinstance(v, list) else v for k, v in inputs.items()}
    return {
        **inputs,
        "outpaint": Margins(**margins),
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": int(settings["Seed"]),
    }


ASKED = {
    **SMALL,
    "prompt": "a (red:1.3) circle, on blue\nand: more",
    "negative_prompt": "star",
    "scheduler": "K_EULER_ANCESTRAL",
}


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_what_a_file_says_makes_it_again(make, kind):
    made = make(**ASKED, output_format=kind)
    (file,) = made.result.files
    again = make(output_format=kind, embed_parameters=True, **read_back(file))
    assert again.bytes == made.bytes
    assert Image.open(file).format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]


def test_what_a_batchs_files_say_makes_each_again(make):
    made = make(**ASKED, num_outputs=2)
    again = [make(embed_parameters=True, **read_back(file)) for file in made.result.files]
    assert nearly_equal([one.pictures[0] for one in again], made.pictures)
    assert [one.pictures[0].info for one in again] == [picture.info for picture in made.pictures]
    assert max_difference(*made.pictures) > 1


def test_quality_and_switching_off(make):
    small, large = (make(**SMALL, output_format="jpg", output_quality=q) for q in (20, 95))
    assert len(small.bytes[0]) < len(large.bytes[0])
    silent = make(**{**SMALL, "embed_parameters": False})
    assert Image.open(silent.result.files[0]).info.get("parameters") is None
    told = make(**SMALL)
    assert len(told.bytes[0]) > len(silent.bytes[0])
    assert np.array_equal(np.asarray(told.pictures[0]), np.asarray(silent.pictures[0]))


def test_weights_are_named_by_their_hash(make):
    lora = visible_lora(3)
    made = make(**SMALL, replicate_weights=data_uri(lora, "mine.safetensors"))
    text = Image.open(made.result.files[0]).info["parameters"]
    assert f'Lora hashes: "{hashlib.sha256(lora).hexdigest()[:10]}: 0.6"' in text
    assert "base64" not in text


def test_eight_bits_are_diffusers_own():
    pipeline = load_pipeline(FOLDER)
    latents = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = generation.painter._decode(pipeline, latents, Passes(Acceleration(None, None)))
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    stock = VaeImageProcessor().postprocess(pixels, output_type="pil")
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.tobytes() == theirs.tobytes()
        assert mine.size == (72, 64)
