"""Check that trained weights fit a model before anything is changed by them."""

from weights.errors import BadWeights
from weights.formats.detect import ANOTHER_MODEL, guess_family
from weights.formats.types import LoraDelta, ModelShapes, TrainedWeights
from weights.messages import quote


def check_fits(weights: TrainedWeights, shapes: ModelShapes, name: str) -> None:
    """Raise BadWeights unless every tensor has its place in the model, in the right shape."""
    modules = shapes.modules()
    bad = [key for key, delta in weights.lora.items() if not _delta_fits(delta, modules.get(key))]
    if bad:
        delta = weights.lora[bad[0]]
        family = guess_family(
            {f"{k}.lora_A.weight": tuple(d.down.shape) for k, d in weights.lora.items()}
        )
        raise BadWeights(
            f"{name} does not fit this model: {len(bad)} of {len(weights.lora)} modules, the first"
            f" {quote(bad[0])}, with down {tuple(delta.down.shape)} and up {tuple(delta.up.shape)}"
            f" for a weight of {modules.get(bad[0], 'no such module')}{family}. {ANOTHER_MODEL}."
        )
    sizes = {key: tuple(tensor.shape) for key, tensor in weights.parameters.items()}
    bad = [key for key, size in sizes.items() if shapes.parameters.get(key) != size]
    if bad:
        what = "checkpoint" if weights.checkpoint else "UNet"
        raise BadWeights(
            f"{name} is a {what} that does not fit this model: {len(bad)} of {len(sizes)}"
            f" parameters, the first {quote(bad[0])} with {sizes[bad[0]]} for"
            f" {shapes.parameters.get(bad[0], 'nothing')}{guess_family(sizes)}. {ANOTHER_MODEL}."
        )
    for entry in weights.embeddings:
        for encoder, rows in entry.vectors.items():
            width = shapes.text_width(encoder)
            if rows.shape[1] != width:
                raise BadWeights(
                    f"{name} has vectors of width {rows.shape[1]} for {encoder}, which needs"
                    f" {width}. {ANOTHER_MODEL}."
                )


def _delta_fits(delta: LoraDelta, weight: tuple[int, ...] | None) -> bool:
    if weight is None:
        return False
    ones = (1,) * (len(weight) - 2)
    return (
        tuple(delta.down.shape[1:]) == weight[1:]
        and tuple(delta.up.shape) == (weight[0], delta.rank, *ones)
        and (
            delta.dora_scale is None
            or tuple(delta.dora_scale.shape) in ((weight[0], 1, *ones), (1, weight[1], *ones))
        )
    )
