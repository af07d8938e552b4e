"""Files of whole requests: their formats, and that their metadata gives the same image again."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from generation.latents import decode_latents
from generation.sizes import Margins
from models.cache import LoadedModel
from models.cuda_graphs import CUDAGraphRunner, ExecutionConfig
from tests.helpers.comparison import max_difference, nearly_equal
from tests.helpers.user_weight_fixtures import data_uri, visible_lora
from tests.miniature.pipeline_components import from_pipeline
from weights.miniature.evaluate import FOLDER, load_pipeline

SMALL = {"width": 64, "height": 72, "num_inference_steps": 3, "guidance_scale": 4.5, "seed": 77}
SMALL["embed_parameters"] = True
CPU = torch.device("cpu")
LINE = re.compile(r'(\w[\w \-/]+): ("(?:\\.|[^\\"])+"|[^,]*)(?:, |$)')


def read_request(path) -> dict[str, object]:
    """Return the request that a file's metadata records."""
    image = Image.open(path)
    if image.format == "PNG":
        text = image.info["parameters"]
    else:
        text = image.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
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


WEIGHTED = {
    **SMALL,
    "prompt": "a (red:1.3) circle, on blue\nand: more",
    "negative_prompt": "star",
    "scheduler": "K_EULER_ANCESTRAL",
}


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_a_files_metadata_gives_it_again(make, output_format):
    made = make(**WEIGHTED, output_format=output_format)
    (file,) = made.result.files
    again = make(output_format=output_format, embed_parameters=True, **read_request(file))
    assert again.bytes == made.bytes
    assert Image.open(file).format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[output_format]


def test_the_metadata_of_a_batch_gives_each_image_again(make):
    made = make(**WEIGHTED, num_outputs=2)
    again = [make(embed_parameters=True, **read_request(file)) for file in made.result.files]
    assert nearly_equal([one.images[0] for one in again], made.images)
    assert [one.images[0].info for one in again] == [image.info for image in made.images]
    assert max_difference(*made.images) > 1


def test_quality_and_files_without_metadata(make):
    small, large = (make(**SMALL, output_format="jpg", output_quality=q) for q in (20, 95))
    assert len(small.bytes[0]) < len(large.bytes[0])
    without = make(**{**SMALL, "embed_parameters": False})
    assert Image.open(without.result.files[0]).info.get("parameters") is None
    recorded = make(**SMALL)
    assert len(recorded.bytes[0]) > len(without.bytes[0])
    assert np.array_equal(np.asarray(recorded.images[0]), np.asarray(without.images[0]))


def test_weights_are_recorded_by_their_hash(make):
    lora = visible_lora(3)
    made = make(**SMALL, replicate_weights=data_uri(lora, "mine.safetensors"))
    text = Image.open(made.result.files[0]).info["parameters"]
    assert f'Lora hashes: "{hashlib.sha256(lora).hexdigest()[:10]}: 0.6"' in text
    assert "base64" not in text


def test_decoded_images_equal_diffusers():
    pipeline = load_pipeline(FOLDER)
    latents = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = LoadedModel(
            from_pipeline(pipeline), CUDAGraphRunner(ExecutionConfig()), CPU, torch.float32
        )
        ours = decode_latents(model, latents)
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    stock = VaeImageProcessor().postprocess(pixels, output_type="pil")
    for image, expected in zip(ours, stock, strict=True):
        assert image.tobytes() == expected.tobytes()
        assert image.size == (72, 64)
