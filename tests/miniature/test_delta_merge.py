"""LoRAs merged in batches: the same values in few operations, restored exactly."""

import itertools
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from generation import delta_merge
from generation import lora as lora_module
from generation.adapters import Adapter
from generation.delta_merge import BatchedDelta, DeltaCache, SingleDelta, merge_delta
from generation.lora import LoraMerger
from models.components import ModelComponents
from tests.helpers.trained_files import (
    kohya_tensors,
    matrices,
    miniature_shapes,
    model_parts,
    read_tensors,
)
from tests.miniature.isolation import Cancelled, failing_in
from weights.formats.types import LoraDelta, Pooling, TrainedWeights

ROUNDING = 1e-6  # of fp32, relative to the largest value
SHAPES = {"linear": (6, 8), "other": (6, 8), "wide": (12, 8), "conv": (6, 4, 3, 3), "again": (6, 8)}


class Operations(TorchDispatchMode):
    """Counts the kernels that a device runs: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::unbind")):
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def model(dtype=torch.float32, device="cpu", shapes=SHAPES) -> nn.Module:
    module = nn.Module()
    generator = torch.Generator().manual_seed(1)
    for name, (out, into, *kernel) in shapes.items():
        layer = nn.Conv2d(into, out, kernel) if kernel else nn.Linear(into, out)
        module.add_module(name, layer)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return module.to(device, dtype).requires_grad_(False)


def lora(seed=0, rank=2, dtype=torch.float32, dora=(), shapes=SHAPES, **alphas) -> TrainedWeights:
    deltas = {}
    for k, (name, shape) in enumerate(shapes.items()):
        down, up = (m.to(dtype) for m in matrices(shape, rank, 100 * seed + k))
        ones = (1,) * (len(shape) - 1)
        magnitude = torch.rand(shape[0], *ones) + 1 if name in dora else None
        deltas[f"unet.{name}"] = LoraDelta(down, up, alphas.get(name, 1.0), magnitude)
    return TrainedWeights(deltas, {}, False, (), {}, Pooling.EOS, "")


def merger_of(module) -> LoraMerger:
    return LoraMerger(ModelComponents(module, None, {}, {}, {}, is_sdxl=False))


def values(module) -> list[tuple[bytes, int]]:
    """Return every parameter's bytes and address."""
    return [(p.cpu().numpy().tobytes(), p.data_ptr()) for p in module.parameters()]


def by_name(module):
    return {f"unet.{name}": parameter for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("transient", [delta_merge.MAX_TRANSIENT_BYTES, 500, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_batched_deltas_equal_single_ones(monkeypatch, dtype, transient):
    monkeypatch.setattr(delta_merge, "MAX_TRANSIENT_BYTES", transient)
    weights = lora(dtype=torch.float16, dora=("wide",), again=0.5)
    parameters = by_name(model(dtype))
    seen = []
    for batch in DeltaCache(parameters).get(weights):
        originals = [parameters[name] for name in batch.names]
        for name, value in zip(batch.names, batch.merge(originals, 0.7), strict=True):
            wanted = merge_delta(parameters[name], weights.lora[name.removesuffix(".weight")], 0.7)
            assert value.shape == wanted.shape
            assert value.dtype == torch.float32
            assert (value - wanted).abs().max() <= ROUNDING * wanted.abs().max()
            seen.append(name)
    assert sorted(seen) == sorted(f"unet.{name}.weight" for name in SHAPES)


def test_modules_of_one_layout_are_batched():
    weights = lora(dora=("wide",), again=0.5)
    batches = list(DeltaCache(by_name(model())).get(weights))
    kinds = [(type(batch), len(batch.names)) for batch in batches]
    assert kinds == [(SingleDelta, 1), (BatchedDelta, 2), (BatchedDelta, 1), (BatchedDelta, 1)]


@torch.inference_mode()
def test_adapters_are_merged_in_order_and_rounded_in_between():
    module = model(torch.float16)
    before = values(module)
    chain = [(lora(1), 0.9), (lora(2, rank=3), -0.4), (lora(3, dora=("linear",)), 0.3)]
    wanted = {name: parameter.clone() for name, parameter in by_name(module).items()}
    for weights, scale in chain:
        for name, delta in weights.lora.items():
            weight = wanted[f"{name}.weight"]
            weight.copy_(merge_delta(weight, delta, scale))
    merger = merger_of(module)
    with merger.applied([Adapter(*pair) for pair in chain]):
        for name, parameter in by_name(module).items():
            # A rounding in fp32 may become one in fp16.
            torch.testing.assert_close(parameter, wanted[name], rtol=2e-3, atol=4e-3)
        first = values(module)
    assert values(module) == before
    with merger.applied([Adapter(*pair) for pair in chain]):
        assert values(module) == first


@torch.no_grad()
def test_a_switch_takes_few_operations_for_any_number_of_modules():
    shapes = {f"{kind}{k}": SHAPES[kind] for k in range(50) for kind in ("linear", "wide", "conv")}
    merger = merger_of(model(shapes=shapes))
    first, second = (Adapter(lora(seed, shapes=shapes), 1.0) for seed in (1, 2))
    with merger.applied([first], keep=True):
        pass
    with Operations() as switch, merger.applied([second], keep=True):
        pass
    # For each of three shapes two stacks, a sum, values read and written; and one restoration.
    assert switch.counts == {"aten::stack": 6, "aten::baddbmm_": 3, "aten::_foreach_copy_": 7}
    with Operations() as end:
        merger._switch_to(())
    assert end.counts == {"aten::_foreach_copy_": 1}


@torch.no_grad()
def test_the_miniature_takes_few_operations_too(tmp_path):
    unet = model_parts()["unet"].requires_grad_(False)
    modules = [name for name in miniature_shapes().modules() if name.startswith("unet.")]
    merger = merger_of(unet)
    weights = read_tensors(tmp_path, kohya_tensors(modules))
    shapes = {unet.get_parameter(f"{name[5:]}.weight").shape for name in modules}
    with merger.applied([Adapter(weights, 1.0)]):
        pass
    with Operations() as use, merger.applied([Adapter(weights, 1.0)]):
        pass
    assert len(modules) > 3 * len(shapes)
    assert use.counts.total() <= 5 * len(shapes) + 1


@pytest.mark.parametrize(
    ("module_struck", "is_accelerator"),
    [(lora_module, True), (delta_merge, False), (delta_merge, True)],
    ids=["merger", "batches", "cached batches"],
)
@torch.inference_mode()
def test_cancelled_anywhere(monkeypatch, module_struck, is_accelerator):
    monkeypatch.setattr(delta_merge, "is_accelerator", lambda device: is_accelerator)
    monkeypatch.setattr(delta_merge, "MAX_TRANSIENT_BYTES", 500)
    shapes = {name: SHAPES[name] for name in ("linear", "conv", "again", "wide")}
    module = model(torch.float16, shapes=shapes)
    value = {"unet.linear.bias": torch.ones(6)}
    first = replace(lora(1, dora=("wide",), shapes=shapes), parameters=value)
    above = lora(2, shapes={"again": (6, 8)})
    pair = [Adapter(first, 1.0), Adapter(above, 0.5)]
    second = [Adapter(lora(3, shapes={"linear": (6, 8), "again": (6, 8)}), 1.0)]
    before = values(module)
    merger = merger_of(module)
    with merger.applied(second):
        wanted = values(module)
    for count in itertools.count(1):
        if count % 2:
            merger = merger_of(module)  # whose cache is empty
        caught = []
        try:
            with failing_in(module_struck, None, count, Cancelled) as struck, merger.applied(pair):
                pass
        except Cancelled as error:
            caught.append(error)
        with merger.applied(second):
            caught.clear()
            assert values(module) == wanted, struck
        assert values(module) == before, struck
        if not struck:
            break
    assert count > 500


@pytest.mark.parametrize("free", [59, 60])
def test_copies_stay_on_a_gpu_that_keeps_a_quarter_free(monkeypatch, free):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 200))
    assert delta_merge.device_for_copies(gpu, 10) == (gpu if free == 60 else torch.device("cpu"))


def test_copies_on_a_cpu_need_no_free_memory(monkeypatch):
    monkeypatch.setattr(delta_merge, "_free_bytes", None)
    assert delta_merge.device_for_copies(torch.device("cpu"), 10**15) == torch.device("cpu")


@torch.inference_mode()
def test_copies_are_exact_in_any_memory_format():
    tensors = [*model(torch.float16).parameters(), torch.tensor([float("nan"), -0.0])]
    conv = tensors[6]
    assert conv.ndim == 4
    tensors[6] = conv.to(memory_format=torch.channels_last)
    for tensor, copy in zip(tensors, delta_merge.copy_of_each(tensors), strict=True):
        assert (copy.shape, copy.dtype) == (tensor.shape, tensor.dtype)
        assert copy.numpy().tobytes() == tensor.numpy().tobytes()
        assert copy.data_ptr() != tensor.data_ptr()


@torch.inference_mode()
def test_values_are_written_in_any_memory_format():
    module, other = model(torch.float16), model(torch.float16)
    other.to(memory_format=torch.channels_last)
    for each in (module, other):
        merger = merger_of(each)
        before = values(each)
        with merger.applied([Adapter(lora(), 1.0)]):
            changed = [parameter.clone() for parameter in each.parameters()]
        assert values(each) == before
        if each is module:
            wanted = changed
    assert all(torch.equal(a, b) for a, b in zip(changed, wanted, strict=True))


@pytest.fixture
def accelerator(monkeypatch):
    """Treat the CPU as a device with memory of its own."""
    monkeypatch.setattr(delta_merge, "is_accelerator", lambda device: True)


def uploads(deltas, weights) -> int:
    """Return how often deltas are stacked."""
    with Operations() as used:
        list(deltas.get(weights))
    return used.counts["aten::stack"]


def cache_of(monkeypatch, n_bytes: int) -> DeltaCache:
    monkeypatch.setattr(delta_merge, "CACHED_BYTES", n_bytes)
    return DeltaCache(by_name(model()))


@torch.no_grad()
def test_the_last_used_deltas_stay_on_the_device(accelerator, monkeypatch):
    pool = [lora(seed, dora=("wide",)) for seed in range(3)]
    size = sum(batch.n_bytes for batch in DeltaCache(by_name(model())).get(pool[0]))
    deltas = cache_of(monkeypatch, 2 * size)
    again = [uploads(deltas, pool[k]) > 0 for k in (0, 0, 1, 0, 2, 0, 1)]
    assert again == [True, False, True, False, True, False, True]
    deltas = cache_of(monkeypatch, size - 1)
    assert [uploads(deltas, pool[2]) > 0 for _ in range(2)] == [True, True]


@torch.no_grad()
def test_deltas_are_cached_for_one_file_alone(accelerator):
    """Renamed placeholder tokens leave a file's LoRA as it is; another file has another serial."""
    deltas = DeltaCache(by_name(model()))
    weights = lora(1)
    assert uploads(deltas, weights)
    assert not uploads(deltas, replace(weights, pooling=Pooling.ARGMAX))
    assert uploads(deltas, lora(1))


@torch.no_grad()
def test_a_cpu_caches_no_deltas():
    deltas = DeltaCache(by_name(model()))
    weights = lora()
    assert uploads(deltas, weights) == uploads(deltas, weights) > 0
    assert not deltas._cache


@torch.no_grad()
def test_a_full_device_caches_no_deltas(accelerator, monkeypatch):
    monkeypatch.setattr(
        delta_merge, "device_for_copies", lambda device, n_bytes: torch.device("meta")
    )
    deltas = DeltaCache(by_name(model()))
    weights = lora()
    assert uploads(deltas, weights) == uploads(deltas, weights) > 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("room", [True, False])
@torch.inference_mode()
def test_a_gpu_merges_as_a_cpu_does(monkeypatch, room):
    monkeypatch.setattr(delta_merge, "_free_bytes", lambda device: 10**9 if room else -1)
    chain = [Adapter(lora(1, dora=("wide",)), 0.9), Adapter(lora(2, dtype=torch.float16), -0.4)]
    made = []
    for device in ("cpu", "cuda"):
        module = model(torch.float16, device)
        merger = merger_of(module)
        before = values(module)
        for _ in range(2):  # from the CPU, and from the cache
            with merger.applied(chain):
                made.append([parameter.cpu().clone() for parameter in module.parameters()])
            assert values(module) == before
    kept = {copy.device.type for copy in merger._originals.values()}
    assert kept == {"cuda" if room else "cpu"}
    assert all(torch.equal(a, b) for a, b in zip(made[2], made[3], strict=True))
    for ours, theirs in zip(made[2], made[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=4e-3)


@pytest.mark.gpu
@needs_gpu
@torch.inference_mode()
def test_an_sdxl_lora_is_switched_in_a_moment():
    """Rank 32, all attention of the UNet."""
    sizes = {(1280, 1280): 360, (1280, 2048): 120, (640, 640): 60, (640, 2048): 20}
    shapes = {
        f"{out}_{into}_{k}": (out, into) for (out, into), n in sizes.items() for k in range(n)
    }
    merger = merger_of(model(torch.float16, "cuda", shapes))
    pair = [Adapter(lora(k, 32, torch.float16, shapes=shapes), 1.0) for k in (1, 2)]
    taken = []
    for k in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with merger.applied([pair[k % 2]], keep=True):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    print("seconds:", *(f"{seconds:.4f}" for seconds in taken))
    assert sorted(taken[2:])[3] < 0.03
