"""Measure how long a new process takes to its first image, beside bare diffusers.

Each start is a process of its own, in turns. Bare: import torch and the pipeline's class, load the
same files, generate one image. Ours: predict.py's `setup`, then one `predict` of the same image;
setup loads the safety checker too, which the bare process does without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import environment, machine
from benchmarks.report import Spread, markdown_table
from benchmarks.workloads import PROMPT

ROOT = Path(__file__).parents[1]
BARE, OURS = "bare diffusers", "ours"
LOADED, GENERATED = "loaded", "generated"  # what a process prints as it gets there
STEPS, GUIDANCE = 20, 7.5

Seconds = dict[str, float]  # from a process's start to LOADED and GENERATED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environment.add_cpu(parser)
    environment.add_runs(parser, 5, "starts")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    with environment.settings(arguments.cpu), TemporaryDirectory() as folder:
        print(json.dumps(machine.describe(arguments.cpu)), flush=True)
        inputs = {BARE: _bare_inputs(), OURS: _our_inputs()}
        samples: dict[str, list[Seconds]] = {side: [] for side in inputs}
        # Of several, one more comes first: it reads files that are not in memory yet.
        first = 0 if arguments.runs > 1 else 1
        for run in range(first, 1 + arguments.runs):
            for side, taken in samples.items():
                seconds = start(side, inputs[side], Path(folder))
                if run:
                    taken.append(seconds)
                    print(json.dumps({"side": side, **seconds}), flush=True)
    print(table(samples))


def start(side: str, inputs: dict[str, Any], folder: Path) -> Seconds:
    """Run one process and return its times."""
    command = [sys.executable, "-m", "benchmarks.start", side, json.dumps(inputs)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    seconds = {}
    with (
        (folder / "errors.txt").open("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, cwd=folder
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() in (LOADED, GENERATED):
                seconds[line.strip()] = time.perf_counter() - began
        if process.wait() or len(seconds) < 2:
            errors.seek(0)
            raise SystemExit(f"{side} ended with status {process.returncode}:\n{errors.read()}")
    return seconds


def table(samples: dict[str, list[Seconds]]) -> str:
    """Return medians, and ratios of the turns to the bare process."""
    rows = [[side] for side in samples]
    for row, runs in zip(rows, samples.values(), strict=True):
        for point in (LOADED, GENERATED):
            taken = [seconds[point] for seconds in runs]
            bare = [seconds[point] for seconds in samples[BARE]]
            row += [f"{statistics.median(taken):.2f}", Spread.of_ratios(taken, bare).cell()]
    columns = ["imported and loaded, s", "ratio", "first image, s", "ratio"]
    return markdown_table(["a new process", *columns], rows)


def _bare_inputs() -> dict[str, Any]:
    environment.provide("sdxl")
    spec = environment.spec("sdxl")
    vae = spec.components_from.get("vae")
    return {
        "folder": str(environment.folder(spec.weights)),
        "vae": str(environment.folder(vae)) if vae else None,
        "size": spec.native_size,
    }


def _our_inputs() -> dict[str, Any]:
    from benchmarks.sides import PLAIN, default_inputs

    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": 0}
    return {**default_inputs(), **PLAIN, **call}


def _start_bare(inputs: dict[str, Any]) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    device = os.environ["DEVICE"]
    dtype = torch.float32 if device == "cpu" else torch.float16
    components: dict[str, Any] = {}
    if inputs["vae"]:
        from diffusers import AutoencoderKL

        components["vae"] = AutoencoderKL.from_pretrained(inputs["vae"], dtype=dtype)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        inputs["folder"], variant="fp16", dtype=dtype, add_watermarker=False, **components
    ).to(device)
    _report(LOADED)
    pipeline(
        prompt=PROMPT,
        negative_prompt="",
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        width=inputs["size"],
        height=inputs["size"],
        generator=torch.Generator().manual_seed(0),
    ).images[0].save("bare.png")
    _report(GENERATED)


def _start_ours(inputs: dict[str, Any]) -> None:
    from predict import Predictor

    predictor = Predictor()
    predictor.setup()
    _report(LOADED)
    predictor.record_metric = lambda *_: None
    predictor.predict(**inputs)
    _report(GENERATED)
    predictor.folders.remove()


def _report(point: str) -> None:
    print(point, flush=True)


SIDES = {BARE: _start_bare, OURS: _start_ours}  # what the processes do

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
