"""Every rule about controls: what is refused, before anything loads, and what comes of the rest."""

from dataclasses import replace
from pathlib import Path

import pytest

from generation import controlnets
from generation.base_models import BASE_MODELS, BaseModel
from generation.controlnets import CHOICES, CONTROLNETS, ControlRequest, control_types_of
from generation.errors import InvalidRequest
from generation.resolve import resolve
from preprocess.annotators import ANNOTATORS
from tests.helpers.request import REQUEST
from weights.catalog import CATALOG, Edition

FULL = BASE_MODELS[Edition.FULL]
MINIATURE = BASE_MODELS[Edition.MINIATURE]
PICTURE = Path("picture.png")
EDGES = ControlRequest("edge_canny", PICTURE)
IMAGE_SIZE = (1024, 768)


def plan(*controls: ControlRequest, model=FULL["sdxl"], **changes):
    request = replace(REQUEST, controls=controls, **changes)
    return resolve(request, model, None, IMAGE_SIZE if controls else None)


def refused(*controls: ControlRequest, **changes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        plan(*controls, **changes)
    return str(caught.value)


# The registry


def test_every_control_type_has_files_or_none_for_each_base_model():
    for spec in CONTROLNETS.values():
        assert set(spec.weights) <= set(BaseModel)
        assert set(spec.weights.values()) <= set(CATALOG[Edition.FULL])
        assert (spec.union_index is not None) == (spec.weights[BaseModel.SDXL] == controlnets.UNION)
        assert spec.annotator is None or spec.annotator in ANNOTATORS


def test_the_eight_control_types_of_the_guide_are_there_for_every_base_model():
    guide = ("edge_canny", "soft_edge_hed", "depth_midas", "openpose", "scribble")
    for name in (*guide, "segmentation", "normal_bae"):
        assert set(CONTROLNETS[name].weights) == set(BaseModel)
    assert set(CONTROLNETS["mlsd"].weights) == {BaseModel.SDXL, BaseModel.SD15}  # none for SD 2.1


def test_fofrs_names_are_known():
    names = "none edge_canny illusion depth_leres depth_midas soft_edge_pidi soft_edge_hed"
    assert set(names.split()) | {"lineart", "lineart_anime", "openpose"} <= set(CHOICES)


def test_union_indices_are_diffusers():
    # xinsir/controlnet-union-sdxl-1.0: openpose, depth, thick lines, thin lines, normal, segment
    wanted = {"openpose": 0, "depth_zoe": 1, "scribble": 2, "soft_edge_hed": 2, "soft_edge_pidi": 2}
    wanted |= {"edge_canny": 3, "lineart": 3, "lineart_anime": 3, "mlsd": 3}
    wanted |= {"normal_bae": 4, "segmentation": 5, "tile": 6}
    assert {name: CONTROLNETS[name].union_index for name in wanted} == wanted


@pytest.mark.parametrize("name", FULL)
def test_models_are_controlled_by_their_base_models_controlnets(name):
    base_model = FULL[name].base_model
    assert control_types_of(FULL[name]) == [
        k for k, spec in CONTROLNETS.items() if base_model in spec.weights
    ]
    assert FULL["sd-turbo"].base_model == FULL["sd21"].base_model
    assert FULL["lcm-dreamshaper"].base_model == FULL["sd15"].base_model


# Plans


def test_a_control_becomes_a_plan():
    asked = replace(EDGES, conditioning_scale=1.5, start=0.25, end=0.5)
    (control,) = plan(asked, canny_low_threshold=30, canny_high_threshold=90).controlnets
    assert (control.name, control.spec.name) == ("controlnet_1", "edge_canny")
    assert (control.conditioning_scale, control.start, control.end) == (1.5, 0.25, 0.5)
    assert control.annotator == "canny"


def test_a_control_that_does_not_count_is_none():
    nothing = replace(EDGES, conditioning_scale=0)
    assert plan(nothing).controlnets == ()
    (control,) = plan(nothing, EDGES).controlnets
    assert control.name == "controlnet_2"
    assert len(plan(nothing, EDGES, return_control_maps=True).controlnets) == 2


def test_controls_keep_their_inputs_names():
    named = plan(ControlRequest(), EDGES, replace(EDGES, control_type="tile")).controlnets
    assert [control.name for control in named] == ["controlnet_2", "controlnet_3"]


def test_a_map_needs_no_annotator():
    (control,) = plan(replace(EDGES, is_map=True)).controlnets
    assert control.annotator is None


@pytest.mark.parametrize("control_type", ["tile", "illusion"])
def test_some_pictures_are_maps_as_they_are(control_type):
    (control,) = plan(replace(EDGES, control_type=control_type)).controlnets
    assert control.annotator is None


def test_pictures_have_the_first_controls_shape():
    assert (plan().width, plan().height) == (1024, 1024)
    shaped = plan(EDGES)
    assert shaped.width / shaped.height == pytest.approx(4 / 3, rel=0.02)
    given = plan(EDGES, width=768, height=1024)
    assert (given.width, given.height) == (768, 1024)
    assert plan(EDGES, width=1024).height == 768


# What is refused


def test_an_unknown_control_type_lists_the_known_ones():
    message = refused(replace(EDGES, control_type="canny"))
    assert "controlnet_1 'canny' is not known" in message
    assert all(name in message for name in CHOICES)


def test_a_missing_picture():
    message = refused(ControlRequest(), replace(EDGES, image=None))
    assert "controlnet_2 is edge_canny, but controlnet_2_image is missing" in message
    assert "controlnet_2_is_map=true" in message


def test_a_picture_without_a_control_type():
    message = refused(replace(EDGES, control_type="none"))
    assert "controlnet_1_image is given, but controlnet_1 is 'none'" in message


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.4), (1, 1), (0, 0)])
def test_a_start_that_is_not_before_the_end(start, end):
    message = refused(replace(EDGES, start=start, end=end))
    assert f"controlnet_1_start is {start:g} and controlnet_1_end {end:g}" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conditioning_scale", -0.1),
        ("conditioning_scale", 4.1),
        ("conditioning_scale", float("nan")),
        ("start", -0.1),
        ("end", 1.1),
    ],
)
def test_values_out_of_bounds(field, value):
    message = refused(EDGES, EDGES, replace(EDGES, **{field: value}))
    assert f"controlnet_3_{field} is {value}" in message


@pytest.mark.parametrize(("low", "high"), [(100, 100), (200, 100), (0, 100), (100, 256)])
def test_thresholds(low, high):
    message = refused(EDGES, canny_low_threshold=low, canny_high_threshold=high)
    assert "canny_" in message
    assert "threshold" in message


@pytest.mark.parametrize("control_type", ["mlsd", "tile", "illusion"])
@pytest.mark.parametrize("model", ["sd21", "sd-turbo"])
def test_control_types_that_sd21_lacks(control_type, model):
    message = refused(replace(EDGES, control_type=control_type), model=FULL[model])
    assert (
        f"controlnet_1 is {control_type}, and no ControlNet of that type exists for {model}"
        in message
    )
    assert "(SD 2.1)" in message
    assert "edge_canny" in message
    assert control_type not in message.partition("use one of")[2]


def test_control_types_that_the_miniatures_lack():
    message = refused(replace(EDGES, control_type="openpose", is_map=True), model=MINIATURE["sd15"])
    assert "is among the miniature weights for sd15" in message
    assert plan(replace(EDGES, control_type="openpose", is_map=True), model=MINIATURE["sdxl"])


def test_annotators_that_the_miniatures_lack():
    message = refused(replace(EDGES, control_type="depth_midas"), model=MINIATURE["sdxl"])
    assert "controlnet_1_is_map=true" in message
    assert "WEIGHTS_EDITION=full" in message
    assert plan(replace(EDGES, control_type="depth_midas", is_map=True), model=MINIATURE["sdxl"])
    assert plan(EDGES, model=MINIATURE["sdxl"])  # Canny needs no weights


@pytest.mark.parametrize("name", ["return_control_maps", "control_maps_only"])
def test_maps_of_no_control(name):
    assert f"{name} is on, but there is no ControlNet" in refused(**{name: True})


def test_maps_alone_are_returned():
    assert plan(EDGES, control_maps_only=True).request.returns_control_maps
    assert not plan(EDGES).request.returns_control_maps
