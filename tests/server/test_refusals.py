"""Requests that the server answers without running predict(): the schema and the protocol."""

import json

import pytest

from generation.schedulers import SCHEDULERS
from tests.server.conftest import ROOT, picture

NAMES = ",".join(f'"{name}"' for name in SCHEDULERS)


def test_the_served_schema_is_the_committed_one(server):
    committed = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
    assert server.client.get("/openapi.json").json() == committed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_outputs", 99, "99 is greater than the maximum of 16"),
        ("num_outputs", 0, "0 is less than the minimum of 1"),
        ("num_outputs", 1.5, '1.5 is not of type "integer"'),
        ("guidance_scale", 51, "51 is greater than the maximum of 50"),
        ("guidance_scale", -0.5, "-0.5 is less than the minimum of 0"),
        ("guidance_scale", "7.5", '"7.5" is not of type "number"'),
        ("num_inference_steps", 0, "0 is less than the minimum of 1"),
        ("num_inference_steps", 501, "501 is greater than the maximum of 500"),
        ("seed", -1, "-1 is less than the minimum of 0"),
        ("seed", 2**32, "4294967296 is greater than the maximum of 4294967295"),
        ("width", 9000, "9000 is greater than the maximum of 8192"),
        ("height", True, 'true is not of type "integer"'),
        ("prompt", 3, '3 is not of type "string"'),
        ("scheduler", "Euler b", f'"Euler b" is not one of [{NAMES}]'),
        # Nullable, says the document, but the server does not heed it: clients leave these out.
        ("seed", None, 'null is not of type "integer"'),
        ("width", None, 'null is not of type "integer"'),
        ("guidance_scale", None, 'null is not of type "number"'),
        ("scheduler", None, f"null is not one of [{NAMES}]"),
    ],
)
def test_a_value_outside_the_schema_is_refused_by_name(server, name, value, message):
    response = server.post({name: value})
    assert response.status_code == 422
    details = response.json()["detail"]
    assert {tuple(detail["loc"]) for detail in details} == {("body", "input", name)}
    assert message in [detail["msg"] for detail in details]


def test_every_bad_value_is_named_at_once(server):
    response = server.post({"num_outputs": 99, "seed": -1, "prompt": "fine"})
    assert response.status_code == 422
    assert [d["loc"][-1] for d in response.json()["detail"]] == ["num_outputs", "seed"]


def test_an_unknown_input_is_dropped(server):
    result = server.predict(num_inference_steps=1, width=64, height=64, sampler="nonsense")
    assert result["status"] == "succeeded"
    assert picture(result["output"][0]).size == (64, 64)


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b'{"input": {', "application/json", 400),
        (b"", "application/json", 400),
        (b"input=1", "application/x-www-form-urlencoded", 415),
        (b'{"input": {}}', "text/plain", 415),
        (b'{"input": [1]}', "application/json", 422),
        (b'{"input": "a prompt"}', "application/json", 422),
    ],
)
def test_a_body_that_is_no_request(server, content, content_type, status):
    headers = {"Content-Type": content_type}
    response = server.client.post("/predictions", content=content, headers=headers)
    assert response.status_code == status


def test_cancelling_what_does_not_run(server):
    assert server.cancel("no-such-prediction").status_code == 404
