"""Texts to what the UNet is conditioned on: of any length, with weights, remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from generation.prompt_syntax import Blend, Fragment, ParsedPrompt, Passage, parse
from generation.request import GenerationPlan

if TYPE_CHECKING:
    from compel.embeddings_provider import EmbeddingsProvider
    from diffusers import StableDiffusionXLPipeline

MAX_CHUNKS = 20  # of 75 tokens; cross-attention takes memory and time for each
CACHED_TEXTS = 64  # 0.3 MB each, at SDXL's widths, for every 75 tokens


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt's embeddings; the negative ones are None where no guidance pass runs."""

    prompt_embeds: Tensor  # (1, 77 n, width of both text encoders)
    pooled_prompt_embeds: Tensor  # (1, width of the second encoder's projection)
    negative_prompt_embeds: Tensor | None  # of the same size
    negative_pooled_prompt_embeds: Tensor | None


@dataclass(frozen=True)
class _Text:
    """What one text means."""

    embeds: Tensor  # (1, 77 n, width)
    pooled: Tensor  # (1, width of the projection)
    notes: tuple[str, ...]  # what was not read as it was written


class EmbeddingCache:
    """The texts that were read last, by the text encoders' state.

    A state is all that decides what a text means to a model beside the text: which encoders, and
    which trained weights are in them.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Text] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], _Text]) -> _Text:
        """What is kept for the key, or else what `read` gives."""
        if key not in self._kept:
            self._kept[key] = read()
        self._kept.move_to_end(key)
        while len(self._kept) > CACHED_TEXTS:
            self._kept.popitem(last=False)
        return self._kept[key]


@dataclass(frozen=True)
class Texts:
    """A cache, and the state that a request's text encoders are in."""

    cache: EmbeddingCache
    state: Hashable

    def encode(self, pipeline: StableDiffusionXLPipeline, plan: GenerationPlan) -> PromptEmbeddings:
        """Read the plan's prompts, once for all of its pictures.

        The longer one's chunks of 77 tokens decide the size; the other is filled up with what an
        empty text means, as compel does.
        """
        pairs = [
            (tokenizer, encoder)
            for tokenizer, encoder in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
            if encoder is not None
        ]

        def read(name: str, text: str) -> _Text:
            found = self.cache.get((len(pairs), self.state, text), lambda: _read(pairs, text))
            for note in found.notes:
                print(f"{name}: {note}")
            return found

        prompt = read("prompt", plan.prompt)
        if not plan.guided:
            return PromptEmbeddings(prompt.embeds, prompt.pooled, None, None)
        negative = read("negative_prompt", plan.negative_prompt)
        each = (prompt.embeds, negative.embeds)
        embeds, negative_embeds = _filled_up(each, lambda: [read("prompt", "").embeds] * 2)
        return PromptEmbeddings(embeds, prompt.pooled, negative_embeds, negative.pooled)


def _filled_up(each: Sequence[Tensor], empty: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """(1, 77 n, width), all as long as the longest, by what an `empty` text means to each."""
    longest = max(own.shape[1] for own in each)
    if all(own.shape[1] == longest for own in each):
        return each
    return [
        torch.cat([own, filling.repeat(1, (longest - own.shape[1]) // filling.shape[1], 1)], dim=1)
        for own, filling in zip(each, empty(), strict=True)
    ]


Pair = tuple[Any, Any]  # a tokenizer and its text encoder


def _read(pairs: Sequence[Pair], text: str) -> _Text:
    parsed = parse(text)
    plain, notes = parsed.plain, list(parsed.notes)
    tokenizer, encoder = pairs[-1]
    pooled = encoder(_tokens(tokenizer, plain).to(encoder.device))[0]
    states: Sequence[Tensor]
    if parsed.is_plain and _count(tokenizer, plain) <= tokenizer.model_max_length - 2:
        states = [_plain(pair, plain) for pair in pairs]
    else:
        parts, cut = _fitting(parsed, tokenizer)
        notes += cut
        weighted = [_weighted(pair, parts, parsed.weights) for pair in pairs]
        # SDXL's second tokenizer reads "!" as its padding, and so may cut elsewhere than the first.
        states = _filled_up(weighted, lambda: [_plain(pair, "") for pair in pairs])
    return _Text(torch.cat(list(states), dim=-1), pooled, tuple(notes))


def _tokens(tokenizer: Any, text: str) -> Tensor:  # noqa: ANN401
    """(1, 77): the beginning of the text where it is longer."""
    ids: Tensor = tokenizer(
        text,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def _plain(pair: Pair, text: str) -> Tensor:
    """As the stock pipeline reads it."""
    tokenizer, encoder = pair
    output = encoder(_tokens(tokenizer, text).to(encoder.device), output_hidden_states=True)
    states: Tensor = output.hidden_states[-2]
    return states


# Long and weighted texts


def _count(tokenizer: Any, text: str) -> int:  # noqa: ANN401
    """Tokens of a text, without its start and end."""
    # Not verbose: it warns of texts that are longer than a model can take in one piece.
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _fitting(
    parsed: ParsedPrompt,
    tokenizer: Any,  # noqa: ANN401
) -> tuple[list[Passage | Blend], list[str]]:
    """The parts without what says nothing and what is beyond MAX_CHUNKS; a note of the latter."""
    limit = MAX_CHUNKS * (tokenizer.model_max_length - 2)
    left = limit
    cut = False

    def fit(passage: Passage) -> Passage:
        nonlocal left, cut
        kept = []
        for fragment in passage:
            count = _count(tokenizer, fragment.text)
            if count > left:
                cut = True
                fragment = Fragment(_beginning(tokenizer, fragment.text, left), fragment.weight)
                count = _count(tokenizer, fragment.text)
            if count:
                kept.append(fragment)
                left -= count
        return tuple(kept)

    parts: list[Passage | Blend] = []
    for part in parsed.parts:
        if isinstance(part, Blend):
            part = Blend(tuple(map(fit, part.passages)), part.weights, part.normalized)
            parts.append(part)
        else:
            parts.append(fit(part))
    return parts, [f"only its first {limit} tokens are read; the rest is left out"] if cut else []


def _beginning(tokenizer: Any, text: str, limit: int) -> str:  # noqa: ANN401
    """As much of a text as makes no more tokens than the limit."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _count(tokenizer, text[:middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _weighted(pair: Pair, parts: Sequence[Passage | Blend], weights: Sequence[float]) -> Tensor:
    """Each part by itself, one after the other, by compel."""
    from compel.embeddings_provider import (
        EmbeddingsProvider,
        ReturnedEmbeddingsType,
        SplitLongTextMode,
    )

    tokenizer, encoder = pair
    provider = EmbeddingsProvider(
        tokenizer=tokenizer,
        text_encoder=encoder,
        truncate=False,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        split_long_text_mode=SplitLongTextMode.PHRASES,
    )
    states = []
    for part, weight in zip(parts, weights, strict=True):
        own = _blended(provider, part) if isinstance(part, Blend) else _passage(provider, part)
        if weight != 1:
            empty = provider.empty_z.repeat(1, own.shape[1] // provider.empty_z.shape[1], 1)
            own = empty + (own - empty) * weight
        states.append(own)
    return torch.cat(states, dim=1).to(encoder.dtype)


def _blended(provider: EmbeddingsProvider, blend: Blend) -> Tensor:
    each = [_passage(provider, passage) for passage in blend.passages]
    filled = _filled_up(each, lambda: [provider.empty_z] * len(each))
    mixed: Tensor = provider.apply_embedding_weights(
        torch.stack(list(filled), dim=1), blend.weights, normalize=blend.normalized
    )
    return mixed


def _passage(provider: EmbeddingsProvider, passage: Passage) -> Tensor:
    """(1, 77 n, width). A weight scales what a fragment adds to an empty text; below 1, what the
    passage means without the fragment is mixed in too, the more the less the weight.
    """
    embeds: Tensor = provider.get_embeddings_for_weighted_prompt_fragments(
        text_batch=[[fragment.text for fragment in passage]],
        fragment_weights_batch=[[fragment.weight for fragment in passage]],
        device=provider.device,
    )
    return embeds
