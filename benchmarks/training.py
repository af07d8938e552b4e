"""A training beside cog-sdxl's loop: steps a second and memory, on the same parts, in turns.

Each side is a process of its own, and they take turns step by step, so that a machine whose speed
drifts treats both alike. JSON lines as rounds end, then a table.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING

from script.tools import bench_machine, bench_models

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
    before: float  # seconds of the median step before the pivot
    after: float  # and after it
    peak_bytes: int  # on a GPU what tensors took, elsewhere the process with all that it imports
    first_loss: float
    last_loss: float

    @property
    def steps_per_second(self) -> float:
        """Of a training that has as many steps before the pivot as after it."""
        return 2 / (self.before + self.after)


@dataclass
class Turns:
    """The child's end: tells of each step, then waits until it is its turn again."""

    output: IO[str]
    turns: IO[str]
    began: float

    def tell(self, loss: float) -> None:
        """One step has been made; what a GPU still works on counts."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._say({"seconds": time.perf_counter() - self.began, "loss": loss})
        self.turns.readline()
        self.began = time.perf_counter()

    def end(self) -> None:
        import torch

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        self._say({"peak_bytes": peak})

    def _say(self, content: dict[str, float]) -> None:
        print(json.dumps(content), file=self.output, flush=True)


def train_ours(turns: Turns, cpu: bool, size: int, steps: int, compiled: bool = False) -> None:
    from training import loop
    from training.config import TrainConfig
    from training.progress import Event, StepDone

    trainable, examples = subject(cpu, size)

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            turns.tell(event.loss)

    config = TrainConfig(
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
        loop.fit(examples, (), config, trainable, Path(folder), listen, None)


def train_peer(turns: Turns, cpu: bool, size: int, steps: int) -> None:
    import torch

    from script.tools.peer_training import PeerTraining
    from training.dataset import encode

    torch.manual_seed(0)
    trainable, examples = subject(cpu, size)
    latents = encode(trainable.vae, examples, False)
    peer = PeerTraining(trainable, latents, BATCH, RANK, steps)
    peer.run(lambda step, loss: turns.tell(loss))


def subject(cpu: bool, size: int) -> tuple[TrainableModel, list[Example]]:
    """The model, and eight square pictures with captions."""
    import numpy as np
    import torch
    from PIL import Image

    from training import base_models
    from training.dataset import Example
    from training.model import load
    from weights.catalog import Edition
    from weights.miniature import world

    rng = np.random.default_rng(0)
    examples = []
    for number in range(PHOTOS):
        scene = world.random_scene(rng)
        image = world.render(scene, size, size)
        caption = f"a {scene.size} {scene.colour} TOK on a {scene.background} background"
        mask = Image.new("L", image.size, 255)
        examples.append(Example(str(number), image, mask, caption, (size, size), (0, 0)))
    if not cpu:
        return _random_sdxl(), examples
    device = torch.device("cpu")
    spec = base_models.MINIATURE_SDXL
    return load(spec, Edition.MINIATURE, device, base_models.Method.LORA), examples


def _random_sdxl() -> TrainableModel:
    """As `training.model.load` makes it of SDXL's files."""
    import torch
    from diffusers import DDPMScheduler

    from script.tools import random_sdxl
    from training import base_models
    from training.model import TrainableModel
    from weights.trained_types import TEXT_ENCODERS

    device, dtype = torch.device("cuda"), torch.bfloat16
    parts = random_sdxl.build_parts(device, dtype)
    return TrainableModel(
        spec=base_models.SDXL,
        unet=parts["unet"],
        vae=parts["vae"].float(),
        text_encoders={part: parts[part] for part in TEXT_ENCODERS},
        tokenizers={
            "text_encoder": parts["tokenizer"],
            "text_encoder_2": parts["tokenizer_2"],
        },
        noising=DDPMScheduler.from_config(random_sdxl.SCHEDULER_CONFIG),
        scheduler_config=random_sdxl.SCHEDULER_CONFIG,
        device=device,
        unet_dtype=dtype,
    )


SIDES: dict[str, Callable[[Turns, bool, int, int], None]] = {
    "peer": train_peer,
    "ours": train_ours,
    "compiled": partial(train_ours, compiled=True),
}
NAMES = {"peer": "cog-sdxl's loop", "ours": "ours", "compiled": "ours, compile_unet"}


class _Side:
    """The parent's end of one side."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "script.tools.bench", "training", "--side", name]
        command += ["--steps", str(arguments.steps), "--size", str(arguments.size)]
        command += ["--cpu"] if arguments.cpu else []
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.steps: list[dict[str, float]] = []

    def load(self) -> None:
        """Wait until it has made its first step, for which it loads everything."""
        self.steps.append(self._hear())

    def turn(self) -> dict[str, float]:
        """Let it make its next step; of the last turn, let it end."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):
                content: dict[str, float] = json.loads(line)
                return content
        raise SystemExit(f"{self.name} ended with exit status {self._process.wait()}")

    def sample(self, peak_bytes: int) -> Sample:
        seconds = [step["seconds"] for step in self.steps]
        middle = len(seconds) // 2
        return Sample(
            self.name,
            statistics.median(seconds[WARM_UP:middle]),
            statistics.median(seconds[middle + WARM_UP :]),
            peak_bytes,
            self.steps[0]["loss"],
            self.steps[-1]["loss"],
        )


def measure(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Sample]:
    """One round."""
    sides = [_Side(name, arguments) for name in names]
    for side in sides:
        side.load()
    for _ in range(arguments.steps - 1):
        for side in sides:
            side.steps.append(side.turn())
    samples = {side.name: side.sample(int(side.turn()["peak_bytes"])) for side in sides}
    for sample in samples.values():
        print(json.dumps(vars(sample)), flush=True)
    return samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_models.add_argument(parser)
    parser.add_argument("--size", type=int, help="of the square pictures, in pixels")
    parser.add_argument("--steps", type=int, default=40, help="half before the pivot, half after")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="ours with compile_unet too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.steps < MIN_STEPS:
        parser.error(f"--steps {arguments.steps} is too few; {MIN_STEPS} at least")
    bench_models.check(arguments.cpu, parser)
    if arguments.size is None:
        arguments.size = 128 if arguments.cpu else 768
    if arguments.side:
        turns = Turns(sys.stdout, sys.stdin, time.perf_counter())
        SIDES[arguments.side](turns, arguments.cpu, arguments.size, arguments.steps)
        turns.end()
        return
    print(json.dumps(bench_machine.describe(arguments.cpu)), flush=True)
    names = [side for side in SIDES if side != "compiled" or arguments.compiled]
    print(table([measure(names, arguments) for _ in range(arguments.rounds)]))


def table(rounds: list[dict[str, Sample]]) -> str:
    """Medians of each side, and of its ratios to the peer round by round."""
    rows = [
        "| training | ms a step, before the pivot | after it | steps a second | ratio"
        " | peak memory, MB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in rounds[0]:
        cells = [NAMES[side]]
        for figure in ("before", "after"):
            middle = statistics.median(getattr(samples[side], figure) for samples in rounds)
            cells.append(f"{1000 * middle:.0f}")
        for figure, unit, digits in (("steps_per_second", 1.0, 2), ("peak_bytes", 1e6, 0)):
            values = [getattr(samples[side], figure) / unit for samples in rounds]
            peers = [getattr(samples["peer"], figure) / unit for samples in rounds]
            ratios = sorted(value / peer for value, peer in zip(values, peers, strict=True))
            cells.append(f"{statistics.median(values):.{digits}f}")
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
