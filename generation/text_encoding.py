"""Encode texts of any length, with weights, by CLIP's text encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from generation.prompt_parser import Blend, Fragment, ParsedPrompt, Segment, parse
from models.tokens import tokenize

if TYPE_CHECKING:
    from compel.embeddings_provider import EmbeddingsProvider

MAX_CHUNKS = 20  # of 75 tokens; cross-attention takes memory and time for each


@dataclass(frozen=True)
class EncodedText:
    """The embeddings of one text."""

    embeds: Tensor  # (1, 77 n, D)
    pooled: Tensor | None  # (1, P)
    notes: tuple[str, ...]  # parts of the text that were not read as written, for the log


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and its text encoder."""

    tokenizer: Any
    network: Any
    is_sdxl: bool  # SDXL reads the penultimate layer as it is; SD reads a layer behind the norm
    clip_skip: int  # SD's: 1 reads the last layer, 2 the one before

    def encode(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Encode a text of up to 75 tokens as stock diffusers does: (1, 77, width), pooled."""
        ids = tokenize(self.tokenizer, text).to(self.network.device)
        output = self.network(ids, output_hidden_states=self.is_sdxl or self.clip_skip > 1)
        if self.is_sdxl:
            return output.hidden_states[-2], output[0]
        if self.clip_skip == 1:
            return output.last_hidden_state, None
        return self.network.final_layer_norm(output.hidden_states[-self.clip_skip]), None

    def for_compel(self) -> Any:  # noqa: ANN401
        """Return what compel calls to get the layer that is read."""
        network = self.network
        if self.clip_skip == 1:
            return network
        return _ClipSkip(network, self.clip_skip)


@dataclass(frozen=True)
class _ClipSkip:
    """A text encoder whose last hidden state is that of an earlier layer."""

    network: Any
    clip_skip: int

    @property
    def device(self) -> torch.device:
        """The network's."""
        device: torch.device = self.network.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    def __call__(self, ids: Tensor, attention_mask: Tensor | None, **_: object) -> SimpleNamespace:
        states = self.network(ids, attention_mask, output_hidden_states=True).hidden_states
        return SimpleNamespace(
            last_hidden_state=self.network.final_layer_norm(states[-self.clip_skip])
        )


def pad_to_longest(embeds: list[Tensor], empty: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Pad embeddings (1, 77 n, width) with those of an `empty` text, one for each."""
    longest = max(each.shape[1] for each in embeds)
    if all(each.shape[1] == longest for each in embeds):
        return embeds
    return [
        torch.cat([each, padding.repeat(1, (longest - each.shape[1]) // padding.shape[1], 1)], 1)
        for each, padding in zip(embeds, empty(), strict=True)
    ]


def encode_text(encoders: Sequence[TextEncoder], text: str) -> EncodedText:
    """Encode a text by a model's text encoders, whose embeddings are joined."""
    parsed = parse(text)
    plain, notes = parsed.plain, list(parsed.notes)
    tokenizer = encoders[-1].tokenizer
    pooled = None
    states: Sequence[Tensor]
    if parsed.is_plain and _count(tokenizer, plain) <= tokenizer.model_max_length - 2:
        encoded = [encoder.encode(plain) for encoder in encoders]
        states, pooled = [state for state, _ in encoded], encoded[-1][1]
    else:
        if encoders[-1].is_sdxl:
            pooled = encoders[-1].encode(plain)[1]
        parts, cut = _fitting(parsed, tokenizer)
        notes += cut
        weighted = [_encode_weighted(encoder, parts, parsed.weights) for encoder in encoders]
        # SDXL's second tokenizer pads with "!", and so may split a text elsewhere than the first.
        states = pad_to_longest(weighted, lambda: [e.encode("")[0] for e in encoders])
    return EncodedText(torch.cat(list(states), dim=-1), pooled, tuple(notes))


# Long and weighted texts


def _count(tokenizer: Any, text: str) -> int:  # noqa: ANN401
    """Count a text's tokens, without its start and end."""
    # Not verbose: it warns of texts longer than a model takes at once, which are split here.
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _fitting(
    parsed: ParsedPrompt,
    tokenizer: Any,  # noqa: ANN401
) -> tuple[list[Segment | Blend], list[str]]:
    """Drop empty fragments and what is beyond MAX_CHUNKS; return a note about the latter."""
    limit = MAX_CHUNKS * (tokenizer.model_max_length - 2)
    left = limit
    cut = False

    def fit(segment: Segment) -> Segment:
        nonlocal left, cut
        kept = []
        for fragment in segment:
            count = _count(tokenizer, fragment.text)
            if count > left:
                cut = True
                fragment = Fragment(_beginning(tokenizer, fragment.text, left), fragment.weight)
                count = _count(tokenizer, fragment.text)
            if count:
                kept.append(fragment)
                left -= count
        return tuple(kept)

    parts: list[Segment | Blend] = []
    for part in parsed.parts:
        if isinstance(part, Blend):
            part = Blend(tuple(map(fit, part.segments)), part.weights, part.normalized)
            parts.append(part)
        else:
            parts.append(fit(part))
    return parts, [f"only its first {limit} tokens are read; the rest is ignored"] if cut else []


def _beginning(tokenizer: Any, text: str, limit: int) -> str:  # noqa: ANN401
    """Return the longest beginning of a text with at most `limit` tokens."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _count(tokenizer, text[:middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _encode_weighted(
    encoder: TextEncoder, parts: Sequence[Segment | Blend], weights: Sequence[float]
) -> Tensor:
    """Encode each part by itself, by compel, and join them: (1, 77 n, width)."""
    from compel.embeddings_provider import (
        EmbeddingsProvider,
        ReturnedEmbeddingsType,
        SplitLongTextMode,
    )

    layers = ReturnedEmbeddingsType
    provider = EmbeddingsProvider(
        tokenizer=encoder.tokenizer,
        text_encoder=encoder.for_compel(),
        truncate=False,
        returned_embeddings_type=layers.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        if encoder.is_sdxl
        else layers.LAST_HIDDEN_STATES_NORMALIZED,
        split_long_text_mode=SplitLongTextMode.PHRASES,
    )
    states = []
    for part, weight in zip(parts, weights, strict=True):
        embeds = (
            _blend(provider, part) if isinstance(part, Blend) else _encode_segment(provider, part)
        )
        if weight != 1:
            empty = provider.empty_z.repeat(1, embeds.shape[1] // provider.empty_z.shape[1], 1)
            embeds = empty + (embeds - empty) * weight
        states.append(embeds)
    return torch.cat(states, dim=1).to(encoder.network.dtype)


def _blend(provider: EmbeddingsProvider, blend: Blend) -> Tensor:
    each = [_encode_segment(provider, segment) for segment in blend.segments]
    padded = pad_to_longest(each, lambda: [provider.empty_z] * len(each))
    mixed: Tensor = provider.apply_embedding_weights(
        torch.stack(list(padded), dim=1), blend.weights, normalize=blend.normalized
    )
    return mixed


def _encode_segment(provider: EmbeddingsProvider, segment: Segment) -> Tensor:
    """Encode weighted fragments together: (1, 77 n, width).

    A weight scales the difference to an empty text; one below 1 also mixes in the segment without
    the fragment.
    """
    embeds: Tensor = provider.get_embeddings_for_weighted_prompt_fragments(
        text_batch=[[fragment.text for fragment in segment]],
        fragment_weights_batch=[[fragment.weight for fragment in segment]],
        device=provider.device,
    )
    return embeds
