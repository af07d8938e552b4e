"""Examples → cached latents → batches.

Every random draw depends only on the seed, the step and the slot in its batch. So no generator's
state has to be saved to resume a training, and a batch is the same however many processes share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from training.errors import InvalidTraining
from training.plan import SIDE_MULTIPLE, TrainPlan
from weights.trigger_words import has_trigger_word

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Kinds of draws: no two of them share a random stream.
TRAINING, CLASS_IMAGES, HELD_OUT, ORDER, SPLIT, TOKENS = range(6)


@dataclass(frozen=True)
class Example:
    """An image at the size to train at."""

    name: str
    image: Image.Image  # RGB; its sides are multiples of 8
    mask: Image.Image  # L, of the same size; 255 = full loss weight
    caption: str  # as typed, with the trigger word
    original_size: tuple[int, int]  # (height, width) before scaling and cropping
    crop_top_left: tuple[int, int]  # (y, x)

    def __post_init__(self) -> None:
        width, height = self.image.size
        assert width % SIDE_MULTIPLE == height % SIDE_MULTIPLE == 0, (
            f"{self.name}: {width}x{height}"
        )
        assert (self.image.mode, self.mask.mode) == ("RGB", "L"), self.name
        assert self.mask.size == self.image.size, f"{self.name}: its mask is {self.mask.size}"

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's size conditioning: original height and width, crop top and left, final size."""
        return (*self.original_size, *self.crop_top_left, self.image.height, self.image.width)


@dataclass(frozen=True)
class LatentView:
    """The latents of an image, or of its mirror image."""

    mean: Tensor  # (4, h/8, w/8), not scaled yet
    std: Tensor  # (4, h/8, w/8)
    mask: Tensor  # (1, h/8, w/8) in [0, 1]


@dataclass(frozen=True)
class CachedExample:
    """An example after the VAE, which runs only once."""

    views: tuple[LatentView, ...]
    time_ids: Tensor  # (6,)
    caption: str

    @property
    def size(self) -> tuple[int, int]:
        """(h/8, w/8); a batch has examples of one size."""
        height, width = self.views[0].mean.shape[-2:]
        return int(height), int(width)


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass, on the CPU."""

    latents: Tensor  # (B, 4, h/8, w/8), freshly sampled and scaled
    noise: Tensor  # (B, 4, h/8, w/8)
    timesteps: Tensor  # (B,) int64
    mask: Tensor  # (B, 1, h/8, w/8)
    time_ids: Tensor  # (B, 6)
    captions: list[str]  # "" where one is dropped


def generator(seed: int, kind: int, *place: int) -> torch.Generator:
    """Return the random stream of one place, independent of those of other places."""
    state = np.random.SeedSequence((seed, kind, *place)).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))


def check_captions(examples: Sequence[Example], plan: TrainPlan) -> None:
    """Raise InvalidTraining if no caption contains the trigger word."""
    if not any(has_trigger_word(e.caption, plan.token_string) for e in examples):
        shown = "; ".join(repr(e.caption) for e in examples[:3])
        raise InvalidTraining(
            f"no caption has the word {plan.token_string!r} in it (they begin {shown}), so it would"
            " learn nothing. Write it in the captions, or set token_string to the word that they"
            " have"
        )


def split(examples: Sequence[Example], plan: TrainPlan) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and those held out."""
    order = torch.randperm(len(examples), generator=generator(plan.seed, SPLIT)).tolist()
    out = set(order[: plan.held_out])
    kept = [e for i, e in enumerate(examples) if i not in out]
    return kept, [e for i, e in enumerate(examples) if i in out]


@torch.no_grad()
def encode(vae: AutoencoderKL, examples: Sequence[Example], flip: bool) -> list[CachedExample]:
    """Encode each example, and with `flip` its mirror image, by the VAE."""
    encoded = []
    for example in examples:
        pairs = [(example.image, example.mask)]
        if flip:
            pairs.append((ImageOps.mirror(example.image), ImageOps.mirror(example.mask)))
        views = tuple(_encode_view(vae, image, mask) for image, mask in pairs)
        time_ids = torch.tensor(example.time_ids, dtype=torch.float32)
        encoded.append(CachedExample(views, time_ids, example.caption))
    return encoded


def _encode_view(vae: AutoencoderKL, image: Image.Image, mask: Image.Image) -> LatentView:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
    pixels = pixels.permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W) in [-1, 1]
    distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, std = (t[0].float().cpu() for t in (distribution.mean, distribution.std))
    size = (image.width // SIDE_MULTIPLE, image.height // SIDE_MULTIPLE)
    small = np.asarray(mask.resize(size, Image.Resampling.BOX), dtype=np.float32)  # means of 8x8
    return LatentView(mean, std, torch.from_numpy(small.copy())[None] / 255)


class BucketBatchSampler:
    """Samples batches of examples of one size; each example comes equally often.

    Within a size, every example comes once before any comes again.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, seed: int) -> None:
        self._buckets: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            self._buckets.setdefault(size, []).append(index)
        self._total = len(sizes)
        self._batch_size = batch_size
        self._seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of examples' indices without end."""
        buckets = self._buckets.values()
        streams = [self._shuffled(number, bucket) for number, bucket in enumerate(buckets)]
        shares = [len(bucket) / self._total for bucket in buckets]
        counts = [0] * len(streams)
        while True:
            due = [share * (sum(counts) + 1) - n for share, n in zip(shares, counts, strict=True)]
            chosen = due.index(max(due))
            counts[chosen] += 1
            yield [next(streams[chosen]) for _ in range(self._batch_size)]

    def _shuffled(self, number: int, bucket: list[int]) -> Iterator[int]:
        rounds = 0
        while True:
            g = generator(self._seed, ORDER, number, rounds)
            yield from (bucket[i] for i in torch.randperm(len(bucket), generator=g).tolist())
            rounds += 1


@dataclass(frozen=True)
class NoiseSettings:
    """What batches need to know of a base model."""

    latent_scale: float  # what the VAE's latents are multiplied by for the UNet
    n_timesteps: int  # noise levels that the UNet was trained at


def sample_batch(
    items: Sequence[CachedExample],
    kind: int,
    step: int,
    slots: range,
    n_slots: int,
    plan: TrainPlan,
    noise: NoiseSettings,
) -> Batch:
    """Sample latents, noise and timesteps for the items, which fill `slots` of a step's `n_slots`.

    Slots count on over accumulated batches, and over the processes that share a batch. `kind` is
    that of the draws.
    """
    rows = [
        _sample_row(item, generator(plan.seed, kind, step, slot), plan)
        for slot, item in zip(slots, items, strict=True)
    ]
    # Stratified: each slot has its own stretch of the timesteps, so a step covers all of them.
    timesteps = [
        int((slot + row.timestep) / n_slots * noise.n_timesteps)
        for slot, row in zip(slots, rows, strict=True)
    ]
    return Batch(
        torch.stack([row.latents for row in rows]) * noise.latent_scale,
        torch.stack([row.noise for row in rows]),
        torch.tensor(timesteps),
        torch.stack([row.mask for row in rows]),
        torch.stack([item.time_ids for item in items]),
        [row.caption for row in rows],
    )


def step_batches(
    items: Sequence[CachedExample],
    kind: int,
    first_step: int,
    plan: TrainPlan,
    noise: NoiseSettings,
    process: int = 0,
    n_processes: int = 1,
) -> Iterator[list[Batch]]:
    """Yield this process's share of each step's batches from `first_step` on; [] without items."""
    accumulated, size = plan.gradient_accumulation_steps, plan.train_batch_size
    batches = iter(BucketBatchSampler([item.size for item in items], size, plan.seed))
    share = size // n_processes
    for step in itertools.count():
        indices = list(itertools.islice(batches, accumulated)) if items else []
        if step < first_step:
            continue
        starts = [number * size + process * share for number in range(len(indices))]
        yield [
            sample_batch(
                [items[i] for i in batch[process * share : (process + 1) * share]],
                kind,
                step,
                range(start, start + share),
                size * accumulated,
                plan,
                noise,
            )
            for start, batch in zip(starts, indices, strict=True)
        ]


@dataclass(frozen=True)
class _Row:
    latents: Tensor
    noise: Tensor
    timestep: float  # in [0, 1)
    mask: Tensor
    caption: str


def _sample_row(item: CachedExample, g: torch.Generator, plan: TrainPlan) -> _Row:
    which, timestep, drop = torch.rand(3, generator=g).tolist()
    view = item.views[int(which * len(item.views))]
    shape = view.mean.shape
    latents = view.mean + view.std * torch.randn(shape, generator=g)
    noise = torch.randn(shape, generator=g)
    # crosslabs.org, "Diffusion with offset noise"
    noise = noise + plan.noise_offset * torch.randn((shape[0], 1, 1), generator=g)
    caption = "" if drop < plan.caption_dropout else item.caption
    return _Row(latents, noise, timestep, view.mask, caption)
