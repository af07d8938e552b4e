"""The real engine on the embedded weights, on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import generation.engine
from generation.engine import Engine, GenerationResult
from tests.requests import REQUEST
from weights.catalog import Edition

RED_ON_BLUE = replace(REQUEST, num_inference_steps=8)


@dataclass(frozen=True)
class Made:
    """A result, its pictures, its files' bytes, and the latents they were decoded from."""

    result: GenerationResult
    pictures: list[Image.Image]
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
    decode = generation.engine._decode
    seen: list[torch.Tensor] = []

    def watched_decode(pipeline, latents):
        seen.append(latents.clone())
        return decode(pipeline, latents)

    monkeypatch.setattr(generation.engine, "_decode", watched_decode)

    def make(engine: Engine = engine, **changes: object) -> Made:
        folder = Path(tmp_path, str(len(list(tmp_path.iterdir()))))
        folder.mkdir()
        result = engine.generate(replace(RED_ON_BLUE, **changes), folder)
        pictures = [Image.open(path).copy() for path in result.files]
        return Made(result, pictures, [path.read_bytes() for path in result.files], seen[-1])

    return make
