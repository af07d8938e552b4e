"""Cancelled at any instruction of lora.py, the next request has its adapters alone."""

import itertools

import pytest
import torch

from generation import lora
from generation.adapters import Adapter
from generation.engine import Engine
from generation.lora import LoraMerger
from models.components import ModelComponents
from tests.helpers.engines import base_model
from tests.miniature.isolation import Cancelled, failing_in
from weights.catalog import Edition
from weights.formats.types import LoraDelta, Pooling, TokenVectors, TrainedWeights

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
BIAS = "unet.conv_in.bias"


@pytest.fixture(scope="module")
def components() -> ModelComponents:
    return base_model(Engine(Edition.MINIATURE, "cpu")).components


def adapter(components, seed: int, pooling: Pooling) -> Adapter:
    """Return random weights: a LoRA of one layer, one parameter and one new token."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    out, in_ = parameter(components, f"{LAYER}.weight").shape
    vectors = {name: noise(1, rows.shape[1]) for name, rows in token_embeddings(components).items()}
    weights = TrainedWeights(
        lora={LAYER: LoraDelta(noise(2, in_), noise(out, 2), 1.0, None)},
        parameters={BIAS: noise(*parameter(components, BIAS).shape)},
        checkpoint=False,
        embeddings=(TokenVectors(("<s0>",), vectors),),
        trigger_words={"TOK": "<s0>"},
        pooling=pooling,
        description="",
    )
    return Adapter(weights, 0.5)


def parameter(components, name):
    part, path = name.split(".", 1)
    return components.adaptable()[part].get_parameter(path)


def token_embeddings(components):
    return {
        name: encoder.get_input_embeddings().weight
        for name, encoder in components.text_encoders.items()
    }


def state(components) -> list[object]:
    """Return what such adapters change, and its addresses."""
    values = [parameter(components, name) for name in (f"{LAYER}.weight", BIAS)]
    rows = token_embeddings(components).values()
    return [
        *(value.numpy().tobytes() for value in (*values, *rows)),
        *(value.data_ptr() for value in values),
        *(len(tokenizer) for tokenizer in components.tokenizers.values()),
        components.text_encoders["text_encoder_2"].text_model.eos_token_id,
    ]


@pytest.mark.parametrize("after", ["others", "the same", "none"])
@pytest.mark.parametrize("keep", [False, True])
@torch.inference_mode()
def test_cancelled_anywhere(components, keep, after):
    merger = LoraMerger(components)
    first = [adapter(components, 1, Pooling.EOS)]
    others = [adapter(components, 2, Pooling.ARGMAX)]
    second = {"others": others, "the same": first, "none": []}[after]
    before, rows = state(components), list(token_embeddings(components).values())
    with merger.applied(second):
        wanted = state(components)
    for count in itertools.count(1):
        caught = []
        try:
            with (
                failing_in(lora, None, count, Cancelled) as struck,
                merger.applied(first, keep),
            ):
                pass
        except Cancelled as error:
            caught.append(error)
        with merger.applied(second):
            caught.clear()  # the error is released, and with it the first request's frames
            assert state(components) == wanted, struck
        assert state(components) == before, struck
        assert all(
            now is own for now, own in zip(token_embeddings(components).values(), rows, strict=True)
        )
        if not struck:
            break
    assert count > 500
