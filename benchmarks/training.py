"""Measure a training beside cog-sdxl's loop: steps per second and memory, on the same networks.

Each side is a process of its own, and they take turns step by step, so that a machine whose speed
drifts treats both alike. JSON lines as rounds end, then a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import environment, machine
from benchmarks.baseline_training import CogSdxlTraining
from benchmarks.report import Spread, markdown_table
from training import loop
from training.config import TRAINABLE_MODELS, Method, TrainConfig
from training.dataset import Example, encode
from training.model import TrainableModel, load
from training.progress import Event, StepDone
from weights.miniature import world

PROCESSES = multiprocessing.get_context("spawn")  # each imports for itself
WARM_UP = 4  # steps that are not counted, of each half: some compile
MIN_STEPS = 4 * WARM_UP
PHOTOS = 8
RANK, BATCH = 32, 4  # cog-sdxl's defaults


@dataclass(frozen=True)
class Sample:
    """One process's figures."""

    side: str
    before: float  # seconds of the median step while the embeddings are trained
    after: float  # and once they are frozen
    peak_bytes: int  # on a GPU of tensors, elsewhere of the process with all that it imports
    first_loss: float
    last_loss: float

    @property
    def steps_per_second(self) -> float:
        """Of a training that freezes the embeddings at half of its steps."""
        return 2 / (self.before + self.after)


@dataclass
class Turns:
    """The child's end: reports each step, then waits until it is its turn again."""

    parent: Connection
    began: float = field(default_factory=time.perf_counter)

    def step(self, loss: float) -> None:
        """Report a step; what a GPU still works on counts."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.parent.send((time.perf_counter() - self.began, loss))
        self.parent.recv()
        self.began = time.perf_counter()

    def end(self) -> None:
        """Report the peak memory."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.parent.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak)


def train_ours(turns: Turns, size: int, steps: int, compiled: bool = False) -> None:
    """Train by our loop."""
    model, examples = load_subject(size)

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone):
            turns.step(event.loss)

    config = TrainConfig(
        input_images=Path(),
        seed=0,
        resolution=size,
        max_train_steps=steps,
        train_batch_size=BATCH,
        lora_rank=RANK,
        pivot_fraction=0.5,
        validation=False,
        compile_unet=compiled,
        verbose=False,
    )
    with TemporaryDirectory() as folder:
        loop.fit(examples, (), config, model, Path(folder), on_event)


def train_cog_sdxl(turns: Turns, size: int, steps: int) -> None:
    """Train by cog-sdxl's loop."""
    torch.manual_seed(0)
    model, examples = load_subject(size)
    latents = encode(model.components.vae, examples, False)
    training = CogSdxlTraining(model, latents, BATCH, RANK, steps)
    training.run(lambda step, loss: turns.step(loss))


def load_subject(size: int) -> tuple[TrainableModel, list[Example]]:
    """Load the model, and draw eight square images with captions."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(PHOTOS):
        scene = world.random_scene(rng)
        image = world.render(scene, size, size)
        caption = f"a {scene.size} {scene.colour} TOK on a {scene.background} background"
        mask = Image.new("L", image.size, 255)
        examples.append(Example(str(number), image, mask, caption, (size, size), (0, 0)))
    edition = environment.edition()
    return load(TRAINABLE_MODELS[edition], edition, environment.device(), Method.LORA), examples


SIDES: dict[str, Callable[[Turns, int, int], None]] = {
    "cog-sdxl": train_cog_sdxl,
    "ours": train_ours,
    "compiled": partial(train_ours, compiled=True),
}
NAMES = {"cog-sdxl": "cog-sdxl's loop", "ours": "ours", "compiled": "ours, compile_unet"}


def train(side: str, parent: Connection, size: int, steps: int) -> None:
    """Be the process of one side."""
    turns = Turns(parent)
    SIDES[side](turns, size, steps)
    turns.end()


def measure(names: Sequence[str], size: int, steps: int) -> dict[str, Sample]:
    """Run one round."""
    children = {name: _start(name, size, steps) for name in names}
    taken = {name: [_receive(name, child)] for name, child in children.items()}  # all have loaded
    for _ in range(steps - 1):
        for name, child in children.items():
            child.send(None)
            taken[name].append(_receive(name, child))
    samples = {}
    for name, child in children.items():
        child.send(None)
        seconds, losses = zip(*taken[name], strict=True)
        samples[name] = Sample(
            name,
            statistics.median(seconds[WARM_UP : steps // 2]),
            statistics.median(seconds[steps // 2 + WARM_UP :]),
            _receive(name, child),
            losses[0],
            losses[-1],
        )
        print(json.dumps(asdict(samples[name])), flush=True)
    return samples


def _start(name: str, size: int, steps: int) -> Connection:
    """Start the process of one side, and return the connection to it."""
    ours, its = PROCESSES.Pipe()
    PROCESSES.Process(target=train, args=(name, its, size, steps), daemon=True).start()
    its.close()  # so that ours ends with the process
    return ours


def _receive(name: str, child: Connection) -> Any:  # noqa: ANN401  what Turns sends
    try:
        return child.recv()
    except EOFError:
        raise SystemExit(f"{name} ended before its training did") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment.add_cpu(parser)
    parser.add_argument("--size", type=int, help="of the square images, in pixels")
    parser.add_argument("--steps", type=int, default=40, help="half of them train the embeddings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="ours with compile_unet too")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.steps < MIN_STEPS:
        parser.error(f"--steps {arguments.steps} is too few; {MIN_STEPS} at least")
    size = arguments.size or (128 if arguments.cpu else 768)
    with environment.settings(arguments.cpu):
        print(json.dumps(machine.describe(arguments.cpu)), flush=True)
        environment.provide("sdxl")
        names = [side for side in SIDES if side != "compiled" or arguments.compiled]
        rounds = [measure(names, size, arguments.steps) for _ in range(arguments.rounds)]
    print(table(rounds))


def table(rounds: list[dict[str, Sample]]) -> str:
    """Return each side's medians, and those of its ratios to cog-sdxl round by round."""
    rows = []
    for side in rounds[0]:
        ours, cog = ([samples[name] for samples in rounds] for name in (side, "cog-sdxl"))
        speeds = [sample.steps_per_second for sample in ours]
        peaks = [sample.peak_bytes for sample in ours]
        rows.append(
            [
                NAMES[side],
                f"{1000 * statistics.median(sample.before for sample in ours):.0f}",
                f"{1000 * statistics.median(sample.after for sample in ours):.0f}",
                f"{statistics.median(speeds):.2f}",
                Spread.of_ratios(speeds, [sample.steps_per_second for sample in cog]).cell(),
                f"{statistics.median(peaks) / 1e6:.0f}",
                Spread.of_ratios(peaks, [sample.peak_bytes for sample in cog]).cell(),
            ]
        )
    columns = ["ms a step, embeddings trained", "frozen", "steps a second", "ratio"]
    return markdown_table(["training", *columns, "peak memory, MB", "ratio"], rows)
