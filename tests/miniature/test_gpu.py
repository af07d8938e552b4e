"""What a GPU does: the CPU's pictures in fp16, and trainings in bf16 that teach as well."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from generation import painter
from generation.controlnets import ControlRequest
from generation.engine import Engine
from generation.safety import SafetyChecker
from tests.miniature import concept, safety_bars
from tests.miniature import training_bars as bars
from tests.miniature.stock import COG_ARCHIVE, MODES, TYPED
from tests.requests import NO_CONTROL
from training import loop, trainables
from training.config import TRAINABLE_MODELS, Method
from training.model import load
from training.progress import StepDone
from weights.catalog import Edition
from weights.miniature.captions import held_out_captions
from weights.miniature.evaluate import CAPTION_SEED, row_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CAPTIONS = 16
CLOSE = 1.0  # mean difference in steps of 255; another seed differs by more


@pytest.fixture(scope="module")
def gpu() -> Engine:
    engine = Engine(Edition.MINIATURE, "cuda")
    engine.load()
    return engine


def test_captions_are_followed_as_well(gpu, make):
    captions = held_out_captions(CAPTIONS, CAPTION_SEED)
    right = {}
    for engine in ("gpu", "cpu"):
        changes = {"engine": gpu} if engine == "gpu" else {}
        made = [
            make(prompt=c.text, seed=k, num_inference_steps=20, **changes).pictures[0]
            for k, c in enumerate(captions)
        ]
        rows = [row_of(c, picture) for c, picture in zip(captions, made, strict=True)]
        right[engine] = sum(all(row.right.values()) for row in rows)
    assert right["gpu"] >= right["cpu"] - 1


@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_makes_the_cpus_picture(gpu, make, files, mode):
    changes = {k: files.get(v, v) if isinstance(v, str) else v for k, v in MODES[mode].items()}
    (here,), (there,) = make(engine=gpu, **changes).pictures, make(**changes).pictures
    (other,) = make(**{**changes, "seed": 99}).pictures
    assert difference(here, there) < CLOSE < difference(other, there)


def test_a_gpu_makes_the_cpus_picture_under_control(gpu, make, files):
    edges = ControlRequest("edge_canny", files["picture"], 0.75, 0, 1, is_map=False)
    controlled = {"controls": (edges, edges, NO_CONTROL)}
    (here,), (there,) = (make(**e, **controlled).pictures for e in ({"engine": gpu}, {}))
    (other,) = make().pictures
    assert difference(here, there) < CLOSE < difference(other, there)


def difference(a: Image.Image, b: Image.Image) -> float:
    first, second = (np.asarray(picture, np.float32) for picture in (a, b))
    return float(np.abs(first - second).mean())


@pytest.mark.parametrize("mode", MODES)
def test_a_recorded_request_is_the_first_one(gpu, make, files, mode):
    """Run as it is, recorded, and replayed; a seed apart is further away."""
    changes = {k: files.get(v, v) if isinstance(v, str) else v for k, v in MODES[mode].items()}
    gpu._store.forget_passes()
    pictures = [make(engine=gpu, **changes).pictures[0] for _ in range(4)]
    (other,) = make(engine=gpu, **{**changes, "seed": 99}).pictures
    for picture in pictures[1:]:
        assert difference(pictures[0], picture) < 0.1 < difference(pictures[0], other)


@pytest.mark.parametrize("scheduler", ["K_EULER", "K_EULER_ANCESTRAL", "DDIM", "LCM", "DPM++ 2M"])
@pytest.mark.parametrize("mode", ["txt2img", "inpaint"])
def test_denoising_waits_for_nothing(gpu, make, files, monkeypatch, mode, scheduler):
    asked = {k: files.get(v, v) if isinstance(v, str) else v for k, v in MODES[mode].items()}
    asked |= {"scheduler": scheduler, "num_inference_steps": 10, "prompt_strength": 0.8}
    for _ in range(3):
        make(engine=gpu, **asked)  # recorded by now: a recording itself does wait
    fast, steps, calls = painter._fast, 8 if mode == "inpaint" else 10, []

    def watched(passes, pipeline):
        forward = fast(passes, pipeline)

        def call(*args, **kwargs):
            calls.append(1)
            torch.cuda.set_sync_debug_mode("error" if len(calls) < steps else "default")
            return forward(*args, **kwargs)

        return call

    monkeypatch.setattr(painter, "_fast", watched)
    try:
        make(engine=gpu, **asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == steps


def test_a_request_is_repeated_byte_for_byte_after_another_with_weights(gpu, make):
    first = make(engine=gpu).bytes
    make(engine=gpu, prompt=TYPED, replicate_weights=COG_ARCHIVE.url)
    assert make(engine=gpu).bytes == first


def test_the_safety_models_agree_in_fp16(gpu):
    here = gpu._finisher.load_safety_checker()
    there = SafetyChecker(Edition.MINIATURE, torch.device("cpu"), torch.float32)
    for shape, background in (("star", "red"), ("star", "orange"), ("heart", "red")):
        pictures = safety_bars.drawn(shape, background)
        for opinion in ("flagged", "confirmed"):
            ours, cpus = (np.array(getattr(c, opinion)(pictures)) for c in (here, there))
            assert (ours != cpus).mean() <= 0.02


def losses(tmp_path, **changes) -> list[float]:
    """Of 16 steps, half before the pivot."""
    model = load(
        TRAINABLE_MODELS[Edition.MINIATURE], Edition.MINIATURE, torch.device("cuda"), Method.LORA
    )
    config = replace(bars.CONFIG, max_train_steps=16, lora_lr=3e-3, **changes)
    told = []
    loop.fit(concept.examples(), (), config, model, tmp_path, told.append)
    return [event.loss for event in told if isinstance(event, StepDone)]


def test_a_replayed_training_is_the_eager_one(tmp_path, monkeypatch):
    replayed = losses(tmp_path / "replayed")
    monkeypatch.setattr(trainables, "_uses_cuda_graphs", lambda model, plan: False)
    eager = losses(tmp_path / "eager")
    assert replayed == pytest.approx(eager, rel=0.01)
    assert losses(tmp_path / "other", lora_rank=2) != pytest.approx(eager, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"compile_unet": True}], ids=["replayed", "compiled"])
def test_a_training_teaches_the_word(changes):
    weights = bars.train(replace(bars.CONFIG, **changes), device="cuda")
    assert bars.share(bars.Bench().draw(weights)) >= bars.SHOWN
