"""Recorded and compiled passes make the pictures that plain ones make, once a shape."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from generation import passes
from generation.base_models import MINIATURE_SDXL
from generation.controlnets import ControlRequest
from generation.passes import Acceleration, Compiler, Passes
from tests.comparison import max_difference
from tests.miniature.stock import MODES
from tests.recorder import Recorder
from tests.requests import NO_CONTROL
from weights.edition import has_compiler

STEPS = 3
REQUESTS = {
    **MODES,
    "two pictures": {"num_outputs": 2, "width": 72},
    # These keep what the UNet gives for later steps; without guidance, as it is.
    "PNDM": {"scheduler": "PNDM", "guidance_scale": 1.0},
    "LMS": {"scheduler": "LMS", "guidance_scale": 1.0},
    "control": {"controls": "picture"},
    "part of guidance": {"guidance_end": 0.5},
    "sd15": {"model": "sd15"},
    "turbo": {"model": "sdxl-turbo", "num_inference_steps": None},
    "lcm": {"model": "lcm-dreamshaper", "num_inference_steps": None},
}


@pytest.fixture
def accelerated(engine, monkeypatch):
    """Has the engine's passes begin anew, as this acceleration makes them."""

    def accelerated(acceleration: Acceleration) -> None:
        monkeypatch.setattr(engine._store, "acceleration", acceleration)
        engine._store._passes.clear()

    yield accelerated
    engine._store._passes.clear()


@pytest.fixture
def ask(make, files):
    def ask(name: str, **more):
        size = {} if name == "outpaint" else {"width": 64, "height": 64}
        asked = {"num_inference_steps": STEPS, **size, **REQUESTS[name], **more}
        if asked.get("controls"):
            control = ControlRequest("edge_canny", files["picture"], 0.75, 0, 0.5, is_map=False)
            asked["controls"] = (control, NO_CONTROL, NO_CONTROL)
        given = {k: files.get(v, v) if isinstance(v, str) else v for k, v in asked.items()}
        return np.stack([np.asarray(p, int) for p in make(**given).pictures])

    return ask


@pytest.mark.parametrize("name", REQUESTS)
def test_a_recorded_request_is_the_plain_one(name, ask, accelerated):
    plain, other = ask(name), ask(name, seed=99)
    recorder = Recorder()
    accelerated(Acceleration(recorder, None))
    first, second = ask(name), ask(name, seed=99)
    assert recorder.replays
    made = len(recorder.recordings)
    third = ask(name)
    for ours, expected in ((first, plain), (second, other), (third, plain)):
        assert max_difference(ours, expected) <= 1
    assert max_difference(plain, other) > 1
    ask(name)
    assert len(recorder.recordings) - made <= 2  # what a request does once is recorded in its turn


def test_python_runs_no_more_once_all_is_recorded(ask, accelerated, engine):
    accelerated(Acceleration(Recorder(), None))
    for _ in range(2):
        ask("txt2img")
    calls = []
    modules = engine._store.load(MINIATURE_SDXL).parts
    handles = [
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        for module in (modules["unet"].conv_in, modules["vae"].decoder)
    ]
    try:
        ask("txt2img", prompt="a small blue star on a white background", seed=5)
        assert calls == []
        ask("txt2img", width=72)
        assert calls != []
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", REQUESTS)
def test_no_request_looks_through_a_model(name, ask, monkeypatch):
    """At the real sizes each look takes milliseconds, in which a GPU has nothing to do."""
    ask(name)
    looked_at = []
    named_modules = torch.nn.Module.named_modules

    def watched(module, *args, **kwargs):
        for found in named_modules(module, *args, **kwargs):
            looked_at.append(found)
            yield found

    monkeypatch.setattr(torch.nn.Module, "named_modules", watched)
    ask(name, seed=7)
    assert len(looked_at) < 50  # the first few, on the way to some first parameter


def test_weights_come_and_go_in_what_is_recorded(ask, accelerated):
    plain, trained = ask("txt2img"), ask("trained")
    accelerated(Acceleration(Recorder(), None))
    for _ in range(2):
        assert max_difference(ask("txt2img"), plain) <= 1
        assert max_difference(ask("trained"), trained) <= 1


def test_only_so_many_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(passes, "MAX_SHAPES", 2)
    recorder = Recorder()
    own = Passes(Acceleration(recorder, None))
    for length in (1, 2, 3, 1):
        for _ in range(3):
            given = torch.full((length,), 2.0)
            assert torch.equal(own.run("double", lambda x: 2 * x, given), 2 * given)
    assert len(recorder.recordings) == 4
    assert len(own._ways) == 2


def test_a_pass_is_told_apart_by_all_but_values():
    recorder = Recorder()
    own = Passes(Acceleration(recorder, None))

    def function(x, *, scale, of):
        return x * scale + (0 if of is None else of["y"])

    one = torch.ones(2)
    calls = [
        (one, {"scale": 2.0, "of": None}),
        (one, {"scale": 3.0, "of": None}),
        (one, {"scale": 3.0, "of": {"y": one}}),
        (one.double(), {"scale": 3.0, "of": None}),
    ]
    for _ in range(3):
        for x, others in calls:
            expected = function(x, **others)
            result = own.run("sum", function, x, **others)
            assert torch.equal(result, expected)
            assert result.dtype == expected.dtype
    assert len(recorder.recordings) == len(calls)


def test_what_does_not_fit_beside_recordings_runs_without_them(ask, accelerated):
    plain = ask("txt2img")
    recorder = Recorder()

    def record(run):
        if len(recorder.recordings) == 1:
            raise torch.OutOfMemoryError("no more")
        return recorder(run)

    accelerated(Acceleration(record, None))
    for _ in range(3):
        assert max_difference(ask("txt2img"), plain) <= 1
    assert recorder.replays


def test_what_cannot_be_recorded_is_launched_as_before(ask, accelerated, capfd):
    plain = ask("txt2img")
    attempts = []

    def record(run):
        attempts.append(run)
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    accelerated(Acceleration(record, None))
    for _ in range(3):
        assert max_difference(ask("txt2img"), plain) <= 1
    said = capfd.readouterr()
    assert said.out.count("could not be recorded") == len(attempts) == 2  # UNet, VAE's decoder
    assert "operation not permitted" in said.err


def test_a_pass_that_fails_is_told_however_it_is_run():
    own = Passes(Acceleration(Recorder(), None))

    def function(x):
        if x.sum() > 2:
            raise ValueError("too much")
        return x

    own.run("fails", function, torch.ones(2))
    with pytest.raises(ValueError, match="too much"):
        own.run("fails", function, torch.full((2,), 2.0))


def test_without_recordings_a_lack_of_memory_is_told(make):
    def fails(_):
        raise torch.OutOfMemoryError("no more")

    own = Passes(Acceleration(Recorder(), None))
    with pytest.raises(torch.OutOfMemoryError):
        own.run("fails", fails, torch.ones(1))


# Compiling. With the backend "eager" everything is PyTorch's but the kernels: what is traced, what
# is guarded, and when it has to be traced again.


@pytest.fixture
def traced(monkeypatch):
    compile_ = torch.compile

    def traced(function, **options):
        del options["mode"]
        return compile_(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_twenty_requests_are_traced_once(ask, accelerated, traced):
    """With other seeds, prompts, steps, schedulers, weights; all checkpoints of an architecture."""
    unguided = {"guidance_scale": 1.0}
    plain, trained = ask("txt2img", **unguided), ask("trained", **unguided)
    compiler = Compiler()
    accelerated(Acceleration(Recorder(), compiler))
    for _ in range(2):
        ask("txt2img", **unguided)
    compiler.wait()
    ask("txt2img", **unguided)
    assert counters["stats"]["unique_graphs"] == 2  # the UNet's, and the VAE's decoder's
    for k in range(20):
        changes = {"seed": k, "prompt": f"a small red star on a white background {k}", **unguided}
        changes["num_inference_steps"] = 1 + k % 3
        changes["scheduler"] = ("K_EULER", "DDIM", "DPM++ 2M")[k // 3 % 3]
        ask("trained" if k % 2 else "txt2img", **changes)
    assert max_difference(ask("txt2img", **unguided), plain) <= 1
    assert max_difference(ask("trained", **unguided), trained) <= 1
    for model in ("sdxl-turbo", "sdxl-lcm"):
        for _ in range(3):
            ask("txt2img", model=model, **unguided)
            compiler.wait()
    assert counters["stats"]["unique_graphs"] == 2


def test_what_cannot_be_compiled_stays_as_it_is(traced, capfd):
    def function(x):
        torch._dynamo.graph_break()
        return 2 * x

    compiler = Compiler()
    own = Passes(Acceleration(None, compiler))
    for _ in range(4):
        assert own.run("double", function, torch.ones(2)).tolist() == [2, 2]
        compiler.wait()
    assert "COMPILE: a pass could not be compiled and stays as it is" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler on a CPU")
def test_kernels_give_what_pytorch_gives():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()).eval()
    compiler = Compiler()
    own = Passes(Acceleration(None, compiler))
    with torch.inference_mode():
        for _ in range(3):
            given = torch.randn(4, 8)
            torch.testing.assert_close(own.run("network", network, given), network(given))
            compiler.wait()
        (way,) = own._ways.values()
        assert way._function is not network
        graphs = counters["stats"]["unique_graphs"]
        network[0].weight.mul_(2)  # as trained weights come in
        given = torch.randn(4, 8)
        torch.testing.assert_close(own.run("network", network, given), network(given))
        assert counters["stats"]["unique_graphs"] == graphs
