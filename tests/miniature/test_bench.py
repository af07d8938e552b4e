"""script/bench measures what it says, on both sides."""

import pytest
import torch

from script.tools import bench
from script.tools.bench import Sample
from script.tools.peer_training import PeerTraining
from training.dataset import encode


@pytest.mark.parametrize("side", ["peer", "ours"])
def test_a_side_trains_and_is_measured(side):
    sample = bench.SIDES[side](bench.MIN_STEPS)
    assert sample.side == side
    assert 0.1 < sample.steps_per_second < 1000
    assert sample.peak_bytes > 100e6
    assert 0 < sample.last_loss < 10


def test_the_peer_trains_its_lora_and_its_word():
    torch.manual_seed(0)
    model, examples = bench._subject()
    peer = PeerTraining(model, encode(model.vae, examples, False), 4, 32, 4)
    before = {
        part: encoder.get_input_embeddings().weight.detach().clone()
        for part, encoder in model.text_encoders.items()
    }
    told = []
    peer.run(lambda step, loss: told.append(step))
    assert told == [1, 2, 3, 4]
    for processor in model.unet.attn_processors.values():
        assert processor.to_q_lora.up.weight.abs().max() > 0
    for part, encoder in model.text_encoders.items():
        table = encoder.get_input_embeddings().weight
        assert len(table) == len(before[part]) + 2
        assert torch.equal(table[:-2], before[part])


def test_the_table_has_medians_and_ratios_round_by_round():
    def sample(side: str, speed: float) -> Sample:
        return Sample(side, speed, int(2e9 / speed), 1.0, 0.5)

    rounds = [
        {"peer": sample("peer", 1.0), "ours": sample("ours", 2.0)},
        {"peer": sample("peer", 2.0), "ours": sample("ours", 5.0)},
        {"peer": sample("peer", 4.0), "ours": sample("ours", 6.0)},
    ]
    assert bench.table(rounds).splitlines()[2:] == [
        "| cog-sdxl's loop | 2.00 | 1.00 (1.00 to 1.00) | 1000 | 1.00 (1.00 to 1.00) |",
        "| ours | 5.00 | 2.00 (1.50 to 2.50) | 400 | 0.50 (0.40 to 0.67) |",
    ]
