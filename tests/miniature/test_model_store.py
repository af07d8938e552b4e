"""Several models in one process: a budget of memory, failures to load, and the variables for it."""

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

from generation import painter
from generation.adapters import AdapterSlot
from generation.base_models import BASE_MODELS, NAMES
from generation.engine import Engine
from generation.pipelines import PipelineStore
from tests.comparison import max_difference, nearly_equal
from tests.miniature.stock import lora_file
from weights import cache, edition
from weights.catalog import Edition
from weights.errors import WrongSetting
from weights.formats.types import ModelShapes

MODELS = BASE_MODELS[Edition.MINIATURE]
CPU = torch.device("cpu")
SIZE = {"width": 64, "height": 64, "num_inference_steps": 2}
ASKED = {**SIZE, "num_inference_steps": 1}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("WEIGHTS_CACHE", str(tmp_path_factory.getbasetemp() / "brought"))


def store(budget: int | None) -> PipelineStore:
    return PipelineStore(Edition.MINIATURE, CPU, torch.float32, budget)


def test_models_stay_while_they_fit():
    roomy = store(None)
    first = {name: roomy.load(spec) for name, spec in MODELS.items()}
    assert all(roomy.load(MODELS[name]) is model for name, model in first.items())


def test_models_of_the_same_weights_are_one_and_equal_modules_too():
    roomy = store(None)
    parts = {name: roomy.load(spec).parts for name, spec in MODELS.items()}
    assert parts["sdxl"]["unet"] is parts["sdxl-lcm"]["unet"]
    assert parts["sd15"]["unet"] is parts["sd15-lcm"]["unet"]
    assert len({id(own["vae"]) for own in parts.values()}) == 1
    # The miniatures' files are copies; as published, SD 1.5's text encoder is SDXL's first one.
    assert parts["sd15"]["text_encoder"] is parts["lcm-dreamshaper"]["text_encoder"]
    assert parts["sd15"]["text_encoder"] is not parts["sd21"]["text_encoder"]
    assert parts["sd15"]["text_encoder"] is not parts["sdxl"]["text_encoder"]
    alone = store(None)
    one, two = (alone.load(MODELS[name], alone=True).parts for name in ("sdxl", "sd15"))
    assert one["vae"] is not two["vae"]


def test_equal_weights_with_another_config_are_not_shared(tmp_path, monkeypatch):
    ensure, other = cache.ensure, tmp_path / "lcm-dreamshaper"
    shutil.copytree(cache.MINIATURE_FOLDER / "lcm-dreamshaper", other)
    config = other / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
    monkeypatch.setattr(
        cache, "ensure", lambda name, kind: other if name == other.name else ensure(name, kind)
    )
    roomy = store(None)
    first, second = (roomy.load(MODELS[name]).parts for name in ("sd15", "lcm-dreamshaper"))
    assert first["text_encoder"] is not second["text_encoder"]


def test_what_a_cancelled_request_left_in_shared_modules_is_taken_back_first(make, monkeypatch):
    """It is in sd15's text encoder, which is lcm-dreamshaper's as well."""
    asked = {"prompt": "a red circle", "seed": 4, "num_inference_steps": 2, **SIZE}
    engine = Engine(Edition.MINIATURE, "cpu")
    clean = make(engine=engine, model="lcm-dreamshaper", **asked).bytes
    encoder = engine._store.load(MODELS["sd15"]).parts["text_encoder"]
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
        # A second cancellation strikes the taking back.
        patch.setattr(AdapterSlot, "_take_back", Mock(side_effect=[None, KeyboardInterrupt]))
        patch.setattr(painter.Studio, "draw", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(engine=engine, model="sd15", replicate_weights=lora_file(tensors).url, **asked)
    assert any((before[n] != v).any() for n, v in encoder.state_dict().items())
    assert make(engine=engine, model="lcm-dreamshaper", **asked).bytes == clean
    assert all((before[n] == v).all() for n, v in encoder.state_dict().items())


def test_the_one_used_longest_ago_leaves_and_its_memory_is_free(capsys):
    tight = store(20_000_000)  # SDXL's miniature takes 17 MB in fp32, the others 6 each
    gone = weakref.ref(tight.load(MODELS["sdxl"]).parts["unet"])
    tight.load(MODELS["sd15"])
    assert "sdxl-base leaves the memory, for MAX_MODEL_GB" in capsys.readouterr().out
    gc.collect()
    assert gone() is None
    kept = tight.load(MODELS["sd21"])
    assert list(tight._loaded) == ["sd15", "sd21"]
    assert tight.load(MODELS["sd21"]) is kept


def test_a_model_larger_than_the_budget_is_alone():
    tight = store(1)
    for spec in MODELS.values():
        tight.load(spec)
        assert list(tight._loaded) == [spec.weights]
    refiner = tight.load_refiner(MODELS["sdxl"])
    assert tight.load_refiner(MODELS["sdxl"]).parts["vae"] is refiner.parts["vae"]


def test_a_refiner_works_with_the_base_that_took_the_first_ones_place():
    sdxl, roomy = MODELS["sdxl"], store(None)
    roomy.load(sdxl)
    roomy.load_refiner(sdxl)
    roomy.drop(sdxl)
    base = roomy.load(sdxl, alone=True)
    refiner = roomy.load_refiner(sdxl)
    for part in ("vae", "text_encoder_2", "tokenizer_2"):
        assert refiner.parts[part] is base.parts[part]
    assert roomy.load_refiner(sdxl) is refiner


def test_a_model_that_cannot_be_read_changes_nothing(tmp_path, monkeypatch):
    tight = store(1)
    model = tight.load(MODELS["sd15"])
    ensure, broken = cache.ensure, tmp_path / "sd21"
    shutil.copytree(cache.MINIATURE_FOLDER / "sd21", broken)
    next((broken / "unet").glob("*.safetensors")).write_bytes(b"no tensors")
    monkeypatch.setattr(
        cache, "ensure", lambda name, kind: broken if name == "sd21" else ensure(name, kind)
    )
    with pytest.raises(OSError, match="safetensors"):
        tight.load(MODELS["sd21"])
    assert tight.load(MODELS["sd15"]) is model


@pytest.mark.parametrize(("budget", "count"), [(None, 25), (20_000_000, 6)])
def test_switching_in_any_order_takes_no_more_memory_and_changes_no_picture(make, budget, count):
    engine = Engine(Edition.MINIATURE, "cpu", budget=budget)
    process, rng = psutil.Process(), random.Random(0)

    def switches(count: int) -> list[Image.Image]:
        names = [*MODELS, *rng.choices(list(MODELS), k=count)]
        last = {name: make(engine=engine, model=name, **SIZE).pictures[0] for name in names}
        return list(last.values())

    first = switches(4)  # allocators settle
    assert all(max_difference(*pair) > 1 for pair in itertools.combinations(first, 2))
    before = process.memory_info().rss
    assert nearly_equal(switches(count), first)
    assert process.memory_info().rss <= 1.02 * before


def test_the_operators_weights_are_put_into_a_model_that_comes_back(make):
    from tests.miniature.stock import COG_ARCHIVE, TYPED

    asked = {**ASKED, "prompt": TYPED}
    engine = Engine(Edition.MINIATURE, "cpu", budget=1)
    engine.load(COG_ARCHIVE.url)
    mine = make(engine=engine, **asked).pictures
    make(engine=engine, model="sd15", **ASKED)
    assert nearly_equal(make(engine=engine, **asked).pictures, mine)
    assert not nearly_equal(make(**asked).pictures, mine)


def test_the_operators_weights_can_come_after_the_model(make):
    from tests.miniature.stock import COG_ARCHIVE, TYPED

    asked = {"prompt": TYPED, "seed": 3, **SIZE}
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load()
    plain = make(engine=engine, **asked).pictures
    engine.load(COG_ARCHIVE.url)
    assert not nearly_equal(make(engine=engine, **asked).pictures, plain)
    assert nearly_equal(make(**asked).pictures, plain)


def test_the_operators_weights_are_those_of_all_models_made_of_the_same(make):
    from tests.miniature.stock import COG_ARCHIVE, TYPED

    asked = {"prompt": TYPED, "model": "sdxl-lcm", "seed": 3, **SIZE}
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load(COG_ARCHIVE.url)
    mine = make(engine=engine, **asked).pictures
    assert nearly_equal(mine, make(**asked, replicate_weights=COG_ARCHIVE.url).pictures)
    assert not nearly_equal(mine, make(**asked).pictures)
    other = {**asked, "model": "sd15"}
    assert nearly_equal(make(engine=engine, **other).pictures, make(**other).pictures)


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
    assert edition.requested_models(NAMES, "sdxl") == expected


@pytest.mark.parametrize("variable", ["MODEL", "PRELOAD"])
def test_unknown_models_in_the_environment(monkeypatch, variable):
    monkeypatch.setenv(variable, "sd3")
    with pytest.raises(WrongSetting, match=f"{variable} is 'sd3'; set it to one of: sdxl, sdxl-t"):
        edition.requested_models(NAMES, "sdxl")


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
    assert list(engine._store._loaded) == ["sd21"]
    ours, named = make(engine=engine, **ASKED), make(model="sd21", **ASKED)
    assert nearly_equal(ours.pictures, named.pictures)
