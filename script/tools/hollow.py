"""Models of the real architectures that compute nothing and take no memory.

All of their modules are there, to be looked at, but their weights are memory that nothing is ever
written to, and what they are asked for is zeros. What a request takes then is the host's own work,
which a GPU would wait for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from generation.passes import Acceleration, Replay
from generation.pipelines import SETTINGS, LoadedModel, PipelineStore
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from generation.base_models import BaseModel, BaseModelSpec
from script.tools import random_models, random_sdxl
from weights.catalog import Edition

DTYPE = torch.float16  # as on a GPU

Encoders = tuple[nn.Module, ...]
# UNet, VAE, text encoders.
_BUILDERS: dict[
    BaseModel, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], Encoders]]
] = {
    BaseModel.SDXL: (
        random_sdxl.build_unet,
        random_sdxl.build_vae,
        random_sdxl.build_text_encoders,
    ),
    BaseModel.SD15: (
        random_models.build_sd15_unet,
        random_models.build_sd_vae,
        lambda: (random_models.build_sd15_text_encoder(),),
    ),
    BaseModel.SD21: (
        random_models.build_sd21_unet,
        random_models.build_sd_vae,
        lambda: (random_models.build_sd21_text_encoder(),),
    ),
}


@functools.cache
def parts(lineage: BaseModel) -> Mapping[str, Any]:
    """The modules and tokenizers of a model, by a pipeline's names; the same ones at each call."""
    build_unet, build_vae, build_encoders = _BUILDERS[lineage]
    with torch.device("meta"):
        unet, vae, encoders = build_unet(), build_vae(), build_encoders()
    unet.forward = _no_noise
    vae.decode = _grey  # type: ignore[assignment]
    found = {"unet": _hollow(unet), "vae": _hollow(vae)}
    tokenizers = random_sdxl.build_tokenizers()
    for suffix, encoder, tokenizer in zip(("", "_2"), encoders, tokenizers, strict=False):
        projects = isinstance(encoder, CLIPTextModelWithProjection)
        encoder.forward = functools.partial(_no_meaning, encoder.config, projects)
        found[f"text_encoder{suffix}"] = _hollow(encoder)
        found[f"tokenizer{suffix}"] = tokenizer
    return found


def _hollow(module: nn.Module) -> nn.Module:
    """On the CPU, where memory that is asked for and never touched is none."""
    return nn.Module.to(module, DTYPE).to_empty(device="cpu").eval().requires_grad_(False)


def _no_noise(sample: Tensor, timestep: Tensor, *_: object, **__: object) -> tuple[Tensor]:
    return (torch.zeros_like(sample),)


def _grey(latents: Tensor, return_dict: bool = False, **_: object) -> tuple[Tensor]:
    assert not return_dict
    n, _channels, height, width = latents.shape
    return (latents.new_zeros(n, 3, 8 * height, 8 * width),)


def _no_meaning(config: Any, projects: bool, input_ids: Tensor, **_: object) -> Any:  # noqa: ANN401
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    n, length = input_ids.shape
    state = torch.zeros(n, length, config.hidden_size, dtype=DTYPE)
    states = {
        "last_hidden_state": state,
        "hidden_states": (state,) * (config.num_hidden_layers + 1),
    }
    pooled = torch.zeros(n, config.projection_dim if projects else config.hidden_size, dtype=DTYPE)
    if projects:
        return CLIPTextModelOutput(text_embeds=pooled, **states)
    return BaseModelOutputWithPooling(pooler_output=pooled, **states)


class HollowStore(PipelineStore):
    """Our store of models, on the CPU, with hollow ones; passes are "recorded" as on a GPU."""

    def __init__(self) -> None:
        super().__init__(Edition.FULL, torch.device("cpu"), DTYPE)
        self.acceleration = Acceleration(_record, None)

    def _read(self, spec: BaseModelSpec, alone: bool) -> LoadedModel:
        settings = SETTINGS[spec.architecture]
        return LoadedModel({**parts(spec.base_model), **settings}, random_sdxl.SCHEDULER_CONFIG)


def _record(run: Callable[[], None]) -> Replay:
    run()
    return run  # which takes about as long as the launch of a recording
