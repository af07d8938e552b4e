"""After any requests and errors, the next request's image equals that of a fresh process.

To one step of 255: where memory lies depends on what came before (tests/helpers/comparison.py).
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from generation.engine import Engine
from generation.errors import GenerationError, InvalidRequest
from generation.sizes import Margins
from preprocess.errors import BadPicture
from tests.helpers.comparison import nearly_equal
from tests.miniature.isolation import (
    ERRORS,
    EVERY_MODEL,
    UNET,
    failing_at,
    fingerprint,
    images_of,
)
from weights.catalog import Edition
from weights.miniature.world import place, render

EXPERT, BASE_IMAGE = "expert_ensemble_refiner", "base_image_refiner"

# What each request changes in the default one; its images are given by name.
POOL: dict[str, dict[str, object]] = {
    "text": {"width": 64, "height": 64},
    "two wide": {"width": 96, "height": 64, "num_outputs": 2, "scheduler": "KarrasDPM"},
    "unguided": {"prompt": "a star", "guidance_scale": 1.0, "scheduler": "K_EULER_ANCESTRAL"},
    "expert": {"refine": EXPERT, "high_noise_frac": 0.5, "scheduler": "HeunDiscrete"},
    "refined": {"refine": BASE_IMAGE, "scheduler": "DPMSolverMultistep", "width": 64},
    "image": {"image": "image", "prompt_strength": 0.7, "scheduler": "PNDM"},
    "image, expert": {"image": "wide", "refine": EXPERT, "width": 96, "height": 64},
    "inpaint": {"image": "image", "mask": "mask", "prompt_strength": 1.0, "scheduler": "DDIM"},
    "region": {
        "image": "wide",
        "mask": "wide_mask",
        "masked_content": "fill",
        "inpaint_area": "masked_region",
        "inpaint_padding": 4,
        "refine": EXPERT,
        "high_noise_frac": 0.3,
    },
    "alpha": {
        "image": "transparent",
        "mask_from_alpha": True,
        "mask_invert": True,
        "masked_content": "noise",
        "scheduler": "K_EULER_ANCESTRAL",
        "refine": BASE_IMAGE,
    },
    "hires": {"hires_fix": 1.5, "width": 64, "height": 64, "refine": BASE_IMAGE, "num_outputs": 2},
    "outpaint": {"image": "wide", "outpaint": Margins(40, 0, 0, 5), "num_outputs": 2},
}
INVALID: dict[str, dict[str, object]] = {
    "size": {"width": 3},
    "scheduler": {"scheduler": "Euler b"},
    "strength": {"image": "image", "prompt_strength": 1.5},
    "no image": {"mask": "mask"},
    "other aspect": {"image": "wide", "mask": "mask"},
    "margin": {"image": "wide", "outpaint": Margins(500, 0, 0, 0)},
    "refine": {"refine": "twice"},
    "too large": {"hires_fix": 3},
    "not an image": {"image": "text"},
}

# Loading takes most of a fresh process's time: it is done once, and forked for each request.
FRESH_PROCESS = """
import json, numpy, os, sys
from pathlib import Path
from generation.engine import Engine
from tests.miniature.isolation import fingerprint, images_of
from tests.miniature.test_isolation import POOL
from weights.catalog import Edition
sources = Path(sys.argv[1])
engine = Engine(Edition.MINIATURE, "cpu")
engine.load()
print(json.dumps(fingerprint(engine)))
for name in POOL:
    if (child := os.fork()) == 0:
        numpy.savez(sources / f"{name}.npz", *images_of(engine, sources, **POOL[name]))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@dataclass(frozen=True)
class Fresh:
    """The results of processes that have done nothing else."""

    images: dict[str, list[np.ndarray]]  # (H, W, 3), by request
    fingerprint: dict[str, str]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    scene = place("square", "yellow", "green", "medium", "center", np.random.default_rng(3))
    image, wide = render(scene, 128, 128), render(scene, 104, 72)
    mask, wide_mask = Image.new("L", image.size), Image.new("L", wide.size)
    ImageDraw.Draw(mask).rectangle((30, 40, 90, 100), fill=255)
    ImageDraw.Draw(wide_mask).ellipse((30, 20, 60, 50), fill=255)
    transparent = image.convert("RGBA")
    transparent.putalpha(mask)
    images = {
        "image": image,
        "wide": wide,
        "mask": mask,
        "wide_mask": wide_mask,
        "transparent": transparent,
    }
    for name, pixels in images.items():
        pixels.save(folder / f"{name}.png")
    (folder / "text.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def fresh(sources) -> Fresh:
    command = [sys.executable, "-c", FRESH_PROCESS, str(sources)]
    # One thread: a process that has started threads cannot be copied.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    made = {name: list(np.load(sources / f"{name}.npz").values()) for name in POOL}
    return Fresh(made, json.loads(done.stdout.splitlines()[0]))


def test_a_fresh_process_makes_a_different_image_for_each_request(fresh):
    made = list(fresh.images.values())
    assert len(made) == len(POOL)
    assert not any(nearly_equal(a, b) for a, b in itertools.combinations(made, 2))


@pytest.mark.parametrize("name", POOL)
def test_after_every_error_the_same_request_and_another_equal_a_fresh_process(
    engine, sources, fresh, name
):
    for kind, (make, reported) in ERRORS.items():
        with failing_at(2, UNET, make), pytest.raises(reported) as raised:
            images_of(engine, sources, **POOL[name])
        if kind == "memory":
            assert isinstance(raised.value, GenerationError)
            assert f"{POOL[name].get('num_outputs', 1)} image(s) of" in str(raised.value)
            assert "num_outputs" in str(raised.value)
    assert nearly_equal(images_of(engine, sources, **POOL[name]), fresh.images[name])
    assert nearly_equal(images_of(engine, sources, **POOL["text"]), fresh.images["text"])


@pytest.mark.parametrize("name", INVALID)
def test_after_an_invalid_request_the_next_equals_a_fresh_process(engine, sources, fresh, name):
    with pytest.raises((InvalidRequest, BadPicture)):
        images_of(engine, sources, **INVALID[name])
    assert nearly_equal(images_of(engine, sources, **POOL["text"]), fresh.images["text"])


def test_the_models_hold_what_a_fresh_process_has_loaded(engine, fresh):
    assert fingerprint(engine) == fresh.fingerprint


REQUESTS = st.sampled_from(list(POOL))
ACTIONS = st.one_of(
    st.tuples(st.just("make"), REQUESTS),
    st.tuples(st.just("make"), REQUESTS),
    st.tuples(st.sampled_from(list(ERRORS)), REQUESTS, st.integers(1, 9)),
    st.tuples(st.just("invalid"), st.sampled_from(list(INVALID))),
)


@pytest.fixture(scope="module")
def used_engine() -> Engine:
    """Return one engine for all sequences."""
    return Engine(Edition.MINIATURE, "cpu")


@given(st.lists(ACTIONS, min_size=3, max_size=9))
@settings(
    max_examples=14,
    phases=[Phase.generate],  # a failure depends on what came before, so it cannot be shrunk
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_sequence_of_requests_leaves_a_trace(used_engine, sources, fresh, actions):
    for action in actions:
        _act(used_engine, sources, fresh, action)
    assert fingerprint(used_engine) == fresh.fingerprint


def _act(engine: Engine, sources: Path, fresh: Fresh, action: tuple) -> None:
    match action:
        case "make", name:
            assert nearly_equal(images_of(engine, sources, **POOL[name]), fresh.images[name])
        case "invalid", name:
            with pytest.raises((InvalidRequest, BadPicture)):
                images_of(engine, sources, **INVALID[name])
        case kind, name, count:
            make, reported = ERRORS[kind]
            try:
                with failing_at(count, EVERY_MODEL, make):
                    made = images_of(engine, sources, **POOL[name])
            except reported:
                return
            assert nearly_equal(made, fresh.images[name])  # it took fewer runs than that
