"""Placeholder tokens of textual inversions (arXiv:2208.01618), and pooling where a text ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def add_placeholder_tokens(tokenizer: Any, tokens: Sequence[str], first_id: int) -> Any:  # noqa: ANN401
    """Return a copy of a tokenizer that reads each of `tokens` as one token.

    Their ids count up from `first_id`, the number of rows of the text encoder's embedding table.
    """
    from transformers import AddedToken

    extended = copy.deepcopy(tokenizer)
    added = [AddedToken(token, normalized=False, special=True) for token in tokens]
    extended.add_tokens(added, special_tokens=True)
    ids = extended.convert_tokens_to_ids(list(tokens))
    assert ids == list(range(first_id, first_id + len(tokens))), "vocabulary and embeddings differ"
    return extended


def tokenize(tokenizer: Any, text: str) -> Tensor:  # noqa: ANN401
    """Return the ids (1, 77) of a text, padded, or cut where it is longer."""
    ids: Tensor = tokenizer(
        text,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


@contextmanager
def pooled_at_end_token(text_encoder: Any, tokenizer: Any) -> Iterator[None]:  # noqa: ANN401
    """Pool at the end token, rather than at the highest id, which is a placeholder token's.

    SDXL's config says eos_token_id 2, by which transformers means the highest id
    (CLIPTextModel.forward): pooled embeddings would ignore every word after a placeholder.
    """
    inner = text_transformer(text_encoder)
    configured = inner.eos_token_id
    try:
        inner.eos_token_id = tokenizer.eos_token_id
        yield
    finally:
        inner.eos_token_id = configured


def text_transformer(text_encoder: Any) -> Any:  # noqa: ANN401
    """Return the part of a text encoder that pools: with a projection, an inner module."""
    return getattr(text_encoder, "text_model", text_encoder)
