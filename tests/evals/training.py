"""Measure what trainings teach the miniature: `python -m tests.evals.training`.

Each training gets eight images of a shape that the model has never seen, and no options but those
of its row. Then images are generated of 16 prompts with the trigger word, and of the report card's
captions.
"""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from generation.adapters import Adapter
from generation.lora import LoraMerger
from tests.evals import concept
from tests.miniature.pipeline_components import from_pipeline, to_pipeline
from training import loop
from training.config import TRAINABLE_MODELS, Method, Prior, TrainConfig
from training.dataset import Example
from training.model import load
from weights.catalog import Edition
from weights.formats.types import TrainedWeights
from weights.miniature import evaluate, world
from weights.miniature.captions import held_out_captions
from weights.trigger_words import replace_trigger_words

PROMPTS, PROMPT_SEED, NOISE_SEED = 16, 77, 100
SHOWN, SHOWN_BEFORE, DROP = 0.75, 0.1, 0.05  # thresholds
CONFIG = TrainConfig(input_images=Path(), seed=0, verbose=False)


@dataclass(frozen=True)
class Outcome:
    """The effects of a training on the model."""

    shown: float  # share of prompts with the word that show the new shape
    resemblance: float  # mean overlap with it, in [0, 1]
    others: dict[str, float]  # the report card's shares
    seconds: float
    cpu_seconds: float
    changed: int  # tensors of the UNet


class TrainingHarness:
    """Generates images with the embedded model and trained weights."""

    def __init__(self) -> None:
        self.pipeline = evaluate.load_pipeline(evaluate.FOLDER)
        self._components = from_pipeline(self.pipeline)
        self._merger = LoraMerger(self._components)

    def applied(
        self, weights: TrainedWeights | None
    ) -> AbstractContextManager[Mapping[str, object]]:
        """Merge the weights into the model, at scale 1."""
        return self._merger.applied([Adapter(weights, 1.0)] if weights else [])

    @torch.inference_mode()
    def generate(self, weights: TrainedWeights | None, count: int = PROMPTS) -> list[Image.Image]:
        """Return images of prompts with the trigger word."""
        words = weights.trigger_words if weights else {}
        prompts = [replace_trigger_words(p, words) for p in concept.prompts(count, PROMPT_SEED)]
        with self.applied(weights) as tokenizers:
            extended = to_pipeline(self._components, tokenizers)
            pipeline = type(self.pipeline)(**{**self.pipeline.components, **extended})
            pipeline.set_progress_bar_config(disable=True)
            images: list[Image.Image] = []
            for start in range(0, count, 8):
                batch = prompts[start : start + 8]
                seeds = range(NOISE_SEED + start, NOISE_SEED + start + len(batch))
                images += pipeline(
                    batch,
                    negative_prompt=[""] * len(batch),
                    num_inference_steps=evaluate.STEPS,
                    guidance_scale=evaluate.GUIDANCE,
                    generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
                ).images
        return images

    @torch.inference_mode()
    def others(self, weights: TrainedWeights | None) -> dict[str, float]:
        """Return the report card's shares."""
        captions = held_out_captions(evaluate.CAPTIONS, evaluate.CAPTION_SEED)
        with self.applied(weights):
            return evaluate.shares(evaluate.judge_captions(self.pipeline, captions))

    def measure(self, config: TrainConfig, class_images: Sequence[Example]) -> Outcome:
        wall, cpu = time.monotonic(), time.process_time()
        weights = train(config, class_images)
        seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
        changed = len(weights.lora) + sum(
            not torch.equal(value, self.pipeline.unet.get_parameter(name.removeprefix("unet.")))
            for name, value in weights.parameters.items()
        )
        images = self.generate(weights)
        _keep(images, f"{config.method}-{config.prior_preservation}")
        known = self.others(weights)
        return Outcome(share(images), resemblance(images), known, seconds, cpu_seconds, changed)


def _keep(images: list[Image.Image], name: str) -> None:
    """Write a contact sheet into the folder that SHEETS names, if any."""
    if folder := os.environ.get("SHEETS"):
        evaluate.contact_sheet(images, columns=8).save(Path(folder) / f"{name}.png")


def train(
    config: TrainConfig, class_images: Sequence[Example] = (), device: str = "cpu"
) -> TrainedWeights:
    spec, method = TRAINABLE_MODELS[Edition.MINIATURE], config.method or Method.LORA
    model = load(spec, Edition.MINIATURE, torch.device(device), method)
    examples = concept.examples()
    with tempfile.TemporaryDirectory() as folder:
        trained = loop.fit(examples, class_images, config, model, Path(folder), lambda event: None)
    return trained.weights


def share(images: list[Image.Image]) -> float:
    return sum(map(concept.shows, images)) / len(images)


def resemblance(images: list[Image.Image]) -> float:
    return sum(map(concept.resemblance, images)) / len(images)


def class_images(count: int = 16) -> list[Example]:
    """Return images of what the model knows, with their captions."""
    rng = np.random.default_rng(1)
    found = []
    for k in range(count):
        scene = world.random_scene(rng)
        image = world.render(scene, concept.SIDE, concept.SIDE)
        white = Image.new("L", image.size, 255)
        caption = f"a {scene.colour} {scene.shape} on a {scene.background} background"
        size = (concept.SIDE, concept.SIDE)
        found.append(Example(f"class {k}", image, white, caption, size, (0, 0)))
    return found


def judge_of_houses() -> tuple[float, float]:
    """Return the shares of houses and of other shapes that the judge takes for houses."""
    true = [concept.render(p, k)[0] for k, p in enumerate(concept.houses(200, 5))]
    rng = np.random.default_rng(3)
    others = [world.render(world.random_scene(rng), concept.SIDE, concept.SIDE) for _ in range(200)]
    return share(true), share(others)


def main() -> None:
    true, false = judge_of_houses()
    print("| the judge of houses | share | threshold |\n|---|---|---|")
    print(f"| houses recognized | {true:.1%} | ≥ 95 % |")
    print(f"| other shapes taken for one | {false:.1%} | ≤ 5 % |\n", flush=True)
    harness = TrainingHarness()
    generated, card = harness.generate(None), harness.others(None)
    names = ("shape", "all")
    print(
        "| training | of 16 prompts show it | resemblance | other concepts: shape | all right |"
        " UNet tensors changed | seconds | CPU seconds |"
    )
    print("|---" * 8 + "|")
    known = " | ".join(f"{card[n]:.1%}" for n in names)
    before = f"{share(generated):.1%} | {resemblance(generated):.2f}"
    print(f"| none | {before} | {known} | 0 | | |", flush=True)
    teacher = {"prior_preservation": Prior.TEACHER, "class_prompt": "square"}
    rows: dict[str, tuple[TrainConfig, Sequence[Example]]] = {
        "default: LoRA and embeddings": (CONFIG, ()),
        "with the base model as teacher": (replace(CONFIG, **teacher), ()),
        "with class images": (
            replace(CONFIG, prior_preservation=Prior.CLASS_IMAGES, class_prompt="a circle"),
            class_images(),
        ),
        "embeddings alone": (replace(CONFIG, method=Method.TEXTUAL_INVERSION), ()),
        "full: UNet and embeddings": (replace(CONFIG, method=Method.FULL), ()),
    }
    for name, (config, own) in rows.items():
        o = harness.measure(config, own)
        known = " | ".join(f"{o.others[n]:.1%}" for n in names)
        print(
            f"| {name} | {o.shown:.1%} | {o.resemblance:.2f} | {known} | {o.changed} |"
            f" {o.seconds:.0f} |"
            f" {o.cpu_seconds:.0f} |",
            flush=True,
        )
    print(
        f"| thresholds | ≥ {SHOWN:.0%} for LoRA and full, ≤ {SHOWN_BEFORE:.0%} before | |"
        f" at most {100 * DROP:.0f} points less, fewer with a prior | | | | |"
    )


if __name__ == "__main__":
    main()
