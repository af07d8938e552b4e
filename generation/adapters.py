"""Adapters: trained weights at a scale, and the words that refer to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weights.formats.types import TrainedWeights
from weights.trigger_words import replace_trigger_words


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


def report_shared_trigger_words(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
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
