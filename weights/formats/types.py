"""Trained weights in memory: plain tensors under the model's parameter names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class Pooling(StrEnum):
    """Where the second text encoder's pooled embedding is taken from.

    The configs of SDXL say `eos_token_id` 2, which makes transformers pool at the highest token id.
    Added tokens have higher ids than the end token, so the pooled embedding then ignores every word
    after the first of them. Weights expect in use what they were trained with.
    """

    ARGMAX = "argmax"  # at the highest token id: cog-sdxl
    EOS = "eos"  # at the end token: kohya, ComfyUI


@dataclass(frozen=True)
class LoraDelta:
    """One module's low-rank change: weight += scale * (alpha / rank) * up @ down.

    arXiv:2106.09685. For a convolution, both are flattened to matrices after the first dimension.
    With `dora_scale`, the sum is then rescaled to that magnitude (arXiv:2402.09353): its norm is
    taken over every dimension in which `dora_scale` has size 1.
    """

    down: Tensor  # (rank, in), or (rank, in, kh, kw) for a convolution
    up: Tensor  # (out, rank), or (out, rank, 1, 1) for a convolution
    alpha: float  # the rank where the file names none; rsLoRA's square root is worked in
    dora_scale: Tensor | None  # (out, 1) or LyCORIS' (1, in); (…, 1, 1) appended for a convolution

    @property
    def rank(self) -> int:
        """Return the number of rows of `down` and of columns of `up`."""
        return int(self.down.shape[0])


@dataclass(frozen=True)
class TokenVectors:
    """A textual inversion (arXiv:2208.01618): rows for the text encoders' token embeddings.

    One encoder may be missing: the file then was trained with the other alone.
    """

    placeholder_tokens: tuple[str, ...]  # ("<s0>", "<s1>"); unique within one TrainedWeights
    vectors: Mapping[str, Tensor]  # "text_encoder", "text_encoder_2" → (tokens, width)


@dataclass(frozen=True)
class TrainedWeights:
    """Everything that one file of trained weights changes; checked against the model it is for."""

    lora: Mapping[str, LoraDelta]  # "unet.<module path>", "text_encoder.<…>", "text_encoder_2.<…>"
    parameters: Mapping[str, Tensor]  # to replace, "<part>.<name>"; all, some or none of them
    checkpoint: bool  # a whole model, which takes the base model's place: nothing on top of one
    embeddings: tuple[TokenVectors, ...]
    trigger_words: Mapping[str, str]  # typed by people → placeholder tokens: "TOK" → "<s0><s1>"
    pooling: Pooling
    description: str  # for logs: "kohya LoRA (sgm names), rank 16, 722 modules"
    digest: str = field(default="", compare=False)  # sha256 of the file that it was read from
    # Identifies this reading where no reference to it may be kept
    serial: int = field(default_factory=itertools.count().__next__, compare=False, repr=False)

    @property
    def n_bytes(self) -> int:
        """Return how many bytes the tensors take in memory."""
        tensors = list(self.parameters.values())
        for delta in self.lora.values():
            tensors += [delta.down, delta.up]
        for entry in self.embeddings:
            tensors += entry.vectors.values()
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class ModelShapes:
    """The parameters of a model that trained weights are for.

    `parameters`: "<part>.<name in named_parameters()>" → shape, where a part is "unet",
    "text_encoder" or "text_encoder_2". Taken from the pristine model: adapter layers that are in
    place would change the names.
    """

    parameters: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module]) -> ModelShapes:
        """Return the shapes of modules by part name; nothing is copied."""
        return cls(
            {
                f"{part}.{name}": tuple(parameter.shape)
                for part, module in parts.items()
                for name, parameter in module.named_parameters()
            }
        )

    def modules(self) -> Mapping[str, tuple[int, ...]]:
        """Return the modules that a LoRA can change, linear layers and convolutions.

        "<part>.<path>" → the weight's shape. An embedding is a matrix, but not a matrix product.
        """
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.parameters.items()
            if name.endswith(".weight") and len(shape) in (2, 4) and "_embedding.weight" not in name
        }

    def text_width(self, encoder: str) -> int | None:
        """Return the width of an encoder's token embedding; None if the model lacks it."""
        for name, shape in self.parameters.items():
            if name.startswith(f"{encoder}.") and name.endswith(".token_embedding.weight"):
                return shape[1]
        return None
