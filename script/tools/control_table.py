"""The README's table of controls, from the registry and the catalog."""

from generation.base_models import BaseModel
from generation.controlnets import CONTROLNETS, UNION, ControlNetSpec
from preprocess.annotators import ANNOTATORS
from weights.catalog import Edition, HubFiles, get_entry

_IMAGE = "the image itself"


def control_table() -> str:
    """Return a Markdown table with a row per control type, as it is published."""
    rows: list[tuple[str, ...]] = [
        ("`controlnet_1`", "Keeps", "Map made by", *BaseModel),
        ("---",) * 6,
    ]
    rows += [_row(spec) for spec in CONTROLNETS.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(spec: ControlNetSpec) -> tuple[str, ...]:
    networks = [_network(spec.weights.get(base_model)) for base_model in BaseModel]
    return (f"`{spec.name}`", spec.description, _annotator(spec), *networks)


def _annotator(spec: ControlNetSpec) -> str:
    if spec.annotator is None:
        return _IMAGE
    entry = ANNOTATORS[spec.annotator].weights
    if entry is None:
        return "OpenCV"
    found = get_entry(entry, Edition.FULL)
    name = entry.removeprefix("annotator-")
    return name if found.commercial_use else f"{name} (not for commercial use)"


def _network(entry: str | None) -> str:
    if entry is None:
        return "none"
    if entry == UNION:
        return "union"
    source = get_entry(entry, Edition.FULL).source
    assert isinstance(source, HubFiles)
    return source.repo.partition("/")[2]
