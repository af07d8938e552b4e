"""Placeholder tokens with trainable embeddings, and captions encoded with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.components import TOKENIZERS
from models.tokens import add_placeholder_tokens, pooled_at_end_token, tokenize
from training.cuda_graphs import ForwardPass
from training.dataset import TOKENS, generator
from training.errors import InvalidTraining
from training.model import TrainableModel
from training.plan import TrainPlan
from weights.trigger_words import replace_trigger_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

NORM_QUANTILES = (0.01, 0.99)  # of the vocabulary's norms
INITIALIZER_SPREAD = 0.1  # of the vocabulary's standard deviation, around an initial embedding


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table, followed by trainable rows in fp32.

    Outside the table: no gradient or optimizer state for the vocabulary, and nothing to restore in
    it (Nerogar/OneTrainer, AdditionalEmbeddingWrapper).
    """

    def __init__(self, frozen: nn.Embedding, rows: nn.Parameter) -> None:
        super().__init__()
        self.frozen = frozen
        self.rows = rows  # (n, width)

    @property
    def weight(self) -> Tensor:
        """The frozen table, whose dtype transformers reads."""
        return self.frozen.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, 77) to embeddings (B, 77, width)."""
        first = self.frozen.num_embeddings
        known = self.frozen(ids.clamp(max=first - 1))
        added = nn.functional.embedding((ids - first).clamp(min=0), self.rows)
        return torch.where((ids >= first)[..., None], added.to(known.dtype), known)


class PlaceholderTokens:
    """The trainable embeddings by text encoder, and tokenizers that know the tokens."""

    def __init__(self, model: TrainableModel, plan: TrainPlan) -> None:
        self.embeddings: dict[str, nn.Parameter] = {}
        self.tokenizers: dict[str, CLIPTokenizer] = {}
        self._norms: dict[str, tuple[float, float]] = {}
        for number, name in enumerate(TOKENIZERS):
            tokenizer = model.components.tokenizers[name]
            encoder: Any = model.components.text_encoders[name]
            table = encoder.get_input_embeddings().weight.detach().float()
            norms = torch.quantile(table.norm(dim=1).cpu(), torch.tensor(NORM_QUANTILES))
            self._norms[name] = (norms[0].item(), norms[1].item())
            rows = _initial_rows(table.cpu(), tokenizer, plan, generator(plan.seed, TOKENS, number))
            self.embeddings[name] = nn.Parameter(rows.to(table.device))
            self.tokenizers[name] = add_placeholder_tokens(
                tokenizer, plan.placeholder_tokens, table.shape[0]
            )
        self.clamp_norms()

    @torch.no_grad()
    def clamp_norms(self) -> None:
        """Scale each embedding whose norm is outside the vocabulary's 1 % to 99 % quantiles."""
        for name, rows in self.embeddings.items():
            norms = rows.norm(dim=1, keepdim=True)
            rows.mul_(norms.clamp(*self._norms[name]) / norms.clamp(min=1e-12))


def _initial_rows(
    table: Tensor, tokenizer: CLIPTokenizer, plan: TrainPlan, g: torch.Generator
) -> Tensor:
    """Return embeddings (n, width) around the initializer's, or spread as the vocabulary is."""
    noise = torch.randn((plan.num_new_tokens, table.shape[1]), generator=g)
    spread = table.std(dim=0) * noise
    if not plan.token_initializer:
        return table.mean(dim=0) + spread
    ids = tokenizer(plan.token_initializer, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise InvalidTraining(
            f"token_initializer is {plan.token_initializer!r}, which the model reads as {len(ids)}"
            " tokens; take one common word"
        )
    return table[ids[0]] + INITIALIZER_SPREAD * spread


@contextmanager
def install_tokens(tokens: PlaceholderTokens, model: TrainableModel) -> Iterator[None]:
    """Let the text encoders read the placeholder tokens, and pool at the end of the text."""
    with ExitStack() as stack:
        encoder: Any
        for name, encoder in model.components.text_encoders.items():
            frozen = encoder.get_input_embeddings()
            stack.callback(encoder.set_input_embeddings, frozen)
            encoder.set_input_embeddings(ExtendedEmbedding(frozen, tokens.embeddings[name]))
            tokenizer = model.components.tokenizers[name]
            stack.enter_context(pooled_at_end_token(encoder, tokenizer))
        yield


def text_forward(text_encoders: Mapping[str, nn.Module]) -> ForwardPass:
    """Return a function of both tokenizers' ids, (B, 77) each.

    It returns prompt embeddings (B, 77, width) and pooled ones (B, width).
    """

    def encode(*ids: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [
            text_encoders[name](encoder_ids, output_hidden_states=True)
            for name, encoder_ids in zip(TOKENIZERS, ids, strict=True)
        ]
        states = [output.hidden_states[-2] for output in outputs]
        return torch.cat(states, dim=-1), outputs[-1][0]  # the second encoder's projection

    return encode


class CaptionEncoder:
    """Encodes captions; each of them only once after `freeze`."""

    def __init__(
        self,
        encode: ForwardPass,
        tokenizers: Mapping[str, CLIPTokenizer],
        trigger_words: Mapping[str, str],
        device: torch.device,
    ) -> None:
        """`encode` is a `text_forward`; `trigger_words` map words to placeholder tokens."""
        self._encode_ids = encode
        self._tokenizers = tokenizers
        self._trigger_words = trigger_words
        self._device = device
        self._ids: dict[str, list[Tensor]] = {}  # caption → ids of each tokenizer, (77,)
        self._encoded: dict[str, tuple[Tensor, Tensor]] | None = None

    def freeze(self) -> None:
        """Cache encoded captions from now on, as nothing that encodes them is trained any more."""
        if self._encoded is None:
            self._encoded = {}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return prompt embeddings (B, 77, width) and pooled ones (B, width)."""
        if self._encoded is None:
            return self._encode(captions)
        with torch.no_grad():
            for caption in captions:
                if caption not in self._encoded:
                    embeds, pooled = self._encode([caption])
                    self._encoded[caption] = (embeds[0], pooled[0])
        found = [self._encoded[caption] for caption in captions]
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = [self._tokenize(caption) for caption in captions]
        batch = (torch.stack(rows).to(self._device) for rows in zip(*ids, strict=True))
        embeds, pooled = self._encode_ids(*batch)
        return embeds, pooled

    def _tokenize(self, caption: str) -> list[Tensor]:
        if caption not in self._ids:
            text = replace_trigger_words(caption, self._trigger_words)
            self._ids[caption] = [tokenize(self._tokenizers[name], text)[0] for name in TOKENIZERS]
        return self._ids[caption]
