"""Controls through the server: pictures as data URIs, maps among the outputs."""

import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import picture
from tests.server.test_modes import EXACT, SOURCE, pixels, uri
from weights.miniature.controls import Subject, segmentation
from weights.miniature.world import place

SCENE = place("star", "yellow", "green", "large", "center", np.random.default_rng(3))
EDGES = {"controlnet_1": "edge_canny", "controlnet_1_image": uri(SOURCE)}
SEGMENTS = {
    "controlnet_2": "segmentation",
    "controlnet_2_image": uri(Image.fromarray(segmentation(Subject(SCENE), 128, 128))),
    "controlnet_2_is_map": True,
}


def outputs(result: dict) -> list[np.ndarray]:
    assert result["status"] == "succeeded", result["error"]
    return [pixels(picture(output)) for output in result["output"]]


def test_controls_change_the_picture_and_their_maps_come_first(server):
    (plain,) = outputs(server.predict(**EXACT))
    edges, controlled = outputs(server.predict(**EXACT, **EDGES, return_control_maps=True))
    assert set(np.unique(edges)) == {0, 255}
    assert (controlled != plain).any()
    *maps, both = outputs(server.predict(**EXACT, **EDGES, **SEGMENTS, return_control_maps=True))
    assert len(maps) == 2
    assert (maps[0] == edges).all()
    assert (both != controlled).any()


@pytest.mark.parametrize(
    "change",
    [
        {"controlnet_1_conditioning_scale": 0.3},
        {"controlnet_1_start": 0.5},
        {"controlnet_1_end": 0.5},
        {"controlnet_1_is_map": True},
        {"canny_low_threshold": 3, "canny_high_threshold": 10},
    ],
    ids=str,
)
def test_every_input_of_a_control_counts(server, change):
    (first,) = outputs(server.predict(**EXACT, **EDGES))
    (second,) = outputs(server.predict(**EXACT, **EDGES, **change))
    assert (first != second).any()


def test_maps_alone(server):
    result = server.predict(**EXACT, **EDGES, **SEGMENTS, control_maps_only=True)
    assert len(outputs(result)) == 2
    assert set(result["metrics"]["seconds"]) == {"control_maps", "save"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({**EDGES, "controlnet_1": "mlsd", "model": "sd21"}, "exists for sd21 (SD 2.1)"),
        ({"controlnet_3": "scribble"}, "controlnet_3_image is missing"),
        ({**EDGES, "controlnet_1_start": 0.7, "controlnet_1_end": 0.3}, "controlnet_1_start is"),
        ({"controlnet_1_image": uri(SOURCE)}, "controlnet_1 is 'none'"),
        ({**EDGES, "controlnet_1_image": "/etc/hostname"}, "must be a URL or a data URI"),
    ],
    ids=["no such net", "no picture", "backwards", "no kind", "a file of the server"],
)
def test_what_is_wrong_with_a_control_is_said_and_the_server_goes_on(server, inputs, message):
    result = server.predict(**EXACT, **inputs)
    assert result["status"] == "failed"
    assert message in result["error"]
    assert server.predict(**EXACT, width=64, height=64)["status"] == "succeeded"


def test_an_unknown_kind_is_refused_by_the_schema(server):
    body = server.predict(**EXACT, controlnet_1="canny", controlnet_1_image=uri(SOURCE))
    assert "controlnet_1" in str(body)
    assert "edge_canny" in str(body)
