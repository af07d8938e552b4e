"""How long a new process takes to its first picture, beside bare diffusers.

Each start is a process of its own, in turns. Bare: import torch and the pipeline's class, load the
same files, draw one picture. Ours: predict.py's `setup`, then one `predict` of the same picture;
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

BARE, OURS = "bare diffusers", "ours"
LOADED, DRAWN = "loaded", "drawn"  # what a process says as it gets there
STEPS, GUIDANCE = 20, 7.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from script.tools import bench_models

    bench_models.add_argument(parser)
    parser.add_argument("--runs", type=int, default=5, help="starts of each side")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from script.tools import bench_machine, bench_models

    if arguments.runs < 1:
        parser.error(f"--runs is {arguments.runs}; 1 at least")
    bench_models.check(arguments.cpu, parser)
    with bench_models.settings(arguments.cpu), TemporaryDirectory() as folder:
        print(json.dumps(bench_machine.describe(arguments.cpu)), flush=True)
        inputs = {BARE: _bare_inputs(), OURS: _own_inputs()}
        taken: dict[str, list[dict[str, float]]] = {BARE: [], OURS: []}
        # Of several, one more comes first: it reads files that are not in memory yet.
        first = 0 if arguments.runs > 1 else 1
        for run in range(first, 1 + arguments.runs):
            for side in taken:
                seconds = start(side, inputs[side], Path(folder))
                if run:
                    taken[side].append(seconds)
                    print(json.dumps({"side": side, **seconds}), flush=True)
    print(table(taken))


def start(side: str, inputs: dict[str, Any], folder: Path) -> dict[str, float]:
    """One process: seconds since it was begun until it had loaded, and drawn."""
    command = [sys.executable, "-m", "script.tools.bench_start", side, json.dumps(inputs)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    began = time.perf_counter()
    seconds = {}
    with (folder / "errors.txt").open("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=folder
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() in (LOADED, DRAWN):
                seconds[line.strip()] = time.perf_counter() - began
        if process.wait() or len(seconds) < 2:
            errors.seek(0)
            raise SystemExit(f"{side} ended with status {process.returncode}:\n{errors.read()}")
    return seconds


def table(taken: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and ratios of the turns, to the bare process."""
    lines = [
        "| a new process | imported and loaded, s | ratio | first picture, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for side, runs in taken.items():
        cells = [side]
        for point in (LOADED, DRAWN):
            pairs = zip(runs, taken[BARE], strict=True)
            ratios = sorted(own[point] / bare[point] for own, bare in pairs)
            middle = statistics.median(ratios)
            cells.append(f"{statistics.median(own[point] for own in runs):.2f}")
            cells.append(f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bare_inputs() -> dict[str, Any]:
    from script.tools import bench_models
    from script.tools.bench_workloads import PROMPT

    bench_models.provide("sdxl")
    spec = bench_models.spec("sdxl")
    vae = bench_models.folder(spec.components_from["vae"]) if spec.components_from else None
    return {
        "folder": str(bench_models.folder(spec.weights)),
        "vae": str(vae) if vae else None,
        "size": spec.native_size,
        "device": os.environ["DEVICE"],
        "call": {
            "prompt": PROMPT,
            "negative_prompt": "",
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
        },
    }


def _own_inputs() -> dict[str, Any]:
    from script.tools.arguments import parse_inputs
    from script.tools.bench_sides import PLAIN, ROOT
    from script.tools.bench_workloads import PROMPT
    from script.tools.schema import document

    asked = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": 0}
    flags = [f"{name}={value}" for name, value in (asked | PLAIN).items()]
    return parse_inputs(flags, document(ROOT), "Input", ROOT)


def _start_bare(inputs: dict[str, Any]) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    dtype = torch.float32 if inputs["device"] == "cpu" else torch.float16
    more: dict[str, Any] = {"add_watermarker": False}
    if inputs["vae"]:
        from diffusers import AutoencoderKL

        more["vae"] = AutoencoderKL.from_pretrained(inputs["vae"], dtype=dtype)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        inputs["folder"], variant="fp16", dtype=dtype, **more
    ).to(inputs["device"])
    _say(LOADED)
    size = {"width": inputs["size"], "height": inputs["size"]}
    generator = torch.Generator().manual_seed(0)
    pipeline(**inputs["call"], **size, generator=generator).images[0].save("bare.png")
    _say(DRAWN)


def _start_ours(inputs: dict[str, Any]) -> None:
    from predict import Predictor

    predictor: Any = Predictor()
    predictor.setup()
    _say(LOADED)
    predictor.record_metric = lambda *_: None
    predictor.predict(**inputs)
    _say(DRAWN)
    predictor.folders.remove()


def _say(point: str) -> None:
    print(point, flush=True)


SIDES = {BARE: _start_bare, OURS: _start_ours}  # what the processes do

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
