"""A new word: vectors for both text encoders that learn beside a frozen vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainPlan
from training.cuda_graphs import Pass
from training.dataset import generator
from training.errors import InvalidTraining
from training.model import TrainableModel
from weights.formats.types import TEXT_ENCODERS
from weights.trigger_words import replace_trigger_words

VECTORS = 5  # a kind of draws, beside training.dataset's
NORM_QUANTILES = (0.01, 0.99)  # of the vocabulary's norms
SCATTER = 0.1  # of the vocabulary's spread, around the vector of an initial word


class ExtendedEmbedding(nn.Module):
    """A frozen embedding with more rows behind it, which are fp32 and learn.

    Outside the matrix: no gradient or optimizer state for the rest of the vocabulary, and nothing
    to restore in it (Nerogar/OneTrainer, AdditionalEmbeddingWrapper).
    """

    def __init__(self, frozen: nn.Embedding, vectors: nn.Parameter) -> None:
        super().__init__()
        self.frozen = frozen
        self.vectors = vectors  # (n, width)

    @property
    def weight(self) -> Tensor:
        """The vocabulary's own rows: transformers asks for their dtype."""
        return self.frozen.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, 77) ids to (B, 77, width)."""
        first = self.frozen.num_embeddings
        known = self.frozen(ids.clamp(max=first - 1))
        new = nn.functional.embedding((ids - first).clamp(min=0), self.vectors)
        return torch.where((ids >= first)[..., None], new.to(known.dtype), known)


class NewWord:
    """The vectors, and the tokenizers that know their tokens."""

    def __init__(self, model: TrainableModel, plan: TrainPlan) -> None:
        self.vectors: dict[str, nn.Parameter] = {}
        self.tokenizers: dict[str, Any] = {}
        self._limits: dict[str, tuple[float, float]] = {}
        for number, part in enumerate(TEXT_ENCODERS):
            embedding: Any = model.text_encoders[part].get_input_embeddings()  # type: ignore[operator]
            table = embedding.weight.detach().float()
            norms = table.norm(dim=1).cpu()
            low, high = torch.quantile(norms, torch.tensor(NORM_QUANTILES)).tolist()
            self._limits[part] = (low, high)
            g = generator(plan.seed, VECTORS, number)
            rows = _initial_rows(table.cpu(), model.tokenizers[part], plan, g)
            self.vectors[part] = nn.Parameter(rows.to(table.device))
            self.tokenizers[part] = _extended(
                model.tokenizers[part], plan.placeholder_tokens, table.shape[0]
            )
        self.keep_norms()

    @torch.no_grad()
    def keep_norms(self) -> None:
        """Bring each vector's norm back among the vocabulary's: from its 1 % to its 99 % quantile.

        Vector by vector and encoder by encoder; within the limits nothing is changed.
        """
        for part, vectors in self.vectors.items():
            norms = vectors.norm(dim=1, keepdim=True)
            vectors.mul_(norms.clamp(*self._limits[part]) / norms.clamp(min=1e-12))


def _initial_rows(
    table: Tensor,
    tokenizer: Any,  # noqa: ANN401
    plan: TrainPlan,
    g: torch.Generator,
) -> Tensor:
    """(n, width): around an initial word's vector, or drawn as the vocabulary is spread."""
    spread = table.std(dim=0) * torch.randn((plan.n_tokens, table.shape[1]), generator=g)
    if plan.token_initializer is None:
        return table.mean(dim=0) + spread
    ids = tokenizer(plan.token_initializer, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise InvalidTraining(
            f"token_initializer is {plan.token_initializer!r}, which the model reads as {len(ids)}"
            " tokens; take one common word"
        )
    return table[ids[0]] + SCATTER * spread


def _extended(tokenizer: Any, tokens: Sequence[str], first: int) -> Any:  # noqa: ANN401
    """A copy of the tokenizer that reads each of the tokens as one."""
    from transformers import AddedToken

    extended = copy.deepcopy(tokenizer)
    added = [AddedToken(t, normalized=False, special=True) for t in tokens]
    extended.add_tokens(added, special_tokens=True)
    ids = extended.convert_tokens_to_ids(list(tokens))
    assert ids == list(range(first, first + len(tokens))), "vocabulary and embeddings differ"
    return extended


@contextmanager
def known(word: NewWord, model: TrainableModel) -> Iterator[None]:
    """The text encoders read the new word's tokens, and pool at the end of the text.

    SDXL's config says eos_token_id 2, by which transformers means the highest id: a new token's,
    and every word after it would go unheard (CLIPTextTransformer.forward).
    """
    with ExitStack() as stack:
        for part, encoder in model.text_encoders.items():
            own: Any = encoder.get_input_embeddings()  # type: ignore[operator]
            stack.callback(encoder.set_input_embeddings, own)  # type: ignore[arg-type]
            encoder.set_input_embeddings(ExtendedEmbedding(own, word.vectors[part]))  # type: ignore[operator]
            inner: Any = getattr(encoder, "text_model", encoder)
            stack.callback(setattr, inner, "eos_token_id", inner.eos_token_id)
            inner.eos_token_id = model.tokenizers[part].eos_token_id
        yield


def text_pass(text_encoders: Mapping[str, nn.Module]) -> Pass:
    """Ids of both tokenizers, (B, 77) each, to prompt embeddings (B, 77, width) and pooled ones."""

    def encode(*ids: Tensor) -> tuple[Tensor, Tensor]:
        states = []
        pooled = None
        for part, own in zip(TEXT_ENCODERS, ids, strict=True):
            output = text_encoders[part](own, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]  # the second encoder's projection counts
        assert pooled is not None
        return torch.cat(states, dim=-1), pooled

    return encode


class Reader:
    """Captions to what the UNet is conditioned on; remembers it once nothing of it learns."""

    def __init__(
        self,
        encode: Pass,
        tokenizers: Mapping[str, Any],
        words: Mapping[str, str],
        device: torch.device,
    ) -> None:
        """`encode` is a `text_pass`; `words` are trigger words and the tokens they stand for."""
        self._pass = encode
        self._tokenizers = tokenizers
        self._words = words
        self._device = device
        self._ids: dict[str, list[Tensor]] = {}  # caption → ids of both tokenizers, (77,)
        self._known: dict[str, tuple[Tensor, Tensor]] | None = None

    def remember(self) -> None:
        """From now on nothing changes what a caption means."""
        if self._known is None:
            self._known = {}

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to prompt embeddings (B, 77, width) and pooled ones (B, width)."""
        if self._known is None:
            return self._encode(captions)
        with torch.no_grad():
            for caption in captions:
                if caption not in self._known:
                    embeds, pooled = self._encode([caption])
                    self._known[caption] = (embeds[0], pooled[0])
        found = [self._known[caption] for caption in captions]
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = [self._tokens(caption) for caption in captions]
        embeds, pooled = self._pass(
            *(torch.stack(ids).to(self._device) for ids in zip(*tokens, strict=True))
        )
        return embeds, pooled

    def _tokens(self, caption: str) -> list[Tensor]:
        if caption not in self._ids:
            text = replace_trigger_words(caption, self._words)
            self._ids[caption] = [
                self._tokenizers[part](
                    text,
                    padding="max_length",
                    max_length=self._tokenizers[part].model_max_length,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids[0]
                for part in TEXT_ENCODERS
            ]
        return self._ids[caption]
