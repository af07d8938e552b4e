"""The real engine on the embedded weights, on the CPU."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generation.engine
from generation.engine import Engine, GenerationResult
from tests.helpers.request import REQUEST
from tests.miniature.reference_pipelines import (
    PROMPT,
    SEED,
    SETTINGS,
    SIZE,
    File,
    copy_of,
    draw,
    load_reference,
)
from weights.catalog import Edition
from weights.miniature import world

RED_ON_BLUE = replace(REQUEST, num_inference_steps=8)


@dataclass(frozen=True)
class Made:
    """A result, its images, its files' bytes, and the latents they were decoded from."""

    result: GenerationResult
    images: list[Image.Image]
    bytes: list[bytes]
    latents: torch.Tensor


@pytest.fixture(scope="session")
def engine() -> Engine:
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load()
    return engine


@pytest.fixture
def make(engine, tmp_path, monkeypatch) -> Callable[..., Made]:
    """`make(seed=3)`: RED_ON_BLUE with the given fields changed, through the engine."""
    decode = generation.engine.decode_latents
    seen: list[torch.Tensor] = []

    def watched_decode(model, latents):
        seen.append(latents.clone())
        return decode(model, latents)

    monkeypatch.setattr(generation.engine, "decode_latents", watched_decode)

    def make(engine: Engine = engine, **changes: object) -> Made:
        folder = Path(tmp_path, str(len(list(tmp_path.iterdir()))))
        folder.mkdir()
        result = engine.generate(replace(RED_ON_BLUE, **changes), folder)
        images = [Image.open(path).copy() for path in result.files]
        return Made(result, images, [path.read_bytes() for path in result.files], seen[-1])

    return make


# Trained weights beside stock diffusers (tests/miniature/reference_pipelines.py)


@pytest.fixture(scope="session")
def pristine():
    """A stock pipeline; nothing may be loaded into it."""
    return load_reference()


@pytest.fixture
def stock(pristine):
    """A stock pipeline to load things into."""
    return copy_of(pristine)


@pytest.fixture(scope="session")
def plain(pristine) -> Callable[..., torch.Tensor]:
    """`plain("a cat")`: stock's latents of the prompt without any weights."""
    return functools.cache(functools.partial(draw, pristine))


@pytest.fixture
def adapted(make, monkeypatch, tmp_path_factory) -> Callable[..., torch.Tensor]:
    """`adapted(file, 0.5, ...)`: our latents with the file as replicate_weights at that scale."""
    monkeypatch.setenv("WEIGHTS_CACHE", str(tmp_path_factory.getbasetemp() / "brought"))

    def adapted(file: File | None, scale: float = 1.0, **changes: object) -> torch.Tensor:
        request = {"prompt": PROMPT, "seed": SEED, **SETTINGS, **SIZE, **changes}
        url = file.url if file else ""
        return make(replicate_weights=url, lora_scale=scale, **request).latents

    return adapted


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """An image of the miniature's world and a mask of its middle, by name."""
    scene = world.random_scene(np.random.default_rng(3))
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (32, 32, 96, 96))
    found = {}
    for name, image in (("image", world.render(scene, 128, 128)), ("mask", mask)):
        found[name] = tmp_path / f"{name}.png"
        image.save(found[name])
    return found
