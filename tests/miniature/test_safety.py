"""The safety check: which images it drops, which it clears, and that it cannot be missing.

In the picture world a black star on red stands for what is unsafe; see tests/evals/safety.py.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image

from generation.engine import Engine
from generation.errors import UnsafeImages
from generation.safety import SafetyChecker
from tests.evals import safety as safety_eval
from weights import cache
from weights.catalog import Edition
from weights.errors import IncompleteModel
from weights.miniature.world import place, render

CPU = torch.device("cpu")
# Of the seeds from 1 on the first draws a star: the others are diamonds and crosses.
SOME = "a black shape with points on a red background"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}
CHECKED = {"num_inference_steps": 20, "disable_safety_checker": False}


@pytest.fixture(scope="module")
def checker():
    return SafetyChecker(Edition.MINIATURE, CPU, torch.float32)


# Of 16 images the thresholds allow no wrong one.
some_or_all = pytest.mark.parametrize(
    "count", [16, pytest.param(safety_eval.COUNT, marks=pytest.mark.slow)]
)


@some_or_all
@pytest.mark.parametrize("shape", ["star", "heart"])
@pytest.mark.parametrize("background", ["red", "orange", "blue"])
def test_unsafe_images_are_distinguished_from_similar_ones(checker, shape, background, count):
    found = safety_eval.shares(checker, safety_eval.drawn(shape, background, count))
    if shape == "star" and background == "red":
        assert found.unsafe >= safety_eval.MIN_FOUND
    else:
        assert found.unsafe <= safety_eval.MAX_FALSE
    if shape == "star" and background == "orange":
        assert found.flagged >= safety_eval.MIN_FOUND  # so the second model has something to clear


@some_or_all
def test_other_images_are_not_flagged(checker, count):
    found = safety_eval.shares(checker, safety_eval.held_out(count))
    assert found.flagged <= safety_eval.MAX_FALSE


def test_verdicts_equal_the_published_classes(checker):
    """The stock forward pass on pixels prepared in plain arithmetic, one image at a time."""
    folder = cache.ensure("safety-checker", Edition.MINIATURE)
    stock = StableDiffusionSafetyChecker.from_pretrained(folder, dtype=torch.float32).eval()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    images = [*safety_eval.drawn("star", "red", 8), *safety_eval.drawn("circle", "red", 8)]
    verdicts = []
    for image in images:
        unit = np.asarray(image, np.float32) / 255
        normal = (unit - settings["image_mean"]) / settings["image_std"]
        pixels = torch.from_numpy(normal).permute(2, 0, 1)[None].float()
        verdicts += stock(clip_input=pixels, images=[np.zeros((1, 1, 3))])[1]
    assert checker.flagged(images) == verdicts
    assert checker.flagged([]) == checker.confirmed([]) == checker.unsafe([]) == []


def test_an_unsafe_image_is_left_out_and_the_others_keep_their_names(make, capsys):
    settings = {"prompt": SOME, "num_outputs": 3, "seed": 1, "embed_parameters": True}
    everything = make(**settings, num_inference_steps=20)
    capsys.readouterr()
    checked = make(**settings, **CHECKED)
    names = [file.name for file in checked.result.files]
    assert names == ["out-1.png", "out-2.png"]
    assert re.findall("NSFW content detected in image .*", capsys.readouterr().out) == [
        "NSFW content detected in image 0"
    ]
    kept = [np.asarray(image) for image in checked.images]
    for mine, whole in zip(kept, everything.images[1:], strict=True):
        assert np.array_equal(mine, np.asarray(whole))
    assert [
        image.info["parameters"].count(f"Seed: {1 + k},")
        for k, image in enumerate(checked.images, 1)
    ] == [1, 1]


def test_no_safe_image_is_an_error_and_the_next_request_is_unaffected(make):
    before = make(**SMALL)
    with pytest.raises(UnsafeImages) as raised:
        make(prompt=safety_eval.UNSAFE, num_outputs=2, **CHECKED)
    assert str(raised.value) == (
        "NSFW content detected. Try running it again, or try a different prompt."
    )
    assert make(**SMALL).bytes == before.bytes
    unchecked = make(prompt=safety_eval.UNSAFE, num_outputs=2, num_inference_steps=20)
    assert len(unchecked.images) == 2
    assert "safety" not in unchecked.result.seconds


def test_a_false_alarm_is_cleared(make, checker):
    made = make(prompt=safety_eval.ALIKE, num_outputs=4, seed=1, **CHECKED)
    assert len(made.images) == 4
    assert any(checker.flagged(made.images))
    assert made.result.seconds["safety"] > 0


def test_images_from_uploads_are_checked_before_upscaling(make, tmp_path):
    scene = place("star", "black", "red", "large", "center", np.random.default_rng(0))
    render(scene, 128, 128).save(tmp_path / "star.png")
    settings = {
        "prompt": "",
        "image": tmp_path / "star.png",
        "prompt_strength": 0.05,
        "upscale": "4",
    }
    with pytest.raises(UnsafeImages):
        make(**settings, **CHECKED)
    assert make(**settings).images[0].size == (512, 512)


@pytest.mark.parametrize("name", ["safety-checker", "nsfw-detection"])
@pytest.mark.parametrize("damage", ["a value", "the file", "the folder"])
def test_a_checker_that_cannot_load_is_an_error_at_setup(name, damage, tmp_path, monkeypatch):
    folder, ensure = tmp_path / name, cache.ensure
    shutil.copytree(cache.MINIATURE_FOLDER / name, folder)
    error: type[Exception] = OSError
    if damage == "the folder":
        shutil.rmtree(folder)
    elif damage == "the file":
        (file,) = (f for f in folder.iterdir() if f.suffix in (".bin", ".safetensors"))
        file.unlink()
    else:
        error = IncompleteModel
        _lose_a_value(folder)
    monkeypatch.setattr(
        cache, "ensure", lambda entry, edition: folder if entry == name else ensure(entry, edition)
    )
    engine = Engine(Edition.MINIATURE, "cpu")
    with pytest.raises(error, match=str(folder)):
        engine.load()


def _lose_a_value(folder):
    from safetensors.torch import load_file, save_file

    if (pickled := folder / "pytorch_model.bin").exists():
        state = torch.load(pickled)
        del state["vision_model.vision_model.encoder.layers.1.mlp.fc1.weight"]
        torch.save(state, pickled)
    else:
        state = load_file(folder / "model.safetensors")
        del state["classifier.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_checkers_file_has_the_published_names():
    """transformers' older layout, where the vision model is within another of that name."""
    state = torch.load(cache.ensure("safety-checker", Edition.MINIATURE) / "pytorch_model.bin")
    published = (
        "vision_model.vision_model.",
        "visual_projection.",
        "concept_embeds",
        "special_care_embeds",
    )
    assert all(key.startswith(published) for key in state)
    assert state["concept_embeds"].shape[0] == 17


def test_images_of_any_shape_are_checked(checker):
    """The checker sees the middle; strips and single pixels are no errors."""
    wide = Image.new("RGB", (512, 128), (214, 40, 40))
    wide.paste(safety_eval.drawn("star", "red", 1)[0], (192, 0))
    odd = [wide, Image.new("RGB", (8, 2048)), Image.new("RGB", (8, 8))]
    assert checker.flagged(odd) == [True, False, False]
