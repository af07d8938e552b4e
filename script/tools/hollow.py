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
from torch import Tensor, nn

from generation.base_models import BaseModelSpec, Lineage
from generation.passes import Acceleration, Replay
from generation.pipelines import LoadedModel, PipelineStore
from script.tools import random_models, random_sdxl
from weights.catalog import Edition

DTYPE = torch.float16  # as on a GPU

_UNETS: dict[Lineage, Callable[[], nn.Module]] = {
    Lineage.SDXL: random_sdxl.build_unet,
    Lineage.SD15: random_models.build_sd15_unet,
    Lineage.SD21: random_models.build_sd21_unet,
}


@functools.cache
def parts(lineage: Lineage) -> Mapping[str, Any]:
    """Of a model, by a pipeline's names; the same ones at each call."""
    unet = _hollow(_UNETS[lineage])
    unet.forward = _no_noise
    vae = _hollow(_VAES[lineage])
    vae.decode = _grey  # type: ignore[assignment]
    first, second = random_sdxl.build_tokenizers()
    found = {"unet": unet, "vae": vae, "tokenizer": first, "image_encoder": None}
    if lineage is not Lineage.SDXL:
        alone = {"safety_checker": None, "requires_safety_checker": False}
        return {**found, **alone, "text_encoder": _encoder(lineage), "feature_extractor": None}
    encoders = [_encoder(lineage, number) for number in range(2)]
    return {
        **found,
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "tokenizer_2": second,
        "feature_extractor": None,
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": False,
    }


_VAES: dict[Lineage, Callable[[], nn.Module]] = {
    Lineage.SDXL: random_sdxl.build_vae,
    Lineage.SD15: random_models.build_sd_vae,
    Lineage.SD21: random_models.build_sd_vae,
}


def _hollow(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    # Memory that is asked for and never touched is none.
    return nn.Module.to(module, DTYPE).to_empty(device="cpu").eval().requires_grad_(False)


def _no_noise(sample: Tensor, timestep: Tensor, *_: object, **__: object) -> tuple[Tensor]:
    return (torch.zeros_like(sample),)


def _grey(latents: Tensor, return_dict: bool = False, **_: object) -> tuple[Tensor]:
    assert not return_dict
    n, _channels, height, width = latents.shape
    return (latents.new_zeros(n, 3, 8 * height, 8 * width),)


def _encoder(lineage: Lineage, number: int = 0) -> nn.Module:
    if lineage is Lineage.SD21:
        encoder = _hollow(random_models.build_sd21_text_encoder)
    else:
        encoder = _hollow(lambda: random_sdxl.build_text_encoders()[number])
    encoder.forward = functools.partial(_no_meaning, encoder.config, projected=number == 1)
    return encoder


def _no_meaning(config: Any, input_ids: Tensor, *, projected: bool, **_: object) -> Any:  # noqa: ANN401
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    n, length = input_ids.shape
    state = torch.zeros(n, length, config.hidden_size, dtype=DTYPE)
    states = (state,) * (config.num_hidden_layers + 1)
    pooled = torch.zeros(n, config.projection_dim if projected else config.hidden_size, dtype=DTYPE)
    if projected:
        return CLIPTextModelOutput(
            text_embeds=pooled, last_hidden_state=state, hidden_states=states
        )
    return BaseModelOutputWithPooling(
        last_hidden_state=state, pooler_output=pooled, hidden_states=states
    )


class HollowStore(PipelineStore):
    """Our store of models, on the CPU, with hollow ones; passes are "recorded" as on a GPU."""

    def __init__(self) -> None:
        super().__init__(Edition.FULL, torch.device("cpu"), DTYPE)
        self.acceleration = Acceleration(_record, None)

    def _read(self, spec: BaseModelSpec, alone: bool) -> LoadedModel:
        return LoadedModel(parts(spec.lineage), random_sdxl.SCHEDULER_CONFIG)


def _record(run: Callable[[], None]) -> Replay:
    run()
    return run  # which takes about as long as the launch of a recording
