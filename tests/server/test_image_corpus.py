"""Every odd and broken picture file, sent to the server as a user would."""

import pytest

from tests.helpers.image_corpus import corpus
from tests.server.conftest import picture, wait_for

CORPUS = {sample.name: sample for sample in corpus()}
GOOD = [name for name, sample in CORPUS.items() if sample.error is None]
# One of each kind is sent by default; tests/unit/test_images.py reads them all.
SENT = {
    *("jpeg", "jpeg-cmyk-adobe", "jpeg-named-png", "mpo", "webp-moving", "avif-alpha"),
    *("heic-turned", "jpeg2000", "png-clear-hides-colour", "png-palette-alpha", "gif-moving"),
    *("png-16-bit-grey", "tiff-float", "tiff-lab", "tiff-pages", "qoi", "png-too-few-rows"),
    *("png-without-extension", "png-one-pixel", "png-long", "png-six-megapixels"),
    *("jpeg-other-primaries", "png-damaged-profile"),
}
BAD = [name for name, sample in CORPUS.items() if sample.error is not None]
PLAIN = {"prompt": "a red circle on a blue background", "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module", autouse=True)
def unharmed(server):
    """After all of it the server is healthy and makes the same picture as before, to the byte."""
    before = server.predict(**PLAIN)
    worker = server.worker().pid
    yield
    # Right after a reply the server is still busy for some milliseconds.
    wait_for(lambda: server.health()["status"] == "READY", "the server's rest")
    assert server.worker().pid == worker
    after = server.predict(**PLAIN)
    assert before["status"] == after["status"] == "succeeded"
    assert after["output"] == before["output"]


def send(server, image: str) -> dict:
    return server.predict(**PLAIN, prompt_strength=0.5, image=image)


def test_the_files_that_are_sent_exist():
    assert set(GOOD) >= SENT


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SENT else pytest.mark.slow) for name in GOOD],
)
def test_a_good_file_becomes_a_picture(server, name):
    result = send(server, CORPUS[name].data_uri)
    assert result["status"] == "succeeded", result["error"]
    (uri,) = result["output"]
    assert picture(uri).getextrema() != ((0, 0),) * 3


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_reason(server, name):
    result = send(server, CORPUS[name].data_uri)
    assert result["status"] == "failed"
    assert "BadImage: image " in result["error"]
    assert CORPUS[name].error in result["error"]
    assert str(server.temporary) not in result["error"]


@pytest.mark.parametrize("address", ["/etc/passwd", "file:///etc/passwd", "../predict.py"])
@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_file_of_the_server_is_not_read(server, name, address):
    inputs = {"image": CORPUS["png"].data_uri, name: address}
    result = server.predict(**PLAIN, **inputs)
    assert result["status"] == "failed"
    assert "must be a URL or a data URI" in result["error"]
    assert "root:" not in result["error"] + result["logs"]
