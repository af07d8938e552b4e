"""Prompts and image sizes to what the UNet is conditioned on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generation.text_encoding import EncodedText, TextEncoder, encode_text, pad_to_longest
from models.components import ModelComponents
from models.lru_cache import LRUCache

CACHED_TEXTS = 64  # 0.3 MB each for every 75 tokens, at SDXL's widths
# diffusers' defaults for SDXL's refiner (LAION aesthetics scores)
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt's embeddings; the negative ones are None without classifier-free guidance."""

    prompt_embeds: Tensor  # (1, 77 n, D), D the width of all text encoders together
    pooled_prompt_embeds: Tensor | None  # (1, P) of the second encoder's projection; SDXL's alone
    negative_prompt_embeds: Tensor | None  # (1, 77 n, D)
    negative_pooled_prompt_embeds: Tensor | None  # (1, P)


@dataclass(frozen=True)
class Conditioning:
    """The UNet's inputs beside the sample and timestep: B rows, negative prompts first."""

    prompt_embeds: Tensor  # (B, 77 n, D)
    pooled_prompt_embeds: Tensor | None = None  # (B, P); SDXL's alone, like the time ids
    add_time_ids: Tensor | None = None  # (B, 6) or, with an aesthetics score, (B, 5)
    timestep_cond: Tensor | None = None  # (B, E): an embedding of the guidance scale

    def of_prompts(self) -> Conditioning:
        """Return the second half of the rows, without the negative prompts."""
        halves = (None if t is None else t.chunk(2)[1] for t in vars(self).values())
        return Conditioning(*halves)  # type: ignore[arg-type]  # the same fields in order

    def added_arguments(self) -> dict[str, Tensor] | None:
        """Return the UNet's and ControlNets' `added_cond_kwargs`."""
        if self.pooled_prompt_embeds is None or self.add_time_ids is None:
            return None
        return {"text_embeds": self.pooled_prompt_embeds, "time_ids": self.add_time_ids}


def condition(
    components: ModelComponents,
    prompts: PromptEmbeddings,
    size: tuple[int, int],
    n_images: int,
    guidance_scale: float,
) -> Conditioning:
    """Return the conditioning of `n_images` images of `size` (width, height) in pixels."""
    embeds, pooled = [prompts.prompt_embeds], [prompts.pooled_prompt_embeds]
    if prompts.negative_prompt_embeds is not None:
        embeds.insert(0, prompts.negative_prompt_embeds)
        pooled.insert(0, prompts.negative_pooled_prompt_embeds)
    like = embeds[0]
    added: dict[str, Tensor] = {}
    if components.is_sdxl:
        # Micro-conditioning (arXiv:2307.01952, section 2.2): original size, crop, and target size
        # or, for the refiner, a score; sizes as (height, width).
        ends: list[list[float]] = [[size[1], size[0]]] * 2
        if components.requires_aesthetics_score:
            ends = [[NEGATIVE_AESTHETIC_SCORE], [AESTHETIC_SCORE]]
        ids = [[size[1], size[0], 0, 0, *end] for end in ends][-len(embeds) :]
        added["pooled_prompt_embeds"] = _repeat([p for p in pooled if p is not None], n_images)
        rows = [torch.tensor([row], dtype=like.dtype) for row in ids]
        added["add_time_ids"] = _repeat(rows, n_images).to(like.device)
    width = components.unet.config.time_cond_proj_dim
    if width is not None:  # distilled to take the guidance scale as an input (arXiv:2210.03142)
        from diffusers.models.embeddings import get_timestep_embedding

        scale = torch.tensor([(guidance_scale - 1) * 1000.0]).repeat(n_images)
        added["timestep_cond"] = get_timestep_embedding(scale, width).to(like)
    return Conditioning(_repeat(embeds, n_images), **added)


def _repeat(rows: Sequence[Tensor], n_images: int) -> Tensor:
    """Repeat each row (1, ...) for every image: (rows · n_images, ...)."""
    return torch.cat([row.repeat_interleave(n_images, dim=0) for row in rows])


class PromptEncoder:
    """Encodes prompts, and remembers the texts it encoded last."""

    def __init__(self) -> None:
        self._cache: LRUCache[Hashable, EncodedText] = LRUCache(CACHED_TEXTS)

    def encode(
        self,
        components: ModelComponents,
        tokenizers: Mapping[str, Any],
        prompt: str,
        negative_prompt: str | None,
        clip_skip: int,
        state: Hashable,
    ) -> PromptEmbeddings:
        """Encode a request's prompts, once for all of its images.

        The longer text decides the number of chunks; the other is padded with an empty text's
        embeddings, as compel does.

        Args:
            tokenizers: by text encoder; those that know the placeholder tokens in use.
            negative_prompt: None without classifier-free guidance.
            state: equal where the text encoders' weights and vocabulary are.
        """
        encoders = [
            TextEncoder(tokenizers[name], network, components.is_sdxl, clip_skip)
            for name, network in components.text_encoders.items()
        ]

        def encode(name: str, text: str) -> EncodedText:
            key = (len(encoders), clip_skip, state, text)
            encoded = self._cache.get(key)
            if encoded is None:
                encoded = encode_text(encoders, text)
                self._cache.add(key, encoded)
            for note in encoded.notes:
                print(f"{name}: {note}")
            return encoded

        positive = encode("prompt", prompt)
        if negative_prompt is None:
            return PromptEmbeddings(positive.embeds, positive.pooled, None, None)
        negative = encode("negative_prompt", negative_prompt)
        embeds = [positive.embeds, negative.embeds]
        if embeds[0].shape != embeds[1].shape:
            embeds = pad_to_longest(embeds, lambda: [encode("prompt", "").embeds] * 2)
        return PromptEmbeddings(embeds[0], positive.pooled, embeds[1], negative.pooled)
