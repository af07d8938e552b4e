"""Trainings through Cog's own server, and what predictions make of their archives."""

import base64
import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evals import concept
from tests.helpers.archives import zip_bytes
from tests.server.conftest import CogServer, are_alike, picture, serving
from weights.miniature.world import Expectation, judge

PROMPT = "a large red TOK on a blue background"
PICTURES = 4
TRAININGS = 6  # one after the other


@functools.cache
def archive() -> str:
    """Eight pictures of a shape that the model does not know, with captions, as a data: URL."""
    examples = concept.examples()
    rows = ["caption,image_file"]
    members = {}
    for k, example in enumerate(examples):
        content = io.BytesIO()
        example.image.save(content, "PNG")
        members[f"{k}.png"] = content.getvalue()
        rows.append(f'"{example.caption}",{k}.png')
    members["caption.csv"] = "\n".join(rows).encode()
    return data_url(zip_bytes(members))


def data_url(content: bytes) -> str:
    return "data:application/zip;base64," + base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Iterator[CogServer]:
    with serving(tmp_path_factory.mktemp("trainer"), "--x-mode", "train") as server:
        assert server.health()["status"] == "READY"
        yield server


def train(server: CogServer, **inputs: object) -> dict:
    reply = server.client.post("/trainings", json={"input": inputs})
    return reply.json()


@pytest.fixture(scope="module")
def trained(trainer) -> bytes:
    reply = train(trainer, input_images=archive(), seed=0)
    assert reply["status"] == "succeeded", reply
    return base64.b64decode(reply["output"]["weights"].partition(",")[2])


def test_the_archive_is_cog_sdxls_and_tells_of_itself(trained):
    with tarfile.open(fileobj=io.BytesIO(trained)) as members:
        names = members.getnames()
        report = members.extractfile("report.html").read().decode()
        words = json.load(members.extractfile("special_params.json"))
    assert {"lora.safetensors", "embeddings.pti", "special_params.json", "report.html"} == set(
        names
    )
    assert words == {"TOK": "<s0><s1>"}
    assert "max_train_steps" in report
    assert report.count("<figure>") >= 7


def test_predictions_show_what_was_trained(trained, server, tmp_path):
    """By COG_WEIGHTS and by replicate_weights, and not without; what was known still is."""
    weights = tmp_path / "trained_model.tar"
    weights.write_bytes(trained)
    inputs = {"prompt": PROMPT, "seed": 1, "num_outputs": PICTURES}
    plain = server.predict(**inputs)
    with serving(tmp_path, COG_WEIGHTS=str(weights)) as fine_tuned:
        own = fine_tuned.predict(**inputs, lora_scale=1)
    by_request = server.predict(**inputs, lora_scale=1, replicate_weights=data_url(trained))
    assert are_alike(own, by_request)
    assert houses(plain) == 0
    assert houses(own) >= PICTURES - 1
    others = {**inputs, "prompt": "a large red circle on a blue background"}
    known = server.predict(**others, lora_scale=1, replicate_weights=data_url(trained))
    circle = Expectation("circle", "red", "blue")
    right = [judge(picture(output), circle).all_right for output in known["output"]]
    assert sum(right) >= PICTURES - 1


def houses(reply: dict) -> int:
    """How many of a reply's pictures show the new shape."""
    return sum(concept.shows(picture(output)) for output in reply["output"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_images": data_url(b"no archive")}, "input_images is "),
        ({"input_images": "/etc/passwd"}, "must be a URL or a data URI"),
        ({"token_string": "two words"}, "token_string is 'two words'"),
        ({"token_string": "XYZ"}, "XYZ"),
        ({"is_lora": False, "lora_rank": 4}, "lora_rank is set"),
        ({"input_images_filetype": "tar"}, "input_images is a zip archive"),
        ({"class_prompt": "a shape"}, "prior_preservation"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_and_nothing_is_left(trainer, inputs, message):
    reply = train(trainer, **{"input_images": archive(), "max_train_steps": 2, **inputs})
    assert reply["status"] == "failed"
    assert message in reply["error"]
    assert left(trainer.temporary) == []


def left(folder: Path) -> list[Path]:
    """What trainings have left."""
    return list(folder.glob("cog-stable-diffusion-training-*/*"))


def test_one_server_runs_training_after_training(trainer):
    """Cog runs each on another thread, which some libraries bear only if imported before."""
    for seed in range(TRAININGS):
        inputs = {"seed": seed, "max_train_steps": 1, "preview_prompts": [PROMPT]}
        reply = train(trainer, input_images=archive(), **inputs)
        assert reply["status"] == "succeeded", reply
