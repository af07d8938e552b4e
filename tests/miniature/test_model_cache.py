"""Several models in one process: the memory budget, failures to load, environment variables."""

import gc
import itertools
import random
import shutil
import weakref
from unittest.mock import Mock

import psutil
import pytest
import torch
from PIL import Image

from generation.base_models import BASE_MODEL_NAMES, BASE_MODELS
from generation.engine import Engine
from generation.lora import LoraMerger
from generation.stages import StageSampler
from models.cache import LoadedModel, ModelCache
from tests.helpers.comparison import max_difference, nearly_equal
from tests.miniature.reference_pipelines import COG_ARCHIVE, TYPED, lora_file
from weights import cache, edition
from weights.catalog import Edition
from weights.errors import WrongSetting
from weights.formats.types import ModelShapes

MODELS = BASE_MODELS[Edition.MINIATURE]
CPU = torch.device("cpu")
SIZE = {"width": 64, "height": 64, "num_inference_steps": 2}
ONE_STEP = {**SIZE, "num_inference_steps": 1}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("WEIGHTS_CACHE", str(tmp_path_factory.getbasetemp() / "brought"))


def new_cache(budget: int | None) -> ModelCache:
    return ModelCache(Edition.MINIATURE, CPU, torch.float32, budget)


def load(models: ModelCache, name: str, unshared: bool = False) -> LoadedModel:
    spec = MODELS[name]
    return models.base_model(spec.weights, spec.components_from, unshared)


def load_refiner(models: ModelCache) -> LoadedModel:
    spec = MODELS["sdxl"]
    return models.refiner(spec.refiner.weights, spec.weights, load(models, "sdxl"))


def test_models_stay_while_they_fit():
    models = new_cache(None)
    first = {name: load(models, name) for name in MODELS}
    assert all(load(models, name) is model for name, model in first.items())


def test_models_of_the_same_weights_are_one_and_equal_networks_too():
    models = new_cache(None)
    loaded = {name: load(models, name).components for name in MODELS}
    encoders = {name: components.text_encoders for name, components in loaded.items()}
    assert loaded["sdxl"].unet is loaded["sdxl-lcm"].unet
    assert loaded["sd15"].unet is loaded["sd15-lcm"].unet
    assert len({id(components.vae) for components in loaded.values()}) == 1
    # The miniatures' files are copies; as published, SD 1.5's text encoder is SDXL's first one.
    assert encoders["sd15"]["text_encoder"] is encoders["lcm-dreamshaper"]["text_encoder"]
    assert encoders["sd15"]["text_encoder"] is not encoders["sd21"]["text_encoder"]
    assert encoders["sd15"]["text_encoder"] is not encoders["sdxl"]["text_encoder"]
    models = new_cache(None)
    one, two = (load(models, name, unshared=True).components for name in ("sdxl", "sd15"))
    assert one.vae is not two.vae


def test_equal_weights_with_another_config_are_not_shared(tmp_path, monkeypatch):
    ensure, other = cache.ensure, tmp_path / "lcm-dreamshaper"
    shutil.copytree(cache.MINIATURE_FOLDER / "lcm-dreamshaper", other)
    config = other / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
    monkeypatch.setattr(
        cache, "ensure", lambda name, kind: other if name == other.name else ensure(name, kind)
    )
    models = new_cache(None)
    first, second = (load(models, name).components for name in ("sd15", "lcm-dreamshaper"))
    assert first.text_encoders["text_encoder"] is not second.text_encoders["text_encoder"]


def test_what_a_cancelled_request_left_in_shared_networks_is_restored_first(make, monkeypatch):
    """It left a LoRA in sd15's text encoder, which is lcm-dreamshaper's as well."""
    request = {"prompt": "a red circle", "seed": 4, "num_inference_steps": 2, **SIZE}
    engine = Engine(Edition.MINIATURE, "cpu")
    clean = make(engine=engine, model="lcm-dreamshaper", **request).bytes
    encoder = load(engine._models, "sd15").components.text_encoders["text_encoder"]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    modules = ModelShapes.of({"text_encoder": encoder}).modules()
    tensors = {}
    for name, (out, into, *_) in modules.items():
        if name.endswith("fc1"):
            key = f"lora_te_{name.removeprefix('text_encoder.').replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, into, generator=generator)
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
    with monkeypatch.context() as patch:
        # A second cancellation strikes the restoration.
        patch.setattr(LoraMerger, "_restore", Mock(side_effect=[None, KeyboardInterrupt]))
        patch.setattr(StageSampler, "sample", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(engine=engine, model="sd15", replicate_weights=lora_file(tensors).url, **request)
    assert any((before[n] != v).any() for n, v in encoder.state_dict().items())
    assert make(engine=engine, model="lcm-dreamshaper", **request).bytes == clean
    assert all((before[n] == v).all() for n, v in encoder.state_dict().items())


def test_the_model_used_longest_ago_is_dropped_and_its_memory_is_freed(capsys):
    models = new_cache(20_000_000)  # SDXL's miniature takes 17 MB in fp32, the others 6 each
    dropped = weakref.ref(load(models, "sdxl").components.unet)
    load(models, "sd15")
    assert "Unloading sdxl-base to stay within MAX_MODEL_GB" in capsys.readouterr().out
    gc.collect()
    assert dropped() is None
    kept = load(models, "sd21")
    assert list(models._entries) == ["sd15", "sd21"]
    assert load(models, "sd21") is kept


def test_a_model_larger_than_the_budget_is_alone():
    models = new_cache(1)
    for name, spec in MODELS.items():
        load(models, name)
        assert list(models._entries) == [spec.weights]
    refiner = load_refiner(models)
    assert load_refiner(models).components.vae is refiner.components.vae


def test_a_refiner_works_with_the_base_model_that_replaced_the_first():
    sdxl, models = MODELS["sdxl"], new_cache(None)
    load_refiner(models)
    models.drop(sdxl.weights)
    base = load(models, "sdxl", unshared=True).components
    refiner = load_refiner(models)
    name = "text_encoder_2"
    assert refiner.components.vae is base.vae
    assert refiner.components.text_encoders[name] is base.text_encoders[name]
    assert refiner.components.tokenizers[name] is base.tokenizers[name]
    assert load_refiner(models) is refiner


def test_controlnets_make_room_for_one_another_but_not_for_those_in_use():
    names = ["controlnet-canny-sd15", "controlnet-depth-sd15"]
    models = new_cache(1)
    first = models.controlnet(names[0], names)
    models.controlnet(names[1], names)
    assert list(models._entries) == names
    assert models.controlnet(names[0], names) is first
    models.controlnet(names[1], [])
    load(models, "sd15")
    assert list(models._entries) == ["sd15"]


def test_a_model_that_cannot_be_read_changes_nothing(tmp_path, monkeypatch):
    models = new_cache(1)
    model = load(models, "sd15")
    ensure, broken = cache.ensure, tmp_path / "sd21"
    shutil.copytree(cache.MINIATURE_FOLDER / "sd21", broken)
    next((broken / "unet").glob("*.safetensors")).write_bytes(b"no tensors")
    monkeypatch.setattr(
        cache, "ensure", lambda name, kind: broken if name == "sd21" else ensure(name, kind)
    )
    with pytest.raises(OSError, match="safetensors"):
        load(models, "sd21")
    assert load(models, "sd15") is model


@pytest.mark.parametrize(
    ("budget", "count"),
    [(None, 8), pytest.param(None, 25, marks=pytest.mark.slow), (20_000_000, 6)],
)
def test_switching_in_any_order_takes_no_more_memory_and_changes_no_image(make, budget, count):
    engine = Engine(Edition.MINIATURE, "cpu", budget=budget)
    process, rng = psutil.Process(), random.Random(0)

    def switches(count: int) -> list[Image.Image]:
        names = [*MODELS, *rng.choices(list(MODELS), k=count)]
        last = {name: make(engine=engine, model=name, **SIZE).images[0] for name in names}
        return list(last.values())

    first = switches(4)  # allocators settle
    assert all(max_difference(*pair) > 1 for pair in itertools.combinations(first, 2))
    before = process.memory_info().rss
    assert nearly_equal(switches(count), first)
    assert process.memory_info().rss <= 1.02 * before


def test_operator_weights_are_merged_again_into_a_reloaded_model(make):
    request = {**ONE_STEP, "prompt": TYPED}
    engine = Engine(Edition.MINIATURE, "cpu", budget=1)
    engine.load(COG_ARCHIVE.url)
    with_weights = make(engine=engine, **request).images
    make(engine=engine, model="sd15", **ONE_STEP)
    assert nearly_equal(make(engine=engine, **request).images, with_weights)
    assert not nearly_equal(make(**request).images, with_weights)


def test_operator_weights_can_be_loaded_after_the_model(make):
    request = {"prompt": TYPED, "seed": 3, **SIZE}
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load()
    plain = make(engine=engine, **request).images
    engine.load(COG_ARCHIVE.url)
    assert not nearly_equal(make(engine=engine, **request).images, plain)
    assert nearly_equal(make(**request).images, plain)


def test_operator_weights_apply_to_all_models_of_the_same_checkpoint(make):
    request = {"prompt": TYPED, "model": "sdxl-lcm", "seed": 3, **SIZE}
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load(COG_ARCHIVE.url)
    with_weights = make(engine=engine, **request).images
    assert nearly_equal(with_weights, make(**request, replicate_weights=COG_ARCHIVE.url).images)
    assert not nearly_equal(with_weights, make(**request).images)
    other = {**request, "model": "sd15"}
    assert nearly_equal(make(engine=engine, **other).images, make(**other).images)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("sdxl", ("sdxl",))),
        ({"MODEL": "sdxl-lcm"}, ("sdxl-lcm", ("sdxl-lcm",))),
        ({"MODEL": "sd15", "PRELOAD": "sdxl, sd21,"}, ("sd15", ("sdxl", "sd21"))),
    ],
)
def test_model_and_preload(monkeypatch, environment, expected):
    for name in ("MODEL", "PRELOAD"):
        monkeypatch.setenv(name, environment.get(name, ""))
    assert edition.requested_models(BASE_MODEL_NAMES, "sdxl") == expected


@pytest.mark.parametrize("variable", ["MODEL", "PRELOAD"])
def test_unknown_models_in_the_environment(monkeypatch, variable):
    monkeypatch.setenv(variable, "sd3")
    with pytest.raises(WrongSetting, match=f"{variable} is 'sd3'; set it to one of: sdxl, sdxl-t"):
        edition.requested_models(BASE_MODEL_NAMES, "sdxl")


@pytest.mark.parametrize(("value", "expected"), [("", False), ("off", False), (" ON", True)])
def test_compiling_is_a_setting(monkeypatch, cpp_compiler, value, expected):
    monkeypatch.setenv("COMPILE", value)
    assert edition.requested_compiling("cpu") is expected


def test_compiling_is_on_or_off_and_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("COMPILE", "yes")
    with pytest.raises(WrongSetting, match="COMPILE is 'yes'; set it to on or off"):
        edition.requested_compiling("cpu")
    monkeypatch.setenv("COMPILE", "on")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(WrongSetting, match=r"COMPILE is on, which needs .* install g\+\+"):
        edition.requested_compiling("cpu")
    assert edition.requested_compiling("cuda")


def test_the_budget(monkeypatch):
    monkeypatch.setenv("MAX_MODEL_GB", "1.5")
    assert edition.model_budget("cpu") == 1_500_000_000
    monkeypatch.setenv("MAX_MODEL_GB", "")
    assert edition.model_budget("cpu") == pytest.approx(psutil.virtual_memory().total / 2, rel=0.01)
    for wrong in ("a lot", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("MAX_MODEL_GB", wrong)
        with pytest.raises(WrongSetting, match="set it to a number of gigabytes above 0"):
            edition.model_budget("cpu")


def test_a_default_model_serves_requests_that_name_none(make):
    engine = Engine(Edition.MINIATURE, "cpu", model="sd21")
    engine.load()
    assert list(engine._models._entries) == ["sd21"]
    ours, named = make(engine=engine, **ONE_STEP), make(model="sd21", **ONE_STEP)
    assert nearly_equal(ours.images, named.images)
