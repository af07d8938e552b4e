"""A GPU gives the CPU's images in fp16, and its trainings in bf16 are as good."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from generation.controlnets import ControlRequest
from generation.engine import Engine
from generation.safety import SafetyChecker
from models.cuda_graphs import CUDAGraphRunner
from tests.evals import concept, safety
from tests.evals import training as training_eval
from tests.miniature.reference_pipelines import COG_ARCHIVE, MODES, TYPED
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
        images = [
            make(prompt=c.text, seed=k, num_inference_steps=20, **changes).images[0]
            for k, c in enumerate(captions)
        ]
        rows = [row_of(c, image) for c, image in zip(captions, images, strict=True)]
        right[engine] = sum(all(row.right.values()) for row in rows)
    assert right["gpu"] >= right["cpu"] - 1


@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_cpus_image(gpu, make, files, mode):
    changes = {k: files.get(v, v) if isinstance(v, str) else v for k, v in MODES[mode].items()}
    (here,), (there,) = make(engine=gpu, **changes).images, make(**changes).images
    (other,) = make(**{**changes, "seed": 99}).images
    assert difference(here, there) < CLOSE < difference(other, there)


def test_a_gpu_gives_the_cpus_image_with_controlnets(gpu, make, files):
    edges = ControlRequest("edge_canny", files["image"], 0.75, 0, 1, is_map=False)
    controlled = {"controls": (edges, edges)}
    (here,), (there,) = (make(**e, **controlled).images for e in ({"engine": gpu}, {}))
    (other,) = make().images
    assert difference(here, there) < CLOSE < difference(other, there)


def difference(a: Image.Image, b: Image.Image) -> float:
    first, second = (np.asarray(image, np.float32) for image in (a, b))
    return float(np.abs(first - second).mean())


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_request_equals_the_eager_one(gpu, make, files, mode):
    """Run eagerly, captured and replayed, an image differs less than one of another seed."""
    changes = {k: files.get(v, v) if isinstance(v, str) else v for k, v in MODES[mode].items()}
    gpu._models.clear_graphs()
    images = [make(engine=gpu, **changes).images[0] for _ in range(4)]
    (other,) = make(engine=gpu, **{**changes, "seed": 99}).images
    for image in images[1:]:
        assert difference(images[0], image) < 0.1 < difference(images[0], other)


@pytest.mark.parametrize("scheduler", ["K_EULER", "K_EULER_ANCESTRAL", "DDIM", "LCM", "DPM++ 2M"])
@pytest.mark.parametrize("mode", ["txt2img", "inpaint"])
def test_sampling_does_not_wait_for_the_gpu(gpu, make, files, monkeypatch, mode, scheduler):
    changes = {k: files.get(v, v) if isinstance(v, str) else v for k, v in MODES[mode].items()}
    changes |= {"scheduler": scheduler, "num_inference_steps": 10, "prompt_strength": 0.8}
    for _ in range(3):
        make(engine=gpu, **changes)  # captured by now: a capture itself synchronizes
    run, steps, calls = CUDAGraphRunner.run, 8 if mode == "inpaint" else 10, []

    def watch(runner, name, *args, **kwargs):
        if name == "unet":
            calls.append(name)
            torch.cuda.set_sync_debug_mode("error" if len(calls) < steps else "default")
        return run(runner, name, *args, **kwargs)

    monkeypatch.setattr(CUDAGraphRunner, "run", watch)
    try:
        make(engine=gpu, **changes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == steps


def test_a_request_is_repeated_byte_for_byte_after_another_with_weights(gpu, make):
    first = make(engine=gpu).bytes
    make(engine=gpu, prompt=TYPED, replicate_weights=COG_ARCHIVE.url)
    assert make(engine=gpu).bytes == first


def test_the_safety_models_agree_in_fp16(gpu):
    here = gpu._postprocessor.load_safety_checker()
    there = SafetyChecker(Edition.MINIATURE, torch.device("cpu"), torch.float32)
    for shape, background in (("star", "red"), ("star", "orange"), ("heart", "red")):
        images = safety.drawn(shape, background)
        for opinion in ("flagged", "confirmed"):
            ours, expected = (np.array(getattr(c, opinion)(images)) for c in (here, there))
            assert (ours != expected).mean() <= 0.02


def losses(tmp_path, **changes) -> list[float]:
    """Return the losses of 16 steps; half of them also train the new tokens."""
    spec, device = TRAINABLE_MODELS[Edition.MINIATURE], torch.device("cuda")
    model = load(spec, Edition.MINIATURE, device, Method.LORA)
    config = replace(training_eval.CONFIG, max_train_steps=16, lora_lr=3e-3, **changes)
    events = []
    loop.fit(concept.examples(), (), config, model, tmp_path, events.append)
    return [event.loss for event in events if isinstance(event, StepDone)]


def test_a_replayed_training_is_the_eager_one(tmp_path, monkeypatch):
    replayed = losses(tmp_path / "replayed")
    monkeypatch.setattr(trainables, "_uses_cuda_graphs", lambda model, plan: False)
    eager = losses(tmp_path / "eager")
    assert replayed == pytest.approx(eager, rel=0.01)
    assert losses(tmp_path / "other", lora_rank=2) != pytest.approx(eager, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"compile_unet": True}], ids=["replayed", "compiled"])
def test_a_training_teaches_the_word(changes):
    weights = training_eval.train(replace(training_eval.CONFIG, **changes), device="cuda")
    assert (
        training_eval.share(training_eval.TrainingHarness().generate(weights))
        >= training_eval.SHOWN
    )
