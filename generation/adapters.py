"""Trained weights in a model's shared modules: applied for one request, and taken back exactly."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from generation import merging
from weights.formats.types import TEXT_ENCODERS, UNET, Pooling, TokenVectors, TrainedWeights

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class Adapter:
    """Trained weights and how strongly their LoRA counts: any sign, 1 as trained."""

    weights: TrainedWeights
    scale: float


def with_own_tokens(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with placeholder tokens that no two of them share.

    Every file calls its tokens <s0>, <s1> ...; the first keeps the names, as people may have typed
    them.
    """
    return [adapter if k == 0 else _renamed(adapter, k) for k, adapter in enumerate(adapters)]


def _renamed(adapter: Adapter, number: int) -> Adapter:
    def other(text: str) -> str:
        return re.sub(r"<s(\d+)>", rf"<a{number}s\1>", text)

    weights = adapter.weights
    embeddings = tuple(
        replace(v, placeholder_tokens=tuple(map(other, v.placeholder_tokens)))
        for v in weights.embeddings
    )
    words = {word: other(tokens) for word, tokens in weights.trigger_words.items()}
    return replace(adapter, weights=replace(weights, embeddings=embeddings, trigger_words=words))


def text_state(adapters: Sequence[Adapter]) -> Hashable:
    """What the adapters make of texts: equal where every text means the same.

    An adapter's place decides what its tokens are called.
    """
    return tuple(
        (place, adapter.weights.serial, adapter.scale)
        for place, adapter in enumerate(adapters)
        if adapter.weights.embeddings
        or any(
            name.startswith(TEXT_ENCODERS)
            for name in (*adapter.weights.lora, *adapter.weights.parameters)
        )
    )


class AdapterSlot:
    """The only place that changes a loaded model's modules.

    Merging is in place, on the storages that the modules have: nothing that was compiled or
    captured for them goes stale. Taking back copies the pristine values, so it leaves no rounding
    behind. What is about to change is written down first: a cancellation can strike any line, and
    then the next request takes back what this one could not.

    Adapters that stay, the operator's, are merged once and not for each request.
    """

    def __init__(self, parts: Mapping[str, object]) -> None:
        self._parts = parts
        self._parameters = {
            f"{part}.{name}": parameter
            for part in (UNET, *TEXT_ENCODERS)
            if isinstance(module := parts.get(part), nn.Module)
            for name, parameter in module.named_parameters()
        }
        self._pristine: dict[str, Tensor] = {}  # of every parameter changed so far
        self._changed: set[str] = set()
        self._batches = merging.Batches(self._parameters)
        self._embeddings: dict[str, nn.Parameter] = {}  # part → its own token embeddings
        self._pooling: int | None = None  # the second encoder's own eos_token_id
        self._tokenizers: dict[tuple[tuple[str, ...], str], Any] = {}
        self._merged: tuple[Adapter, ...] | None = ()  # None while that changes
        self._own: Mapping[str, object] = {}  # tokenizers that know the merged adapters' words
        self._turn = object()  # whose adapters these are

    @contextmanager
    def applied(
        self, adapters: Sequence[Adapter], stay: bool = False
    ) -> Iterator[Mapping[str, object]]:
        """Merge the adapters, in order; yields the parts that take the model's own ones' place.

        Afterwards they are taken back, whatever happens inside and whenever it is cancelled, or at
        the latest when the next request comes here. Those that `stay` are taken back only once
        other adapters are asked for, or none.
        """
        turn = self._turn = object()
        kept = False
        try:
            self._become(tuple(adapters))
            kept = stay
            yield self._own
        finally:
            # Cancelled between here and its `with`, it ends when its frames go: perhaps during the
            # next request, whose adapters are not this one's to take back.
            if not kept and self._turn is turn:
                self._become(())

    def settle(self) -> None:
        """Take back what a cancelled request has left half done."""
        if self._merged is None:
            self._become(())

    def replace_base(self, parameters: Mapping[str, Tensor]) -> None:
        """New values for the model's own parameters, for good."""
        self._become(())
        self._pristine.clear()
        for name, value in parameters.items():
            self._parameters[name].copy_(value)

    def _become(self, adapters: tuple[Adapter, ...]) -> None:
        if self._merged is not None and _same(self._merged, adapters):
            return
        self._merged = None
        self._take_back()
        for adapter in adapters:
            self._merge(adapter)
        self._own = self._extend_vocabulary([a.weights for a in adapters])
        self._merged = adapters

    def _merge(self, adapter: Adapter) -> None:
        weights = adapter.weights
        lora = weights.lora if adapter.scale != 0 else {}
        self._remember([*weights.parameters, *(f"{module}.weight" for module in lora)])
        for name, value in weights.parameters.items():
            self._write([name], [value])
        if not lora:
            return
        for batch in self._batches.of(weights):
            parameters = [self._parameters[name] for name in batch.names]
            self._write(batch.names, batch.merged(parameters, adapter.scale))

    def _remember(self, names: Sequence[str]) -> None:
        """Pristine values of parameters that are about to change for the first time."""
        new = [name for name in dict.fromkeys(names) if name not in self._pristine]
        if new:
            copies = merging.copies([self._parameters[name] for name in new])
            self._pristine.update(zip(new, copies, strict=True))

    def _write(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Change parameters that are remembered."""
        self._changed.update(names)
        merging.copy_all([self._parameters[name] for name in names], values)

    def _extend_vocabulary(self, trained: Sequence[TrainedWeights]) -> Mapping[str, object]:
        """Rows for new tokens in both text encoders; returns tokenizers that know them."""
        vectors = [v for weights in trained for v in weights.embeddings]
        if not vectors:
            return {}
        tokens = tuple(token for v in vectors for token in v.placeholder_tokens)
        for part in _TOKENIZERS:
            if self._parts.get(part) is not None:
                self._append_rows(part, vectors)
        if self._parts.get("text_encoder_2") is not None and all(
            w.pooling is Pooling.EOS for w in trained if w.embeddings
        ):
            self._pool_at_the_end()
        return {_TOKENIZERS[part]: self._tokenizer(part, tokens) for part in self._embeddings}

    def _append_rows(self, part: str, vectors: Sequence[TokenVectors]) -> None:
        """Rows for all tokens: zeros for those that were trained for the other encoder alone."""
        embedding = self._parts[part].get_input_embeddings()  # type: ignore[attr-defined]
        own = embedding.weight
        rows = [
            v.vectors.get(part, own.new_zeros(len(v.placeholder_tokens), own.shape[1])).to(own)
            for v in vectors
        ]
        self._embeddings[part] = own
        embedding.weight = nn.Parameter(torch.cat([own, *rows]), requires_grad=False)

    def _tokenizer(self, part: str, tokens: tuple[str, ...]) -> Any:  # noqa: ANN401
        """A copy of the part's tokenizer with the tokens, whose ids are the appended rows'."""
        key = (tokens, part)
        if key not in self._tokenizers:
            from transformers import AddedToken

            extended = copy.deepcopy(self._parts[_TOKENIZERS[part]])
            added = [AddedToken(t, normalized=False, special=True) for t in tokens]
            extended.add_tokens(added, special_tokens=True)  # type: ignore[attr-defined]
            rows = self._embeddings[part].shape[0]
            ids = extended.convert_tokens_to_ids(list(tokens))  # type: ignore[attr-defined]
            assert ids == list(range(rows, rows + len(tokens))), "vocabulary and embeddings differ"
            self._tokenizers = {key: extended, **dict(list(self._tokenizers.items())[:15])}
        return self._tokenizers[key]

    def _pool_at_the_end(self) -> None:
        """Pool where the text ends, not at the highest token id, which a new token now has.

        SDXL's config says eos_token_id 2, by which transformers means the highest id
        (CLIPTextTransformer.forward).
        """
        model = self._parts["text_encoder_2"].text_model  # type: ignore[attr-defined]
        tokenizer: Any = self._parts["tokenizer_2"]
        self._pooling = model.eos_token_id
        model.eos_token_id = tokenizer.eos_token_id

    def _take_back(self) -> None:
        self._own = {}
        for part, own in list(self._embeddings.items()):
            self._parts[part].get_input_embeddings().weight = own  # type: ignore[attr-defined]
            del self._embeddings[part]
        if self._pooling is not None:
            self._parts["text_encoder_2"].text_model.eos_token_id = self._pooling  # type: ignore[attr-defined]
            self._pooling = None
        changed = list(self._changed)
        merging.copy_all(
            [self._parameters[name] for name in changed], [self._pristine[name] for name in changed]
        )
        self._changed.clear()


def _same(first: Sequence[Adapter], second: Sequence[Adapter]) -> bool:
    """Whether these are the same objects at the same scales: no tensor is compared."""
    return len(first) == len(second) and all(
        a.weights is b.weights and a.scale == b.scale for a, b in zip(first, second, strict=True)
    )
