"""What is asked, and every rule about it. Nothing here loads a model or imports torch."""

import math
import secrets
from dataclasses import dataclass
from enum import StrEnum

from generation.base_models import BaseModelSpec
from generation.errors import InvalidRequest
from generation.schedulers import SCHEDULERS

SIDE_MULTIPLE = 8  # pixels per latent
MAX_NUM_OUTPUTS = 4
MAX_NUM_INFERENCE_STEPS = 500
MAX_GUIDANCE_SCALE = 50.0
SEEDS = 2**32


class Mode(StrEnum):
    """The kinds of work, told apart by which images a request brings."""

    TXT2IMG = "txt2img"


@dataclass(frozen=True)
class GenerationRequest:
    """What was asked. None leaves a value to the model's own default, or the seed to chance."""

    prompt: str
    negative_prompt: str
    width: int | None  # pixels
    height: int | None  # pixels
    num_outputs: int
    scheduler: str | None
    num_inference_steps: int | None
    guidance_scale: float | None  # 1 or less: no guidance pass
    seed: int | None


@dataclass(frozen=True)
class GenerationPlan:
    """A request with every value settled; what the engine carries out."""

    mode: Mode
    prompt: str
    negative_prompt: str
    width: int
    height: int
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # one per picture

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional pass runs at each step (arXiv:2207.12598)."""
        return self.guidance_scale > 1


def resolve_mode(request: GenerationRequest) -> Mode:
    """Which kind of work the request is."""
    return Mode.TXT2IMG


def resolve(request: GenerationRequest, spec: BaseModelSpec) -> GenerationPlan:
    """Check every rule and fill in the model's defaults.

    Raises:
        InvalidRequest: naming the value, the rule and the remedy.
    """
    width, height = _size(request, spec)
    steps = request.num_inference_steps
    guidance = request.guidance_scale
    scheduler = spec.scheduler if request.scheduler is None else request.scheduler
    if scheduler not in SCHEDULERS:
        raise InvalidRequest(
            f"scheduler {scheduler!r} is not known; choose one of {', '.join(SCHEDULERS)}"
        )
    _within("num_outputs", request.num_outputs, 1, MAX_NUM_OUTPUTS)
    if steps is not None:
        _within("num_inference_steps", steps, 1, MAX_NUM_INFERENCE_STEPS)
    if guidance is not None:
        _within("guidance_scale", guidance, 0, MAX_GUIDANCE_SCALE)
    return GenerationPlan(
        mode=resolve_mode(request),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        scheduler=scheduler,
        num_inference_steps=spec.num_inference_steps if steps is None else steps,
        guidance_scale=spec.guidance_scale if guidance is None else guidance,
        seeds=_seeds(request.seed, request.num_outputs),
    )


def _within(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails too.
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must be from {low} to {high}")


def _seeds(seed: int | None, count: int) -> tuple[int, ...]:
    """Picture k has the seed s + k, so that each can be made again on its own."""
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    _within("seed", seed, 0, SEEDS - 1)
    return tuple((seed + k) % SEEDS for k in range(count))


def _size(request: GenerationRequest, spec: BaseModelSpec) -> tuple[int, int]:
    width = spec.native_size if request.width is None else request.width
    height = spec.native_size if request.height is None else request.height
    nearest = nearest_valid_size(width, height, spec)
    if nearest == (width, height):
        return nearest
    raise InvalidRequest(
        f"a picture of width={width} height={height} is not possible with {spec.name}: each side "
        f"must be a multiple of {SIDE_MULTIPLE} from {spec.min_side} to {spec.max_side} "
        f"and the area at most {spec.max_pixels} pixels; the nearest valid size is "
        f"width={nearest[0]} height={nearest[1]}"
    )


def nearest_valid_size(width: int, height: int, spec: BaseModelSpec) -> tuple[int, int]:
    """The valid (width, height) in pixels closest to the given one; the same one if it is valid."""

    def side(length: float) -> int:
        rounded = math.floor(length / SIDE_MULTIPLE + 0.5) * SIDE_MULTIPLE
        return min(max(rounded, spec.min_side), spec.max_side)

    w, h = side(width), side(height)
    if w * h > spec.max_pixels:
        shrink = math.sqrt(spec.max_pixels / (w * h))
        w = max(math.floor(w * shrink / SIDE_MULTIPLE) * SIDE_MULTIPLE, spec.min_side)
        h = max(math.floor(h * shrink / SIDE_MULTIPLE) * SIDE_MULTIPLE, spec.min_side)
    return w, h
