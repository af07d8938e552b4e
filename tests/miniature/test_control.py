"""What controls do to a request: pictures, maps, memory, and nothing to the next one."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import generation.control
from generation.base_models import MINIATURE_SDXL
from generation.controlnets import ControlRequest
from generation.engine import Engine
from generation.errors import InvalidRequest
from generation.pipelines import LoadedModel, PipelineStore
from generation.request import Margins
from generation.stand_ins import Progress
from preprocess import annotators
from tests.comparison import max_difference
from tests.miniature.isolation import ERRORS, failing_at
from tests.requests import NO_CONTROL, REQUEST
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
        asked = ControlRequest(kind, folder / f"{name}.png", 0.75, 0, 1, is_map)
        return replace(asked, **changes)

    return control


def three(*controls: ControlRequest) -> tuple[ControlRequest, ...]:
    return (*controls, *[NO_CONTROL] * (3 - len(controls)))


def pixels(made, number: int = 0) -> np.ndarray:
    return np.asarray(made.pictures[number].convert("RGB")).astype(int)


# How much a control counts


@pytest.mark.parametrize("model", ["sdxl", "sd15", "sd21", "sdxl-turbo", "sd15-lcm"])
def test_a_scale_of_zero_is_no_control(make, control, model):
    steps = {} if model in ("sdxl-turbo", "sd15-lcm") else QUICK
    plain = make(model=model, seed=4, num_inference_steps=steps.get("num_inference_steps"))
    asked = {"model": model, "seed": 4, "num_inference_steps": steps.get("num_inference_steps")}
    nothing = make(**asked, controls=three(control(conditioning_scale=0)))
    assert nothing.bytes == plain.bytes
    much = make(**asked, controls=three(control(conditioning_scale=1.5)))
    assert np.abs(pixels(much) - pixels(plain)).mean() > 1


def test_a_scale_of_zero_loads_no_controlnet_and_makes_no_map(control, monkeypatch, tmp_path):
    engine = Engine(Edition.MINIATURE, "cpu")
    monkeypatch.setattr(PipelineStore, "load_controlnet", None)
    monkeypatch.setattr(annotators, "annotate", None)
    engine.generate(
        replace(REQUEST, **QUICK, controls=three(control(conditioning_scale=0))), tmp_path
    )


def test_a_part_of_the_steps_is_between_none_and_all(make, control):
    asked = {"seed": 4, "num_inference_steps": 8}
    none, half, late, whole = (
        pixels(make(**asked, controls=three(control(**part))))
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
    """Image to image runs a part of the schedule; shares are of that part."""
    seen: list[tuple[int, int]] = []
    between = Progress.between

    def watched(progress, start, end):
        seen.append((progress.step, progress.steps))
        return between(progress, start, end)

    monkeypatch.setattr(Progress, "between", watched)
    asked = {"num_inference_steps": 10, "controls": three(control())}
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
        engine.generate(replace(REQUEST, **asked, **changes), tmp_path / str(k))
        assert seen == [(step, steps) for step in range(steps)]


# Several


def test_controls_add_up_and_may_be_of_one_index(make, control):
    asked = {"seed": 4, **QUICK}
    first, second = control("canny"), control("photo", "edge_canny", conditioning_scale=0.4)
    one = pixels(make(**asked, controls=three(first)))
    both = pixels(make(**asked, controls=three(first, second)))
    swapped = pixels(make(**asked, controls=three(second, first)))
    assert np.abs(both - one).mean() > 0.5
    assert max_difference(both, swapped) <= 1
    three_kinds = three(first, second, control("segmentation", "segmentation"))
    assert np.abs(pixels(make(**asked, controls=three_kinds)) - both).mean() > 0.5


def test_an_sdxl_controlnet_of_its_own_beside_the_union(control, make, engine, monkeypatch):
    """As `illusion` is, which the miniatures lack: a plain ControlNet, of chance values here."""
    torch.manual_seed(0)
    unet = engine._store.load(MINIATURE_SDXL).parts["unet"]
    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 16, 24, 32)
    )
    for parameter in net.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    load = PipelineStore.load_controlnet

    def with_plain(store, weights, beside):
        if weights == "controlnet-illusion-sdxl":
            return LoadedModel({"controlnet": net.eval()}, {})
        return load(store, weights, beside)

    entries = {"controlnet-illusion-sdxl": None, **generation.controlnets.CATALOG["miniature"]}
    monkeypatch.setitem(generation.controlnets.CATALOG, Edition.MINIATURE, entries)
    monkeypatch.setattr(PipelineStore, "load_controlnet", with_plain)
    asked = {"seed": 4, **QUICK}
    edges, pattern = control("canny"), control("photo", "illusion")
    pictures = [
        pixels(make(**asked, controls=three(*controls)))
        for controls in ([edges], [pattern], [edges, pattern])
    ]
    assert all(
        np.abs(a - b).mean() > 0.5
        for a, b in zip(pictures, pictures[1:] + pictures[:1], strict=True)
    )


# Maps


def test_maps_come_out_before_the_pictures(make, control, folder):
    made = make(
        seed=4,
        **QUICK,
        num_outputs=2,
        return_control_maps=True,
        controls=(NO_CONTROL, control("photo"), control("segmentation", "segmentation")),
    )
    names = [file.name for file in made.result.files]
    assert names == ["control-2.png", "control-3.png", "out-0.png", "out-1.png"]
    assert np.array_equal(pixels(made, 0), np.asarray(Image.open(folder / "canny.png")))
    assert np.array_equal(pixels(made, 1), np.asarray(Image.open(folder / "segmentation.png")))


def test_maps_alone_load_no_model(control, monkeypatch, tmp_path):
    engine = Engine(Edition.MINIATURE, "cpu")
    monkeypatch.setattr(PipelineStore, "load", None)
    asked = replace(REQUEST, control_maps_only=True, controls=three(control("wide")))
    result = engine.generate(asked, tmp_path)
    (file,) = result.files
    assert file.name == "control-1.png"
    drawn = Image.open(file)
    assert drawn.size == (result.plan.width, result.plan.height)
    assert drawn.width > drawn.height  # the control's own shape
    assert np.asarray(drawn).any()


def test_thresholds_reach_the_map(engine, control, tmp_path):
    lit = []
    for low, high in ((100, 200), (10, 30)):
        folder = tmp_path / str(low)
        folder.mkdir()
        asked = replace(
            REQUEST,
            control_maps_only=True,
            controls=three(control("grain")),
            canny_low_threshold=low,
            canny_high_threshold=high,
        )
        (file,) = engine.generate(asked, folder).files
        lit.append(np.asarray(Image.open(file)).mean())
    assert lit[1] > 2 * lit[0]


def test_a_control_of_another_shape_is_cut_never_squashed(engine, control, tmp_path):
    asked = replace(
        REQUEST, width=SIDE, height=SIDE, control_maps_only=True, controls=three(control("wide"))
    )
    (file,) = engine.generate(asked, tmp_path).files
    wide = Image.open(control("wide").image).convert("RGB")
    middle = wide.crop((SIDE // 2, 0, SIDE // 2 + SIDE, SIDE))
    settings, detectors = annotators.AnnotatorSettings(100, 200), None
    expected = annotators.canny(np.asarray(middle), settings, detectors)
    assert np.array_equal(np.asarray(Image.open(file)), expected)


def test_what_is_repainted_sees_its_part_of_the_map(engine, control, folder, tmp_path):
    seen: dict[str, Image.Image] = {}
    asked = replace(
        REQUEST,
        **QUICK,
        image=folder / "photo.png",
        mask=folder / "mask.png",
        inpaint_area="masked_region",
        inpaint_padding=8,
        mask_blur=0,
        return_control_maps=True,
        controls=three(control("segmentation", "segmentation")),
    )
    seen["part"] = Image.open(engine.generate(asked, tmp_path).files[0])
    # The mask's box and the padding, enlarged to the model's own area.
    whole = Image.open(folder / "segmentation.png").crop((32, 24, 104, 96))
    assert seen["part"].size == (SIDE, SIDE)
    expected = np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    assert (np.asarray(seen["part"]) == expected).mean() > 0.98


def test_outpainting_sees_the_map_of_the_whole(engine, control, folder, tmp_path, monkeypatch):
    maps = []
    look = generation.control.ControlMaps.look

    def watched(controls, frame):
        maps.append((frame, look(controls, frame)["controlnet_1"]))
        return maps[-1][1]

    monkeypatch.setattr(
        generation.control.ControlMaps, "look", lambda c, f: {"controlnet_1": watched(c, f)}
    )
    asked = replace(
        REQUEST,
        **QUICK,
        image=folder / "photo.png",
        outpaint=Margins(left=64, top=0, right=0, bottom=0),
        controls=three(control("wide", is_map=True, kind="segmentation")),
    )
    engine.generate(asked, tmp_path)
    boxes = [frame.box for frame, _ in maps]
    # 64 pixels on the left of 128 are two passes; the first lies 32 from the final left.
    assert boxes == [(32, 0, 192, 128), (0, 0, 192, 128)]


def test_a_second_pass_sees_a_larger_map(engine, control, tmp_path):
    asked = replace(
        REQUEST, **QUICK, hires_fix=1.5, return_control_maps=True, controls=three(control())
    )
    files = engine.generate(asked, tmp_path).files
    assert [Image.open(file).size for file in files] == [(192, 192), (192, 192)]


@pytest.mark.parametrize("kind", ["edge_canny", "segmentation"])
def test_an_empty_map_is_a_warning_and_still_given_out(engine, control, capsys, tmp_path, kind):
    asked = replace(
        REQUEST,
        control_maps_only=True,
        controls=three(control("black", kind, is_map=kind == "segmentation")),
    )
    (file,) = engine.generate(asked, tmp_path).files
    assert not np.asarray(Image.open(file)).any()
    said = capsys.readouterr().out
    assert f"controlnet_1: {kind} does not find" in said
    assert "says nothing" in said


def test_files_say_how_they_were_controlled(make, control):
    made = make(
        seed=4, **QUICK, embed_parameters=True, controls=three(control("canny", start=0.25))
    )
    told = Image.open(made.result.files[0]).text["parameters"]
    assert "ControlNet 0" in told
    assert "Module: none, Model: controlnet-union-sdxl, Weight: 0.75, Guidance Start: 0.25" in told
    assert str(control().image.parent) not in told


# Nothing is left behind


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("models", [("UNet2DConditionModel",), ("ControlNetUnionModel",)])
def test_what_fails_leaves_nothing_for_the_next_request(engine, make, control, kind, models):
    asked = {"seed": 4, **QUICK}
    plain = make(**asked)
    controlled = make(**asked, controls=three(control()))
    happens, reported = ERRORS[kind]
    with pytest.raises(reported), failing_at(3, models, happens):
        make(**asked, controls=three(control()))
    unet = engine._store.load(MINIATURE_SDXL).parts["unet"]
    assert not unet._forward_pre_hooks
    assert not unet._forward_pre_hooks_with_kwargs
    assert make(**asked).bytes == plain.bytes
    assert make(**asked, controls=three(control())).bytes == controlled.bytes


def test_nothing_is_loaded_for_a_request_that_is_refused(control, monkeypatch, tmp_path):
    engine = Engine(Edition.MINIATURE, "cpu")
    monkeypatch.setattr(cache, "ensure", None)
    for asked in (control(kind="mlsd", is_map=False), replace(control(), start=0.5, end=0.5)):
        with pytest.raises(InvalidRequest):
            engine.generate(replace(REQUEST, controls=three(asked)), tmp_path)


def test_controlnets_are_kept_within_the_budget(control, tmp_path, capsys):
    engine = Engine(Edition.MINIATURE, "cpu", budget=1)  # nothing fits beside anything

    def names() -> list[str]:
        return list(engine._store._loaded)

    for k, (model, kind, name) in enumerate(
        [("sdxl", "edge_canny", "canny"), ("sd15", "segmentation", "segmentation")]
    ):
        (tmp_path / str(k)).mkdir()
        asked = replace(REQUEST, **QUICK, model=model, controls=three(control(name, kind)))
        engine.generate(asked, tmp_path / str(k))
        entry = {"sdxl": "controlnet-union-sdxl", "sd15": "controlnet-segmentation-sd15"}[model]
        base = {"sdxl": "sdxl-base", "sd15": "sd15"}[model]
        assert sorted(names()) == sorted([base, entry])
    assert "controlnet-union-sdxl leaves the memory" in capsys.readouterr().out
