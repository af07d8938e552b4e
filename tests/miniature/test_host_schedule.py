"""Between its first and its last step, denoising never makes a GPU wait for its host.

The device here is PyTorch's "meta": tensors without values, so that asking for one is an error, as
`torch.cuda.set_sync_debug_mode("error")` makes it on a GPU (tests/miniature/test_gpu.py). What is
copied to it while the host waits is counted.
"""

from dataclasses import replace

import diffusers
import pytest
import torch
from generation.host_schedule import WAITS, on_the_host
from generation.passes import Acceleration, Passes
from generation.pipelines import PIPELINE_CLASSES
from generation.prompts import PromptEmbeddings
from torch.utils._python_dispatch import TorchDispatchMode

from generation import control, modes, noise, stand_ins
from generation.base_models import MINIATURE_SDXL
from generation.plan import Mode, RepaintPlan
from generation.resolve import resolve
from generation.schedulers import SCHEDULERS, ScheduleType, build_scheduler
from tests.miniature.stock import DISTINCT
from tests.requests import REQUEST

META = torch.device("meta")
MODES = [Mode.TXT2IMG, Mode.IMG2IMG, Mode.INPAINT]


class Watch(TorchDispatchMode):
    """Notes the copies that a host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        if func.overloadpacket.__name__ in ("to", "_to_copy", "copy_"):
            source = told.get("src", told["self"])
            if source.device != result.device and not told.get("non_blocking"):
                self.waits.append(f"{func} {tuple(source.shape)} {source.device}")
        return result


@pytest.fixture(scope="module")
def parts(engine):
    model = engine._store.load(MINIATURE_SDXL)
    with META:
        unet = diffusers.UNet2DConditionModel.from_config(model.parts["unet"].config)
        vae = diffusers.AutoencoderKL.from_config(model.parts["vae"].config)
    return model, {"unet": unet.eval(), "vae": vae.eval()}


def waits_of(parts, mode, name, steps=5, guidance=7.5, of=on_the_host, predicts=True):
    """What was waited for between the UNet's first and last call."""
    model, own = parts
    plan = replace(
        resolve(replace(REQUEST, scheduler=name, num_inference_steps=steps), MINIATURE_SDXL, None),
        mode=mode,
        strength=1.0 if mode is Mode.TXT2IMG else 0.8,
        guidance_scale=guidance,
        guided=guidance > 1,
        repaint=RepaintPlan(False, 0, None, None, 0, None) if mode is Mode.INPAINT else None,
        seeds=(1, 2),
    )
    scheduler = of(
        build_scheduler(name, ScheduleType.AUTOMATIC, model.scheduler_config, plan.seeds)
    )
    pipeline = getattr(diffusers, PIPELINE_CLASSES[MINIATURE_SDXL.architecture, mode])(
        **{**model.parts, **own, "text_encoder": None, "text_encoder_2": None},
        scheduler=scheduler,
    )
    width = model.parts["unet"].config.cross_attention_dim
    pooled = model.parts["text_encoder_2"].config.projection_dim
    texts = PromptEmbeddings(
        *(torch.empty(1, *s, device=META) for s in [(77, width), (pooled,)] * 2)
    )
    latents = torch.empty(2, 4, 16, 16, device=META)
    change = torch.empty(1, 1, 16, 16, device=META)
    seen = (None, None) if mode is Mode.TXT2IMG else (latents, change)
    start = modes.Start((128, 128), *seen, None)
    generators = [torch.Generator().manual_seed(seed) for seed in plan.seeds]
    watch, marks = Watch(), []
    passes = Passes(Acceleration(None, None))
    progress = stand_ins.Progress(scheduler, plan.skipped_steps)

    def forward(sample, timestep, **others):
        marks.append(len(watch.waits))
        if not predicts:
            return (0.5 * sample,)
        return passes.run("unet", own["unet"].forward, sample, timestep, **others)

    with torch.inference_mode(), noise.drawn_in_fp32(META), watch:
        arguments = modes.ARGUMENTS[mode](plan, texts, generators, start)
        heard = control.listening(forward, [], progress)
        with stand_ins.given(pipeline, heard, progress):
            result = pipeline(**arguments, output_type="latent", return_dict=False)[0]
    assert result.shape == latents.shape
    assert len(marks) >= 3
    return watch.waits[marks[0] : marks[-1]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DISTINCT)
def test_nothing_is_waited_for(parts, mode, name):
    if SCHEDULERS[name].class_name in WAITS:
        assert (
            waits_of(parts, mode, name, predicts=False) != []
        )  # or else it need not be named there
        return
    assert waits_of(parts, mode, name, predicts=False) == []


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_nothing_is_waited_for_in_the_unet(parts, guidance):
    assert waits_of(parts, Mode.INPAINT, "K_EULER", guidance=guidance) == []


@pytest.mark.parametrize("name", ["K_EULER", "DDIM"])
def test_the_watch_sees_what_is_waited_for(parts, name):
    """Schedulers as diffusers gives them ask a tensor on the device for its value, or copy."""
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        assert waits_of(parts, Mode.INPAINT, name, of=lambda scheduler: scheduler) == []


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_is_added_as_diffusers_adds_it(engine, name, dtype):
    config = engine._store.load(MINIATURE_SDXL).scheduler_config
    generator = torch.Generator().manual_seed(0)
    samples, drawn = (torch.randn(2, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
    results = []
    for of in (on_the_host, lambda scheduler: scheduler):
        scheduler = of(build_scheduler(name, ScheduleType.AUTOMATIC, config, (1, 2)))
        scheduler.set_timesteps(8, device="cpu")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(3)
        level = scheduler.timesteps[3 : 3 + 1].repeat(2)
        results.append(scheduler.add_noise(samples, drawn, level))
    ours, stock = results
    assert ours.dtype == stock.dtype == dtype
    torch.testing.assert_close(ours, stock, rtol=0, atol=0 if dtype is torch.float32 else 2e-3)
    assert (ours.float() - samples.float()).abs().max() > 0.1
