"""ControlNets in a request: images, maps and memory; and no effect on the next request."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import generation.engine
from generation.controlnets import ControlRequest
from generation.engine import Engine
from generation.errors import InvalidRequest
from generation.sampling import CFGDenoiser
from generation.sizes import Margins
from models.cache import LoadedControlNet, ModelCache
from models.cuda_graphs import CUDAGraphRunner, ExecutionConfig
from preprocess import annotators
from tests.helpers.comparison import max_difference
from tests.helpers.engines import base_model
from tests.helpers.request import REQUEST
from tests.miniature.isolation import ERRORS, failing_at
from weights import cache
from weights.catalog import Edition
from weights.miniature.controls import Subject, canny, segmentation
from weights.miniature.world import place

SIDE = 128
QUICK = {"num_inference_steps": 6}
SCENE = place("star", "yellow", "blue", "medium", "left", np.random.default_rng(3))
SUBJECT = Subject(replace(SCENE, texture="plain"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    SUBJECT.picture(SIDE, SIDE).save(folder / "photo.png")
    SUBJECT.picture(2 * SIDE, SIDE).save(folder / "wide.png")
    Image.fromarray(canny(SUBJECT, SIDE, SIDE)).save(folder / "canny.png")
    Image.fromarray(segmentation(SUBJECT, SIDE, SIDE)).save(folder / "segmentation.png")
    Image.new("RGB", (SIDE, SIDE)).save(folder / "black.png")
    grain = np.random.default_rng(0).normal(128, 12, (SIDE, SIDE, 3))
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / "grain.png")
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (40, 32, 96, 88))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture
def control(folder):
    def control(name: str = "photo", kind: str = "edge_canny", **changes) -> ControlRequest:
        is_map = changes.pop("is_map", name in ("canny", "segmentation"))
        return replace(ControlRequest(kind, folder / f"{name}.png", is_map=is_map), **changes)

    return control


def pixels(made, number: int = 0) -> np.ndarray:
    return np.asarray(made.images[number].convert("RGB")).astype(int)


# Conditioning scale and steps


@pytest.mark.parametrize("model", ["sdxl", "sd15", "sd21", "sdxl-turbo", "sd15-lcm"])
def test_a_conditioning_scale_of_zero_is_no_controlnet(make, control, model):
    steps = {} if model in ("sdxl-turbo", "sd15-lcm") else QUICK
    plain = make(model=model, seed=4, num_inference_steps=steps.get("num_inference_steps"))
    settings = {"model": model, "seed": 4, "num_inference_steps": steps.get("num_inference_steps")}
    nothing = make(**settings, controls=(control(conditioning_scale=0),))
    assert nothing.bytes == plain.bytes
    much = make(**settings, controls=(control(conditioning_scale=1.5),))
    assert np.abs(pixels(much) - pixels(plain)).mean() > 1


def test_a_scale_of_zero_loads_no_controlnet_and_makes_no_map(control, monkeypatch, tmp_path):
    engine = Engine(Edition.MINIATURE, "cpu")
    monkeypatch.setattr(ModelCache, "controlnet", None)
    monkeypatch.setattr(annotators, "annotate", None)
    engine.generate(replace(REQUEST, **QUICK, controls=(control(conditioning_scale=0),)), tmp_path)


def test_a_part_of_the_steps_is_between_none_and_all(make, control):
    settings = {"seed": 4, "num_inference_steps": 8}
    none, half, late, whole = (
        pixels(make(**settings, controls=(control(**part),)))
        for part in (
            {"conditioning_scale": 0},
            {"end": 0.5},
            {"start": 0.5},
            {},
        )
    )
    pairs = [(none, half), (half, whole), (none, late), (late, whole), (half, late)]
    assert all(np.abs(a - b).mean() > 0.2 for a, b in pairs)


def test_steps_are_counted_in_every_mode(control, folder, monkeypatch, engine, tmp_path):
    """Image to image runs a part of the schedule; start and end are shares of that part."""
    seen: list[tuple[float, float]] = []
    predict = CFGDenoiser.__call__

    def watched(denoiser, sample, timestep, before, after):
        assert denoiser.controlnets
        seen.append((before, after))
        return predict(denoiser, sample, timestep, before, after)

    monkeypatch.setattr(CFGDenoiser, "__call__", watched)
    settings = {"num_inference_steps": 10, "controls": (control(),)}
    for k, (changes, steps) in enumerate(
        [
            ({}, 10),
            ({"image": folder / "photo.png", "prompt_strength": 0.5}, 5),
            ({"image": folder / "photo.png", "mask": folder / "mask.png"}, 8),
            ({"scheduler": "HeunDiscrete"}, 19),
            ({"scheduler": "PNDM"}, 11),
        ]
    ):
        seen.clear()
        (tmp_path / str(k)).mkdir()
        engine.generate(replace(REQUEST, **settings, **changes), tmp_path / str(k))
        assert seen == [(step / steps, (step + 1) / steps) for step in range(steps)]


# Several


def test_residuals_add_up_and_controls_may_be_of_one_type(make, control):
    settings = {"seed": 4, **QUICK}
    first, second = control("canny"), control("photo", "edge_canny", conditioning_scale=0.4)
    one = pixels(make(**settings, controls=(first,)))
    both = pixels(make(**settings, controls=(first, second)))
    swapped = pixels(make(**settings, controls=(second, first)))
    assert np.abs(both - one).mean() > 0.5
    assert max_difference(both, swapped) <= 1
    of_all_types = (first, second, control("segmentation", "segmentation"))
    assert np.abs(pixels(make(**settings, controls=of_all_types)) - both).mean() > 0.5


def test_a_plain_sdxl_controlnet_beside_the_union(control, make, engine, monkeypatch):
    """`illusion` is one, which the miniature lacks: here with random values."""
    torch.manual_seed(0)
    unet = base_model(engine).components.unet
    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 16, 24, 32)
    )
    for parameter in net.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    load = ModelCache.controlnet

    def with_plain(models, weights, keep):
        if weights == "controlnet-illusion-sdxl":
            return LoadedControlNet(net.eval(), CUDAGraphRunner(ExecutionConfig()))
        return load(models, weights, keep)

    entries = {"controlnet-illusion-sdxl": None, **generation.controlnets.CATALOG["miniature"]}
    monkeypatch.setitem(generation.controlnets.CATALOG, Edition.MINIATURE, entries)
    monkeypatch.setattr(ModelCache, "controlnet", with_plain)
    settings = {"seed": 4, **QUICK}
    edges, pattern = control("canny"), control("photo", "illusion")
    images = [
        pixels(make(**settings, controls=tuple(controls)))
        for controls in ([edges], [pattern], [edges, pattern])
    ]
    assert all(
        np.abs(a - b).mean() > 0.5 for a, b in zip(images, images[1:] + images[:1], strict=True)
    )


# Maps


def test_maps_are_returned_before_the_images(make, control, folder):
    made = make(
        seed=4,
        **QUICK,
        num_outputs=2,
        return_control_maps=True,
        controls=(ControlRequest(), control("photo"), control("segmentation", "segmentation")),
    )
    names = [file.name for file in made.result.files]
    assert names == ["control-2.png", "control-3.png", "out-0.png", "out-1.png"]
    assert np.array_equal(pixels(made, 0), np.asarray(Image.open(folder / "canny.png")))
    assert np.array_equal(pixels(made, 1), np.asarray(Image.open(folder / "segmentation.png")))


def test_maps_alone_load_no_model(control, monkeypatch, tmp_path):
    engine = Engine(Edition.MINIATURE, "cpu")
    monkeypatch.setattr(ModelCache, "base_model", None)
    settings = replace(REQUEST, control_maps_only=True, controls=(control("wide"),))
    result = engine.generate(settings, tmp_path)
    (file,) = result.files
    assert file.name == "control-1.png"
    drawn = Image.open(file)
    assert drawn.size == (result.plan.width, result.plan.height)
    assert drawn.width > drawn.height  # the shape of the control image
    assert np.asarray(drawn).any()


def test_thresholds_reach_the_map(engine, control, tmp_path):
    lit = []
    for low, high in ((100, 200), (10, 30)):
        folder = tmp_path / str(low)
        folder.mkdir()
        settings = replace(
            REQUEST,
            control_maps_only=True,
            controls=(control("grain"),),
            canny_low_threshold=low,
            canny_high_threshold=high,
        )
        (file,) = engine.generate(settings, folder).files
        lit.append(np.asarray(Image.open(file)).mean())
    assert lit[1] > 2 * lit[0]


def test_a_control_image_of_another_shape_is_cropped_not_distorted(engine, control, tmp_path):
    settings = replace(
        REQUEST, width=SIDE, height=SIDE, control_maps_only=True, controls=(control("wide"),)
    )
    (file,) = engine.generate(settings, tmp_path).files
    wide = Image.open(control("wide").image).convert("RGB")
    middle = wide.crop((SIDE // 2, 0, SIDE // 2 + SIDE, SIDE))
    settings, detectors = annotators.AnnotatorSettings(100, 200), None
    expected = annotators.canny(np.asarray(middle), settings, detectors)
    assert np.array_equal(np.asarray(Image.open(file)), expected)


def test_a_masked_region_has_its_part_of_the_map(engine, control, folder, tmp_path):
    seen: dict[str, Image.Image] = {}
    settings = replace(
        REQUEST,
        **QUICK,
        image=folder / "photo.png",
        mask=folder / "mask.png",
        inpaint_area="masked_region",
        inpaint_padding=8,
        mask_blur=0,
        return_control_maps=True,
        controls=(control("segmentation", "segmentation"),),
    )
    seen["part"] = Image.open(engine.generate(settings, tmp_path).files[0])
    # The mask's box and the padding, enlarged to the model's native area.
    whole = Image.open(folder / "segmentation.png").crop((32, 24, 104, 96))
    assert seen["part"].size == (SIDE, SIDE)
    expected = np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    assert (np.asarray(seen["part"]) == expected).mean() > 0.98


def test_outpainting_crops_the_map_of_the_final_image(
    engine, control, folder, tmp_path, monkeypatch
):
    boxes = []
    render = generation.engine.render_control_maps

    def watched(controlnets, annotators, images, region, detectors):
        boxes.append(region.box)
        return render(controlnets, annotators, images, region, detectors)

    monkeypatch.setattr(generation.engine, "render_control_maps", watched)
    settings = replace(
        REQUEST,
        **QUICK,
        image=folder / "photo.png",
        outpaint=Margins(left=64, top=0, right=0, bottom=0),
        controls=(control("wide", is_map=True, kind="segmentation"),),
    )
    engine.generate(settings, tmp_path)
    # 64 pixels on the left of 128 are two stages; the first lies 32 from the final left.
    assert boxes == [(32, 0, 192, 128), (0, 0, 192, 128)]


def test_the_hires_stage_has_a_larger_map(engine, control, tmp_path):
    settings = replace(
        REQUEST, **QUICK, hires_fix=1.5, return_control_maps=True, controls=(control(),)
    )
    files = engine.generate(settings, tmp_path).files
    assert [Image.open(file).size for file in files] == [(192, 192), (192, 192)]


@pytest.mark.parametrize("kind", ["edge_canny", "segmentation"])
def test_an_empty_map_is_logged_and_still_returned(engine, control, capsys, tmp_path, kind):
    settings = replace(
        REQUEST,
        control_maps_only=True,
        controls=(control("black", kind, is_map=kind == "segmentation"),),
    )
    (file,) = engine.generate(settings, tmp_path).files
    assert not np.asarray(Image.open(file)).any()
    log = capsys.readouterr().out
    assert f"controlnet_1: {kind} does not find" in log
    assert "has no effect" in log


def test_metadata_records_the_controlnets(make, control):
    made = make(seed=4, **QUICK, embed_parameters=True, controls=(control("canny", start=0.25),))
    parameters = Image.open(made.result.files[0]).text["parameters"]
    assert "ControlNet 0" in parameters
    assert (
        "Module: none, Model: controlnet-union-sdxl, Weight: 0.75, Guidance Start: 0.25"
        in parameters
    )
    assert str(control().image.parent) not in parameters


# The next request


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("models", [("UNet2DConditionModel",), ("ControlNetUnionModel",)])
def test_a_failure_does_not_change_the_next_request(engine, make, control, kind, models):
    settings = {"seed": 4, **QUICK}
    plain = make(**settings)
    controlled = make(**settings, controls=(control(),))
    happens, reported = ERRORS[kind]
    with pytest.raises(reported), failing_at(3, models, happens):
        make(**settings, controls=(control(),))
    unet = base_model(engine).components.unet
    assert not unet._forward_pre_hooks
    assert not unet._forward_pre_hooks_with_kwargs
    assert make(**settings).bytes == plain.bytes
    assert make(**settings, controls=(control(),)).bytes == controlled.bytes


def test_an_invalid_request_loads_nothing(control, monkeypatch, tmp_path):
    engine = Engine(Edition.MINIATURE, "cpu")
    monkeypatch.setattr(cache, "ensure", None)
    for one in (control(kind="mlsd", is_map=False), replace(control(), start=0.5, end=0.5)):
        with pytest.raises(InvalidRequest):
            engine.generate(replace(REQUEST, controls=(one,)), tmp_path)


def test_controlnets_are_kept_within_the_budget(control, tmp_path, capsys):
    engine = Engine(Edition.MINIATURE, "cpu", budget=1)  # nothing fits beside anything else

    for k, (model, kind, name) in enumerate(
        [("sdxl", "edge_canny", "canny"), ("sd15", "segmentation", "segmentation")]
    ):
        (tmp_path / str(k)).mkdir()
        settings = replace(REQUEST, **QUICK, model=model, controls=(control(name, kind),))
        engine.generate(settings, tmp_path / str(k))
        entry = {"sdxl": "controlnet-union-sdxl", "sd15": "controlnet-segmentation-sd15"}[model]
        base = {"sdxl": "sdxl-base", "sd15": "sd15"}[model]
        assert sorted(engine._models._entries) == sorted([base, entry])
    assert "Unloading controlnet-union-sdxl" in capsys.readouterr().out
