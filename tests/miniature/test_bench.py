"""script/bench measures what it says, on all sides."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from benchmarks import (
    architectures,
    environment,
    images,
    machine,
    measure,
    plot,
    random_weights,
    report,
    start,
    training,
)
from benchmarks.__main__ import main
from benchmarks.architectures import NETWORKS
from benchmarks.baseline_cog_sdxl import CogSdxl
from benchmarks.baseline_training import CogSdxlTraining
from benchmarks.measure import Samples
from benchmarks.report import Spread
from benchmarks.sides import FULL, Ours, Sides
from benchmarks.stub_models import stub_components
from benchmarks.training import Sample, Turns
from benchmarks.workloads import (
    COG_SDXL,
    COMPILED,
    DIFFUSERS,
    OURS,
    OURS_FULL,
    WORKLOADS,
    Workload,
)
from generation.base_models import BaseModel
from training.dataset import encode
from weights import cache, download
from weights.catalog import Edition
from weights.miniature import architecture, train_safety
from weights.miniature.train_controlnet import UNION
from weights.miniature.train_controlnet import build as build_controlnet

MACHINE = {"machine", "cores", "threads", "measured", "torch", "diffusers", "commit", "date"}
FIVE_STEPS = Workload("test", 1.0, 5, 7.5)


def rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]


def difference(first, second) -> int:
    pixels = [np.asarray(Image.open(file), int) for file in (first, second)]
    return np.abs(pixels[0] - pixels[1]).max()


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """On the miniature; other tests see nothing of its settings."""
    with environment.settings(cpu=True):
        sides = Sides(tmp_path_factory.mktemp("sides"))
        yield sides
        sides.close()


# Images


def test_images_by_the_command(capfd, tmp_path, monkeypatch):
    name, switch, out = "20 steps", "another LoRA, 4 steps", tmp_path / "rows.jsonl"
    monkeypatch.setattr(measure, "WARM_UP", 1)
    for workload in (name, switch):  # as quick as can be
        monkeypatch.setitem(WORKLOADS, workload, replace(WORKLOADS[workload], steps=2))
    arguments = ["--cpu", "--runs", "2", "--only", "W8", "--only", name, "--out", str(out)]
    main(["pictures", *arguments])
    text = capfd.readouterr().out
    described, switched, row = rows(text)
    assert described.keys() == MACHINE
    assert rows(out.read_text()) == [described, switched, row]
    assert (row["workload"], row["id"], row["images"]) == (name, "W9", 1)
    assert set(row["sides"]) == {DIFFUSERS, COG_SDXL, OURS, OURS_FULL}
    for side, figures in row["sides"].items():
        assert figures["runs"] == 2
        assert 0 < figures["p50"] <= figures["p95"]
        assert figures["first"] > 0
        assert not figures["blank"]
        assert figures["images_per_second"] == pytest.approx(1 / figures["p50"])
        assert ("stages" in figures) == (side in (OURS, OURS_FULL))
    stages = row["sides"][OURS_FULL]["stages"]
    assert {"denoise", "decode", "safety", "watermark", "save"} <= stages.keys()
    assert not {"safety", "watermark"} & row["sides"][OURS]["stages"].keys()
    assert sum(stages.values()) <= row["sides"][OURS_FULL]["p95"] * 1.01
    assert set(row["ratios"]) == {DIFFUSERS, COG_SDXL}
    assert all(r["lowest"] <= r["median"] <= r["highest"] for r in row["ratios"].values())
    assert set(switched["sides"]) == {COG_SDXL, OURS_FULL}
    for figures in switched["sides"].values():
        assert figures["runs"] == 2
        assert figures["same_again"] > 0
        added = figures["switch"]
        assert added["lowest"] <= added["median"] <= added["highest"]
    assert f"| {name} | {COG_SDXL} |" in text
    assert f"| {switch} | {OURS_FULL} |" in text


def test_time_is_shared(monkeypatch):
    """A workload has as much as the others that are still to come, and none where none is left."""
    now, shares = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(images, "time", clock)
    monkeypatch.setattr(report, "json_line", str)

    def measure_one(name, arguments, sides, end):
        shares.append(end - now[0])
        now[0] += 10.0
        return name

    monkeypatch.setattr(images, "_measure", measure_one)
    sides = SimpleNamespace(make_room=lambda *_: None)
    arguments = SimpleNamespace(only=list(WORKLOADS)[:4])
    measured = images._measure_all(arguments, sides, 28.0, lambda line: None)
    assert shares == [7.0, 6.0, 4.0]
    assert measured == list(WORKLOADS)[:3]


def test_there_is_no_time_to_compile_in_a_short_run(monkeypatch):
    workload = replace(FIVE_STEPS, baselines=(DIFFUSERS, COMPILED), model="sdxl-turbo")
    monkeypatch.setitem(WORKLOADS, "x", workload)
    sides = SimpleNamespace(has=lambda *_: False, get=lambda name, _: name)
    monkeypatch.setattr(
        measure,
        "measure",
        lambda name, workload, sides, *_: measure.summarise(
            name, workload, {side: Samples(None, seconds=[1.0]) for side in sides}
        ),
    )
    monkeypatch.setenv("DEVICE", "cpu")
    arguments = SimpleNamespace(compiled=True, runs=1)
    for end, built in ((0.0, {DIFFUSERS, OURS}), (1e9, {DIFFUSERS, COMPILED, OURS})):
        figures = images._measure("x", arguments, sides, end)
        assert set(figures.sides) == built
        assert figures.left_out == (() if COMPILED in built else (COMPILED,))


@pytest.mark.parametrize("is_refined", [False, True])
def test_plain_diffusers_makes_the_same_image(sides, tmp_path, is_refined):
    """Otherwise their times say nothing about one another."""
    workload = replace(FIVE_STEPS, is_refined=is_refined, num_outputs=2)
    stock = sides.get(DIFFUSERS, workload).run(workload, 3, tmp_path)
    ours = sides.get(OURS, workload).run(workload, 3, tmp_path)
    assert len(ours) == len(stock) == 2
    assert all(difference(*pair) <= 1 for pair in zip(ours, stock, strict=True))
    assert difference(*ours) > 20


@pytest.mark.parametrize("name", ["SD 1.5 LCM, 4 steps", "SD-Turbo, 1 step", "ControlNet"])
def test_so_it_does_with_other_models(sides, tmp_path, name):
    workload = WORKLOADS.get(name, replace(FIVE_STEPS, control_type="edge_canny"))
    (stock,) = sides.get(DIFFUSERS, workload).run(workload, 3, tmp_path)
    (ours,) = sides.get(OURS, workload).run(workload, 3, tmp_path)
    assert difference(ours, stock) <= 1


def test_cog_sdxl_makes_the_same_image(sides, tmp_path):
    cog: CogSdxl = sides.get(COG_SDXL, FIVE_STEPS)
    with cog.without_watermark():
        (theirs,) = cog.run(FIVE_STEPS, 3, tmp_path)
    unmarked = Ours.load("sdxl", {**FULL, "apply_watermark": False}, tmp_path, sides.loras[0])
    unmarked.prepare(FIVE_STEPS)
    (ours,) = unmarked.run(FIVE_STEPS, 3, tmp_path)
    (without,) = sides.get(DIFFUSERS, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    assert difference(ours, theirs) <= 3
    assert difference(ours, without) > 20  # the LoRA is in both
    assert difference(theirs, without) > 20
    (full,) = sides.get(OURS_FULL, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    changed = np.abs(np.subtract(*(np.asarray(Image.open(f), int) for f in (full, theirs))))
    assert changed.max() > 3
    assert np.median(changed) <= 1  # it is in the watermark's few places


def test_both_change_their_lora(sides, tmp_path):
    workload = WORKLOADS["another LoRA, 4 steps"]
    made = {}
    for name in (COG_SDXL, OURS_FULL):
        side = sides.get(name, workload)
        for number in (0, 1, 1):
            side.use_lora(sides.loras[number])
            (file,) = side.run(workload, 3, tmp_path)
            made[name, number] = Image.open(file).copy()
    for number in (0, 1):
        pair = [np.asarray(made[name, number], int) for name in (COG_SDXL, OURS_FULL)]
        assert np.median(np.abs(pair[0] - pair[1])) <= 1  # all but the watermark
    assert np.abs(np.subtract(*(np.asarray(made[COG_SDXL, n], int) for n in (0, 1)))).max() > 20


def test_the_compiled_baseline_compiles_unet_and_decoder(monkeypatch, sides, tmp_path):
    """What they are compiled to is not ours to test, and takes minutes."""
    calls = []

    def compile_(function, **options):
        calls.append((type(function).__name__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    (file,) = sides.get(COMPILED, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    options = {"mode": "max-autotune", "fullgraph": True}
    assert calls == [("UNet2DConditionModel", options), ("method", options)]
    (stock,) = sides.get(DIFFUSERS, FIVE_STEPS).run(FIVE_STEPS, 3, tmp_path)
    assert difference(file, stock) <= 1


def test_figures_are_of_turns(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    seconds = {DIFFUSERS: [1.0, 2.0, 4.0], OURS: [0.5, 2.0, 1.0]}
    samples = {name: Samples(1.0, first=3.0, seconds=taken) for name, taken in seconds.items()}
    samples[OURS].stages = [{"text": 0.1}, {"text": 0.3, "load": 0.2}, {"text": 0.2}]
    workload = replace(FIVE_STEPS, baselines=(DIFFUSERS,), num_outputs=4)
    figures = measure.summarise("five steps", workload, samples)
    assert figures.ratios == {DIFFUSERS: Spread(0.5, 0.25, 1.0)}
    assert figures.to_diffusers[OURS] == Spread(0.5, 0.25, 1.0)
    assert figures.sides[OURS].images_per_second == 4.0
    assert figures.sides[OURS].stages == {"text": 0.2, "load": 0.0}
    first, second = report.tables([figures])
    assert first.splitlines()[2:] == [
        "| five steps | diffusers | 2000 | 4000 | 3 | 2.00 | 0.50 (0.25 to 1.00) | 1.0 | 3.00 |",
        "| five steps | ours | 1000 | 2000 | 3 | 4.00 |  | 1.0 | 3.00 |",
    ]
    assert second.splitlines()[-1] == "| five steps | ours | 200 | 0.0 |"


def test_a_switch_is_compared_with_the_same_again(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    samples = Samples(None, seconds=[1.5, 1.25, 4.0], repeated=[1.0, 1.0, 1.0])
    figures = measure.summarise("switch", FIVE_STEPS, {OURS_FULL: samples})
    assert figures.sides[OURS_FULL].switch == Spread(0.5, 0.25, 3.0)
    assert report.tables([figures])[0].splitlines()[-1] == (
        "| switch | ours, all features | 1500 | 4000 | 3 | 0.67 |  |  | 0.00 | 1000"
        " | 500 (250 to 3000) |"
    )


def test_on_a_gpu_there_are_floors_and_memory(monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda")
    samples = Samples(None, seconds=[2.0], resident_bytes=int(7e9), working_bytes=int(3e9))
    figures = measure.summarise("x", replace(FIVE_STEPS, tflop=788.0), {OURS: samples})
    ours = figures.sides[OURS]
    assert (ours.peak_bytes, ours.times_the_floor, ours.tflops) == (10e9, 2.0, 394.0)
    assert report.tables([figures])[0].endswith("| 10.0 | 2.00 | 394 |")


def test_floors_are_those_of_the_arithmetic():
    floors = {w.id: round(1000 * w.floor_seconds, 1) for w in WORKLOADS.values()}
    assert floors["W1"] == 528.4
    assert floors["W9"] == 356.7
    assert floors["W3"] == 47.7
    assert len(floors) == len(WORKLOADS)


# The host's work


def test_the_hosts_work_by_the_command(capfd):
    """With the published networks: they take no memory here."""
    name = "SDXL-Turbo, 1 step"
    before = psutil.Process().memory_info().rss
    main(["host", "--runs", "1", "--only", name])
    assert psutil.Process().memory_info().rss < before + 500e6
    out = capfd.readouterr().out
    described, row = rows(out)
    assert described.keys() == MACHINE
    assert set(row["sides"]) == {DIFFUSERS, OURS}
    assert all(0 < side["p50"] < 10 for side in row["sides"].values())
    assert {"load", "text", "denoise", "decode", "save"} <= row["sides"][OURS]["stages"].keys()
    assert f"| {name} | {OURS} |" in out


def test_stubs_have_all_modules_of_the_published_networks():
    sdxl, sd = stub_components(BaseModel.SDXL), stub_components(BaseModel.SD21)
    assert sum(p.numel() for p in sdxl.unet.parameters()) == 2567463684
    assert sum(p.numel() for p in sd.unet.parameters()) == 865910724
    assert stub_components(BaseModel.SDXL).unet is sdxl.unet


# Starting


def test_start_by_the_command(capfd, monkeypatch):
    """But for the processes: what they do is done here, where all is imported already."""

    def start_here(side, inputs, folder):
        monkeypatch.chdir(folder)
        began, seconds = time.perf_counter(), {}
        monkeypatch.setattr(
            start, "_report", lambda point: seconds.update({point: time.perf_counter() - began})
        )
        start.SIDES[side](inputs)
        return seconds

    monkeypatch.setattr(start, "start", start_here)
    main(["start", "--cpu", "--runs", "1"])
    text = capfd.readouterr().out
    described, bare, ours = rows(text)
    assert described.keys() == MACHINE
    assert (bare["side"], ours["side"]) == ("bare diffusers", "ours")
    assert 0.01 < bare["loaded"] < bare["generated"]
    assert 0.01 < ours["loaded"] < ours["generated"]
    assert text.splitlines()[-1].startswith("| ours |")


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match=r"stranger ended with status 1(.|\n)*KeyError"):
        start.start("stranger", {}, tmp_path)


def test_starts_are_compared_in_pairs():
    taken = {
        start.BARE: [{"loaded": 4.0, "generated": 5.0}, {"loaded": 8.0, "generated": 10.0}],
        start.OURS: [{"loaded": 3.0, "generated": 5.0}, {"loaded": 4.0, "generated": 20.0}],
    }
    bare, ours = start.table(taken).splitlines()[2:]
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
    main(["plot", *map(str, files), "--out", str(out)])
    svg = out.read_text()
    full = plot.WIDTH
    assert svg.count('class="baseline"') == svg.count('class="ours"') == 2
    assert [f'width="{w:.1f}"' in svg for w in (full / 4, full / 2, full)] == [True] * 3
    assert "0.50, 1000 ms" in svg
    assert "0.90" not in svg  # the newer line of a workload counts
    assert "a &amp; b" in svg
    assert "prefers-color-scheme: dark" in svg


def test_nothing_to_plot_is_an_error(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for file, message in ((empty, "no workload"), (tmp_path / "none", "No such file")):
        with pytest.raises(SystemExit):
            main(["plot", str(file)])
        assert message in capsys.readouterr().err


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training", "--cpu", "--steps", "3"], "--steps 3"),
        (["images", "--runs", "0"], "--runs is 0"),
        (["start", "--runs", "0"], "--runs is 0"),
        (["host", "--runs", "0"], "--runs is 0"),
        (["images", "--only", "cats"], "cats"),
    ],
)
def test_too_few_and_unknown_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["images", "start", "training"])
def test_without_a_gpu_one_has_to_say_cpu(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([command])
    assert "--cpu" in capsys.readouterr().err


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.describe(cpu=True)["commit"] is None


# The published networks


def test_the_published_networks_sizes():
    """Parameters as published; built without memory."""
    with torch.device("meta"):
        built = {name: build() for name, build in NETWORKS.items()}
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in built.items()}
    assert counts == {
        "sdxl/unet": 2567463684,
        "sdxl-refiner/unet": 2259526660,
        "sdxl-vae": 83653863,
        "sdxl/text_encoder": 123060480,
        "sdxl/text_encoder_2": 694659840,
        "sd15/unet": 859520964,
        "sd15/text_encoder": 123060480,
        "sd15/vae": 83653863,
        "sd21/unet": 865910724,
        "sd21/text_encoder": 340387840,
        "sd21/vae": 83653863,
        "sdxl-controlnet-union": 1256614800,
        "safety-checker": 303981588,
        "nsfw-detector": 85800194,
    }
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = architectures.build_tokenizer(name)
        assert len(tokenizer) == architectures.VOCABULARY
        assert tokenizer("a red circle").input_ids[-1] == architectures.VOCABULARY - 1


@pytest.fixture
def tiny_full(monkeypatch):
    """The full edition on the CPU, its networks as small as the miniature's."""

    def text_encoder(number):
        return architecture.build_text_encoders(architectures.VOCABULARY)[number]

    tiny = {
        **{name: architecture.build_unet for name in NETWORKS if name.endswith("/unet")},
        **{name: architecture.build_vae for name in NETWORKS if name.endswith("vae")},
        **{name: lambda: text_encoder(0) for name in NETWORKS if name.endswith("/text_encoder")},
        "sdxl-refiner/unet": architecture.build_refiner_unet,
        "sdxl/text_encoder_2": lambda: text_encoder(1),
        "sdxl-controlnet-union": lambda: build_controlnet(UNION, architecture.build_unet()),
        "safety-checker": train_safety.build_checker,
        "nsfw-detector": train_safety.build_detector,
    }
    for name, build in tiny.items():
        monkeypatch.setitem(NETWORKS, name, build)
    monkeypatch.setattr(architectures, "VOCABULARY", 1200)
    with environment.settings(cpu=False):
        monkeypatch.setenv("DEVICE", "cpu")
        yield


def test_random_weights_serve_as_downloaded_ones(tiny_full, monkeypatch, tmp_path):
    """All of what happens on a GPU but for sizes: files are made, loaded and used."""
    fetched = []
    monkeypatch.setattr(download, "download_entry", lambda *a: fetched.append(a) or {})
    small = replace(FIVE_STEPS, steps=2, guidance_scale=1.0, sizes={"width": 256, "height": 256})
    sides = Sides(tmp_path)
    for workload in (
        replace(small, is_refined=True),
        replace(small, model="sdxl-turbo", steps=1, guidance_scale=0.0),
        replace(small, model="sdxl-lcm"),
    ):
        names = (OURS_FULL, COG_SDXL) if workload.model == "sdxl" else (OURS,)
        for name in (*names, DIFFUSERS):
            side = sides.get(name, workload)
            if name not in (OURS, OURS_FULL):  # generates at the model's own size
                (side if name == DIFFUSERS else side.stock).size = 256
            assert side.run(workload, 0, tmp_path)
    sides.close()
    for name in random_weights.WRITERS:
        folder = random_weights.write(name, torch.device("cpu"))
        assert cache.ensure(name, Edition.FULL) == folder
    assert not fetched


# Files


def test_files_by_the_command(capfd):
    main(["files", "--size", "256", "--runs", "1", "--upscale-size", "128"])
    out = capfd.readouterr().out
    png, mark, *upscales = rows(out)
    for row in (png, mark):
        assert row["correct"]
        faster = row["times_faster"]
        assert faster["lowest"] == faster["median"] == faster["highest"] > 0
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
    """Stands for multiprocessing: a process runs here, where all is imported already, at once.

    It takes no turns: what it sends is there to be received later.
    """

    def Pipe(self):  # noqa: N802  its name there
        sent = []
        ours = SimpleNamespace(send=lambda _: None, recv=lambda: sent.pop(0))
        its = SimpleNamespace(send=sent.append, recv=lambda: None, close=lambda: None)
        return ours, its

    def Process(self, target, args, daemon):  # noqa: N802
        return SimpleNamespace(start=lambda: target(*args))


def test_training_by_the_command(capfd, monkeypatch):
    monkeypatch.setattr(training, "PROCESSES", AtOnce())
    steps = ["--steps", str(training.MIN_STEPS), "--size", "64"]
    main(["training", "--cpu", "--rounds", "1", *steps])
    out = capfd.readouterr().out
    described, *samples = rows(out)
    assert described.keys() == MACHINE
    assert [s["side"] for s in samples] == ["cog-sdxl", "ours"]
    for sample in samples:
        assert 1e-3 < sample["after"] < 60
        assert 1e-3 < sample["before"] < 60
        assert sample["peak_bytes"] > 100e6
        assert 0 < sample["last_loss"] < 10
    assert out.splitlines()[-2].startswith("| cog-sdxl's loop |")
    assert out.splitlines()[-1].startswith("| ours |")


def test_a_side_that_fails_ends_the_run(capfd):
    with pytest.raises(SystemExit, match="stranger ended before its training did"):
        training.measure(["stranger"], 64, 16)
    assert "KeyError: 'stranger'" in capfd.readouterr().err


def test_a_side_waits_for_its_turn():
    ours, its = training.PROCESSES.Pipe()
    turns = Turns(its)
    for loss in (0.5, 0.25):
        ours.send(None)
        turns.step(loss)
        seconds, sent = ours.recv()
        assert (seconds > 0, sent) == (True, loss)
        assert not its.poll()  # it has taken its turn
    turns.end()
    assert ours.recv() > 100e6


def test_the_baseline_trains_its_lora_and_its_embeddings():
    torch.manual_seed(0)
    with environment.settings(cpu=True):
        model, examples = training.load_subject(128)
    baseline = CogSdxlTraining(model, encode(model.components.vae, examples, False), 4, 32, 4)
    before = {
        part: encoder.get_input_embeddings().weight.detach().clone()
        for part, encoder in model.components.text_encoders.items()
    }
    steps = []
    baseline.run(lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3, 4]
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
        {"cog-sdxl": sample("cog-sdxl", 1.0), "ours": sample("ours", 2.0)},
        {"cog-sdxl": sample("cog-sdxl", 2.0), "ours": sample("ours", 5.0)},
        {"cog-sdxl": sample("cog-sdxl", 4.0), "ours": sample("ours", 6.0)},
    ]
    cog, ours = training.table(rounds).splitlines()[2:]
    assert cog == (
        "| cog-sdxl's loop | 750 | 250 | 2.00 | 1.00 (1.00 to 1.00) | 1000 | 1.00 (1.00 to 1.00) |"
    )
    assert ours == "| ours | 300 | 100 | 5.00 | 2.00 (1.50 to 2.50) | 400 | 0.50 (0.40 to 0.67) |"
