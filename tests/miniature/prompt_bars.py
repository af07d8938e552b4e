"""What prompts do, in numbers, on the miniature: `python -m tests.miniature.prompt_bars`.

Every picture goes through the engine. Shares are of pixels, each of which counts for the nearest of
the world's colours.
"""

import itertools
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from generation.engine import Engine
from tests.requests import REQUEST
from weights.catalog import Edition
from weights.miniature.world import COLOURS, Expectation, colour_shares, judge

STEPS = 12
LONG, HALVED = 0.8, 0.5  # bars
LONG_PROMPTS = 16
FILLER = "and then some more about nothing in particular, " * 12
FILLER_TOKENS = 100  # at least
WEIGHTS = (0.5, 0.75, 1.0, 1.25, 1.5)
SEEDS, NEGATIVE_SEEDS = 8, 32
OPEN_PROMPT = "a large circle"  # leaves its own colour and the background open
COMMON = 0.1  # a colour's share without a negative prompt, to be worth one


@dataclass(frozen=True)
class Bench:
    """The engine, and a folder for its files."""

    engine: Engine
    folder: Path

    def draw(self, prompt: str, seed: int, count: int, negative: str = "") -> list[Image.Image]:
        """Pictures of the seeds from `seed` on."""
        pictures: list[Image.Image] = []
        for first in range(seed, seed + count, 4):
            request = replace(
                REQUEST,
                prompt=prompt,
                negative_prompt=negative,
                seed=first,
                num_outputs=min(4, seed + count - first),
                num_inference_steps=STEPS,
            )
            result = self.engine.generate(request, self.folder)
            pictures += [Image.open(file).copy() for file in result.files]
        return pictures

    def shares(self, *asked: object, **more: str) -> dict[str, float]:
        """Each colour's share of the pixels of all pictures that are asked for."""
        found = [colour_shares(picture) for picture in self.draw(*asked, **more)]  # type: ignore[arg-type]
        return {name: float(np.mean([shares[name] for shares in found])) for name in COLOURS}


def pairs(count: int) -> list[tuple[str, str]]:
    """Different pairs of colours, evenly over all that there are."""
    every = list(itertools.permutations(COLOURS, 2))
    return every[:: len(every) // count][:count]


def filler_tokens(bench: Bench) -> int:
    """The least number of tokens that either tokenizer makes of the filler."""
    parts = bench.engine._store.load(bench.engine._models["sdxl"]).parts
    return min(
        len(parts[name](FILLER, add_special_tokens=False).input_ids)  # type: ignore[operator]
        for name in ("tokenizer", "tokenizer_2")
    )


def long_prompts(bench: Bench, prefix: str = FILLER, count: int = LONG_PROMPTS) -> float:
    """The share of captions behind the filler whose shape has the right colour."""
    right = 0
    for number, (colour, background) in enumerate(pairs(count)):
        caption = f"a large {colour} circle on {background} background"
        (picture,) = bench.draw(prefix + caption, number, 1)
        right += judge(picture, Expectation(colour=colour)).all_right
    return right / count


def weighted(bench: Bench, n_pairs: int, seeds: int = SEEDS) -> list[float]:
    """The mean share of the first of two colours, for each of its weights."""
    found = []
    for weight in WEIGHTS:
        each = [
            bench.shares(f"a ({first}:{weight}) and {second} picture", 0, seeds)[first]
            for first, second in pairs(n_pairs)
        ]
        found.append(float(np.mean(each)))
    return found


def negative(
    bench: Bench, n_colours: int, seeds: int = NEGATIVE_SEEDS
) -> dict[str, tuple[float, float]]:
    """The most common colours' shares without a negative prompt, and with their names in it."""
    without = bench.shares(OPEN_PROMPT, 0, seeds)
    common = sorted((n for n in COLOURS if without[n] >= COMMON), key=without.__getitem__)
    return {
        name: (without[name], bench.shares(OPEN_PROMPT, 0, seeds, negative=name)[name])
        for name in common[-n_colours:]
    }


def main() -> None:
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(engine, Path(folder))
        behind, alone = long_prompts(bench), long_prompts(bench, prefix="")
        rows = [
            ("right colours, captions alone", f"{alone:.0%}", ""),
            (
                f"right colours, behind {filler_tokens(bench)} tokens",
                f"{behind:.0%}",
                f"≥ {LONG:.0%}",
            ),
        ]
        shares = weighted(bench, 8)
        rows += [
            (f"first colour's share at weight {weight}", f"{share:.1%}", "rising")
            for weight, share in zip(WEIGHTS, shares, strict=True)
        ]
        for name, (without, named) in negative(bench, 4).items():
            rows.append(
                (
                    f"{name}'s share with it as negative prompt",
                    f"{without:.1%} → {named:.1%}",
                    "≤ half",
                )
            )
        print("\n| prompts | measured | bar |\n|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
