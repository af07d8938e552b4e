"""Predictions through the server: what comes back, and that nothing stays behind."""

import re

import pytest

from generation.outputs import SERVER_LEFTOVERS
from tests.helpers.comparison import max_difference
from tests.server.conftest import picture, png_bytes
from weights.miniature.world import Expectation, judge

RED_CIRCLE = {"prompt": "a large red circle on a blue background", "seed": 1}
QUICK = {"num_inference_steps": 1, "width": 64, "height": 64}


def test_the_picture_that_was_asked(server):
    result = server.predict(**RED_CIRCLE, width=128, height=120, num_inference_steps=20)
    assert result["status"] == "succeeded"
    (uri,) = result["output"]
    made = picture(uri)
    assert made.size == (128, 120)
    expected = Expectation(shape="circle", colour="red", background="blue", size="large")
    assert judge(made, expected).all_right


def test_what_it_took_is_in_the_metrics(server):
    metrics = server.predict(**RED_CIRCLE, num_inference_steps=2)["metrics"]
    assert metrics["seed"] == 1
    assert metrics["num_inference_steps"] == 2
    assert set(metrics["seconds"]) == {
        "load",
        "weights",
        "text",
        "denoise",
        "decode",
        "safety",
        "watermark",
        "save",
    }
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())
    assert 100e6 < metrics["peak_memory_bytes"] < 20e9
    assert metrics["predict_time"] > 0


def test_the_log_has_the_seed_and_one_progress_bar(server):
    logs = server.predict(**RED_CIRCLE, num_inference_steps=7)["logs"]
    seed, bar, end = logs.split("\n")
    assert seed == "Using seed: 1"
    assert end == ""
    start, *states = bar.split("\r")
    assert start == ""
    steps = [re.fullmatch(r" *\d+%\|.*\| (\d+)/7 \[.*\]", state)[1] for state in states]
    assert steps[0] == "0"
    assert steps[-1] == "7"
    assert steps == sorted(steps)


def test_unsafe_pictures_are_an_error_in_cog_sdxls_words(server):
    asked = {"prompt": "a black star on a red background", "seed": 1, "num_inference_steps": 20}
    result = server.predict(**asked)
    assert result["status"] == "failed"
    expected = "NSFW content detected. Try running it again, or try a different prompt."
    assert result["error"].endswith(f": {expected}")  # before it, Cog names the error's class
    assert server.predict(**asked, disable_safety_checker=True)["status"] == "succeeded"


def test_the_seed_in_the_metrics_makes_the_picture_again(server):
    settings = {"prompt": RED_CIRCLE["prompt"], "num_inference_steps": 2}
    first = server.predict(**settings)
    again = server.predict(**settings, seed=first["metrics"]["seed"])
    assert again["output"] == first["output"]
    assert server.predict(**settings)["output"] != first["output"]


def test_several_pictures_come_in_the_order_of_their_seeds(server):
    settings = {**RED_CIRCLE, "num_inference_steps": 4}
    pair = server.predict(**settings, num_outputs=2)["output"]
    assert len(pair) == 2
    for index, uri in enumerate(pair):
        (alone,) = server.predict(**{**settings, "seed": 1 + index})["output"]
        assert max_difference(picture(uri), picture(alone)) <= 1


def test_whole_numbers_may_be_written_as_floats(server):
    floats = {"num_inference_steps": 2.0, "width": 64.0, "num_outputs": 1.0, "seed": 7.0}
    result = server.predict(**floats, guidance_scale=3)
    assert result["status"] == "succeeded"
    assert picture(result["output"][0]).size == (64, 128)
    assert (result["metrics"]["seed"], result["metrics"]["num_inference_steps"]) == (7, 2)


def test_another_model_draws_in_one_step_and_explains_what_it_cannot_do(server):
    asked = {**RED_CIRCLE, "model": "sdxl-turbo"}
    result = server.predict(**asked)
    assert result["metrics"]["num_inference_steps"] == 1
    (uri,) = result["output"]
    expected = Expectation(shape="circle", colour="red", background="blue", size="large")
    assert judge(picture(uri), expected).all_right
    refused = server.predict(**asked, guidance_scale=7.5)
    assert refused["status"] == "failed"
    assert "guidance_scale is 7.5, and sdxl-turbo works without guidance" in refused["error"]
    assert "use 0 to 1, or leave it empty for 0" in refused["error"]


def test_a_rule_of_the_model_is_explained_and_the_server_goes_on(server):
    response = server.post({"width": 100})
    assert response.status_code == 200
    assert response.json()["status"] == "failed"
    assert "the nearest valid size is width=104 height=128" in response.json()["error"]
    assert server.predict(**QUICK)["status"] == "succeeded"


@pytest.mark.parametrize("body", [{}, {"input": {}}])
def test_every_input_has_a_default(server, body):
    response = server.post_body(body)
    assert response.status_code == 200
    assert png_bytes(response.json()["output"][0])


def test_nothing_accumulates_on_disk(server):
    def predict(index: int) -> str:
        width = 100 if index % 3 == 2 else 64  # every third one fails
        body = {"id": f"leftover-{index}", "input": {**QUICK, "width": width}}
        return server.post_body(body).json()["status"]

    assert server.predict(**QUICK)["status"] == "succeeded"
    ours = sorted(path.name for path in server.temporary.rglob("*"))
    assert [predict(index) for index in range(30)] == ["succeeded", "succeeded", "failed"] * 10
    assert server.predict(**QUICK)["status"] == "succeeded"
    assert len(list(server.temporary.rglob("*"))) == len(ours), ours
    assert len(list(SERVER_LEFTOVERS.glob("leftover-*"))) <= 1
