"""From the weights that a request names to adapters applied to a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from generation.errors import InvalidRequest
from generation.lora_merger import (
    Adapter,
    LoraMerger,
    Tokenizers,
    with_unique_placeholder_tokens,
)
from generation.plan import WeightsUse
from models.components import UNET, ModelComponents
from models.lru_cache import LRUCache
from weights import sources
from weights.references import OPERATOR, Source, Tokens
from weights.trained import ModelShapes, TrainedWeights, read_trained
from weights.trigger_words import replace_trigger_words

MEMORY_BYTES = 2_000_000_000  # of weights kept in memory: some ten LoRAs of rank 32 for SDXL


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
        adapters = with_unique_placeholder_tokens(adapters)
        _report_shared_trigger_words(adapters, names)
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
        with sources.fetch(source, tokens) as file:
            key = (file.digest, file.file_name)
            weights = self._cache.get(key)
            if weights is None:
                weights = read_trained(file.path, name, self._shapes, file.file_name)
                weights = replace(weights, digest=file.digest)
                self._cache.add(key, weights)
        print(f"{name}: {weights.description}")
        return weights


def _report_shared_trigger_words(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """Say what to type for the second of two adapters with one word: cog-sdxl's are all TOK."""
    taken: set[str] = set()
    for adapter, name in zip(adapters, names, strict=True):
        words = adapter.weights.trigger_words
        for word in sorted(taken & words.keys()):
            print(
                f"{name}: the trigger word {word!r} already refers to other weights; write"
                f" {words[word]} for these"
            )
        taken |= words.keys()


def replace_all_trigger_words(prompt: str, adapters: Sequence[Adapter]) -> str:
    """Replace every adapter's trigger words; one that several have refers to the first."""
    words: dict[str, str] = {}
    for adapter in adapters:
        words = {**adapter.weights.trigger_words, **words}
    return replace_trigger_words(prompt, words)
