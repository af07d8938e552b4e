"""script/bench measures what it says, on both sides."""

import io
import json

import pytest
import torch

from script.tools import bench, bench_pictures, bench_training, random_sdxl
from script.tools.bench_training import Sample, Turns
from script.tools.peer_training import PeerTraining
from training.dataset import encode


def rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]


def test_training_by_the_command(capfd):
    bench.main(["training", "--rounds", "1", "--steps", str(bench_training.MIN_STEPS)])
    out = capfd.readouterr().out
    samples = rows(out)
    assert [s["side"] for s in samples] == ["peer", "ours"]
    for sample in samples:
        assert 1e-3 < sample["after"] < 60
        assert 1e-3 < sample["before"] < 60
        assert sample["peak_bytes"] > 100e6
        assert 0 < sample["last_loss"] < 10
    assert out.splitlines()[-2].startswith("| cog-sdxl's loop |")
    assert out.splitlines()[-1].startswith("| ours |")


def test_pictures_by_the_command(capfd, tmp_path):
    name = "4 steps, no guidance"
    bench.main(["pictures", "--runs", "3", "--only", name])
    out = capfd.readouterr().out
    (row,) = rows(out)
    assert row["workload"] == name
    assert row["runs"] == 3
    assert row["lowest"] <= row["ratio"] <= row["highest"]
    assert set(row["stages"]) == {"load", "weights", "text", "denoise", "decode", "save"}
    assert sum(row["stages"].values()) <= row["ours_p95"] * 1.01
    assert out.splitlines()[-1].startswith(f"| {name} |")


def test_both_sides_make_the_same_picture(tmp_path):
    """Otherwise their times say nothing about one another."""
    import numpy as np
    from PIL import Image

    ours = bench_pictures.Ours(bench_pictures.MINIATURE)
    stock = bench_pictures.Stock(ours)
    for asked in ({}, {"refine": "expert_ensemble_refiner"}):
        asked = {"num_inference_steps": 5, "guidance_scale": 7.5, **asked}
        with torch.inference_mode():
            stock(asked, 3, tmp_path)
            (file,) = ours(asked, 3, tmp_path)
        first, second = (Image.open(p) for p in (file, tmp_path / "stock-0.png"))
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
    ours.predictor.folders.remove()


def test_files_by_the_command(capfd):
    bench.main(["files", "--size", "256", "--runs", "1", "--upscale-size", "128"])
    out = capfd.readouterr().out
    png, mark, *upscales = rows(out)
    for row in (png, mark):
        assert row["right"]
        assert row["lowest"] == row["times_faster"] == row["highest"] > 0
    assert [(row["upscale"], row["tiled"]) for row in upscales] == [
        *(("swinir-x4", False), ("swinir-x4", True)),
        *(("real-esrgan-x4", False), ("real-esrgan-x4", True)),
    ]
    for row in upscales:
        assert row["more_mb"] > 5
    # Of one tile, so equal.
    assert [line.split("|")[-2].strip() for line in out.splitlines()[-2:]] == ["0", "0"]


@pytest.mark.parametrize("arguments", [["training", "--steps", "3"], ["pictures", "--runs", "0"]])
def test_too_few_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert f"{arguments[1]}" in capsys.readouterr().err


def test_the_real_models_sizes():
    """Parameters as published; built without memory."""
    with torch.device("meta"):
        built = [
            random_sdxl.build_unet(),
            random_sdxl.build_refiner_unet(),
            random_sdxl.build_vae(),
            *random_sdxl.build_text_encoders(),
        ]
    counts = [sum(p.numel() for p in module.parameters()) for module in built]
    assert counts == [2567463684, 2259526660, 83653863, 123060480, 694659840]
    for tokenizer in random_sdxl.build_tokenizers():
        assert len(tokenizer) == random_sdxl.VOCABULARY
        assert tokenizer("a red circle").input_ids[-1] == random_sdxl.VOCABULARY - 1


def test_a_side_waits_for_its_turn():
    output = io.StringIO()
    turns = Turns(output, io.StringIO("\n\n"), 0.0)
    turns.tell(0.5)
    turns.tell(0.25)
    turns.end()
    assert [r.get("loss") for r in rows(output.getvalue())] == [0.5, 0.25, None]
    assert turns.turns.read() == ""


def test_the_peer_trains_its_lora_and_its_word():
    torch.manual_seed(0)
    model, examples = bench_training.subject(bench_training.MINIATURE, 128)
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
        return Sample(side, 1.5 / speed, 0.5 / speed, int(2e9 / speed), 1.0, 0.5)

    rounds = [
        {"peer": sample("peer", 1.0), "ours": sample("ours", 2.0)},
        {"peer": sample("peer", 2.0), "ours": sample("ours", 5.0)},
        {"peer": sample("peer", 4.0), "ours": sample("ours", 6.0)},
    ]
    peer, ours = bench_training.table(rounds).splitlines()[2:]
    assert peer == (
        "| cog-sdxl's loop | 750 | 250 | 2.00 | 1.00 (1.00 to 1.00) | 1000 | 1.00 (1.00 to 1.00) |"
    )
    assert ours == "| ours | 300 | 100 | 5.00 | 2.00 (1.50 to 2.50) | 400 | 0.50 (0.40 to 0.67) |"
