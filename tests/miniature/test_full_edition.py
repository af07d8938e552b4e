"""The full edition without its weights: its limits, and a VAE from another catalog entry."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from generation.base_models import SDXL
from generation.engine import Engine
from generation.errors import InvalidRequest
from models.cache import LoadedControlNet, ModelCache
from tests.helpers.comparison import nearly_equal
from weights import cache
from weights.catalog import CATALOG, Edition
from weights.miniature.evaluate import FOLDER


@pytest.fixture
def full_engine(tmp_path, monkeypatch):
    """Return the full edition with the miniature's files in the layout of the published ones."""
    base, vae = tmp_path / "sdxl-base", tmp_path / "sdxl-vae-fp16-fix"
    shutil.copytree(FOLDER, base)
    (base / "vae").rename(vae)
    stem = "diffusion_pytorch_model"
    (vae / f"{stem}.fp16.safetensors").rename(vae / f"{stem}.safetensors")
    ensured = []

    def ensure(name, edition):
        assert edition is Edition.FULL
        ensured.append(name)
        packaged = cache.MINIATURE_FOLDER / name  # of the same files as the published ones
        return {"sdxl-base": base, "sdxl-vae-fp16-fix": vae}.get(name, packaged)

    monkeypatch.setattr(cache, "ensure", ensure)
    engine = Engine(Edition.FULL, "cpu")
    engine.load()
    assert sorted(ensured) == ["nsfw-detection", "safety-checker", "sdxl-base", "sdxl-vae-fp16-fix"]
    return engine


def test_every_entry_that_a_model_names_is_in_the_catalog():
    assert {SDXL.weights, *SDXL.components_from.values()} <= set(CATALOG[Edition.FULL])


def test_the_full_layout_gives_the_same_image(full_engine, make, monkeypatch):
    request = {"width": 192, "height": 192, "num_inference_steps": 2}
    small = make(**request)  # on the miniature edition's engine
    monkeypatch.setattr(full_engine, "_specs", {"sdxl": replace(SDXL, min_side=192)})
    assert nearly_equal(make(engine=full_engine, **request).images, small.images)


def test_the_full_edition_has_sdxls_sizes(full_engine, make):
    with pytest.raises(InvalidRequest, match="from 256 to 2048"):
        make(engine=full_engine, width=128)
    made = make(engine=full_engine, width=256, height=264, num_inference_steps=1)
    assert made.images[0].size == (256, 264)


def load_controlnet(name: str) -> LoadedControlNet:
    return ModelCache(Edition.FULL, torch.device("cpu"), torch.float32).controlnet(name, [])


@pytest.mark.parametrize("layout", ["safetensors", "pickle", "subfolder"])
def test_controlnets_load_as_they_are_published(tmp_path, monkeypatch, layout):
    """SD 2.1's are pickles, of which only weights are read; one lies in a folder called v2."""
    name = "controlnet-canny-sd15"
    source = cache.ensure(name, Edition.MINIATURE)
    (weights,) = source.glob("*.safetensors")
    folder = tmp_path / name / ("v2" if layout == "subfolder" else "")
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    if layout == "pickle":
        torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    elif layout == "subfolder":
        shutil.copy(weights, folder / "diffusion_pytorch_model.safetensors")
    else:
        shutil.copy(weights, folder)
    monkeypatch.setattr(cache, "ensure", lambda name, edition: tmp_path / name)
    network = load_controlnet(name).controlnet
    assert not network.training
    assert network.dtype == torch.float32
    expected = load_file(weights)
    loaded = network.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[key], expected[key].float()) for key in expected)


def test_a_hostile_pickle_is_not_loaded(tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "touched",))

    shutil.copy(cache.ensure("controlnet-canny-sd15", Edition.MINIATURE) / "config.json", tmp_path)
    torch.save(Hostile(), tmp_path / "diffusion_pytorch_model.bin")
    monkeypatch.setattr(cache, "ensure", lambda name, edition: tmp_path)
    with pytest.raises(Exception, match=r"(?i)weights.only|pickle|unable to load"):
        load_controlnet("controlnet-canny-sd15")
    assert not (tmp_path / "touched").exists()
