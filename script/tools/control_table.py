"""The README's table of controls, from the registry and the catalog."""

from generation.base_models import BaseModel
from generation.controlnets import CONTROLNETS, UNION, ControlNetSpec
from preprocess.annotators import ANNOTATORS
from weights.catalog import Edition, HubFiles, get_entry

_PICTURE = "the picture itself"


def control_table() -> str:
    """A Markdown table with one row per kind of control, as it is published."""
    rows: list[tuple[str, ...]] = [
        ("`controlnet_1`", "Keeps", "Map made by", *BaseModel),
        ("---",) * 6,
    ]
    rows += [_row(kind) for kind in CONTROLNETS.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(kind: ControlNetSpec) -> tuple[str, ...]:
    nets = [_net(kind.weights.get(lineage)) for lineage in BaseModel]
    return (f"`{kind.name}`", kind.description, _maker(kind), *nets)


def _maker(kind: ControlNetSpec) -> str:
    if kind.annotator is None:
        return _PICTURE
    entry = ANNOTATORS[kind.annotator].weights
    if entry is None:
        return "OpenCV"
    found = get_entry(entry, Edition.FULL)
    name = entry.removeprefix("annotator-")
    return name if found.commercial_use else f"{name} (not for commercial use)"


def _net(entry: str | None) -> str:
    if entry is None:
        return "none"
    if entry == UNION:
        return "union"
    source = get_entry(entry, Edition.FULL).source
    assert isinstance(source, HubFiles)
    return source.repo.partition("/")[2]
