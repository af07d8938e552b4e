"""The models of training's preprocessing, on the miniature: what they return, what they leave."""

import gc
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from spandrel.architectures.SwinIR import SwinIR
from transformers import BlipForConditionalGeneration

from preprocess import blip, models, segment, upscale
from preprocess.blip import caption
from preprocess.errors import BadImage, ModelMissing
from preprocess.images import MAX_IMAGE_PIXELS
from preprocess.models import ready
from preprocess.segment import text_masks
from preprocess.upscale import FACTOR, OVERLAP, Upscaler, enlarge
from tests.evals.preprocess import NATIVE_SIZE
from weights import cache
from weights.catalog import CATALOG, Edition, HubFiles
from weights.miniature.scenes import held_out_scenes
from weights.miniature.world import render

MINIATURE = Edition.MINIATURE


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Ten images: more than a batch of captions; of several sizes."""
    sizes = [(NATIVE_SIZE, NATIVE_SIZE), (160, 104), (90, 200)]
    scenes = held_out_scenes(10, seed=7)
    return [render(scene, *sizes[i % len(sizes)]) for i, scene in enumerate(scenes)]


@pytest.fixture
def loaded(monkeypatch) -> list[weakref.ref[torch.nn.Module]]:
    """Every model that a stage has loaded."""
    found: list[weakref.ref[torch.nn.Module]] = []

    def watched(model, device):
        found.append(weakref.ref(model))
        return ready(model, device)

    monkeypatch.setattr(models, "ready", watched)
    return found


def _is_gone(models) -> bool:
    gc.collect()
    return len(models) == 1 and models[0]() is None


def test_captions_repeat_whatever_the_seed_and_the_batch(pictures, loaded):
    first = caption(pictures, MINIATURE, "cpu")
    assert _is_gone(loaded)
    assert len(first) == len(pictures)
    assert len(set(first)) > 5
    torch.manual_seed(1)
    assert caption(pictures[::-1], MINIATURE, "cpu") == first[::-1]
    for text in first:
        assert text == " ".join(text.lower().split())
        assert not text.startswith(blip.PROMPT)
        assert not text.endswith(".")


def test_no_images_load_nothing(loaded):
    assert caption([], MINIATURE, "cpu") == []
    assert text_masks([], "star", 1.0, MINIATURE, "cpu") == []
    assert loaded == []


def test_a_text_mask_has_the_images_size_and_uses_the_whole_range(pictures, loaded):
    masks = text_masks(pictures, "shape", 1.0, MINIATURE, "cpu")
    assert _is_gone(loaded)
    for picture, mask in zip(pictures, masks, strict=True):
        assert (mask.mode, mask.size) == ("L", picture.size)
        darkest, lightest = mask.getextrema()
        assert lightest >= 250
        assert darkest <= 12  # the floor of a hundredth, and what is not quite certain


@pytest.mark.parametrize("prompt", ["", " , ,"])
def test_no_prompt_counts_everything_and_loads_nothing(pictures, loaded, prompt):
    masks = text_masks(pictures, prompt, 1.0, MINIATURE, "cpu")
    assert [mask.getextrema() for mask in masks] == [(255, 255)] * len(pictures)
    assert loaded == []


def test_temperature_softens(pictures):
    def middling(temperature: float) -> float:
        (mask,) = text_masks(pictures[:1], "shape", temperature, MINIATURE, "cpu")
        grey = np.asarray(mask)
        return float(((grey > 40) & (grey < 215)).mean())

    assert middling(0.2) < middling(1.0) < middling(5.0)


def test_what_is_not_there_is_said(pictures, capsys, monkeypatch):
    logits = np.zeros((2, 8, 8))
    logits[0] = -9
    monkeypatch.setattr(segment, "_logits", lambda *_: logits)
    text_masks(pictures[:2], "a zebra", 1.0, MINIATURE, "cpu")
    assert "Image 2 of 2 hardly shows a zebra" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stage",
    [
        lambda pictures: caption(pictures, MINIATURE, "cpu"),
        lambda pictures: text_masks(pictures, "star", 1.0, MINIATURE, "cpu"),
    ],
    ids=["caption", "text_masks"],
)
def test_a_stage_that_fails_leaves_no_model(pictures, loaded, stage, monkeypatch):
    class Cancelled(BaseException):
        """As Cog's, no Exception."""

    def strike(*_, **__):
        raise Cancelled

    monkeypatch.setattr(BlipForConditionalGeneration, "generate", strike)
    monkeypatch.setattr(segment, "_logits", strike)
    with pytest.raises(Cancelled) as caught:
        stage(pictures)
    # The traceback still holds the model, but none of its tensors holds memory.
    (model,) = (reference() for reference in loaded)
    assert caught.tb is not None
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    del model, caught
    assert _is_gone(loaded)


def test_no_faces_in_the_miniature_edition(pictures):
    with pytest.raises(ModelMissing, match=r"miniature.*WEIGHTS_EDITION=full.*mask_target_prompts"):
        segment.face_masks(pictures, MINIATURE)


@pytest.fixture(scope="module", params=[upscale.SWINIR, upscale.REAL_ESRGAN])
def upscaler(request):
    with Upscaler(MINIATURE, "cpu", request.param) as upscaler:
        yield upscaler


@pytest.mark.parametrize("size", [(1, 1), (5, 17), (33, 20), (40, 64)])
@pytest.mark.parametrize("factor", [4, 2, 1.5])
def test_sizes_are_exact_and_nothing_shifts(upscaler, size, factor):
    red = Image.new("RGB", size, (200, 40, 40))
    large = upscaler.upscale(red, factor)
    assert (large.mode, large.size) == ("RGB", tuple(round(factor * side) for side in size))
    assert np.abs(np.asarray(large, dtype=int) - (200, 40, 40)).max() <= 40


def test_no_strip_at_the_right_and_the_bottom(upscaler):
    """Each corner of the large image shows the small one's, also where sides are odd."""
    picture = render(held_out_scenes(1, seed=3)[0], 45, 37)
    large = upscaler.upscale(picture, FACTOR).resize(picture.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(large, dtype=float) - np.asarray(picture, dtype=float))
    assert difference[:, -3:].mean() < 6
    assert difference[-3:].mean() < 6


def test_tiles_leave_no_seams(upscaler):
    """Away from the borders an image in tiles equals one in a single piece to 1 of 255."""
    picture = render(held_out_scenes(2, seed=3)[1], 136, 104)
    unit = np.asarray(picture, dtype=np.float32) / 255
    with torch.inference_mode():
        whole = enlarge(unit, upscaler._run, 152, OVERLAP)
        tiled = enlarge(unit, upscaler._run, 72, OVERLAP)
    difference = np.abs(tiled.clip(0, 1) - whole.clip(0, 1))[32:-32, 32:-32]
    assert difference.max() <= 1 / 255


def test_tiles_are_blended_with_weights_that_add_up_to_one():
    def run(tile: np.ndarray) -> np.ndarray:
        return tile.repeat(FACTOR, axis=0).repeat(FACTOR, axis=1)

    pixels = np.random.default_rng(0).random((83, 131, 3), dtype=np.float32)
    large = enlarge(pixels, run, 40, 16)
    assert np.abs(large - run(pixels)).max() < 1e-6


def test_an_image_that_would_become_too_large(upscaler):
    side = int((MAX_IMAGE_PIXELS / FACTOR**2) ** 0.5) + 1
    with pytest.raises(BadImage, match=rf"{side}x{side} is too large to upscale"):
        upscaler.upscale(Image.new("RGB", (side, side)), 2)


def test_the_published_file_is_a_pickle_whose_weights_alone_are_read(tmp_path):
    """The real architecture, narrow: its upsampler, its names, wrapped as its authors save it."""
    model = SwinIR(
        img_size=16,
        embed_dim=12,
        depths=[2],
        num_heads=[2],
        window_size=8,
        mlp_ratio=2.0,
        upscale=FACTOR,
        upsampler="nearest+conv",
    ).eval()
    torch.save({"params_ema": model.state_dict()}, tmp_path / "003_realSR.pth")
    loaded = ready(upscale._load(tmp_path), "cpu")
    pixels = torch.rand(1, 3, 16, 24)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixels), model(pixels))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"params_ema": Bomb()}, tmp_path / "003_realSR.pth")
    with pytest.raises(pickle.UnpicklingError):
        upscale._load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["blip-captioning", "clipseg", "safety-checker", "nsfw-detection"])
def test_the_miniature_has_the_published_files(name):
    """So what the full edition fetches is enough to load it."""
    published = CATALOG[Edition.FULL][name].source
    assert isinstance(published, HubFiles)
    assert set(cache.files_of(CATALOG[MINIATURE][name])) == set(published.files)


def test_a_closed_upscaler_holds_nothing():
    with Upscaler(MINIATURE, "cpu") as upscaler:
        assert next(upscaler._model.parameters()).device.type == "cpu"
    assert {p.device.type for p in upscaler._model.parameters()} == {"meta"}
