"""What prompts do, in numbers, on the miniature: `python -m tests.miniature.prompt_bars`.

Every picture goes through the engine. Shares are of pixels, by the nearest of the world's colours.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from generation.engine import Engine
from tests.requests import REQUEST
from weights.miniature.world import COLOURS, lab

STEPS = 12
SEEDS = 16
LONG, NEGATIVE_RATIO = 0.8, 0.5  # bars
WEIGHTS = (0.5, 0.75, 1.0, 1.25, 1.5)
NEGATIVE_SEEDS = 32
FILLER_TOKENS = 100
PAIRS = tuple(itertools.islice(itertools.combinations(COLOURS, 2), 0, 45, 3))
_PALETTE = lab(np.array(list(COLOURS.values()), dtype=np.float64))


class Bench:
    """The engine, and pictures of prompts."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder

    def draw(self, prompt: str, seeds: range, negative: str = "", **changes: object):
        pictures: list[Image.Image] = []
        for start in range(seeds.start, seeds.stop, 4):
            request = replace(
                REQUEST,
                prompt=prompt,
                negative_prompt=negative,
                seed=start,
                num_outputs=min(4, seeds.stop - start),
                num_inference_steps=STEPS,
                **changes,
            )
            result = self._engine.generate(request, self._folder)
            pictures += [Image.open(file).copy() for file in result.files]
        return pictures


def shares(pictures: list[Image.Image]) -> dict[str, float]:
    counts = np.zeros(len(COLOURS))
    for picture in pictures:
        pixels = lab(np.asarray(picture.resize((64, 64)), dtype=np.float64).reshape(-1, 3))
        nearest = ((pixels[:, None] - _PALETTE) ** 2).sum(-1).argmin(-1)
        counts += np.bincount(nearest, minlength=len(COLOURS)) / len(nearest)
    return dict(zip(COLOURS, counts / len(pictures), strict=True))
