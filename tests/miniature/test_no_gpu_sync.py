"""Between its first and its last step, sampling never makes the CPU wait for the GPU.

The device here is PyTorch's "meta": its tensors have no values, so that reading one is an error, as
`torch.cuda.set_sync_debug_mode("error")` makes it on a GPU (tests/miniature/test_gpu.py). Copies to
it that would block are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from generation import sampling
from generation.conditioning import PromptEmbeddings, condition
from generation.latents import NonBlockingCopies, randn
from generation.plan import Mode
from generation.sampling import CFGDenoiser, GuidanceInterval, KnownLatents, Timesteps
from generation.schedulers import SCHEDULERS, ScheduleType
from models.cache import LoadedModel
from models.components import ModelComponents
from tests.helpers.engines import base_model
from tests.miniature.reference_pipelines import DISTINCT

META = torch.device("meta")
SEEDS, STEPS, SIZE = (1, 2), 5, (128, 128)
LATENTS = (len(SEEDS), 4, 16, 16)
MODES = [Mode.TXT2IMG, Mode.IMG2IMG, Mode.INPAINT]
# UniPC solves a small linear system on the GPU at each step, and checks whether that worked.
SYNCHRONIZING = {"UniPCMultistepScheduler"}


class BlockingCopies(TorchDispatchMode):
    """Notes copies between devices that the CPU would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if func.overloadpacket.__name__ in ("to", "_to_copy", "copy_"):
            source = arguments.get("src", arguments["self"])
            if source.device != result.device and not arguments.get("non_blocking"):
                self.found.append(f"{func} {tuple(source.shape)} {source.device}")
        return result


@dataclass
class Runner:
    """Runs the UNet, and counts the blocking copies before each run."""

    copies: BlockingCopies
    runs_unet: bool
    counts: list[int] = field(default_factory=list)

    def run(self, name: str, function: Callable, sample: Tensor, timestep: Tensor, **others):
        self.counts.append(len(self.copies.found))
        return function(sample, timestep, **others) if self.runs_unet else (0.5 * sample,)


@pytest.fixture(scope="module")
def components(engine) -> ModelComponents:
    loaded = base_model(engine).components
    with META:
        unet = diffusers.UNet2DConditionModel.from_config(loaded.unet.config).eval()
        vae = diffusers.AutoencoderKL.from_config(loaded.vae.config).eval()
    return replace(loaded, unet=unet, vae=vae)


def blocking_copies(
    components: ModelComponents,
    mode: Mode,
    scheduler_name: str,
    *,
    guidance_scale: float = 7.5,
    runs_unet: bool = False,
    select_timesteps: Callable[..., Timesteps] = sampling.select_timesteps,
) -> list[str]:
    """Return those between the UNet's first and last run."""
    scheduler = sampling.build_scheduler(
        scheduler_name, ScheduleType.AUTOMATIC, components.scheduler_config
    )
    with torch.inference_mode(), BlockingCopies() as copies:
        runner = Runner(copies, runs_unet)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        noise = randn(generators, LATENTS[1:], META)
        init = torch.empty(LATENTS, device=META)
        timesteps = select_timesteps(scheduler, STEPS, 1.0 if mode is Mode.TXT2IMG else 0.8)
        sample = sampling.initial_latents(
            scheduler, timesteps, noise, None if mode is Mode.TXT2IMG else init, SEEDS
        )
        known = None
        if mode is Mode.INPAINT:
            known = KnownLatents(init, noise, torch.empty(1, 1, 16, 16, device=META))
        denoiser = denoiser_of(components, runner, guidance_scale)
        result = sampling.denoise(denoiser, scheduler, timesteps, generators, sample, known)
    assert result.shape == LATENTS
    assert len(runner.counts) >= 3
    return copies.found[runner.counts[0] : runner.counts[-1]]


def denoiser_of(components, runner, guidance_scale: float) -> CFGDenoiser:
    width = components.unet.config.cross_attention_dim
    pooled_width = components.text_encoders["text_encoder_2"].config.projection_dim
    embeds, pooled = (torch.empty(1, *s, device=META) for s in [(77, width), (pooled_width,)])
    guidance = GuidanceInterval(guidance_scale, 0, 1) if guidance_scale > 1 else None
    negative = (embeds, pooled) if guidance else (None, None)
    prompts = PromptEmbeddings(embeds, pooled, *negative)
    conditioning = condition(components, prompts, SIZE, len(SEEDS), guidance_scale)
    return CFGDenoiser(LoadedModel(components, runner, META, torch.float32), conditioning, guidance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DISTINCT)
def test_no_step_waits_for_the_gpu(components, mode, name):
    synchronizes = SCHEDULERS[name].class_name in SYNCHRONIZING
    assert bool(blocking_copies(components, mode, name)) == synchronizes


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_nor_does_the_unet(components, guidance_scale):
    assert not blocking_copies(
        components, Mode.INPAINT, "K_EULER", guidance_scale=guidance_scale, runs_unet=True
    )


@pytest.mark.parametrize("name", ["K_EULER", "DDIM"])
def test_timesteps_on_the_device_would_be_waited_for(components, name):
    def on_device(scheduler, steps, strength):
        timesteps = sampling.select_timesteps(scheduler, steps, strength)
        scheduler.set_timesteps(steps, device=META)
        return replace(timesteps, scheduled=scheduler.timesteps)

    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        blocking_copies(components, Mode.INPAINT, name, select_timesteps=on_device)


def test_drawn_noise_would_be_waited_for(components, monkeypatch):
    """Without the mode that makes schedulers' copies non-blocking."""
    monkeypatch.setattr(NonBlockingCopies, "__enter__", lambda mode: mode)
    monkeypatch.setattr(NonBlockingCopies, "__exit__", lambda *error: None)
    assert blocking_copies(components, Mode.TXT2IMG, "K_EULER_ANCESTRAL")
