"""Merge LoRA deltas into many modules at once, and copy many tensors at once.

A CPU launches about 25 CUDA kernels per millisecond, so merging module by module is launch-bound:
this module batches it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.lru_cache import LRUCache
from weights.formats.types import LoraDelta, TrainedWeights

MAX_TRANSIENT_BYTES = 500_000_000  # in fp32, of the modules that are merged at once
CACHED_BYTES = 512_000_000  # of stacked deltas on a GPU: five LoRAs of rank 32 of SDXL's attention
SPARED = 4  # copies and caches leave one part in so many of a GPU's memory free

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BatchedDelta:
    """Deltas of modules whose weights have one shape and dtype."""

    names: tuple[str, ...]  # of the modules' weights
    up: Tensor  # (modules, out, rank), on the weights' device
    down: Tensor  # (modules, rank, in · kernel)
    alpha: float

    def merge(self, parameters: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
        """Return `merge_delta` of each parameter, to the rounding of fp32."""
        shape = (len(parameters), *parameters[0].shape)
        weights = torch.empty(shape, dtype=torch.float32, device=self.up.device)
        values = weights.unbind()
        copy_all(values, parameters)
        factor = scale * self.alpha / self.down.shape[1]
        weights.flatten(2).baddbmm_(self.up.float(), self.down.float(), alpha=factor)
        return values

    @property
    def n_bytes(self) -> int:
        """Its size on the device."""
        return self.up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class SingleDelta:
    """A delta that is merged by itself: with DoRA."""

    names: tuple[str]
    delta: LoraDelta
    n_bytes = 0

    def merge(self, parameters: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
        """Return the merged parameter."""
        return [merge_delta(parameters[0], self.delta, scale)]


Deltas = Sequence[BatchedDelta | SingleDelta]


class DeltaCache:
    """LoRAs of one model in batches; on a GPU, the last used ones stay there."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._cache: LRUCache[int, Deltas] = LRUCache(CACHED_BYTES, _n_bytes)

    def get(self, weights: TrainedWeights) -> Iterator[BatchedDelta | SingleDelta]:
        """Yield the deltas of a LoRA, each module's once."""
        cached = self._cache.get(weights.serial)
        if cached is not None:
            yield from cached
            return
        batches: list[BatchedDelta | SingleDelta] = []
        n_bytes = 0
        for batch in _batches(weights.lora, self._parameters):
            n_bytes += batch.n_bytes
            if n_bytes <= CACHED_BYTES:
                batches.append(batch)
            else:
                batches.clear()  # each is freed once it is merged
            yield batch
        if batches and n_bytes <= CACHED_BYTES:
            device = self._parameters[batches[0].names[0]].device
            # They are there already; the free memory is for what else comes.
            if is_accelerator(device) and device_for_copies(device, 0) == device:
                self._cache.add(weights.serial, batches)


def _n_bytes(batches: Deltas) -> int:
    return sum(batch.n_bytes for batch in batches)


def _batches(
    lora: Mapping[str, LoraDelta], parameters: Mapping[str, Tensor]
) -> Iterator[BatchedDelta | SingleDelta]:
    """Group equal shapes, in batches that take at most MAX_TRANSIENT_BYTES to merge."""
    alike: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for module, delta in lora.items():
        if delta.dora_scale is not None:
            yield SingleDelta((f"{module}.weight",), delta)
            continue
        weight = parameters[f"{module}.weight"]
        layout = (weight.shape, weight.stride(), weight.dtype, weight.device)
        alike[(*layout, delta.rank, delta.alpha, delta.up.dtype, delta.down.dtype)].append(module)
    for modules in alike.values():
        delta, weight = lora[modules[0]], parameters[f"{modules[0]}.weight"]
        n_bytes = 4 * (weight.numel() + delta.up.numel() + delta.down.numel())
        step = max(1, MAX_TRANSIENT_BYTES // n_bytes)
        for start in range(0, len(modules), step):
            group = modules[start : start + step]
            yield BatchedDelta(
                tuple(f"{module}.weight" for module in group),
                _stack([lora[module].up for module in group], weight.device),
                _stack([lora[module].down for module in group], weight.device),
                delta.alpha,
            )


def _stack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack matrices or flattened convolutions (tensors, rows, columns) on a device in one copy.

    A GPU copies from pinned memory while the CPU stacks the next.
    """
    matrices = [tensor.flatten(1) for tensor in tensors]
    if not is_accelerator(device) or device.type == "cpu" or any(t.is_cuda for t in matrices):
        return torch.stack(matrices).to(device)
    shape = (len(matrices), *matrices[0].shape)
    pinned = torch.empty(shape, dtype=matrices[0].dtype, pin_memory=True)
    return torch.stack(matrices, out=pinned).to(device, non_blocking=True)


def is_accelerator(device: torch.device) -> bool:
    """Whether a device has memory apart from the CPU's."""
    return device.type != "cpu"


def copy_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in order: on the tensors' devices where there is room, else on the CPU."""
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for k, tensor in enumerate(tensors):
        alike[tensor.shape, tensor.dtype, tensor.device].append(k)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        group = [tensors[k] for k in places]
        device = device_for_copies(group[0].device, n_bytes)
        shape = (len(group), *group[0].shape)  # one allocation
        copies = torch.empty(shape, dtype=group[0].dtype, device=device).unbind()
        copy_all(copies, group)
        found.update(zip(places, copies, strict=True))
    return [found[k] for k in range(len(tensors))]


def device_for_copies(device: torch.device, n_bytes: int) -> torch.device:
    """Return the device if it has room for so many bytes, else the CPU."""
    if device.type == "cpu" or n_bytes <= _free_bytes(device):
        return device
    return _CPU


def _free_bytes(device: torch.device) -> int:
    """Return the bytes that the driver reports free beyond the spared part.

    PyTorch's cached memory counts as used: the next request needs it.
    """
    free, total = torch.cuda.mem_get_info(device)
    return free - total // SPARED


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, many per kernel on a GPU.

    PyTorch does so for lists of equal dtypes and strides; one exception in a list makes it copy
    tensor by tensor (ATen/native/cuda/ForeachBinaryOpList.cu).
    """
    alike: defaultdict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]]
    alike = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        if target.device != source.device or target.stride() != source.stride():
            target.copy_(source)
            continue
        into, out_of = alike[target.device, target.dtype, source.dtype]
        into.append(target)
        out_of.append(source)
    for into, out_of in alike.values():
        torch._foreach_copy_(into, out_of)


def merge_delta(parameter: Tensor, delta: LoraDelta, scale: float) -> Tensor:
    """W + scale * (alpha / rank) * up @ down, in fp32 (arXiv:2106.09685, equation 3).

    With a DoRA magnitude m: m * W' / ||W'||, W' being the above (arXiv:2402.09353, equation 5).
    """
    down, up = (t.to(parameter.device, torch.float32).flatten(1) for t in (delta.down, delta.up))
    factor = scale * delta.alpha / down.shape[0]
    weight = parameter.float().flatten(1).addmm(up, down, alpha=factor)
    if delta.dora_scale is not None:
        # One magnitude for each output, or for each input (LyCORIS): the norm is over the rest.
        magnitude = delta.dora_scale.to(weight)
        weight = weight.view(parameter.shape)
        over = [d for d in range(weight.ndim) if magnitude.shape[d] == 1]
        norm = torch.linalg.vector_norm(weight, dim=over, keepdim=True)
        weight = weight * (magnitude / norm)
    return weight.view(parameter.shape)
