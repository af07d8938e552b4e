"""Whatever an engine has been through, the next request's picture equals a fresh process's.

To one step of 255: where memory lies, which depends on what came before, decides in which order
some CPU kernels sum, and latents then differ by about 1e-6.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch.nn.modules.module import register_module_forward_pre_hook

from generation.base_models import MINIATURE_SDXL
from generation.engine import Engine
from generation.errors import GenerationError, InvalidRequest, OutOfDeviceMemory
from generation.request import Margins
from preprocess.errors import BadPicture
from tests.requests import REQUEST
from weights.catalog import Edition
from weights.miniature.world import place, render

EXPERT, BASE_IMAGE = "expert_ensemble_refiner", "base_image_refiner"
STEPS = 3

# What each request changes in the default one; images are given by their names.
POOL: dict[str, dict[str, object]] = {
    "text": {},
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
    "outpaint": {"image": "wide", "outpaint": Margins(40, 0, 0, 5), "num_outputs": 2},
}
INVALID: dict[str, dict[str, object]] = {
    "size": {"width": 3},
    "scheduler": {"scheduler": "Euler"},
    "strength": {"image": "image", "prompt_strength": 1.5},
    "no image": {"mask": "mask"},
    "other aspect": {"image": "wide", "mask": "mask"},
    "margin": {"image": "wide", "outpaint": Margins(500, 0, 0, 0)},
    "refine": {"refine": "twice"},
    "no picture": {"image": "text"},
}

FRESH_PROCESS = """
import json, numpy, sys
from pathlib import Path
from generation.engine import Engine
from tests.miniature.test_isolation import POOL, fingerprint, pictures
from weights.catalog import Edition
sources = Path(sys.argv[1])
for name in POOL:
    made = pictures(Engine(Edition.MINIATURE, "cpu"), sources, **POOL[name])
    numpy.savez(sources / f"{name}.npz", *made)
print(json.dumps(fingerprint(Engine(Edition.MINIATURE, "cpu"))))
"""


class Cancelled(BaseException):
    """As Cog raises it: no `except Exception` sees it."""


# Kind → the error that happens, and the one that is reported.
ERRORS: dict[str, tuple[Callable[[], BaseException], type[BaseException]]] = {
    "failure": (lambda: RuntimeError("a kernel failed"), RuntimeError),
    "cancel": (Cancelled, Cancelled),
    "memory": (lambda: torch.OutOfMemoryError("full"), OutOfDeviceMemory),
}
UNET = ("UNet2DConditionModel",)
EVERY_MODEL = (*UNET, "CLIPTextModel", "Encoder", "Decoder")


@dataclass(frozen=True)
class Fresh:
    """What a process that has done nothing else makes."""

    pictures: dict[str, list[np.ndarray]]  # of each request, (H, W, 3)
    fingerprint: dict[str, str]


def pictures(engine: Engine, sources: Path, **changes: object) -> list[np.ndarray]:
    """Of a request with these changes, (H, W, 3) each."""
    images = {k: sources / f"{changes[k]}.png" for k in ("image", "mask") if k in changes}
    request = replace(REQUEST, num_inference_steps=STEPS, **{**changes, **images})
    with tempfile.TemporaryDirectory() as folder:
        files = engine.generate(request, Path(folder)).files
        return [np.asarray(Image.open(file)).astype(int) for file in files]


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    """The same pictures, but for rounding."""
    return len(first) == len(second) and all(
        a.shape == b.shape and np.abs(a - b).max() <= 1 for a, b in zip(first, second, strict=True)
    )


def fingerprint(engine: Engine) -> dict[str, str]:
    """Part of a model → hash of all that it holds: parameters, buffers, settings, modes."""
    models = {
        "base": engine._store.load(MINIATURE_SDXL),
        "refiner": engine._store.load_refiner(MINIATURE_SDXL),
    }
    return {
        f"{model} {part}": _hash(content)
        for model, loaded in models.items()
        for part, content in [*loaded.parts.items(), ("scheduler", loaded.scheduler_config)]
    }


def _hash(part: object) -> str:
    if not isinstance(part, torch.nn.Module):
        plain = part if isinstance(part, dict | bool | None) else type(part).__name__
        return hashlib.sha256(repr(plain).encode()).hexdigest()
    config = part.config if isinstance(part.config, dict) else part.config.to_dict()
    # What begins with _ is about the files, in an order that differs between processes.
    public = sorted((key, str(value)) for key, value in config.items() if key[0] != "_")
    modes = [module.training for module in part.modules()]
    digest = hashlib.sha256(repr((public, modes, part.dtype)).encode())
    for name, tensor in part.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


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
    pictures = {
        "image": image,
        "wide": wide,
        "mask": mask,
        "wide_mask": wide_mask,
        "transparent": transparent,
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def fresh(sources) -> Fresh:
    command = [sys.executable, "-c", FRESH_PROCESS, str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    made = {name: list(np.load(sources / f"{name}.npz").values()) for name in POOL}
    return Fresh(made, json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def failing_at(count: int, models: tuple[str, ...], error: BaseException) -> Iterator[None]:
    """Raise when models of these classes run for the `count`-th time."""
    calls = 0

    def hook(module: torch.nn.Module, _: object) -> None:
        nonlocal calls
        calls += type(module).__name__ in models
        if calls == count:
            raise error

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_fresh_process_makes_a_different_picture_for_each_request(fresh):
    made = list(fresh.pictures.values())
    assert len(made) == len(POOL)
    assert not any(equal(a, b) for a, b in itertools.combinations(made, 2))


@pytest.mark.parametrize("name", POOL)
def test_after_every_error_the_same_request_and_another_equal_a_fresh_process(
    engine, sources, fresh, name
):
    for kind, (make, reported) in ERRORS.items():
        with failing_at(2, UNET, make()), pytest.raises(reported) as raised:
            pictures(engine, sources, **POOL[name])
        if kind == "memory":
            assert isinstance(raised.value, GenerationError)
            assert f"{POOL[name].get('num_outputs', 1)} picture(s) of" in str(raised.value)
            assert "num_outputs" in str(raised.value)
    assert equal(pictures(engine, sources, **POOL[name]), fresh.pictures[name])
    assert equal(pictures(engine, sources, **POOL["text"]), fresh.pictures["text"])


@pytest.mark.parametrize("name", INVALID)
def test_after_an_invalid_request_the_next_equals_a_fresh_process(engine, sources, fresh, name):
    with pytest.raises((InvalidRequest, BadPicture)):
        pictures(engine, sources, **INVALID[name])
    assert equal(pictures(engine, sources, **POOL["text"]), fresh.pictures["text"])


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
    """One engine for all of the sequences."""
    return Engine(Edition.MINIATURE, "cpu")


@given(st.lists(ACTIONS, min_size=3, max_size=9))
@settings(
    max_examples=14,
    phases=[Phase.generate],  # what came before matters, so a failure cannot be made smaller
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
            assert equal(pictures(engine, sources, **POOL[name]), fresh.pictures[name])
        case "invalid", name:
            with pytest.raises((InvalidRequest, BadPicture)):
                pictures(engine, sources, **INVALID[name])
        case kind, name, count:
            make, reported = ERRORS[kind]
            try:
                with failing_at(count, EVERY_MODEL, make()):
                    made = pictures(engine, sources, **POOL[name])
            except reported:
                return
            assert equal(made, fresh.pictures[name])  # it took fewer runs than that
