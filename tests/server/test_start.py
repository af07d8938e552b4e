"""Starting: what it logs, what it does when it cannot, uploads, and a worker that dies."""

import json
import os

import pytest
import yaml

from script.tools import serve
from tests.server.conftest import ROOT, open_png, serving, wait_for

DEPRECATIONS = [  # the price of a spelling that older versions of Cog read too
    "<string>:1: DeprecationWarning: BasePredictor is deprecated; use BaseRunner instead",
    "<string>:1: DeprecationWarning: Predictor.predict() is deprecated; use run() instead",
]


def test_loading_warns_of_the_known_deprecations_alone(server):
    lines = server.log_lines()
    loading = lines[: lines.index(("INFO", "Server ready"))]
    loud = [(level, message) for level, message in loading if level != "INFO"]
    assert loud == [("WARN", "predict() is deprecated; use run() instead")]
    quiet = [message for level, message in loading if level == "INFO"]
    assert sorted(message for message in quiet if "warn" in message.lower()) == DEPRECATIONS


def test_a_started_server_says_what_it_runs(server):
    health = server.health()
    assert health["setup"]["status"] == "succeeded"
    sdk_version = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["sdk_version"]
    assert health["version"]["python_sdk"] == sdk_version
    written = json.loads((ROOT / ".cog" / "openapi_schema.json").read_text(encoding="utf-8"))
    assert server.client.get("/openapi.json").json() == written


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as raised:
        serve.main([], tmp_path)
    message = str(raised.value)
    assert message.startswith("script/serve: ")
    assert "cog.yaml" in message
    assert "\n" not in message


def test_the_servers_environment_is_what_the_image_has(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("PORT", raising=False)
    environment = serve.server_environment("predict.py:Predictor", "train.py:train")
    assert environment["COG_PREDICT_TYPE_STUB"] == "predict.py:Predictor"
    assert environment["COG_TRAIN_TYPE_STUB"] == "train.py:train"
    assert environment["PORT"] == "5000"
    first, rest = environment["PATH"].split(":", 1)
    assert rest == "/usr/bin"
    assert os.access(f"{first}/python", os.X_OK)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ({"WEIGHTS_EDITION": "nonsense"}, "set it to one of: full, miniature, auto"),
        ({"DEVICE": "nonsense"}, "DEVICE is 'nonsense', which this machine does not have"),
        ({"COMPILE": "nonsense"}, "COMPILE is 'nonsense'; set it to on or off"),
    ],
    ids=["edition", "device", "compile"],
)
def test_a_failed_setup_shows_in_the_health_check_and_its_traceback_in_the_log(
    tmp_path, setting, remedy
):
    with serving(tmp_path, **setting) as server:
        health = server.health()
        assert health["status"] == "SETUP_FAILED"
        assert health["setup"]["status"] == "failed"
        assert f"WrongSetting: {next(iter(setting))} is 'nonsense'" in health["setup"]["logs"]
        assert remedy in health["setup"]["logs"]
        assert server.client.post("/predictions", json={"input": {}}).status_code == 503

        # The log may still be under way when the health-check has the news.
        expected = ("Traceback (most", 'predict.py", line', 'edition.py", line', "errors.WrongSet")

        def whole_traceback() -> bool:
            messages = "\n".join(message for _, message in server.log_lines())
            return all(part in messages for part in expected)

        wait_for(whole_traceback, "the traceback in the log", 30)


def test_uploads_and_then_the_workers_death(tmp_path, receiver):
    """Two things that need a server of their own, and the second one ends it."""
    with serving(tmp_path, "--upload-url", f"{receiver.url}/pictures/") as server:
        result = server.predict(num_outputs=2, num_inference_steps=2, width=64, height=64, seed=3)
        assert result["status"] == "succeeded"
        stored = {f"{receiver.url}/stored/out-{k}.png" for k in range(2)}
        assert set(result["output"]) == stored  # in the order in which the uploads ended
        uploads = [r for r in receiver.requests if r.path.startswith("/pictures/")]
        assert sorted(r.path for r in uploads) == ["/pictures/out-0.png", "/pictures/out-1.png"]
        for upload in uploads:
            assert upload.headers["content-type"] == "image/png"
            assert upload.headers["x-prediction-id"] == result["id"]
            assert open_png(upload.body).size == (64, 64)

        with server.long_run("doomed", receiver.hook("doomed")):
            server.worker().kill()
            outcome = receiver.outcome("doomed")
        assert outcome["status"] == "failed"
        assert "crashed" in outcome["error"]
        wait_for(lambda: server.health()["status"] == "UNHEALTHY", "the health-check's notice")
        response = server.client.post("/predictions", json={"input": {}})
        assert response.status_code == 409
