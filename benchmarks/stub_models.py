"""Models with the published networks that compute nothing and take no memory.

All modules exist, for code that walks through them, but their weights are memory that is never
written, and forward passes return zeros. What a request takes is then the host's work, for which a
GPU would wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from benchmarks.architectures import NETWORKS, SCHEDULER_CONFIG, build_tokenizer, folders
from generation.base_models import BASE_MODELS, BaseModel
from models.cache import LoadedModel, ModelCache
from models.components import TOKENIZERS, ModelComponents
from models.cuda_graphs import CUDAGraphRunner, ExecutionConfig, Replay
from weights.catalog import Edition

DTYPE = torch.float16  # as on a GPU
_NAMES = {BaseModel.SDXL: "sdxl", BaseModel.SD15: "sd15", BaseModel.SD21: "sd21"}


@functools.cache
def stub_components(base_model: BaseModel) -> ModelComponents:
    """Return a model's networks and tokenizers; the same ones at each call."""
    name = _NAMES[base_model]
    encoders = [folder for folder in folders(name) if folder in TOKENIZERS]
    unet = _without_weights(f"{name}/unet")
    unet.forward = _no_noise
    vae = _without_weights("sdxl-vae" if name == "sdxl" else f"{name}/vae")
    vae.decode = _black
    text_encoders = {encoder: _without_weights(f"{name}/{encoder}") for encoder in encoders}
    for network in text_encoders.values():
        projects = isinstance(network, CLIPTextModelWithProjection)
        network.forward = functools.partial(_no_text, network.config, projects)
    tokenizers = {encoder: build_tokenizer(TOKENIZERS[encoder]) for encoder in encoders}
    return ModelComponents(
        unet, vae, text_encoders, tokenizers, SCHEDULER_CONFIG, is_sdxl=len(encoders) == 2
    )


def _without_weights(network: str) -> Any:  # noqa: ANN401
    """Build a network on the CPU, where memory takes no room until it is written."""
    with torch.device("meta"):
        module = NETWORKS[network]()
    return nn.Module.to(module, DTYPE).to_empty(device="cpu").eval().requires_grad_(False)


def _no_noise(sample: Tensor, timestep: Tensor, *_: object, **__: object) -> tuple[Tensor]:
    return (torch.zeros_like(sample),)


def _black(latents: Tensor, return_dict: bool = False, **_: object) -> tuple[Tensor]:
    assert not return_dict
    n, _channels, height, width = latents.shape
    return (latents.new_zeros(n, 3, 8 * height, 8 * width),)


def _no_text(config: Any, projects: bool, input_ids: Tensor, **_: object) -> Any:  # noqa: ANN401
    n, length = input_ids.shape
    state = torch.zeros(n, length, config.hidden_size, dtype=DTYPE)
    states = (state,) * (config.num_hidden_layers + 1)
    if projects:
        embeds = torch.zeros(n, config.projection_dim, dtype=DTYPE)
        return CLIPTextModelOutput(embeds, last_hidden_state=state, hidden_states=states)
    pooled = torch.zeros(n, config.hidden_size, dtype=DTYPE)
    return BaseModelOutputWithPooling(state, pooler_output=pooled, hidden_states=states)


class StubModelCache(ModelCache):
    """The cache of models with stubs, on the CPU; passes are "captured" as on a GPU."""

    def __init__(self) -> None:
        super().__init__(Edition.FULL, torch.device("cpu"), DTYPE)
        self.execution = ExecutionConfig(_capture)
        self._loaded: dict[str, LoadedModel] = {}

    def base_model(
        self, weights: str, components_from: Mapping[str, str], unshared: bool = False
    ) -> LoadedModel:
        """Return the stub of a catalog entry."""
        if weights not in self._loaded:
            specs = BASE_MODELS[Edition.FULL].values()
            base_model = next(spec.base_model for spec in specs if spec.weights == weights)
            graphs = CUDAGraphRunner(self.execution)
            components = stub_components(base_model)
            self._loaded[weights] = LoadedModel(components, graphs, torch.device("cpu"), DTYPE)
        return self._loaded[weights]


def _capture(run: Callable[[], None]) -> Replay:
    run()
    return run  # takes about as long as a graph's launch
