"""How fast and with how much memory, ours and a peer's, in turn: `script/bench training`.

Each side runs in a process of its own, A B A B …, so that a machine whose speed drifts treats both
alike; the ratio is taken pair by pair, and its median counts. JSON lines as results arrive, then a
table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.dataset import Example
    from training.model import TrainableModel

WARM_UP = 4  # steps that are not counted, of each half: some compile
MIN_STEPS = 4 * WARM_UP
PHOTOS = 8
RANK, BATCH = 32, 4  # cog-sdxl's defaults


@dataclass(frozen=True)
class Sample:
    """One process's figures."""

    side: str
    steps_per_second: float
    peak_bytes: int  # of the whole process, with all that it imports
    first_loss: float
    last_loss: float


@dataclass
class Clock:
    """Steps as they are told, and when."""

    times: list[float]
    losses: list[float]

    def tell(self, loss: float) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(loss)

    def sample(self, side: str) -> Sample:
        """Of the median step before the pivot and the median one after it, as many of each."""
        lengths = [later - earlier for earlier, later in itertools.pairwise(self.times)]
        middle = len(self.times) // 2
        halves = lengths[WARM_UP : middle - 1], lengths[middle + WARM_UP :]
        speed = 2 / sum(statistics.median(half) for half in halves)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Sample(side, speed, peak, self.losses[0], self.losses[-1])


def train_ours(steps: int, compiled: bool = False) -> Sample:
    from training import loop
    from training.config import TrainConfig
    from training.progress import Event, StepDone

    model, examples = _subject()
    clock = Clock([], [])

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            clock.tell(event.loss)

    config = TrainConfig(
        seed=0,
        max_train_steps=steps,
        train_batch_size=BATCH,
        lora_rank=RANK,
        pivot_fraction=0.5,
        validation=False,
        compile_unet=compiled,
        verbose=False,
    )
    with TemporaryDirectory() as folder:
        loop.fit(examples, (), config, model, Path(folder), listen, None)
    return clock.sample("compiled" if compiled else "ours")


def train_peer(steps: int) -> Sample:
    import torch

    from script.tools.peer_training import PeerTraining
    from training.dataset import encode

    torch.manual_seed(0)
    model, examples = _subject()
    clock = Clock([], [])
    peer = PeerTraining(model, encode(model.vae, examples, False), BATCH, RANK, steps)
    peer.run(lambda step, loss: clock.tell(loss))
    return clock.sample("peer")


def _subject() -> tuple[TrainableModel, list[Example]]:
    """The embedded model, and eight pictures with captions."""
    import numpy as np
    import torch
    from PIL import Image

    from training.base_models import MINIATURE_SDXL, Method
    from training.dataset import Example
    from training.model import load
    from weights.catalog import Edition
    from weights.miniature import world

    rng = np.random.default_rng(0)
    side = MINIATURE_SDXL.native_size
    examples = []
    for number in range(PHOTOS):
        scene = world.random_scene(rng)
        image = world.render(scene, side, side)
        caption = f"a {scene.size} {scene.colour} TOK on a {scene.background} background"
        mask = Image.new("L", image.size, 255)
        examples.append(Example(str(number), image, mask, caption, (side, side), (0, 0)))
    model = load(MINIATURE_SDXL, Edition.MINIATURE, torch.device("cpu"), Method.LORA)
    return model, examples


SIDES: dict[str, Callable[[int], Sample]] = {
    "peer": train_peer,
    "ours": train_ours,
    "compiled": partial(train_ours, compiled=True),
}


NAMES = {"peer": "cog-sdxl's loop", "ours": "ours", "compiled": "ours, compile_unet"}


def measure(side: str, steps: int) -> Sample:
    """One side in a new process."""
    command = [sys.executable, "-m", "script.tools.bench", "training", "--side", side]
    done = subprocess.run(
        [*command, "--steps", str(steps)], stdout=subprocess.PIPE, text=True, check=True
    )
    line = done.stdout.splitlines()[-1]
    print(line, flush=True)
    return Sample(**json.loads(line))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    parser.add_argument("workload", choices=["training"])
    parser.add_argument("--steps", type=int, default=60, help="half before the pivot, half after")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--compiled", action="store_true", help="ours with compile_unet too; takes minutes"
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < MIN_STEPS:
        parser.error(f"--steps {arguments.steps} is too few; {MIN_STEPS} at least")
    if arguments.side:
        print(json.dumps(vars(SIDES[arguments.side](arguments.steps))))
        return
    sides = [side for side in SIDES if side != "compiled" or arguments.compiled]
    rounds = [
        {side: measure(side, arguments.steps) for side in sides} for _ in range(arguments.rounds)
    ]
    print(table(rounds))


def table(rounds: list[dict[str, Sample]]) -> str:
    """Medians of each side, and of its ratios to the peer round by round."""
    rows = [
        "| training | steps a second | ratio | peak memory, MB | ratio |",
        "|---|---|---|---|---|",
    ]
    for side in rounds[0]:
        cells = [NAMES[side]]
        for figure, unit, digits in (("steps_per_second", 1.0, 2), ("peak_bytes", 1e6, 0)):
            values = [getattr(samples[side], figure) / unit for samples in rounds]
            peers = [getattr(samples["peer"], figure) / unit for samples in rounds]
            ratios = sorted(value / peer for value, peer in zip(values, peers, strict=True))
            cells.append(f"{statistics.median(values):.{digits}f}")
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
