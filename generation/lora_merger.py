"""Merge adapters into a model's weights for one request, and take them back exactly."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from generation import delta_merge
from models.components import ModelComponents
from models.lru_cache import LRUCache
from models.tokens import add_placeholder_tokens, text_transformer
from weights.trained import Pooling, TokenVectors, TrainedWeights
from weights.trained_types import TEXT_ENCODERS

Tokenizers = Mapping[str, Any]  # text encoder → tokenizer
_MAX_TOKENIZERS = 16  # that are kept: extending one takes tens of milliseconds


@dataclass(frozen=True)
class Adapter:
    """Trained weights and the scale of their LoRA: any sign, 1 as trained."""

    weights: TrainedWeights
    scale: float


def with_unique_placeholder_tokens(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Rename placeholder tokens so that no two adapters share one.

    Every file names its tokens <s0>, <s1> ...; the first adapter keeps them, as users may have
    typed them.
    """
    return [adapter if k == 0 else _renamed(adapter, k) for k, adapter in enumerate(adapters)]


def _renamed(adapter: Adapter, number: int) -> Adapter:
    def rename(text: str) -> str:
        return re.sub(r"<s(\d+)>", rf"<a{number}s\1>", text)

    weights = adapter.weights
    embeddings = tuple(
        replace(v, placeholder_tokens=tuple(map(rename, v.placeholder_tokens)))
        for v in weights.embeddings
    )
    words = {word: rename(tokens) for word, tokens in weights.trigger_words.items()}
    return replace(adapter, weights=replace(weights, embeddings=embeddings, trigger_words=words))


def text_encoder_cache_key(adapters: Sequence[Adapter]) -> Hashable:
    """Return a key that is equal where the adapters change text encoders equally.

    An adapter's position decides the names of its tokens.
    """
    return tuple(
        (position, adapter.weights.serial, adapter.scale)
        for position, adapter in enumerate(adapters)
        if adapter.weights.embeddings
        or any(
            name.startswith(TEXT_ENCODERS)
            for name in (*adapter.weights.lora, *adapter.weights.parameters)
        )
    )


class LoraMerger:
    """The only place that changes a loaded model's weights.

    It merges in place, so that no compiled pass or CUDA graph goes stale, and restores copies of
    the original values, so that no rounding remains. It records what it is about to change first: a
    cancellation can strike any line, and then the next request restores what this one could not.

    Adapters that are kept, the operator's, are merged once and not for each request.
    """

    def __init__(self, components: ModelComponents) -> None:
        self._components = components
        self._parameters = {
            f"{part}.{name}": parameter
            for part, network in components.adaptable().items()
            for name, parameter in network.named_parameters()
        }
        self._originals: dict[str, Tensor] = {}  # of every parameter changed so far
        self._changed: set[str] = set()
        self._deltas = delta_merge.DeltaCache(self._parameters)
        self._embeddings: dict[str, nn.Parameter] = {}  # text encoder → original token embeddings
        self._pooling_id: int | None = None  # the second text encoder's original eos_token_id
        self._extended: LRUCache[Hashable, Any] = LRUCache(_MAX_TOKENIZERS)
        self._merged: tuple[Adapter, ...] | None = ()  # None while that changes
        self._tokenizers: Tokenizers = components.tokenizers
        self._owner = object()  # the request that merged them

    @contextmanager
    def applied(self, adapters: Sequence[Adapter], keep: bool = False) -> Iterator[Tokenizers]:
        """Merge adapters in order; yield tokenizers that know their placeholder tokens.

        They are taken back afterwards, on errors and cancellation too, or at the latest when the
        next request comes here. With `keep`, only once other adapters are applied.
        """
        owner = self._owner = object()
        kept = False
        try:
            self._switch_to(tuple(adapters))
            kept = keep
            yield self._tokenizers
        finally:
            # A request cancelled between here and its `with` statement ends when its frames are
            # freed, perhaps during the next request, whose adapters it must not take back.
            if not kept and self._owner is owner:
                self._switch_to(())

    def recover(self) -> None:
        """Restore what a cancelled request has left half done."""
        if self._merged is None:
            self._switch_to(())

    def replace_base(self, parameters: Mapping[str, Tensor]) -> None:
        """Change the model's parameters for good."""
        self._switch_to(())
        self._originals.clear()
        for name, value in parameters.items():
            self._parameters[name].copy_(value)

    def _switch_to(self, adapters: tuple[Adapter, ...]) -> None:
        if self._merged is not None and _same(self._merged, adapters):
            return
        self._merged = None
        self._restore()
        for adapter in adapters:
            self._merge(adapter)
        self._tokenizers = self._extend_vocabulary([a.weights for a in adapters])
        self._merged = adapters

    def _merge(self, adapter: Adapter) -> None:
        weights = adapter.weights
        lora = weights.lora if adapter.scale != 0 else {}
        self._copy_originals([*weights.parameters, *(f"{module}.weight" for module in lora)])
        for name, value in weights.parameters.items():
            self._write([name], [value])
        if not lora:
            return
        for batch in self._deltas.get(weights):
            parameters = [self._parameters[name] for name in batch.names]
            self._write(batch.names, batch.merge(parameters, adapter.scale))

    def _copy_originals(self, names: Sequence[str]) -> None:
        """Copy parameters that are about to change for the first time."""
        new = [name for name in dict.fromkeys(names) if name not in self._originals]
        if new:
            copies = delta_merge.copy_of_each([self._parameters[name] for name in new])
            self._originals.update(zip(new, copies, strict=True))

    def _write(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Change parameters whose originals are copied."""
        self._changed.update(names)
        delta_merge.copy_all([self._parameters[name] for name in names], values)

    def _extend_vocabulary(self, trained: Sequence[TrainedWeights]) -> Tokenizers:
        """Append token embeddings to the text encoders; return tokenizers that know the tokens."""
        vectors = [v for weights in trained for v in weights.embeddings]
        if not vectors:
            return self._components.tokenizers
        tokens = tuple(token for v in vectors for token in v.placeholder_tokens)
        for name in self._components.text_encoders:
            self._append_embeddings(name, vectors)
        if self._components.is_sdxl and all(
            w.pooling is Pooling.EOS for w in trained if w.embeddings
        ):
            self._pool_at_end_token()
        return {name: self._tokenizer(name, tokens) for name in self._embeddings}

    def _append_embeddings(self, name: str, vectors: Sequence[TokenVectors]) -> None:
        """Append rows for all tokens: zeros where a file has none for this text encoder."""
        embedding: Any = self._components.text_encoders[name].get_input_embeddings()
        original = embedding.weight
        width = original.shape[1]
        rows = [
            v.vectors.get(name, original.new_zeros(len(v.placeholder_tokens), width)).to(original)
            for v in vectors
        ]
        self._embeddings[name] = original
        embedding.weight = nn.Parameter(torch.cat([original, *rows]), requires_grad=False)

    def _tokenizer(self, name: str, tokens: tuple[str, ...]) -> Any:  # noqa: ANN401
        """Return a text encoder's tokenizer with the tokens, whose ids are the appended rows'."""
        extended = self._extended.get((name, tokens))
        if extended is None:
            first_id = self._embeddings[name].shape[0]
            original = self._components.tokenizers[name]
            extended = add_placeholder_tokens(original, tokens, first_id)
            self._extended.add((name, tokens), extended)
        return extended

    def _pool_at_end_token(self) -> None:
        """Pool where the text ends (models.tokens.pooled_at_end_token says why)."""
        inner = text_transformer(self._components.text_encoders["text_encoder_2"])
        self._pooling_id = inner.eos_token_id
        inner.eos_token_id = self._components.tokenizers["text_encoder_2"].eos_token_id

    def _restore(self) -> None:
        self._tokenizers = self._components.tokenizers
        for name, original in list(self._embeddings.items()):
            self._components.text_encoders[name].get_input_embeddings().weight = original
            del self._embeddings[name]
        if self._pooling_id is not None:
            inner = text_transformer(self._components.text_encoders["text_encoder_2"])
            inner.eos_token_id = self._pooling_id
            self._pooling_id = None
        changed = list(self._changed)
        delta_merge.copy_all(
            [self._parameters[name] for name in changed],
            [self._originals[name] for name in changed],
        )
        self._changed.clear()


def _same(first: Sequence[Adapter], second: Sequence[Adapter]) -> bool:
    """Whether these are the same objects at the same scales: no tensor is compared."""
    return len(first) == len(second) and all(
        a.weights is b.weights and a.scale == b.scale for a, b in zip(first, second, strict=True)
    )
