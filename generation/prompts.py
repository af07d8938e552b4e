"""Texts to what the UNet is conditioned on: of any length, with weights, remembered."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from generation.plan import GenerationPlan
from generation.prompt_syntax import Blend, Fragment, ParsedPrompt, Passage, parse

if TYPE_CHECKING:
    from compel.embeddings_provider import EmbeddingsProvider
    from diffusers import DiffusionPipeline

MAX_CHUNKS = 20  # of 75 tokens; cross-attention takes memory and time for each
CACHED_TEXTS = 64  # 0.3 MB each, at SDXL's widths, for every 75 tokens


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt's embeddings; the negative ones are None where no guidance pass runs."""

    prompt_embeds: Tensor  # (1, 77 n, width of all text encoders)
    # (1, width of the second encoder's projection); None where there is one encoder
    pooled_prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None  # of the same size
    negative_pooled_prompt_embeds: Tensor | None


@dataclass(frozen=True)
class _Text:
    """What one text means."""

    embeds: Tensor  # (1, 77 n, width)
    pooled: Tensor | None  # (1, width of the projection)
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

    def encode(self, pipeline: DiffusionPipeline, plan: GenerationPlan) -> PromptEmbeddings:
        """Read the plan's prompts, once for all of its pictures.

        The longer one's chunks of 77 tokens decide the size; the other is filled up with what an
        empty text means, as compel does.
        """
        readers = _readers(pipeline, plan.clip_skip)

        def read(name: str, text: str) -> _Text:
            key = (len(readers), plan.clip_skip, self.state, text)
            found = self.cache.get(key, lambda: _read(readers, text))
            for note in found.notes:
                print(f"{name}: {note}")
            return found

        prompt = read("prompt", plan.prompt)
        if not plan.do_classifier_free_guidance:
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


@dataclass(frozen=True)
class _Reader:
    """A tokenizer and its text encoder."""

    tokenizer: Any
    encoder: Any
    # SD reads the last state, behind its norm; SDXL the one before, as it is.
    penultimate: bool


def _readers(pipeline: Any, clip_skip: int) -> list[_Reader]:  # noqa: ANN401
    """The pipeline's, in the order in which their states are joined."""
    names = [name for name in ("", "_2") if hasattr(pipeline, f"text_encoder{name}")]
    readers = [
        _Reader(
            getattr(pipeline, f"tokenizer{name}"),
            _without_last(getattr(pipeline, f"text_encoder{name}"), clip_skip - 1),
            penultimate=len(names) > 1,
        )
        for name in names
    ]
    return [reader for reader in readers if reader.encoder is not None]


def _without_last(encoder: Any, layers: int) -> Any:  # noqa: ANN401
    """A view of the text encoder without its last layers; it shares all that is left."""
    if not layers:
        return encoder
    view, inner = copy.copy(encoder), copy.copy(encoder.encoder)
    view._modules, inner._modules = {**encoder._modules}, {**encoder.encoder._modules}
    view.encoder, inner.layers = inner, nn.ModuleList(list(encoder.encoder.layers)[:-layers])
    return view


def _read(readers: Sequence[_Reader], text: str) -> _Text:
    parsed = parse(text)
    plain, notes = parsed.plain, list(parsed.notes)
    tokenizer, encoder = readers[-1].tokenizer, readers[-1].encoder
    pooled = None
    if readers[-1].penultimate:
        pooled = encoder(_tokens(tokenizer, plain).to(encoder.device))[0]
    states: Sequence[Tensor]
    if parsed.is_plain and _count(tokenizer, plain) <= tokenizer.model_max_length - 2:
        states = [_plain(reader, plain) for reader in readers]
    else:
        parts, cut = _fitting(parsed, tokenizer)
        notes += cut
        weighted = [_weighted(reader, parts, parsed.weights) for reader in readers]
        # SDXL's second tokenizer reads "!" as its padding, and so may cut elsewhere than the first.
        states = _filled_up(weighted, lambda: [_plain(reader, "") for reader in readers])
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


def _plain(reader: _Reader, text: str) -> Tensor:
    """As the stock pipeline reads it."""
    ids = _tokens(reader.tokenizer, text).to(reader.encoder.device)
    output = reader.encoder(ids, output_hidden_states=reader.penultimate)
    states: Tensor = output.hidden_states[-2] if reader.penultimate else output.last_hidden_state
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


def _weighted(
    reader: _Reader, parts: Sequence[Passage | Blend], weights: Sequence[float]
) -> Tensor:
    """Each part by itself, one after the other, by compel."""
    from compel.embeddings_provider import (
        EmbeddingsProvider,
        ReturnedEmbeddingsType,
        SplitLongTextMode,
    )

    kinds = ReturnedEmbeddingsType
    provider = EmbeddingsProvider(
        tokenizer=reader.tokenizer,
        text_encoder=reader.encoder,
        truncate=False,
        returned_embeddings_type=kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        if reader.penultimate
        else kinds.LAST_HIDDEN_STATES_NORMALIZED,
        split_long_text_mode=SplitLongTextMode.PHRASES,
    )
    states = []
    for part, weight in zip(parts, weights, strict=True):
        own = _blended(provider, part) if isinstance(part, Blend) else _passage(provider, part)
        if weight != 1:
            empty = provider.empty_z.repeat(1, own.shape[1] // provider.empty_z.shape[1], 1)
            own = empty + (own - empty) * weight
        states.append(own)
    return torch.cat(states, dim=1).to(reader.encoder.dtype)


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
