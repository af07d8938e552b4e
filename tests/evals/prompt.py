"""Measure the effect of prompts on the miniature edition: `python -m tests.evals.prompt`.

Every image goes through the engine. Shares are of pixels, each of which counts for the nearest of
the world's colours.
"""

import itertools

import numpy as np
from PIL import Image

from generation.base_models import MINIATURE_SDXL
from tests.evals.harness import Harness, open_harness
from tests.helpers.engines import base_model
from weights.miniature.world import COLOURS, Expectation, colour_shares, judge

STEPS = 12
MAX_OUTPUTS = MINIATURE_SDXL.max_num_outputs
LONG, HALVED = 0.8, 0.5  # thresholds
LONG_PROMPTS = 16
FILLER = "and then some more about nothing in particular, " * 12
FILLER_TOKENS = 100  # at least
WEIGHTS = (0.5, 0.75, 1.0, 1.25, 1.5)
SEEDS, NEGATIVE_SEEDS = 8, 32
OPEN_PROMPT = "a large circle"  # leaves its colour and the background open
COMMON = 0.1  # a colour's share without a negative prompt, to be worth one


def draw(
    harness: Harness, prompt: str, seed: int, count: int, negative: str = ""
) -> list[Image.Image]:
    """Return images of the seeds from `seed` on."""
    images: list[Image.Image] = []
    for first in range(seed, seed + count, MAX_OUTPUTS):
        images += harness.make(
            prompt=prompt,
            negative_prompt=negative,
            seed=first,
            num_outputs=min(MAX_OUTPUTS, seed + count - first),
            num_inference_steps=STEPS,
        )
    return images


def mean_shares(harness: Harness, prompt: str, count: int, negative: str = "") -> dict[str, float]:
    """Return each colour's share of the pixels of all images of the seeds from 0 on."""
    found = [colour_shares(image) for image in draw(harness, prompt, 0, count, negative)]
    return {name: float(np.mean([shares[name] for shares in found])) for name in COLOURS}


def pairs(count: int) -> list[tuple[str, str]]:
    """Return different pairs of colours, evenly over all that there are."""
    every = list(itertools.permutations(COLOURS, 2))
    return every[:: len(every) // count][:count]


def filler_tokens(harness: Harness) -> int:
    """Return the least number of tokens that either tokenizer makes of the filler."""
    tokenizers = base_model(harness.engine).components.tokenizers.values()
    return min(
        len(tokenizer(FILLER, add_special_tokens=False).input_ids) for tokenizer in tokenizers
    )


def long_prompts(harness: Harness, prefix: str = FILLER, count: int = LONG_PROMPTS) -> float:
    """Return the share of captions behind the filler whose shape has the right colour."""
    right = 0
    for number, (colour, background) in enumerate(pairs(count)):
        caption = f"a large {colour} circle on {background} background"
        (image,) = draw(harness, prefix + caption, number, 1)
        right += judge(image, Expectation(colour=colour)).all_right
    return right / count


def weighted(harness: Harness, n_pairs: int, seeds: int = SEEDS) -> list[float]:
    """Return the mean share of the first of two colours, for each of its weights."""
    found = []
    for weight in WEIGHTS:
        each = [
            mean_shares(harness, f"a ({first}:{weight}) and {second} picture", seeds)[first]
            for first, second in pairs(n_pairs)
        ]
        found.append(float(np.mean(each)))
    return found


def negative(
    harness: Harness, n_colours: int, seeds: int = NEGATIVE_SEEDS
) -> dict[str, tuple[float, float]]:
    """Return common colours' shares without a negative prompt, and with their names in it."""
    without = mean_shares(harness, OPEN_PROMPT, seeds)
    common = sorted((n for n in COLOURS if without[n] >= COMMON), key=without.__getitem__)
    return {
        name: (without[name], mean_shares(harness, OPEN_PROMPT, seeds, negative=name)[name])
        for name in common[-n_colours:]
    }


def main() -> None:
    with open_harness() as harness:
        behind, alone = long_prompts(harness), long_prompts(harness, prefix="")
        rows = [
            ("right colours, captions alone", f"{alone:.0%}", ""),
            (
                f"right colours, behind {filler_tokens(harness)} tokens",
                f"{behind:.0%}",
                f"≥ {LONG:.0%}",
            ),
        ]
        shares = weighted(harness, 8)
        rows += [
            (f"first colour's share at weight {weight}", f"{share:.1%}", "rising")
            for weight, share in zip(WEIGHTS, shares, strict=True)
        ]
        for name, (without, named) in negative(harness, 4).items():
            rows.append(
                (
                    f"{name}'s share with it as negative prompt",
                    f"{without:.1%} → {named:.1%}",
                    "≤ half",
                )
            )
        print("\n| prompts | measured | threshold |\n|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
