"""Replaceable weights: from what a request names to adapters that a loaded model can wear."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from generation.adapters import Adapter, AdapterSlot, with_own_tokens
from generation.errors import InvalidRequest
from generation.request import WeightsUse
from weights.formats.read import read_trained
from weights.formats.types import TEXT_ENCODERS, UNET, ModelShapes, TrainedWeights
from weights.trigger_words import replace_trigger_words
from weights.user.fetch import fetch
from weights.user.parse import OPERATOR, Source, Tokens

MEMORY_BYTES = 2_000_000_000  # of weights kept in memory: some ten LoRAs of rank 32 for SDXL


class Shelf:
    """The weights that were used last, as many as fit into a number of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[tuple[str, str], TrainedWeights] = OrderedDict()

    def get(self, key: tuple[str, str]) -> TrainedWeights | None:
        """What was put there, if it is there still."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: tuple[str, str], weights: TrainedWeights) -> None:
        """Keep the weights, unless they alone are too many bytes."""
        if weights.n_bytes > self._limit_bytes:
            return
        self._kept[key] = weights
        while sum(kept.n_bytes for kept in self._kept.values()) > self._limit_bytes:
            self._kept.popitem(last=False)


class ReplaceableWeights:
    """What requests and the operator put into one loaded model."""

    def __init__(self, parts: Mapping[str, object]) -> None:
        self._slot = AdapterSlot(parts)
        named = {part: parts.get(part) for part in (UNET, *TEXT_ENCODERS)}
        self._shapes = ModelShapes.of({k: m for k, m in named.items() if isinstance(m, nn.Module)})
        self._shelf = Shelf(MEMORY_BYTES)
        self._operators: TrainedWeights | None = None
        self._own: dict[Path, TrainedWeights] = {}

    def set_up(self, source: Source, tokens: Tokens) -> None:
        """Take the operator's weights: the default of every request that names none.

        A whole checkpoint becomes the model itself, for good: what requests name goes on top of it.
        Raises a WeightsError.
        """
        weights = self._read(OPERATOR, source, tokens)
        if weights.checkpoint:
            self._slot.replace_base(weights.parameters)
        else:
            self._operators = weights

    def read(self, uses: Sequence[WeightsUse], tokens: Tokens) -> list[Adapter]:
        """Fetch and check what a request uses, before anything is changed.

        Raises:
            InvalidRequest: a whole model is named where only what goes on top of one can be.
            WeightsError: it cannot be fetched or read, or is for another model.
        """
        adapters, names = [], []
        for k, use in enumerate(uses):
            weights = self._operators
            if use.source is not None:
                weights = self._read(use.name, use.source, tokens)
                if k > 0 and weights.parameters:
                    raise InvalidRequest(
                        f"{use.name} is {weights.description}: it takes the model's place and"
                        " cannot be combined with others in loras; give it as replicate_weights"
                    )
            if weights is not None:
                adapters.append(Adapter(weights, use.scale))
                names.append(use.name)
        adapters = with_own_tokens(adapters)
        _tell_taken_words(adapters, names)
        return adapters

    def own(self, name: str, file: Path) -> Adapter:
        """The adapter that makes these weights one of our models: catalog entry and its file."""
        if file not in self._own:
            weights = read_trained(file, name, self._shapes)
            # Only UNets belong to one model alone, and this may stay in it.
            assert all(module.startswith(f"{UNET}.") for module in weights.lora), name
            self._own[file] = weights
        return Adapter(self._own[file], 1.0)

    @contextmanager
    def applied(
        self, adapters: Sequence[Adapter], own: Sequence[Adapter] = ()
    ) -> Iterator[Mapping[str, object]]:
        """The model with these adapters; yields the tokenizers that know their words.

        The model's `own` go on top: among the others may be one that replaces all its values.
        """
        stay = all(adapter.weights is self._operators for adapter in adapters)
        with self._slot.applied([*adapters, *own], stay) as parts:
            yield parts

    def settle(self) -> None:
        """Take back what a cancelled request has left half done."""
        self._slot.settle()

    def _read(self, name: str, source: Source, tokens: Tokens) -> TrainedWeights:
        with fetch(source, tokens) as file:
            key = (file.digest, file.file_name)
            weights = self._shelf.get(key)
            if weights is None:
                weights = replace(
                    read_trained(file.path, name, self._shapes, file.file_name), digest=file.digest
                )
                self._shelf.put(key, weights)
        print(f"{name}: {weights.description}")
        return weights


def _tell_taken_words(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """All of cog-sdxl's archives say TOK: say what to type for the second one's."""
    taken: set[str] = set()
    for adapter, name in zip(adapters, names, strict=True):
        words = adapter.weights.trigger_words
        for word in sorted(taken & words.keys()):
            print(f"{name}: {word!r} is another one's word too; for its own write {words[word]}")
        taken |= words.keys()


def replace_all_trigger_words(prompt: str, adapters: Sequence[Adapter]) -> str:
    """The prompt with every adapter's words; where two have the same, the first one's counts."""
    words: dict[str, str] = {}
    for adapter in adapters:
        words = {**adapter.weights.trigger_words, **words}
    return replace_trigger_words(prompt, words)
