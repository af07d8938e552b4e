"""Whatever a request did, the next one's bytes equal a fresh process's."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from generation.base_models import MINIATURE_SDXL
from generation.errors import GenerationError, InvalidRequest, OutOfDeviceMemory

FRESH_PROCESS = """
import hashlib, json, sys, tempfile
from pathlib import Path
from generation.engine import Engine
from tests.miniature.conftest import RED_ON_BLUE
from weights.catalog import Edition
result = Engine(Edition.MINIATURE, "cpu").generate(RED_ON_BLUE, Path(sys.argv[1]))
print(json.dumps([hashlib.sha256(path.read_bytes()).hexdigest() for path in result.files]))
"""


class Cancelled(BaseException):
    """As Cog raises it: no `except Exception` sees it."""


@pytest.fixture(scope="module")
def fresh_hashes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _raise_at_forward(engine, count, error):
    """Make the UNet raise at its `count`-th forward; returns the hook's handle."""
    unet = engine._store.load(MINIATURE_SDXL).parts["unet"]
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == count:
            raise error

    return unet.register_forward_pre_hook(hook)


def _interrupted(make, engine, error, expected):
    handle = _raise_at_forward(engine, 4, error)
    try:
        with pytest.raises(expected) as raised:
            make(scheduler="KarrasDPM", seed=9)
    finally:
        handle.remove()
    return raised.value


def _invalid(make, engine):
    with pytest.raises(InvalidRequest):
        make(width=3)


def _failed(make, engine):
    _interrupted(make, engine, RuntimeError("a kernel failed"), RuntimeError)


def _cancelled(make, engine):
    _interrupted(make, engine, Cancelled(), Cancelled)


def _out_of_memory(make, engine):
    error = _interrupted(make, engine, torch.OutOfMemoryError("full"), OutOfDeviceMemory)
    assert isinstance(error, GenerationError)
    assert "1 picture(s) of 128x128" in str(error)
    assert "num_outputs" in str(error)


def _other_scheduler(make, engine):
    make(scheduler="KarrasDPM")


def _other_size(make, engine):
    make(width=160, height=96, num_outputs=2)


def _other_everything(make, engine):
    make(prompt="a star", negative_prompt="red", guidance_scale=1, num_inference_steps=3, seed=77)


@pytest.mark.parametrize(
    "before",
    [
        _invalid,
        _failed,
        _cancelled,
        _out_of_memory,
        _other_scheduler,
        _other_size,
        _other_everything,
    ],
)
def test_the_next_request_equals_a_fresh_process(make, engine, fresh_hashes, before):
    before(make, engine)
    assert [hashlib.sha256(data).hexdigest() for data in make().bytes] == fresh_hashes
