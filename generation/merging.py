"""LoRA deltas of many modules at once, and many copies at once.

A host tells a GPU to do some 25 things a millisecond: what is done module by module waits for it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.formats.types import LoraDelta, TrainedWeights

TRANSIENT_BYTES = 500_000_000  # in fp32, of the modules that are merged at once
KEPT_BYTES = 512_000_000  # of stacked deltas on a GPU: five LoRAs of rank 32 of SDXL's attention
SPARED = 4  # what is kept leaves a quarter of a GPU's memory free, or is not kept there

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """Deltas of modules whose weights have one shape and type."""

    names: tuple[str, ...]  # of the modules' weights
    up: Tensor  # (modules, out, rank), on the weights' device
    down: Tensor  # (modules, rank, in · kernel)
    alpha: float

    def merged(self, parameters: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
        """`merged` of each, the same to the rounding of fp32; views of one piece of memory."""
        shape = (len(parameters), *parameters[0].shape)
        weights = torch.empty(shape, dtype=torch.float32, device=self.up.device)
        values = weights.unbind()
        copy_all(values, parameters)
        factor = scale * self.alpha / self.down.shape[1]
        weights.flatten(2).baddbmm_(self.up.float(), self.down.float(), alpha=factor)
        return values

    @property
    def n_bytes(self) -> int:
        """What it takes on the device."""
        return self.up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class Single:
    """One delta that is merged by itself: with DoRA."""

    names: tuple[str]
    delta: LoraDelta
    n_bytes = 0

    def merged(self, parameters: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
        """As `Batch.merged`."""
        return [merged(parameters[0], self.delta, scale)]


@dataclass(frozen=True)
class _Kept:
    """Batches as long as what they were made of is alive."""

    origin: weakref.ref[LoraDelta]  # the first one: TrainedWeights have no hash
    batches: Sequence[Batch | Single]
    n_bytes: int


class Batches:
    """LoRAs in batches for one model; on a GPU, those of the LoRAs used last stay there."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # by serial

    def of(self, weights: TrainedWeights) -> Iterator[Batch | Single]:
        """All deltas of these weights, every module's once."""
        for serial, kept in list(self._kept.items()):
            if kept.origin() is None:
                self._kept.pop(serial, None)
        origin = next(iter(weights.lora.values()), None)
        found = self._kept.get(weights.serial)
        if found is not None and found.origin() is origin:
            self._kept.move_to_end(weights.serial)
            yield from found.batches
        elif origin is not None:
            yield from self._made(weights, origin)

    def _made(self, weights: TrainedWeights, origin: LoraDelta) -> Iterator[Batch | Single]:
        made, n_bytes = [], 0
        for batch in _batches(weights.lora, self._parameters):
            n_bytes += batch.n_bytes
            if n_bytes <= KEPT_BYTES:
                made.append(batch)
            else:
                made.clear()  # nor held until the last is merged
            yield batch
        device = self._parameters[made[0].names[0]].device if made else _CPU
        # They are there already: it is what else there will be that needs the room.
        if n_bytes <= KEPT_BYTES and _is_apart(device) and place_of_copies(device, 0) == device:
            self._kept[weights.serial] = _Kept(weakref.ref(origin), made, n_bytes)
            while sum(kept.n_bytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)


def _batches(
    lora: Mapping[str, LoraDelta], parameters: Mapping[str, Tensor]
) -> Iterator[Batch | Single]:
    """Those alike together, but not more than take TRANSIENT_BYTES while they are merged."""
    alike: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for module, delta in lora.items():
        if delta.dora_scale is not None:
            yield Single((f"{module}.weight",), delta)
            continue
        weight = parameters[f"{module}.weight"]
        own = (weight.shape, weight.stride(), weight.dtype, weight.device)
        alike[(*own, delta.rank, delta.alpha, delta.up.dtype, delta.down.dtype)].append(module)
    for modules in alike.values():
        delta, weight = lora[modules[0]], parameters[f"{modules[0]}.weight"]
        n_bytes = 4 * (weight.numel() + delta.up.numel() + delta.down.numel())
        step = max(1, TRANSIENT_BYTES // n_bytes)
        for start in range(0, len(modules), step):
            some = modules[start : start + step]
            yield Batch(
                tuple(f"{module}.weight" for module in some),
                _stacked([lora[module].up for module in some], weight.device),
                _stacked([lora[module].down for module in some], weight.device),
                delta.alpha,
            )


def _stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """(tensors, rows, columns) on the device, of matrices or convolutions, in one copy.

    A GPU fetches it from pinned memory by itself, while the next is stacked.
    """
    matrices = [tensor.flatten(1) for tensor in tensors]
    if not _is_apart(device) or device.type == "cpu" or any(t.is_cuda for t in matrices):
        return torch.stack(matrices).to(device)
    shape = (len(matrices), *matrices[0].shape)
    pinned = torch.empty(shape, dtype=matrices[0].dtype, pin_memory=True)
    return torch.stack(matrices, out=pinned).to(device, non_blocking=True)


def _is_apart(device: torch.device) -> bool:
    """Whether the device's memory is another one than the host's."""
    return device.type != "cpu"


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the tensors hold, in their order: beside them where there is room, else on the CPU."""
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for k, tensor in enumerate(tensors):
        alike[tensor.shape, tensor.dtype, tensor.device].append(k)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        some = [tensors[k] for k in places]
        device = place_of_copies(some[0].device, n_bytes)
        # One piece of memory: a GPU is asked for it once.
        shape = (len(some), *some[0].shape)
        kept = torch.empty(shape, dtype=some[0].dtype, device=device).unbind()
        copy_all(kept, some)
        found.update(zip(places, kept, strict=True))
    return [found[k] for k in range(len(tensors))]


def place_of_copies(device: torch.device, n_bytes: int) -> torch.device:
    """The device itself if so much can be kept there, else the CPU."""
    if device.type == "cpu" or n_bytes <= _room_on_device(device):
        return device
    return _CPU


def _room_on_device(device: torch.device) -> int:
    """Bytes until only the spared part is free, as the driver sees it.

    What PyTorch holds for its next tensors counts as taken: those of a picture will need it.
    """
    free, total = torch.cuda.mem_get_info(device)
    return free - total // SPARED


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, a GPU's many at a time.

    It does that for tensors with the same strides if all have the same types; a single other one
    in a list makes it copy them one by one (ATen/native/cuda/ForeachBinaryOpList.cu).
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


def merged(parameter: Tensor, delta: LoraDelta, scale: float) -> Tensor:
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
