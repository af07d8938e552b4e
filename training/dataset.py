"""Examples → cached latents → batches. Every draw depends on the seed, step and place alone.

So nothing of a random generator's state has to be kept for a training to be continued, and a batch
is the same however many processes share it.
"""

from __future__ import annotations

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

# Kinds of draws, so that no two of them ever share a random stream.
TRAINING, CLASS_IMAGES, HELD_OUT, ORDER, SPLIT = range(5)


@dataclass(frozen=True)
class Example:
    """One picture at the size it is trained at, and what belongs to it."""

    name: str
    image: Image.Image  # RGB; its sides are multiples of 8
    mask: Image.Image  # L, of the same size; 255 = counts fully
    caption: str  # as typed, with the trigger word
    original_size: tuple[int, int]  # (height, width) before it was scaled and cropped
    crop_top_left: tuple[int, int]  # (y, x)


@dataclass(frozen=True)
class View:
    """One way in which an example is seen: as it is, or mirrored."""

    mean: Tensor  # (4, h/8, w/8), not scaled yet
    std: Tensor  # (4, h/8, w/8)
    mask: Tensor  # (1, h/8, w/8) in [0, 1]


@dataclass(frozen=True)
class Latents:
    """An example as the VAE saw it, once and for all."""

    views: tuple[View, ...]
    time_ids: Tensor  # (6,): original height and width, crop top and left, height and width
    caption: str

    @property
    def size(self) -> tuple[int, int]:
        """(h/8, w/8); only examples of one size can be in one batch."""
        height, width = self.views[0].mean.shape[-2:]
        return int(height), int(width)


@dataclass(frozen=True)
class Batch:
    """What one forward pass learns from; on the CPU."""

    latents: Tensor  # (B, 4, h/8, w/8), freshly sampled and scaled
    noise: Tensor  # (B, 4, h/8, w/8)
    timesteps: Tensor  # (B,) int64
    mask: Tensor  # (B, 1, h/8, w/8)
    time_ids: Tensor  # (B, 6)
    captions: list[str]  # some may be dropped: ""


def generator(seed: int, kind: int, *place: int) -> torch.Generator:
    """A random stream for one place; streams of different places are independent."""
    state = np.random.SeedSequence((seed, kind, *place)).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))


def check_examples(examples: Sequence[Example], name: str) -> None:
    """Raises InvalidTraining for a picture or mask that cannot be trained on."""
    for example in examples:
        width, height = example.image.size
        if example.image.mode != "RGB" or example.mask.mode != "L":
            raise InvalidTraining(
                f"{name} {example.name!r}: image and mask have modes {example.image.mode} and"
                f" {example.mask.mode}; they have to be RGB and L"
            )
        if example.mask.size != example.image.size:
            raise InvalidTraining(
                f"{name} {example.name!r}: its mask is {example.mask.size} pixels and its image"
                f" {example.image.size}; make them equal"
            )
        if width % SIDE_MULTIPLE or height % SIDE_MULTIPLE:
            raise InvalidTraining(
                f"{name} {example.name!r} is {width}x{height} pixels; both sides have to be"
                f" multiples of {SIDE_MULTIPLE}"
            )


def check_captions(examples: Sequence[Example], plan: TrainPlan) -> None:
    """Raises InvalidTraining where no caption has the new word in it."""
    if not any(has_trigger_word(e.caption, plan.token_string) for e in examples):
        shown = "; ".join(repr(e.caption) for e in examples[:3])
        raise InvalidTraining(
            f"no caption has the word {plan.token_string!r} in it (they begin {shown}), so it would"
            " learn nothing. Write it in the captions, or set token_string to the word that they"
            " have"
        )


def split(examples: Sequence[Example], plan: TrainPlan) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and those held out."""
    order = torch.randperm(len(examples), generator=generator(plan.seed, SPLIT)).tolist()
    out = set(order[: plan.held_out])
    kept = [e for i, e in enumerate(examples) if i not in out]
    return kept, [e for i, e in enumerate(examples) if i in out]


@torch.no_grad()
def encode(vae: AutoencoderKL, examples: Sequence[Example], flip: bool) -> list[Latents]:
    """Run the VAE once over each example, and over its mirror image where `flip` says so."""
    encoded = []
    for example in examples:
        images, masks = [example.image], [example.mask]
        if flip:
            images.append(ImageOps.mirror(example.image))
            masks.append(ImageOps.mirror(example.mask))
        width, height = example.image.size
        size = (*example.original_size, *example.crop_top_left, height, width)
        views = tuple(_view(vae, i, m) for i, m in zip(images, masks, strict=True))
        encoded.append(Latents(views, torch.tensor(size, dtype=torch.float32), example.caption))
    return encoded


def _view(vae: AutoencoderKL, image: Image.Image, mask: Image.Image) -> View:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
    pixels = pixels.permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W) in [-1, 1]
    distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    # The mean over each latent's 8x8 pixels.
    small = mask.resize(
        (image.width // SIDE_MULTIPLE, image.height // SIDE_MULTIPLE), Image.Resampling.BOX
    )
    weights = torch.from_numpy(np.asarray(small, dtype=np.float32).copy())[None] / 255
    mean, std = (t[0].float().cpu() for t in (distribution.mean, distribution.std))
    return View(mean, std, weights)


class Order:
    """Which examples each batch has: all of one size, sizes and examples in fair shares.

    Within a size, every example comes once before any comes again.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, seed: int) -> None:
        self._members: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            self._members.setdefault(size, []).append(index)
        self._total = len(sizes)
        self._batch_size = batch_size
        self._seed = seed

    def batches(self) -> Iterator[list[int]]:
        """Endless lists of examples' indices."""
        streams = [self._shuffled(k, own) for k, own in enumerate(self._members.values())]
        shares = [len(own) / self._total for own in self._members.values()]
        given = [0] * len(streams)
        while True:
            due = [share * (sum(given) + 1) - g for share, g in zip(shares, given, strict=True)]
            chosen = due.index(max(due))
            given[chosen] += 1
            yield [next(streams[chosen]) for _ in range(self._batch_size)]

    def _shuffled(self, number: int, members: list[int]) -> Iterator[int]:
        rounds = 0
        while True:
            g = generator(self._seed, ORDER, number, rounds)
            yield from (members[i] for i in torch.randperm(len(members), generator=g).tolist())
            rounds += 1


@dataclass(frozen=True)
class Noise:
    """What a model's noise is like, as far as batches depend on it."""

    scaling_factor: float  # of the latents
    n_timesteps: int


def draw(
    items: Sequence[Latents],
    kind: int,
    number: int,
    places: range,
    n_places: int,
    plan: TrainPlan,
    noise: Noise,
) -> Batch:
    """`items` as the `places` of step `number`, which has `n_places` in all.

    The places go on over accumulated batches, and over the processes that share one.
    """
    rows = [
        _draw_row(item, generator(plan.seed, kind, number, place), plan)
        for place, item in zip(places, items, strict=True)
    ]
    # Each place has its own stretch of the timesteps, so a step covers all of them.
    timesteps = [
        int((place + row.timestep) / n_places * noise.n_timesteps)
        for place, row in zip(places, rows, strict=True)
    ]
    return Batch(
        torch.stack([row.latents for row in rows]) * noise.scaling_factor,
        torch.stack([row.noise for row in rows]),
        torch.tensor(timesteps),
        torch.stack([row.mask for row in rows]),
        torch.stack([item.time_ids for item in items]),
        [row.caption for row in rows],
    )


@dataclass(frozen=True)
class _Row:
    latents: Tensor
    noise: Tensor
    timestep: float  # in [0, 1)
    mask: Tensor
    caption: str


def _draw_row(item: Latents, g: torch.Generator, plan: TrainPlan) -> _Row:
    which, timestep, drop = torch.rand(3, generator=g).tolist()
    view = item.views[int(which * len(item.views))]
    shape = view.mean.shape
    latents = view.mean + view.std * torch.randn(shape, generator=g)
    noise = torch.randn(shape, generator=g)
    # crosslabs.org, "Diffusion with offset noise"
    noise = noise + plan.noise_offset * torch.randn((shape[0], 1, 1), generator=g)
    caption = "" if drop < plan.caption_dropout else item.caption
    return _Row(latents, noise, timestep, view.mask, caption)
