"""Cancelled at any instruction of adapters.py, the next request's weights are its own alone."""

import itertools

import pytest
import torch

from generation import adapters
from generation.adapters import Adapter, AdapterSlot
from generation.base_models import MINIATURE_SDXL
from generation.engine import Engine
from tests.miniature.isolation import Cancelled, failing_in
from weights.catalog import Edition
from weights.formats.types import LoraDelta, Pooling, TokenVectors, TrainedWeights

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
BIAS = "unet.conv_in.bias"
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def parts():
    return Engine(Edition.MINIATURE, "cpu")._store.load(MINIATURE_SDXL).parts


def adapter(parts, seed: int, pooling: Pooling) -> Adapter:
    """A LoRA of one layer, another value for one parameter and one word; all of them random."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    out, in_ = parameter(parts, f"{LAYER}.weight").shape
    vectors = {part: noise(1, embedding(parts, part).shape[1]) for part in ENCODERS}
    weights = TrainedWeights(
        lora={LAYER: LoraDelta(noise(2, in_), noise(out, 2), 1.0, None)},
        parameters={BIAS: noise(*parameter(parts, BIAS).shape)},
        checkpoint=False,
        embeddings=(TokenVectors(("<s0>",), vectors),),
        trigger_words={"TOK": "<s0>"},
        pooling=pooling,
        description="",
    )
    return Adapter(weights, 0.5)


def parameter(parts, name):
    part, path = name.split(".", 1)
    return parts[part].get_parameter(path)


def embedding(parts, part):
    return parts[part].get_input_embeddings().weight


def state(parts) -> list[object]:
    """What such adapters change, and where it lies."""
    values = [parameter(parts, name) for name in (f"{LAYER}.weight", BIAS)]
    rows = [embedding(parts, part) for part in ENCODERS]
    return [
        *(value.numpy().tobytes() for value in (*values, *rows)),
        *(value.data_ptr() for value in values),
        *(len(parts[name]) for name in ("tokenizer", "tokenizer_2")),
        parts["text_encoder_2"].text_model.eos_token_id,
    ]


@pytest.mark.parametrize("after", ["others", "the same", "none"])
@pytest.mark.parametrize("stay", [False, True])
@torch.inference_mode()
def test_cancelled_anywhere(parts, stay, after):
    slot = AdapterSlot(parts)
    first = [adapter(parts, 1, Pooling.EOS)]
    others = [adapter(parts, 2, Pooling.ARGMAX)]
    second = {"others": others, "the same": first, "none": []}[after]
    before, rows = state(parts), [embedding(parts, part) for part in ENCODERS]
    with slot.applied(second):
        wanted = state(parts)
    for count in itertools.count(1):
        caught = []
        try:
            with failing_in(adapters, None, count, Cancelled) as struck, slot.applied(first, stay):
                pass
        except Cancelled as error:
            caught.append(error)
        with slot.applied(second):
            caught.clear()  # whoever kept it lets it go, and with it the frames of the first
            assert state(parts) == wanted, struck
        assert state(parts) == before, struck
        assert all(embedding(parts, part) is own for part, own in zip(ENCODERS, rows, strict=True))
        if not struck:
            break
    assert count > 500
