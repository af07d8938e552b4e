"""script/bench measures what it says, on all sides."""

import io
import json
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from generation.base_models import Lineage
from script.tools import (
    bench,
    bench_machine,
    bench_models,
    bench_pictures,
    bench_plot,
    bench_start,
    bench_tables,
    bench_times,
    bench_training,
    hollow,
    random_cache,
    random_models,
    random_sdxl,
)
from script.tools.bench_sides import ALL, Ours, Sides
from script.tools.bench_times import Times
from script.tools.bench_training import Sample, Turns
from script.tools.bench_workloads import (
    COG,
    COMPILED,
    DIFFUSERS,
    OURS,
    OURS_ALL,
    WORKLOADS,
    Workload,
)
from script.tools.peer_cog_sdxl import CogSdxl
from script.tools.peer_training import PeerTraining
from training.dataset import encode
from weights import cache, download
from weights.catalog import Edition
from weights.miniature import architecture, train_safety
from weights.miniature.train_controlnet import UNION
from weights.miniature.train_controlnet import build as build_controlnet

MACHINE = {"machine", "cores", "threads", "measured", "torch", "diffusers", "commit", "date"}
FIVE_STEPS = Workload("test", 1.0, {"num_inference_steps": 5, "guidance_scale": 7.5}, ())


def rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]


def difference(first, second) -> int:
    pixels = [np.asarray(Image.open(file), int) for file in (first, second)]
    return np.abs(pixels[0] - pixels[1]).max()


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """On the miniature; other tests see nothing of its settings."""
    with bench_models.settings(cpu=True):
        sides = Sides(tmp_path_factory.mktemp("sides"))
        yield sides
        sides.close()


# Pictures


def test_pictures_by_the_command(capfd, tmp_path, monkeypatch):
    name, switch, out = "20 steps", "another LoRA, 4 steps", tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench_times, "WARM_UP", 1)
    for workload in (name, switch):  # as quick as can be
        asked = {**WORKLOADS[workload].asked, "num_inference_steps": 2}
        monkeypatch.setitem(WORKLOADS, workload, replace(WORKLOADS[workload], asked=asked))
    arguments = ["--cpu", "--runs", "2", "--only", switch, "--only", name, "--out", str(out)]
    bench.main(["pictures", *arguments])
    text = capfd.readouterr().out
    machine, switched, row = rows(text)
    assert machine.keys() == MACHINE
    assert rows(out.read_text()) == [machine, switched, row]
    assert (row["workload"], row["id"], row["pictures"]) == (name, "W9", 1)
    assert set(row["sides"]) == {DIFFUSERS, COG, OURS, OURS_ALL}
    for side, said in row["sides"].items():
        assert said["runs"] == 2
        assert 0 < said["p50"] <= said["p95"]
        assert said["first"] > 0
        assert not said["blank"]
        assert said["pictures_per_second"] == pytest.approx(1 / said["p50"])
        assert ("stages" in said) == (side in (OURS, OURS_ALL))
    everything = row["sides"][OURS_ALL]["stages"]
    assert {"denoise", "decode", "safety", "watermark", "save"} <= everything.keys()
    assert not {"safety", "watermark"} & row["sides"][OURS]["stages"].keys()
    assert sum(everything.values()) <= row["sides"][OURS_ALL]["p95"] * 1.01
    assert {peer: said["ours"] for peer, said in row["ratios"].items()} == {
        DIFFUSERS: OURS,
        COG: OURS_ALL,
    }
    assert all(r["lowest"] <= r["median"] <= r["highest"] for r in row["ratios"].values())
    assert set(switched["sides"]) == {COG, OURS_ALL}
    for said in switched["sides"].values():
        assert said["runs"] == 2
        assert said["lowest"] <= said["more"] <= said["highest"]
    assert f"| {name} | {COG} |" in text
    assert f"| {switch} | {OURS_ALL} |" in text


def test_time_is_shared(monkeypatch):
    """A workload has as much as the others that are still to come, and none where none is left."""
    now, shares = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(bench_pictures, "time", clock)

    def measure(name, workload, arguments, sides, end):
        shares.append(end - now[0])
        now[0] += 10.0
        return {"workload": name}

    monkeypatch.setattr(bench_pictures, "_measure", measure)
    sides = SimpleNamespace(make_room=lambda *_: None)
    arguments = SimpleNamespace(only=list(WORKLOADS)[:4])
    made = bench_pictures._measure_all(arguments, sides, 28.0, lambda row: None)
    assert shares == [7.0, 6.0, 4.0]
    assert [row["workload"] for row in made] == list(WORKLOADS)[:3]


def test_there_is_no_time_to_compile_in_a_short_run(monkeypatch, sides):
    workload = replace(FIVE_STEPS, peers=(DIFFUSERS, COMPILED), model="sdxl-turbo")
    names = []
    monkeypatch.setattr(bench_times, "build", lambda s, w, n: names.extend(n) or {})
    monkeypatch.setattr(Sides, "get", lambda *_: None)
    monkeypatch.setattr(bench_times, "measure", lambda *_: None)
    monkeypatch.setattr(bench_times, "figures", lambda *_: {})
    arguments = SimpleNamespace(compiled=True, runs=1)
    for end, built in ((0.0, {DIFFUSERS, OURS}), (1e9, {DIFFUSERS, COMPILED, OURS})):
        names.clear()
        row = bench_pictures._measure("x", workload, arguments, sides, end)
        assert set(names) == built
        assert row == ({} if COMPILED in built else {"left_out": [COMPILED]})


@pytest.mark.parametrize("refined", [{}, {"refine": "expert_ensemble_refiner"}])
def test_plain_diffusers_makes_the_same_picture(sides, tmp_path, refined):
    """Otherwise their times say nothing about one another."""
    workload = replace(FIVE_STEPS, asked={**FIVE_STEPS.asked, **refined, "num_outputs": 2})
    stock = sides.get(DIFFUSERS, workload).run(workload, 3, tmp_path)
    ours = sides.get(OURS, workload).run(workload, 3, tmp_path)
    assert len(ours) == len(stock) == 2
    assert all(difference(*pair) <= 1 for pair in zip(ours, stock, strict=True))
    assert difference(*ours) > 20


@pytest.mark.parametrize("name", ["SD 1.5 LCM, 4 steps", "SD-Turbo, 1 step", "control"])
def test_so_it_does_with_other_models(sides, tmp_path, name):
    controlled = replace(FIVE_STEPS, control="edge_canny")
    workload = WORKLOADS.get(name, controlled)
    (stock,) = sides.get(DIFFUSERS, workload).run(workload, 3, tmp_path)
    (ours,) = sides.get(OURS, workload).run(workload, 3, tmp_path)
    assert difference(ours, stock) <= 1


def test_cog_sdxls_way_makes_the_same_picture(sides, tmp_path):
    peer: CogSdxl = sides.get(COG, FIVE_STEPS)
    with peer.unmarked():
        (theirs,) = peer.run(FIVE_STEPS, 3, tmp_path)
    unmarked = Ours("sdxl", {**ALL, "apply_watermark": "false"}, tmp_path, sides.loras[0])
    unmarked.prepare(FIVE_STEPS)
    (ours,) = unmarked.run(FIVE_STEPS, 3, tmp_path)
    (without,) = sides.get(DIFFUSERS, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    assert difference(ours, theirs) <= 3
    assert difference(ours, without) > 20  # the LoRA is in both
    assert difference(theirs, without) > 20
    (everything,) = sides.get(OURS_ALL, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    changed = np.abs(np.subtract(*(np.asarray(Image.open(f), int) for f in (everything, theirs))))
    assert changed.max() > 3
    assert np.median(changed) <= 1  # it is in the watermark's few places


def test_both_change_their_lora(sides, tmp_path):
    workload = WORKLOADS["another LoRA, 4 steps"]
    made = {}
    for name in (COG, OURS_ALL):
        side = sides.get(name, workload)
        for number in (0, 1, 1):
            side.wear(sides.loras[number])
            (file,) = side.run(workload, 3, tmp_path)
            made[name, number] = Image.open(file).copy()
    for number in (0, 1):
        pair = [np.asarray(made[name, number], int) for name in (COG, OURS_ALL)]
        assert np.median(np.abs(pair[0] - pair[1])) <= 1  # all but the watermark
    assert np.abs(np.subtract(*(np.asarray(made[COG, n], int) for n in (0, 1)))).max() > 20


def test_the_compiled_peer_compiles_unet_and_decoder(monkeypatch, sides, tmp_path):
    """What they are compiled to is not ours to test, and takes minutes."""
    asked = []

    def compiled(work, **how):
        asked.append((type(work).__name__, how))
        return work

    monkeypatch.setattr(torch, "compile", compiled)
    (file,) = sides.get(COMPILED, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    how = {"mode": "max-autotune", "fullgraph": True}
    assert asked == [("UNet2DConditionModel", how), ("method", how)]
    (stock,) = sides.get(DIFFUSERS, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    assert difference(file, stock) <= 1


def test_figures_are_of_turns(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    seconds = {DIFFUSERS: [1.0, 2.0, 4.0], OURS: [0.5, 2.0, 1.0]}
    times = {name: Times(1.0, first=3.0, seconds=taken) for name, taken in seconds.items()}
    times[OURS].stages = [{"text": 0.1}, {"text": 0.3, "load": 0.2}, {"text": 0.2}]
    workload = replace(FIVE_STEPS, peers=(DIFFUSERS,), asked={"num_outputs": 4})
    row = bench_times.figures("five steps", workload, times)
    ratio = {"median": 0.5, "lowest": 0.25, "highest": 1.0}
    assert row["ratios"] == {DIFFUSERS: {"ours": OURS, **ratio}}
    assert row["to_diffusers"][OURS] == ratio
    assert row["sides"][OURS]["pictures_per_second"] == 4.0
    assert row["sides"][OURS]["stages"] == {"text": 0.2, "load": 0.0}
    first, second = bench_tables.tables([row])
    assert first.splitlines()[2:] == [
        "| five steps | diffusers | 2000 | 4000 | 3 | 2.00 | 0.50 (0.25 to 1.00) | 1.0 | 3.00 |",
        "| five steps | ours | 1000 | 2000 | 3 | 4.00 |  | 1.0 | 3.00 |",
    ]
    assert second.splitlines()[-1] == "| five steps | ours | 200 | 0.0 |"


def test_on_a_gpu_there_are_floors_and_memory(monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda")
    times = {OURS: Times(None, int(7e9), seconds=[2.0], working_bytes=int(3e9))}
    workload = replace(FIVE_STEPS, tflop=788.0)
    said = bench_times.figures("five steps", workload, times)["sides"][OURS]
    assert (said["floor"], said["times_the_floor"], said["tflops"]) == (1.0, 2.0, 394.0)
    assert said["peak_bytes"] == 10e9
    row = {"workload": "x", "sides": {OURS: said}, "ratios": {}}
    assert bench_tables.tables([row])[0].endswith("| 10.0 | 2.00 | 394 |")


def test_floors_are_those_of_the_arithmetic():
    floors = {w.id: round(1000 * w.floor_seconds, 1) for w in WORKLOADS.values()}
    assert floors["W1"] == 528.4
    assert floors["W9"] == 356.7
    assert floors["W3"] == 47.7
    assert len(floors) == len(WORKLOADS)


# The host's work


def test_the_hosts_work_by_the_command(capfd):
    """With the real architectures: they take no memory here."""
    name = "SDXL-Turbo, 1 step"
    before = psutil.Process().memory_info().rss
    bench.main(["host", "--runs", "1", "--only", name])
    assert psutil.Process().memory_info().rss < before + 500e6
    out = capfd.readouterr().out
    machine, row = rows(out)
    assert machine.keys() == MACHINE
    assert set(row["sides"]) == {DIFFUSERS, OURS}
    assert all(0 < side["p50"] < 10 for side in row["sides"].values())
    assert {"load", "text", "denoise", "decode", "save"} <= row["sides"][OURS]["stages"].keys()
    assert f"| {name} | {OURS} |" in out


def test_hollow_models_have_all_of_the_real_ones_modules():
    sdxl, sd = hollow.parts(Lineage.SDXL), hollow.parts(Lineage.SD21)
    assert sum(p.numel() for p in sdxl["unet"].parameters()) == 2567463684
    assert sum(p.numel() for p in sd["unet"].parameters()) == 865910724
    assert hollow.parts(Lineage.SDXL)["unet"] is sdxl["unet"]


# Starting


def test_start_by_the_command(capfd, monkeypatch):
    """But for the processes: what they do is done here, where all is imported already."""

    def start(side, inputs, folder):
        monkeypatch.chdir(folder)
        began, seconds = time.perf_counter(), {}
        monkeypatch.setattr(
            bench_start, "_say", lambda point: seconds.update({point: time.perf_counter() - began})
        )
        bench_start.SIDES[side](inputs)
        return seconds

    monkeypatch.setattr(bench_start, "start", start)
    bench.main(["start", "--cpu", "--runs", "1"])
    text = capfd.readouterr().out
    machine, bare, ours = rows(text)
    assert machine.keys() == MACHINE
    assert (bare["side"], ours["side"]) == ("bare diffusers", "ours")
    assert 0.01 < bare["loaded"] < bare["drawn"]
    assert 0.01 < ours["loaded"] < ours["drawn"]
    assert text.splitlines()[-1].startswith("| ours |")


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match=r"stranger ended with status 1(.|\n)*KeyError"):
        bench_start.start("stranger", {}, tmp_path)


def test_starts_are_compared_in_pairs():
    taken = {
        bench_start.BARE: [{"loaded": 4.0, "drawn": 5.0}, {"loaded": 8.0, "drawn": 10.0}],
        bench_start.OURS: [{"loaded": 3.0, "drawn": 5.0}, {"loaded": 4.0, "drawn": 20.0}],
    }
    bare, ours = bench_start.table(taken).splitlines()[2:]
    assert bare == ("| bare diffusers | 6.00 | 1.00 (1.00 to 1.00) | 7.50 | 1.00 (1.00 to 1.00) |")
    assert ours == "| ours | 3.50 | 0.62 (0.50 to 0.75) | 12.50 | 1.50 (1.00 to 2.00) |"


# The plot


def test_the_plot_shows_bars_to_scale(tmp_path):
    def line(workload: str, ours: float) -> dict[str, object]:
        sides = {DIFFUSERS: {"p50": 2.0}, OURS: {"p50": 2 * ours}}
        ratios = {DIFFUSERS: {"median": 1.0}, OURS: {"median": ours}}
        return {"workload": workload, "sides": sides, "to_diffusers": ratios}

    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    files[0].write_text(json.dumps(line("20 steps", 0.9)) + "\nUsing seed: 1\n")
    files[1].write_text(json.dumps(line("20 steps", 0.5)) + "\n" + json.dumps(line("a & b", 2.0)))
    out = tmp_path / "new" / "plot.svg"
    bench.main(["plot", *map(str, files), "--out", str(out)])
    picture = out.read_text()
    full = bench_plot.WIDTH
    assert picture.count('class="peer"') == picture.count('class="ours"') == 2
    assert [f'width="{w:.1f}"' in picture for w in (full / 4, full / 2, full)] == [True] * 3
    assert "0.50, 1000 ms" in picture
    assert "0.90" not in picture  # the newer line of a workload counts
    assert "a &amp; b" in picture
    assert "prefers-color-scheme: dark" in picture


def test_nothing_to_plot_is_an_error(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for file, said in ((empty, "no workload"), (tmp_path / "none", "No such file")):
        with pytest.raises(SystemExit):
            bench.main(["plot", str(file)])
        assert said in capsys.readouterr().err


# Errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training", "--steps", "3"], "--steps 3"),
        (["pictures", "--runs", "0"], "--runs is 0"),
        (["start", "--runs", "0"], "--runs is 0"),
        (["host", "--runs", "0"], "--runs is 0"),
        (["pictures", "--only", "cats"], "cats"),
    ],
)
def test_too_few_and_unknown_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pictures", "start", "training"])
def test_without_a_gpu_one_has_to_say_cpu(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main([command])
    assert "--cpu" in capsys.readouterr().err


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_machine, "ROOT", tmp_path)
    assert bench_machine.describe(cpu=True)["commit"] is None


# The real architectures


def test_the_real_models_sizes():
    """Parameters as published; built without memory."""
    with torch.device("meta"):
        built = {
            "SDXL": random_sdxl.build_unet(),
            "its refiner": random_sdxl.build_refiner_unet(),
            "its VAE": random_sdxl.build_vae(),
            "CLIP L": random_sdxl.build_text_encoders()[0],
            "OpenCLIP bigG": random_sdxl.build_text_encoders()[1],
            "SD 1.5": random_models.build_sd15_unet(),
            "SD 2.1": random_models.build_sd21_unet(),
            "OpenCLIP H": random_models.build_sd21_text_encoder(),
            "SD's VAE": random_models.build_sd_vae(),
            "SDXL's ControlNet": random_models.build_controlnet(),
            "its union": random_models.build_controlnet_union(),
            "safety checker": random_models.build_safety_checker(),
            "its second opinion": random_models.build_nsfw_detector(),
        }
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in built.items()}
    assert counts == {
        "SDXL": 2567463684,
        "its refiner": 2259526660,
        "its VAE": 83653863,
        "CLIP L": 123060480,
        "OpenCLIP bigG": 694659840,
        "SD 1.5": 859520964,
        "SD 2.1": 865910724,
        "OpenCLIP H": 340387840,
        "SD's VAE": 83653863,
        "SDXL's ControlNet": 1251014160,
        "its union": 1256614800,
        "safety checker": 303981588,
        "its second opinion": 85800194,
    }
    for tokenizer in random_sdxl.build_tokenizers():
        assert len(tokenizer) == random_sdxl.VOCABULARY
        assert tokenizer("a red circle").input_ids[-1] == random_sdxl.VOCABULARY - 1


@pytest.fixture
def tiny_full(monkeypatch):
    """The full edition on the CPU, its architectures as small as the miniature's."""
    tiny = {
        "build_unet": architecture.build_unet,
        "build_refiner_unet": architecture.build_refiner_unet,
        "build_vae": architecture.build_vae,
        "build_text_encoders": lambda: architecture.build_text_encoders(random_sdxl.VOCABULARY),
        "build_sd15_unet": architecture.build_unet,
        "build_sd21_unet": architecture.build_unet,
        "build_sd21_text_encoder": lambda: random_sdxl.build_text_encoders()[0],
        "build_sd_vae": architecture.build_vae,
        "build_controlnet_union": lambda: build_controlnet(UNION, architecture.build_unet()),
        "build_safety_checker": train_safety.build_checker,
        "build_nsfw_detector": train_safety.build_detector,
    }
    for name, build in tiny.items():
        monkeypatch.setattr(
            random_sdxl if hasattr(random_sdxl, name) else random_models, name, build
        )
    monkeypatch.setattr(random_sdxl, "VOCABULARY", 1200)
    with bench_models.settings(cpu=False):
        monkeypatch.setenv("DEVICE", "cpu")
        yield


def test_random_weights_serve_as_downloaded_ones(tiny_full, monkeypatch, tmp_path):
    """All of what happens on a GPU but for sizes: files are made, loaded and drawn with."""
    fetched = []
    monkeypatch.setattr(download, "download_entry", lambda *a: fetched.append(a) or {})
    small = {"num_inference_steps": 1, "guidance_scale": 1.0, "width": 256, "height": 256}
    sides = Sides(tmp_path)
    for model, more in (
        ("sdxl", {"refine": "expert_ensemble_refiner", "num_inference_steps": 2}),
        ("sdxl-turbo", {"guidance_scale": 0.0}),
        ("sdxl-lcm", {"num_inference_steps": 2}),
    ):
        workload = replace(FIVE_STEPS, model=model, asked={**small, **more})
        names = (OURS_ALL, COG) if model == "sdxl" else (OURS,)
        for name in (*names, DIFFUSERS):
            side = sides.get(name, workload)
            if name not in (OURS, OURS_ALL):  # draws at the model's own size
                peer = side if name == DIFFUSERS else side._stock
                peer.spec = replace(peer.spec, native_size=256)
            assert side.run(workload, 0, tmp_path)
    sides.close()
    for name in random_cache.WRITERS:
        folder = random_cache.write(name, torch.device("cpu"))
        assert cache.ensure(name, Edition.FULL) == folder
    assert not fetched


# Files


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


# Training


class AtOnce:
    """Stands for the process of one side of a training: made here, where all is imported already.

    It takes no turns, but goes through at once.
    """

    def __init__(self, command, **_):
        asked, told = dict(pairwise(command)), io.StringIO()
        turns = Turns(told, io.StringIO(), time.perf_counter())
        size, steps = int(asked["--size"]), int(asked["--steps"])
        bench_training.SIDES[asked["--side"]](turns, "--cpu" in command, size, steps)
        turns.end()
        self.stdout, self.stdin = io.StringIO(told.getvalue()), io.StringIO()


def test_training_by_the_command(capfd, monkeypatch):
    processes = SimpleNamespace(Popen=AtOnce, PIPE=None)
    monkeypatch.setattr(bench_training, "subprocess", processes)
    steps = ["--steps", str(bench_training.MIN_STEPS), "--size", "64"]
    bench.main(["training", "--cpu", "--rounds", "1", *steps])
    out = capfd.readouterr().out
    machine, *samples = rows(out)
    assert machine.keys() == MACHINE
    assert [s["side"] for s in samples] == ["peer", "ours"]
    for sample in samples:
        assert 1e-3 < sample["after"] < 60
        assert 1e-3 < sample["before"] < 60
        assert sample["peak_bytes"] > 100e6
        assert 0 < sample["last_loss"] < 10
    assert out.splitlines()[-2].startswith("| cog-sdxl's loop |")
    assert out.splitlines()[-1].startswith("| ours |")


def test_a_side_that_fails_ends_the_run():
    arguments = SimpleNamespace(steps=3, size=64, cpu=True)  # which the child refuses
    with pytest.raises(SystemExit, match="peer ended with exit status 2"):
        bench_training._Side("peer", arguments).load()


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
    model, examples = bench_training.subject(True, 128)
    peer = PeerTraining(model, encode(model.components.vae, examples, False), 4, 32, 4)
    before = {
        part: encoder.get_input_embeddings().weight.detach().clone()
        for part, encoder in model.components.text_encoders.items()
    }
    told = []
    peer.run(lambda step, loss: told.append(step))
    assert told == [1, 2, 3, 4]
    for processor in model.components.unet.attn_processors.values():
        assert processor.to_q_lora.up.weight.abs().max() > 0
    for part, encoder in model.components.text_encoders.items():
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
