"""The models that an engine has in memory, for tests that watch them."""

from generation.engine import Engine
from models.cache import LoadedModel


def base_model(engine: Engine, name: str = "sdxl") -> LoadedModel:
    """Return a base model; it is loaded if it is not yet."""
    model, *_ = engine._load_base(engine._specs[name])
    return model


def refiner(engine: Engine, name: str = "sdxl") -> LoadedModel:
    """Return the refiner of a base model; it is loaded if it is not yet."""
    spec = engine._specs[name]
    return engine._models.refiner(spec.refiner.weights, spec.weights, base_model(engine, name))
