"""Keep models in memory: loaded once, the least recently used ones dropped for a budget."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from models.components import ModelComponents
from models.cuda_graphs import CUDAGraphRunner, ExecutionConfig
from models.loading import ModelLoader
from weights.catalog import Edition

if TYPE_CHECKING:
    from diffusers import ControlNetModel


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A base model or refiner on the device."""

    components: ModelComponents
    graphs: CUDAGraphRunner
    # diffusers' properties of these names look through all modules, 2,700 of them in SDXL.
    device: torch.device
    dtype: torch.dtype

    def modules(self) -> list[nn.Module]:
        """Return every network."""
        return self.components.modules()


@dataclass(frozen=True, eq=False)
class LoadedControlNet:
    """A ControlNet on the device, or diffusers' ControlNetUnionModel."""

    controlnet: ControlNetModel
    graphs: CUDAGraphRunner

    def modules(self) -> list[nn.Module]:
        """Return every network."""
        return [self.controlnet]


Entry = LoadedModel | LoadedControlNet
E = TypeVar("E", LoadedModel, LoadedControlNet)


class ModelCache:
    """The models of one edition on one device, by catalog entry.

    They stay as long as they fit into `budget` bytes together (None: always). A model is read whole
    before another is dropped, so one that cannot be read changes nothing.
    """

    def __init__(
        self,
        edition: Edition,
        device: torch.device,
        dtype: torch.dtype,
        budget: int | None = None,
        compiles: bool = False,
    ) -> None:
        self._device, self._dtype, self._budget = device, dtype, budget
        self._loader = ModelLoader(edition, dtype)
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # last used last
        self.execution = ExecutionConfig.for_device(device, compiles)

    def base_model(
        self, weights: str, components_from: Mapping[str, str], unshared: bool = False
    ) -> LoadedModel:
        """Return a base model, see `ModelLoader.base_model`."""

        def load() -> LoadedModel:
            components = self._loader.base_model(weights, components_from, unshared)
            return self._loaded_model(components)

        return self._get(weights, load)

    def refiner(self, weights: str, base_weights: str, base: LoadedModel) -> LoadedModel:
        """Return the refiner of a base model that is loaded."""

        def load() -> LoadedModel:
            return self._loaded_model(self._loader.refiner(weights, base.components))

        known = self._entries.get(weights)
        if isinstance(known, LoadedModel) and known.components.vae is not base.components.vae:
            del self._entries[weights]  # it shares networks of a base model that was dropped
        return self._get(weights, load, keep=[base_weights])

    def controlnet(self, weights: str, keep: Collection[str]) -> LoadedControlNet:
        """Return a ControlNet; the entries in `keep` are not dropped for it."""

        def load() -> LoadedControlNet:
            graphs = CUDAGraphRunner(self.execution)
            return LoadedControlNet(self._loader.controlnet(weights), graphs)

        return self._get(weights, load, keep)

    def drop(self, weights: str) -> None:
        """Drop a model, so that it is loaded again."""
        self._entries.pop(weights, None)

    def clear_graphs(self) -> None:
        """Free the memory of all CUDA graphs."""
        for entry in self._entries.values():
            entry.graphs.clear()

    def _loaded_model(self, components: ModelComponents) -> LoadedModel:
        graphs = CUDAGraphRunner(self.execution)
        return LoadedModel(components, graphs, self._device, self._dtype)

    def _get(self, weights: str, load: Callable[[], E], keep: Collection[str] = ()) -> E:
        if weights not in self._entries:
            loaded = load()
            self._make_room(loaded, keep)
            for module in loaded.modules():
                module.to(self._device)
            self._entries[weights] = loaded
        self._entries.move_to_end(weights)
        return self._entries[weights]  # type: ignore[return-value]  # an entry has one kind

    def _make_room(self, model: Entry, keep: Collection[str]) -> None:
        """Drop the least recently used models until this one fits into the budget."""
        for weights in list(self._entries):
            if self._budget is None or _bytes([model, *self._entries.values()]) <= self._budget:
                break
            if weights not in keep:
                print(f"Unloading {weights} to stay within MAX_MODEL_GB", flush=True)
                del self._entries[weights]
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()


def _bytes(models: Iterable[Entry]) -> int:
    """Return the size of all parameters and buffers; shared networks count once."""
    modules = {id(module): module for model in models for module in model.modules()}
    return sum(
        tensor.nbytes
        for module in modules.values()
        for tensor in (*module.parameters(), *module.buffers())
    )
