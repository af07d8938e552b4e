"""Captured and compiled forward passes give the images of eager ones, captured once a shape."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from generation.controlnets import ControlRequest
from models import cuda_graphs
from models.compile import Compiler
from models.cuda_graphs import CUDAGraphRunner, ExecutionConfig
from tests.helpers.comparison import max_difference
from tests.helpers.engines import base_model
from tests.helpers.fake_graph_capture import FakeGraphCapture
from tests.miniature.reference_pipelines import MODES
from weights.edition import has_compiler

STEPS = 3
REQUESTS = {
    **MODES,
    "two images": {"num_outputs": 2, "width": 72},
    # These keep the UNet's output for later steps; without guidance, the very tensor.
    "PNDM": {"scheduler": "PNDM", "guidance_scale": 1.0},
    "LMS": {"scheduler": "LMS", "guidance_scale": 1.0},
    "control": {"controls": "image"},
    "part of guidance": {"guidance_end": 0.5},
    "sd15": {"model": "sd15"},
    "turbo": {"model": "sdxl-turbo", "num_inference_steps": None},
    "lcm": {"model": "lcm-dreamshaper", "num_inference_steps": None},
}


@pytest.fixture
def execute(engine, monkeypatch):
    """`execute(config)`: the engine's models run their forward passes so, starting eagerly."""

    def execute(config: ExecutionConfig) -> None:
        monkeypatch.setattr(engine._models, "execution", config)
        for entry in engine._models._entries.values():
            monkeypatch.setattr(entry.graphs, "_config", config)
        engine._models.clear_graphs()

    yield execute
    engine._models.clear_graphs()


@pytest.fixture
def generate(make, files):
    """Return the images (N, H, W, 3) of one of REQUESTS."""

    def generate(name: str, **more):
        size = {} if name == "outpaint" else {"width": 64, "height": 64}
        changes = {"num_inference_steps": STEPS, **size, **REQUESTS[name], **more}
        if changes.get("controls"):
            control = ControlRequest("edge_canny", files["image"], 0.75, 0, 0.5, is_map=False)
            changes["controls"] = (control,)
        inputs = {k: files.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
        return np.stack([np.asarray(p, int) for p in make(**inputs).images])

    return generate


@pytest.mark.parametrize("name", REQUESTS)
def test_a_captured_request_equals_the_eager_one(name, generate, execute):
    plain, other = generate(name), generate(name, seed=99)
    capture = FakeGraphCapture()
    execute(ExecutionConfig(capture, None))
    first, second = generate(name), generate(name, seed=99)
    assert capture.replays
    captured = len(capture.captures)
    third = generate(name)
    for ours, expected in ((first, plain), (second, other), (third, plain)):
        assert max_difference(ours, expected) <= 1
    assert max_difference(plain, other) > 1
    generate(name)
    assert len(capture.captures) - captured <= 2  # what a request does once is captured later


def test_python_no_longer_runs_once_all_is_captured(generate, execute, engine):
    execute(ExecutionConfig(FakeGraphCapture(), None))
    for _ in range(2):
        generate("txt2img")
    calls = []
    components = base_model(engine).components
    handles = [
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        for module in (components.unet.conv_in, components.vae.decoder)
    ]
    try:
        generate("txt2img", prompt="a small blue star on a white background", seed=5)
        assert calls == []
        generate("txt2img", width=72)
        assert calls != []
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", REQUESTS)
def test_no_request_walks_through_a_models_modules(name, generate, monkeypatch):
    """With the published models that takes milliseconds, in which a GPU has nothing to do."""
    generate(name)
    visited = []
    named_modules = torch.nn.Module.named_modules

    def watch(module, *args, **kwargs):
        for found in named_modules(module, *args, **kwargs):
            visited.append(found)
            yield found

    monkeypatch.setattr(torch.nn.Module, "named_modules", watch)
    generate(name, seed=7)
    assert len(visited) < 50  # the first few, on the way to some first parameter


def test_captured_passes_follow_merged_and_restored_weights(generate, execute):
    plain, trained = generate("txt2img"), generate("trained")
    execute(ExecutionConfig(FakeGraphCapture(), None))
    for _ in range(2):
        assert max_difference(generate("txt2img"), plain) <= 1
        assert max_difference(generate("trained"), trained) <= 1


def test_the_number_of_shapes_is_limited(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_SHAPES", 2)
    capture = FakeGraphCapture()
    runner = CUDAGraphRunner(ExecutionConfig(capture, None))
    for length in (1, 2, 3, 1):
        for _ in range(3):
            x = torch.full((length,), 2.0)
            assert torch.equal(runner.run("double", lambda x: 2 * x, x), 2 * x)
    assert len(capture.captures) == 4
    assert len(runner._entries) == 2


def test_a_pass_is_captured_for_all_but_its_tensors_values():
    capture = FakeGraphCapture()
    runner = CUDAGraphRunner(ExecutionConfig(capture, None))

    def function(x, *, scale, added):
        return x * scale + (0 if added is None else added["y"])

    one = torch.ones(2)
    calls = [
        (one, {"scale": 2.0, "added": None}),
        (one, {"scale": 3.0, "added": None}),
        (one, {"scale": 3.0, "added": {"y": one}}),
        (one.double(), {"scale": 3.0, "added": None}),
    ]
    for _ in range(3):
        for x, others in calls:
            expected = function(x, **others)
            result = runner.run("sum", function, x, **others)
            assert torch.equal(result, expected)
            assert result.dtype == expected.dtype
    assert len(capture.captures) == len(calls)


def test_a_pass_without_memory_for_a_graph_runs_without_one(generate, execute):
    plain = generate("txt2img")
    capture = FakeGraphCapture()

    def try_capture(run):
        if len(capture.captures) == 1:
            raise torch.OutOfMemoryError("no more")
        return capture(run)

    execute(ExecutionConfig(try_capture, None))
    for _ in range(3):
        assert max_difference(generate("txt2img"), plain) <= 1
    assert capture.replays


def test_a_pass_that_cannot_be_captured_runs_as_before(generate, execute, capfd):
    plain = generate("txt2img")
    attempts = []

    def try_capture(run):
        attempts.append(run)
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    execute(ExecutionConfig(try_capture, None))
    for _ in range(3):
        assert max_difference(generate("txt2img"), plain) <= 1
    log = capfd.readouterr()
    assert log.out.count("could not be captured") == len(attempts) == 2  # UNet, VAE's decoder
    assert "operation not permitted" in log.err


def test_a_failing_pass_raises_its_error_however_it_runs():
    runner = CUDAGraphRunner(ExecutionConfig(FakeGraphCapture(), None))

    def function(x):
        if x.sum() > 2:
            raise ValueError("too much")
        return x

    runner.run("fails", function, torch.ones(2))
    with pytest.raises(ValueError, match="too much"):
        runner.run("fails", function, torch.full((2,), 2.0))


def test_without_graphs_a_lack_of_memory_is_raised():
    def fails(_):
        raise torch.OutOfMemoryError("no more")

    runner = CUDAGraphRunner(ExecutionConfig(FakeGraphCapture(), None))
    with pytest.raises(torch.OutOfMemoryError):
        runner.run("fails", fails, torch.ones(1))


# Compiling. With the backend "eager" all is as in production but the kernels: what is traced, what
# is guarded, and when it has to be traced again.


@pytest.fixture
def traced(monkeypatch):
    """Compile without kernels."""
    compile_ = torch.compile

    def traced(function, **options):
        del options["mode"]
        return compile_(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_twenty_requests_are_traced_once(generate, execute, traced):
    """For all seeds, prompts, steps, schedulers, weights and checkpoints of an architecture."""
    unguided = {"guidance_scale": 1.0}
    plain, trained = generate("txt2img", **unguided), generate("trained", **unguided)
    compiler = Compiler()
    execute(ExecutionConfig(FakeGraphCapture(), compiler))
    for _ in range(2):
        generate("txt2img", **unguided)
    compiler.wait()
    generate("txt2img", **unguided)
    assert counters["stats"]["unique_graphs"] == 2  # the UNet's, and the VAE's decoder's
    for k in range(20):
        changes = {"seed": k, "prompt": f"a small red star on a white background {k}", **unguided}
        changes["num_inference_steps"] = 1 + k % 3
        changes["scheduler"] = ("K_EULER", "DDIM", "DPM++ 2M")[k // 3 % 3]
        generate("trained" if k % 2 else "txt2img", **changes)
    assert max_difference(generate("txt2img", **unguided), plain) <= 1
    assert max_difference(generate("trained", **unguided), trained) <= 1
    for model in ("sdxl-turbo", "sdxl-lcm"):
        for _ in range(3):
            generate("txt2img", model=model, **unguided)
            compiler.wait()
    assert counters["stats"]["unique_graphs"] == 2


def test_a_pass_that_cannot_be_compiled_runs_as_before(traced, capfd):
    def function(x):
        torch._dynamo.graph_break()
        return 2 * x

    compiler = Compiler()
    runner = CUDAGraphRunner(ExecutionConfig(None, compiler))
    for _ in range(4):
        assert runner.run("double", function, torch.ones(2)).tolist() == [2, 2]
        compiler.wait()
    assert (
        "COMPILE: a forward pass could not be compiled and runs as before" in capfd.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_kernels_compute_what_pytorch_does():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()).eval()
    compiler = Compiler()
    runner = CUDAGraphRunner(ExecutionConfig(None, compiler))
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(4, 8)
            torch.testing.assert_close(runner.run("network", network, x), network(x))
            compiler.wait()
        (entry,) = runner._entries.values()
        assert entry._function is not network
        graphs = counters["stats"]["unique_graphs"]
        network[0].weight.mul_(2)  # as adapters are merged
        x = torch.randn(4, 8)
        torch.testing.assert_close(runner.run("network", network, x), network(x))
        assert counters["stats"]["unique_graphs"] == graphs
