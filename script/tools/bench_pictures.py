"""Our whole `predict`, request to encoded file, beside the stock diffusers pipeline doing the same.

Both run in this process with the same weights and take turns. JSON lines as workloads end, the
most telling first, then a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from script.tools import bench_models
from script.tools.bench_models import MINIATURE

if TYPE_CHECKING:
    from predict import Predictor

WARM_UP = 2  # requests of each side
PROMPT = "a large red circle on a blue background"
SCHEDULER = "K_EULER"


@dataclass(frozen=True)
class Workload:
    """What is asked, by predict's names; the size is the model's own."""

    asked: dict[str, Any]
    # At 1024x1024 on an H200: arithmetic at 788 TFLOP/s, its measured bf16 ceiling, and no more.
    floor_ms: float


def _workload(steps: int, floor_ms: float, **more: object) -> Workload:
    asked = {"num_inference_steps": steps, "guidance_scale": 7.5, **more}
    return Workload(asked, floor_ms)


WORKLOADS = {
    "30 steps": _workload(30, 528.0),
    "4 steps, no guidance": _workload(4, 47.7, guidance_scale=1.0),
    "30 steps, refiner for the last fifth": _workload(30, 537.0, refine="expert_ensemble_refiner"),
    "20 steps, 4 pictures": _workload(20, 4 * 357.0, num_outputs=4),
    "50 steps": _workload(50, 872.0),
}


@dataclass
class Times:
    """One side's requests in one workload."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0  # tensors on the GPU; 0 on a CPU, where one process holds both sides


class Ours:
    """predict.py, with the values that Cog gives where a request leaves them out."""

    def __init__(self, model: str) -> None:
        from predict import Predictor
        from script.tools.schema import document

        self.predictor: Predictor = Predictor()
        if model == MINIATURE:
            os.environ["WEIGHTS_EDITION"] = "miniature"  # on a GPU too
            self.predictor.setup()
        else:
            _set_up_random(self.predictor)
        self._schema = document(Path(__file__).parents[2])
        self.stages: dict[str, float] = {}
        self.predictor.record_metric = self._hear

    def _hear(self, name: str, value: Any, *_: object) -> None:  # noqa: ANN401
        if name.startswith("seconds."):
            self.stages[name.removeprefix("seconds.")] = value

    def __call__(self, asked: dict[str, Any], seed: int, folder: Path) -> list[Any]:
        """The request; its files."""
        from script.tools.arguments import parse_inputs

        own = {"prompt": PROMPT, "scheduler": SCHEDULER, "seed": seed}
        # Without what the stock pipeline is set up without.
        off = {"apply_watermark": "false", "disable_safety_checker": "true"}
        given = {**own, **off, **asked}
        self.stages = {}
        texts = [f"{name}={value}" for name, value in given.items()]
        return self.predictor.predict(**parse_inputs(texts, self._schema, "Input", folder))


class Stock:
    """What a person writes with diffusers alone: SDXL's VAE in fp32 on a GPU, Pillow's PNG."""

    def __init__(self, ours: Ours) -> None:
        import copy

        import diffusers
        import torch

        from generation.base_models import DEFAULT_BASE_MODEL

        engine = ours.predictor.engine
        spec = engine._models[DEFAULT_BASE_MODEL]
        self._size = spec.native_size
        base, refiner = engine._store.load(spec), engine._store.load_refiner(spec)
        vae = copy.deepcopy(base.parts["vae"])
        vae.register_to_config(force_upcast=engine.dtype == torch.float16)  # type: ignore[attr-defined]

        def build(kind: str, parts: Any, scheduler_config: Any) -> Any:  # noqa: ANN401
            pipeline = getattr(diffusers, kind)(
                **{**parts, "vae": vae, "add_watermarker": False},
                scheduler=diffusers.EulerDiscreteScheduler.from_config(scheduler_config),
            )
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        self._base = build("StableDiffusionXLPipeline", base.parts, base.scheduler_config)
        self._refiner = build(
            "StableDiffusionXLImg2ImgPipeline", refiner.parts, refiner.scheduler_config
        )

    def __call__(self, asked: dict[str, Any], seed: int, folder: Path) -> None:
        """The request, its files in `folder`."""
        import torch

        count = asked.get("num_outputs", 1)
        common = {
            "prompt": PROMPT,
            "negative_prompt": "",  # as at ours; without one, SDXL takes zeros
            "num_inference_steps": asked["num_inference_steps"],
            "guidance_scale": asked["guidance_scale"],
            "generator": [torch.Generator().manual_seed(seed + k) for k in range(count)],
            "num_images_per_prompt": count,
        }
        size = {"width": self._size, "height": self._size}
        if asked.get("refine"):
            latents = self._base(**common, **size, denoising_end=0.8, output_type="latent").images
            pictures = self._refiner(**common, image=latents, denoising_start=0.8).images
        else:
            pictures = self._base(**common, **size).images
        for number, picture in enumerate(pictures):
            picture.save(folder / f"stock-{number}.png")


def _set_up_random(predictor: Predictor) -> None:
    """The full edition on the GPU with random weights, which the first use makes."""
    import torch

    from generation.base_models import BaseModelSpec, RefinerSpec
    from generation.engine import Engine
    from generation.outputs import OutputFolders
    from generation.pipelines import LoadedModel, PipelineStore
    from script.tools import random_sdxl
    from weights.catalog import Edition

    device, dtype = torch.device("cuda"), torch.float16

    class RandomStore(PipelineStore):
        def _read(self, spec: BaseModelSpec, alone: bool) -> LoadedModel:
            parts = random_sdxl.build_parts(device, dtype)
            none: dict[str, object] = {"image_encoder": None, "feature_extractor": None}
            return LoadedModel({**parts, **none}, random_sdxl.SCHEDULER_CONFIG)

        def _read_refiner(self, spec: RefinerSpec, base: LoadedModel) -> LoadedModel:
            with device:
                unet = random_sdxl.build_refiner_unet()
            parts = {
                **base.parts,
                "unet": unet.to(dtype).eval(),
                "text_encoder": None,
                "tokenizer": None,
                "requires_aesthetics_score": True,
                "force_zeros_for_empty_prompt": False,
            }
            return LoadedModel(parts, random_sdxl.SCHEDULER_CONFIG)

    predictor.folders = OutputFolders()
    predictor.engine = Engine(Edition.FULL, "cuda", RandomStore(Edition.FULL, device, dtype))


def measure(
    sides: list[Callable[..., object]], workload: Workload, runs: int, end: float
) -> list[Times]:
    """Each side's requests, in turns, until `end` on the monotonic clock; at least three."""
    import torch

    on_gpu = torch.cuda.is_available()
    times = [Times() for _ in sides]
    with TemporaryDirectory() as folder:
        for run in range(WARM_UP + runs):
            if run >= WARM_UP + 3 and time.monotonic() > end:
                break
            for side, own in zip(sides, times, strict=True):
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                side(workload.asked, run, Path(folder))
                if run >= WARM_UP:
                    own.seconds.append(time.perf_counter() - began)
                    if on_gpu:
                        own.peak_bytes = max(own.peak_bytes, torch.cuda.max_memory_allocated())
    return times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_models.add_argument(parser)
    parser.add_argument("--runs", type=int, default=20, help="requests of each side, a workload")
    parser.add_argument("--only", action="append", choices=WORKLOADS, help="this request alone")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all workloads")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    import torch

    if arguments.runs < 1:
        parser.error(f"--runs is {arguments.runs}; 1 at least")
    bench_models.check(arguments.model, parser)
    began = time.monotonic()
    with torch.inference_mode():
        ours = Ours(arguments.model)
        sides: list[Callable[..., object]] = [Stock(ours), ours]
        rows = []
        try:
            names = arguments.only or list(WORKLOADS)
            for number, name in enumerate(names):
                workload = WORKLOADS[name]
                left = began + arguments.budget - time.monotonic()
                end = time.monotonic() + left / (len(names) - number)
                theirs, own = measure(sides, workload, arguments.runs, end)
                row = figures(name, workload, theirs, own, ours.stages)
                if arguments.model == MINIATURE:
                    del row["times_the_floor"]
                print(json.dumps(row), flush=True)
                rows.append(row)
        finally:
            ours.predictor.folders.remove()
    print(table(rows))


def figures(
    name: str, workload: Workload, stock: Times, ours: Times, stages: dict[str, float]
) -> dict[str, Any]:
    """Of one workload; seconds are of a whole request, whatever its number of pictures."""
    ratios = sorted(a / b for a, b in zip(ours.seconds, stock.seconds, strict=True))
    return {
        "workload": name,
        "runs": len(ratios),
        "stock_p50": statistics.median(stock.seconds),
        "ours_p50": statistics.median(ours.seconds),
        "ours_p95": sorted(ours.seconds)[math.ceil(0.95 * len(ratios)) - 1],
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "pictures_per_second": workload.asked.get("num_outputs", 1)
        / statistics.median(ours.seconds),
        "times_the_floor": 1000 * statistics.median(ours.seconds) / workload.floor_ms,
        "stock_peak_bytes": stock.peak_bytes,
        "ours_peak_bytes": ours.peak_bytes,
        "stages": {stage: round(seconds, 4) for stage, seconds in stages.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios of time, ours to the stock pipeline's: below 1 is faster."""
    lines = [
        "| request | stock p50, ms | ours p50 | ours p95 | ratio | pictures a second"
        " | times the floor | peak memory stock, GB | ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = row.get("times_the_floor")
        memory = [row[f"{side}_peak_bytes"] for side in ("stock", "ours")]
        cells = [
            row["workload"],
            *(f"{1000 * row[key]:.0f}" for key in ("stock_p50", "ours_p50", "ours_p95")),
            f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})",
            f"{row['pictures_per_second']:.2f}",
            "" if floor is None else f"{floor:.2f}",
            *(f"{size / 1e9:.1f}" if size else "" for size in memory),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
