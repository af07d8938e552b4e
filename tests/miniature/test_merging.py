"""LoRA merged in batches: the same values with few operations, and nothing is left of them."""

import gc
import itertools
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from generation.merging import Batch, Single, merged
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from generation import adapters, merging
from generation.adapters import Adapter, AdapterSlot
from tests.miniature.isolation import Cancelled, failing_in
from tests.trained_files import kohya_tensors, matrices, miniature_shapes, model_parts, read_tensors
from weights.formats.types import LoraDelta, Pooling, TrainedWeights

ROUNDING = 1e-6  # of fp32, relative to the largest value
SHAPES = {"linear": (6, 8), "other": (6, 8), "wide": (12, 8), "conv": (6, 4, 3, 3), "again": (6, 8)}


class Operations(TorchDispatchMode):
    """Counts what a device is asked to do: no views, no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::unbind")):
            self.seen[func.name()] += 1
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


def values(module) -> list[tuple[bytes, int]]:
    """Of every parameter, and where it lies."""
    return [(p.cpu().numpy().tobytes(), p.data_ptr()) for p in module.parameters()]


def by_name(module):
    return {f"unet.{name}": parameter for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("transient", [merging.TRANSIENT_BYTES, 500, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_batches_are_what_single_modules_are(monkeypatch, dtype, transient):
    monkeypatch.setattr(merging, "TRANSIENT_BYTES", transient)
    weights = lora(dtype=torch.float16, dora=("wide",), again=0.5)
    parameters = by_name(model(dtype))
    seen = []
    for batch in merging.Batches(parameters).of(weights):
        own = [parameters[name] for name in batch.names]
        for name, value in zip(batch.names, batch.merged(own, 0.7), strict=True):
            wanted = merged(parameters[name], weights.lora[name.removesuffix(".weight")], 0.7)
            assert value.shape == wanted.shape
            assert value.dtype == torch.float32
            assert (value - wanted).abs().max() <= ROUNDING * wanted.abs().max()
            seen.append(name)
    assert sorted(seen) == sorted(f"unet.{name}.weight" for name in SHAPES)


def test_modules_are_together_that_can_be():
    weights = lora(dora=("wide",), again=0.5)
    batches = list(merging.Batches(by_name(model())).of(weights))
    kinds = [(type(batch), len(batch.names)) for batch in batches]
    assert kinds == [(Single, 1), (Batch, 2), (Batch, 1), (Batch, 1)]


@torch.inference_mode()
def test_adapters_are_merged_in_their_order_and_rounded_between():
    module = model(torch.float16)
    before = values(module)
    chain = [(lora(1), 0.9), (lora(2, rank=3), -0.4), (lora(3, dora=("linear",)), 0.3)]
    wanted = {name: parameter.clone() for name, parameter in by_name(module).items()}
    for weights, scale in chain:
        for name, delta in weights.lora.items():
            weight = wanted[f"{name}.weight"]
            weight.copy_(merged(weight, delta, scale))
    slot = AdapterSlot({"unet": module})
    with slot.applied([Adapter(*pair) for pair in chain]):
        for name, parameter in by_name(module).items():
            # A rounding in fp32 may become one in fp16.
            torch.testing.assert_close(parameter, wanted[name], rtol=2e-3, atol=4e-3)
        first = values(module)
    assert values(module) == before
    with slot.applied([Adapter(*pair) for pair in chain]):
        assert values(module) == first


@torch.no_grad()
def test_a_switch_is_few_operations_however_many_modules():
    shapes = {f"{kind}{k}": SHAPES[kind] for k in range(50) for kind in ("linear", "wide", "conv")}
    slot = AdapterSlot({"unet": model(shapes=shapes)})
    first, second = (Adapter(lora(seed, shapes=shapes), 1.0) for seed in (1, 2))
    with slot.applied([first], stay=True):
        pass
    with Operations() as switch, slot.applied([second], stay=True):
        pass
    # For each of three shapes two stacks, a sum, and values brought and written; and a taking back.
    assert switch.seen == {"aten::stack": 6, "aten::baddbmm_": 3, "aten::_foreach_copy_": 7}
    with Operations() as end:
        slot._become(())
    assert end.seen == {"aten::_foreach_copy_": 1}


@torch.no_grad()
def test_nor_are_there_many_for_the_miniature(tmp_path):
    parts = {name: module.requires_grad_(False) for name, module in model_parts().items()}
    modules = [name for name in miniature_shapes().modules() if name.startswith("unet.")]
    slot = AdapterSlot(parts)
    weights = read_tensors(tmp_path, kohya_tensors(modules))
    shapes = {parts["unet"].get_parameter(f"{name[5:]}.weight").shape for name in modules}
    with slot.applied([Adapter(weights, 1.0)]):
        pass
    with Operations() as use, slot.applied([Adapter(weights, 1.0)]):
        pass
    assert len(modules) > 3 * len(shapes)
    assert use.seen.total() <= 5 * len(shapes) + 1


@pytest.mark.parametrize(
    ("struck_in", "apart"),
    [(adapters, True), (merging, False), (merging, True)],
    ids=["slot", "batches", "kept batches"],
)
@torch.inference_mode()
def test_cancelled_anywhere(monkeypatch, struck_in, apart):
    monkeypatch.setattr(merging, "_is_apart", lambda device: apart)
    monkeypatch.setattr(merging, "TRANSIENT_BYTES", 500)
    shapes = {name: SHAPES[name] for name in ("linear", "conv", "again", "wide")}
    module = model(torch.float16, shapes=shapes)
    value = {"unet.linear.bias": torch.ones(6)}
    first = replace(lora(1, dora=("wide",), shapes=shapes), parameters=value)
    above = lora(2, shapes={"again": (6, 8)})
    pair = [Adapter(first, 1.0), Adapter(above, 0.5)]
    second = [Adapter(lora(3, shapes={"linear": (6, 8), "again": (6, 8)}), 1.0)]
    before = values(module)
    slot = AdapterSlot({"unet": module})
    with slot.applied(second):
        wanted = values(module)
    for count in itertools.count(1):
        if count % 2:
            slot = AdapterSlot({"unet": module})  # which remembers nothing yet
        caught = []
        try:
            with failing_in(struck_in, None, count, Cancelled) as struck, slot.applied(pair):
                pass
        except Cancelled as error:
            caught.append(error)
        with slot.applied(second):
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
    assert merging.place_of_copies(gpu, 10) == (gpu if free == 60 else torch.device("cpu"))


def test_copies_of_a_cpus_stay_there(monkeypatch):
    monkeypatch.setattr(merging, "_room_on_device", None)
    assert merging.place_of_copies(torch.device("cpu"), 10**15) == torch.device("cpu")


@torch.inference_mode()
def test_copies_are_exact_whatever_the_memory_format():
    tensors = [*model(torch.float16).parameters(), torch.tensor([float("nan"), -0.0])]
    conv = tensors[6]
    assert conv.ndim == 4
    tensors[6] = conv.to(memory_format=torch.channels_last)
    for tensor, copy in zip(tensors, merging.copies(tensors), strict=True):
        assert (copy.shape, copy.dtype) == (tensor.shape, tensor.dtype)
        assert copy.numpy().tobytes() == tensor.numpy().tobytes()
        assert copy.data_ptr() != tensor.data_ptr()


@torch.inference_mode()
def test_values_are_written_whatever_the_memory_format():
    module, other = model(torch.float16), model(torch.float16)
    other.to(memory_format=torch.channels_last)
    for each in (module, other):
        slot = AdapterSlot({"unet": each})
        before = values(each)
        with slot.applied([Adapter(lora(), 1.0)]):
            changed = [parameter.clone() for parameter in each.parameters()]
        assert values(each) == before
        if each is module:
            wanted = changed
    assert all(torch.equal(a, b) for a, b in zip(changed, wanted, strict=True))


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setattr(merging, "_is_apart", lambda device: True)


def uploads(batches, weights) -> int:
    """How often deltas are stacked."""
    with Operations() as used:
        list(batches.of(weights))
    return used.seen["aten::stack"]


@torch.no_grad()
def test_deltas_used_last_stay_on_the_device(apart, monkeypatch):
    batches = merging.Batches(by_name(model()))
    pool = [lora(seed, dora=("wide",)) for seed in range(3)]
    size = sum(batch.n_bytes for batch in batches.of(pool[0]))
    monkeypatch.setattr(merging, "KEPT_BYTES", 2 * size)
    again = [uploads(batches, pool[k]) > 0 for k in (0, 1, 0, 2, 0, 1)]
    assert again == [False, True, False, True, False, True]
    monkeypatch.setattr(merging, "KEPT_BYTES", size - 1)
    assert [uploads(batches, pool[2]) > 0 for _ in range(2)] == [True, True]


@torch.no_grad()
def test_deltas_are_kept_no_longer_than_their_file(apart):
    batches = merging.Batches(by_name(model()))
    weights = lora(1)
    assert uploads(batches, weights)
    changed = replace(weights, lora=dict(lora(2).lora))
    assert changed.serial == weights.serial
    assert uploads(batches, changed)
    assert not uploads(batches, replace(changed, pooling=Pooling.ARGMAX))
    del weights, changed
    gc.collect()
    assert uploads(batches, lora(3))
    assert len(batches._kept) == 1


@torch.no_grad()
def test_a_cpu_keeps_no_deltas_twice():
    batches = merging.Batches(by_name(model()))
    weights = lora()
    assert uploads(batches, weights) == uploads(batches, weights) > 0
    assert not batches._kept


@torch.no_grad()
def test_a_full_device_keeps_no_deltas(apart, monkeypatch):
    monkeypatch.setattr(merging, "place_of_copies", lambda device, n_bytes: torch.device("meta"))
    batches = merging.Batches(by_name(model()))
    weights = lora()
    assert uploads(batches, weights) == uploads(batches, weights) > 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("room", [True, False])
@torch.inference_mode()
def test_a_gpu_merges_what_a_cpu_does(monkeypatch, room):
    monkeypatch.setattr(merging, "_room_on_device", lambda device: 10**9 if room else -1)
    chain = [Adapter(lora(1, dora=("wide",)), 0.9), Adapter(lora(2, dtype=torch.float16), -0.4)]
    made = []
    for device in ("cpu", "cuda"):
        module = model(torch.float16, device)
        slot = AdapterSlot({"unet": module})
        before = values(module)
        for _ in range(2):  # from the host, and from what was kept
            with slot.applied(chain):
                made.append([parameter.cpu().clone() for parameter in module.parameters()])
            assert values(module) == before
    kept = {copy.device.type for copy in slot._pristine.values()}
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
    slot = AdapterSlot({"unet": model(torch.float16, "cuda", shapes)})
    pair = [Adapter(lora(k, 32, torch.float16, shapes=shapes), 1.0) for k in (1, 2)]
    taken = []
    for k in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with slot.applied([pair[k % 2]], stay=True):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    print("seconds:", *(f"{seconds:.4f}" for seconds in taken))
    assert sorted(taken[2:])[3] < 0.03
