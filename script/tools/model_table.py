"""The README's table of models, from the registry and the catalog."""

from generation.base_models import BASE_MODELS, BaseModelSpec, GuidanceMode
from weights.catalog import Edition, get_entry


def model_table() -> str:
    """A Markdown table with one row per model, as it is published."""
    rows: list[tuple[str, ...]] = [
        ("`model`", "Size", "Steps", "Guidance", "Licence", "Commercial use", "Good for"),
        ("---",) * 7,
    ]
    rows += [_row(spec) for spec in BASE_MODELS[Edition.FULL].values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(spec: BaseModelSpec) -> tuple[str, ...]:
    names = [spec.weights, *([spec.adapter] if spec.adapter else [])]
    entries = [get_entry(name, Edition.FULL) for name in names]
    steps = str(spec.num_inference_steps)
    if spec.steps is not None:
        steps += f" ({spec.steps[0]} to {spec.steps[1]})"
    return (
        f"`{spec.name}`",
        f"{spec.native_size} x {spec.native_size}",
        steps,
        _guidance(spec),
        ", ".join(dict.fromkeys(entry.licence for entry in entries)),
        "yes" if all(entry.commercial_use for entry in entries) else "no",
        spec.description,
    )


def _guidance(spec: BaseModelSpec) -> str:
    if spec.guidance is GuidanceMode.NONE:
        return "none, no negative prompt"
    told = f"{spec.guidance_scale:g}"
    if spec.guidance_scales is not None:
        low, high = spec.guidance_scales
        told += f" ({low:g} to {high:g})"
    return told if spec.guidance is GuidanceMode.CLASSIFIER_FREE else f"{told}, no negative prompt"
