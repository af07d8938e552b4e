"""Measure what requests cost the host: all that a GPU waits for beside its own arithmetic.

The published networks, but as stubs that compute nothing, and small images: what is left is what
Python does around them. No GPU is needed. The baseline is diffusers' stock pipeline with the same
stubs. Figures are as those of images, without what only a GPU tells.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers

from benchmarks import environment, machine, report
from benchmarks.architectures import SCHEDULER_CONFIG
from benchmarks.baseline_diffusers import Diffusers
from benchmarks.measure import measure
from benchmarks.sides import PLAIN, Ours, Side
from benchmarks.stub_models import StubModelCache, stub_components
from benchmarks.workloads import DIFFUSERS, OURS, WORKLOADS, add_only
from generation.engine import Engine
from generation.outputs import OutputFolders
from models.components import TOKENIZERS
from weights.catalog import Edition

NAMES = ("SDXL-Turbo, 1 step", "SD-Turbo, 1 step", "30 steps")
IMAGE_SIZE = 256  # pixels: the smallest that is served


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment.add_runs(parser, 40, "requests")
    add_only(parser, NAMES)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    figures = []
    with environment.settings(cpu=True, edition="full"), TemporaryDirectory() as folder:
        measured = "the host's work around the published architectures"
        print(json.dumps(machine.describe(cpu=True, measured=measured)), flush=True)
        for name in arguments.only or NAMES:
            size = {"width": IMAGE_SIZE, "height": IMAGE_SIZE}
            workload = replace(WORKLOADS[name], baselines=(DIFFUSERS,), sizes=size)
            sides: dict[str, Side] = {
                DIFFUSERS: _diffusers(workload.model),
                OURS: _ours(workload.model, Path(folder)),
            }
            for side in sides.values():
                side.prepare(workload)
            figures.append(measure(name, workload, sides, arguments.runs))
            print(report.json_line(figures[-1]), flush=True)
    print("\n\n".join(report.tables(figures)))


def _ours(model: str, folder: Path) -> Ours:
    """Return predict.py around stubs, in place of what its setup loads."""
    from predict import Predictor

    predictor = Predictor()
    # Other containers' folders may lie in this machine's temporary folder.
    predictor.folders = OutputFolders(folder, folder / "server")
    predictor.engine = Engine(Edition.FULL, "cpu", StubModelCache(), model=model)
    return Ours(predictor, PLAIN, stub=True)


def _diffusers(model: str) -> Diffusers:
    """Return diffusers' stock pipeline around the same stubs."""
    components = stub_components(environment.spec(model).base_model)
    shared = {
        "unet": components.unet,
        "vae": components.vae,
        **components.text_encoders,
        **{TOKENIZERS[name]: tokenizer for name, tokenizer in components.tokenizers.items()},
        "scheduler": diffusers.EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG),
    }
    if components.is_sdxl:
        pipeline = diffusers.StableDiffusionXLPipeline(**shared, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return Diffusers(model, pipeline, IMAGE_SIZE)
