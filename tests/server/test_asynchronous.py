"""Predictions that outlive their request: webhooks, repeated PUTs, a busy server, cancelling."""

import pytest

from tests.server.conftest import ASYNC, last_step, png_bytes, wait_for

SETTINGS = {"prompt": "a small green star on a white background", "seed": 5}
STEPS = {"num_inference_steps": 6}


def test_webhooks_tell_the_beginning_and_the_outcome(server, receiver):
    waited_for = server.predict(**SETTINGS, **STEPS)
    assert server.put("told", {**SETTINGS, **STEPS}, receiver.hook("told")) == {
        "id": "told",
        "status": "starting",
    }
    outcome = receiver.outcome("told")
    assert outcome["status"] == "succeeded"
    assert outcome["output"] == waited_for["output"]
    assert outcome["metrics"]["seed"] == 5
    assert outcome["logs"].startswith("Using seed: 5\n")
    assert last_step(outcome["logs"]) == 6
    statuses = [state["status"] for state in receiver.states("told")]
    assert statuses.count("succeeded") == 1
    assert set(statuses) == {"processing", "succeeded"}


def test_the_same_put_again_tells_how_far_it_is(server, receiver):
    with server.long_run("repeated", receiver.hook("repeated"), **SETTINGS):
        state = server.state("repeated")
        assert (state["id"], state["status"]) == ("repeated", "processing")
        assert state["input"] == {"num_inference_steps": 500, **SETTINGS}
        assert state["logs"].startswith("Using seed: 5\n")
    started = [s for s in receiver.states("repeated") if s["logs"] == ""]
    assert len(started) == 1  # it ran once


def test_a_put_whose_body_names_another_id(server):
    body = {"id": "another", "input": {}}
    response = server.client.put("/predictions/one", json=body, headers=ASYNC)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "id"]


def test_a_second_request_is_refused_while_one_runs(server, receiver):
    with server.long_run("first", receiver.hook("first")):
        assert server.health()["status"] == "BUSY"
        response = server.client.post("/predictions", json={"input": STEPS})
        assert response.status_code == 409
        assert "At capacity" in response.json()["error"]
    assert server.predict(**STEPS)["status"] == "succeeded"
    wait_for(lambda: server.health()["status"] == "READY", "the server's rest")


@pytest.mark.parametrize("running", [{"scheduler": "KarrasDPM", "seed": 9}, {"num_outputs": 2}])
def test_cancelling_stops_within_the_run_and_leaves_no_trace(server, receiver, running):
    name = f"canceled-{'-'.join(running)}"
    before = server.predict(**SETTINGS, **STEPS)["output"]
    with server.long_run(name, receiver.hook(name), **running):
        at = last_step(server.state(name)["logs"])
        assert server.cancel(name).status_code == 200
        outcome = receiver.outcome(name)
    assert outcome["status"] == "canceled"
    assert "output" not in outcome
    assert outcome["logs"].startswith("Using seed: ")
    assert outcome["logs"].count("| 0/500 [") == 1  # one bar
    assert at <= last_step(outcome["logs"]) < 400
    after = server.predict(**SETTINGS, **STEPS)["output"]
    assert [png_bytes(uri) for uri in after] == [png_bytes(uri) for uri in before]
