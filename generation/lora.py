"""Merge adapters into a model's weights for one request, and take them back exactly."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generation import delta_merge
from generation.adapters import (
    Adapter,
    report_shared_trigger_words,
    with_unique_placeholder_tokens,
)
from generation.errors import InvalidRequest
from generation.plan import WeightsUse
from models.components import UNET, ModelComponents
from models.lru_cache import LRUCache
from models.tokens import add_placeholder_tokens, text_transformer
from weights.formats.read import read_trained
from weights.formats.types import (
    TEXT_ENCODERS,
    ModelShapes,
    Pooling,
    TokenVectors,
    TrainedWeights,
)
from weights.user.fetch import fetch
from weights.user.parse import OPERATOR, Source, Tokens

Tokenizers = Mapping[str, Any]  # text encoder → tokenizer

MEMORY_BYTES = 2_000_000_000  # of weights kept in memory: some ten LoRAs of rank 32 for SDXL
MAX_TOKENIZERS = 16  # that are kept: extending one takes tens of milliseconds


class AdapterManager:
    """The adapters of one loaded model: a request's, the operator's and the model's."""

    def __init__(self, components: ModelComponents) -> None:
        self._merger = LoraMerger(components)
        self._shapes = ModelShapes.of(components.adaptable())
        self._cache: LRUCache[tuple[str, str], TrainedWeights] = LRUCache(
            MEMORY_BYTES, lambda weights: weights.n_bytes
        )
        self._operator_weights: TrainedWeights | None = None
        self._model_weights: dict[Path, TrainedWeights] = {}

    def set_operator_weights(self, source: Source, tokens: Tokens) -> None:
        """Make these weights the default of requests that name none. Raises a WeightsError.

        A checkpoint replaces the base model for good, below whatever requests name.
        """
        weights = self._read(OPERATOR, source, tokens)
        if weights.checkpoint:
            self._merger.replace_base(weights.parameters)
        else:
            self._operator_weights = weights

    def read(self, uses: Sequence[WeightsUse], tokens: Tokens) -> list[Adapter]:
        """Download and validate what a request uses; nothing is changed yet.

        Raises:
            InvalidRequest: a checkpoint is given where only an adapter can be.
            WeightsError: weights cannot be downloaded or read, or are for another model.
        """
        adapters, names = [], []
        for k, use in enumerate(uses):
            weights = self._operator_weights
            if use.source is not None:
                weights = self._read(use.name, use.source, tokens)
                if k > 0 and weights.parameters:
                    raise InvalidRequest(
                        f"{use.name} is {weights.description}: it replaces the base model and"
                        " cannot be combined with others in loras; give it as replicate_weights"
                    )
            if weights is not None:
                adapters.append(Adapter(weights, use.scale))
                names.append(use.name)
        if len(adapters) > 1:
            adapters = with_unique_placeholder_tokens(adapters)
            report_shared_trigger_words(adapters, names)
        return adapters

    def model_adapter(self, name: str, file: Path) -> Adapter:
        """Return the LoRA that is a part of one of the models: its catalog entry and file."""
        if file not in self._model_weights:
            weights = read_trained(file, name, self._shapes)
            # Text encoders are shared with models that do not have it.
            assert all(module.startswith(f"{UNET}.") for module in weights.lora), name
            self._model_weights[file] = weights
        return Adapter(self._model_weights[file], 1.0)

    @contextmanager
    def applied(
        self, adapters: Sequence[Adapter], model_adapters: Sequence[Adapter] = ()
    ) -> Iterator[Tokenizers]:
        """Merge the adapters; yield tokenizers that know their placeholder tokens.

        The model's come last: among the others may be a checkpoint, which replaces all values.
        """
        keep = all(adapter.weights is self._operator_weights for adapter in adapters)
        with self._merger.applied([*adapters, *model_adapters], keep) as tokenizers:
            yield tokenizers

    def recover(self) -> None:
        """Restore what a cancelled request has left half done."""
        self._merger.recover()

    def _read(self, name: str, source: Source, tokens: Tokens) -> TrainedWeights:
        with fetch(source, tokens) as file:
            key = (file.digest, file.file_name)
            weights = self._cache.get(key)
            if weights is None:
                weights = read_trained(file.path, name, self._shapes, file.file_name)
                weights = replace(weights, digest=file.digest)
                self._cache.add(key, weights)
        print(f"{name}: {weights.description}")
        return weights


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
        self._extended: LRUCache[Hashable, Any] = LRUCache(MAX_TOKENIZERS)
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
            if adapters or self._merged != ():
                self._switch_to(tuple(adapters))
            kept = keep
            yield self._tokenizers
        finally:
            # A request cancelled between here and its `with` statement ends when its frames are
            # freed, perhaps during the next request, whose adapters it must not take back.
            if not kept and self._owner is owner and self._merged != ():
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
