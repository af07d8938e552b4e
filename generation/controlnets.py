"""The kinds of control, and what a request may ask of them. To add a kind, add an entry.

A ControlNet (arXiv:2302.05543) makes pictures follow a map of edges, depths, poses or the like. An
annotator takes the map from a picture, or the map itself is sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from generation.base_models import BaseModelSpec, Lineage
from generation.errors import InvalidRequest
from generation.rules import one_of, within
from preprocess.annotators import ANNOTATORS, AnnotatorSettings
from weights.catalog import CATALOG

NO_CONTROL = "none"  # fofr/cog-sdxl-multi-controlnet-lora's name for no control
MAX_CONTROLS = 3
MAX_CONDITIONING_SCALE = 4.0
MAX_CANNY_THRESHOLD = 255

UNION = "controlnet-union-sdxl"


@dataclass(frozen=True)
class ControlNetSpec:
    """One kind of control; its name is also what people choose."""

    name: str
    keeps: str  # of the control picture, to people who choose
    annotator: str | None  # of preprocess.annotators; None: the picture is the map
    weights: Mapping[Lineage, str]  # catalog entries; a lineage for which none was published lacks
    # Its number in SDXL's union model (diffusers, ControlNetUnionModel); None: not one of its kinds
    union_index: int | None
    flat: bool = False  # colours of the map are names: there is nothing between two of them


def _kind(
    name: str,
    keeps: str,
    annotator: str | None,
    union_index: int,
    sd15: str,
    sd21: str | None,
    flat: bool = False,
) -> ControlNetSpec:
    """Of SDXL's union model, and with a ControlNet each for SD 1.5 and 2.1."""
    weights = {Lineage.SDXL: UNION, Lineage.SD15: f"controlnet-{sd15}-sd15"}
    if sd21 is not None:
        weights[Lineage.SD21] = f"controlnet-{sd21}-sd21"
    return ControlNetSpec(name, keeps, annotator, weights, union_index, flat)


_KINDS = (
    _kind("edge_canny", "sharp edges", "canny", 3, "canny", "canny"),
    _kind("depth_midas", "near and far", "depth_midas", 1, "depth", "depth"),
    _kind("depth_leres", "near and far, with more detail", "depth_leres", 1, "depth", "depth"),
    _kind("depth_zoe", "near and far, in true proportion", "depth_zoe", 1, "depth", "zoedepth"),
    _kind("soft_edge_hed", "soft outlines", "soft_edge_hed", 2, "softedge", "hed"),
    _kind("soft_edge_pidi", "soft outlines, fewer of them", "soft_edge_pidi", 2, "softedge", "hed"),
    _kind("lineart", "drawn lines", "lineart", 3, "lineart", "lineart"),
    _kind("lineart_anime", "lines of an anime", "lineart_anime", 3, "lineart", "lineart"),
    _kind("mlsd", "straight lines: rooms, buildings", "mlsd", 3, "mlsd", None),
    _kind("scribble", "the gist of outlines", "scribble", 2, "scribble", "scribble"),
    _kind("openpose", "how people stand", "openpose", 0, "openpose", "openpose"),
    _kind("segmentation", "what is where", "segmentation", 5, "segmentation", "segmentation", True),
    _kind("normal_bae", "which way surfaces face", "normal_bae", 4, "normal", "normal"),
    _kind("tile", "colours and composition; details are new", None, 6, "tile", None),
    ControlNetSpec(
        "illusion",
        "light and dark: patterns and QR codes hidden in a scene",
        annotator=None,
        weights={
            Lineage.SDXL: "controlnet-illusion-sdxl",
            Lineage.SD15: "controlnet-illusion-sd15",
        },
        union_index=None,
    ),
)
CONTROLNETS: dict[str, ControlNetSpec] = {spec.name: spec for spec in _KINDS}
CHOICES = (NO_CONTROL, *CONTROLNETS)


@dataclass(frozen=True)
class ControlRequest:
    """One of a request's controls, as it was asked for."""

    kind: str  # of CHOICES
    image: Path | None
    conditioning_scale: float  # 0: it does not count
    start: float  # share of the steps after which it begins to count
    end: float  # share of the steps after which it no longer counts
    is_map: bool  # the image is a map already


@dataclass(frozen=True)
class ControlPlan:
    """A control that a request uses."""

    name: str  # of the input, for messages
    spec: ControlNetSpec
    weights: str  # catalog entry
    conditioning_scale: float
    start: float
    end: float
    annotator: str | None  # None: the image is the map


@dataclass(frozen=True)
class ControlsPlan:
    """What a request's controls are and what becomes of their maps."""

    controls: tuple[ControlPlan, ...]  # those whose maps are needed, in the order of their inputs
    annotators: AnnotatorSettings
    returned: bool  # the maps come out before the pictures
    only: bool  # no pictures are made


def resolve_controls(
    requests: Sequence[ControlRequest],
    settings: AnnotatorSettings,
    returned: bool,
    only: bool,
    spec: BaseModelSpec,
) -> ControlsPlan:
    """Check every rule about controls.

    Raises:
        InvalidRequest: naming the value, the rule and the remedy.
    """
    controls = []
    for k, request in enumerate(requests, 1):
        name = f"controlnet_{k}"
        _check(name, request)
        if request.kind != NO_CONTROL:
            controls.append(_resolve(name, request, spec))
    low, high = settings.canny_low_threshold, settings.canny_high_threshold
    within("canny_low_threshold", low, 1, MAX_CANNY_THRESHOLD)
    within("canny_high_threshold", high, 1, MAX_CANNY_THRESHOLD)
    if low >= high:
        raise InvalidRequest(
            f"canny_low_threshold is {low} and canny_high_threshold {high}; the first must be below"
            " the second"
        )
    for name, asked in (("return_control_maps", returned), ("control_maps_only", only)):
        if asked and not controls:
            raise InvalidRequest(
                f"{name} is on, but there is no control whose map could be returned; choose"
                " controlnet_1 and send controlnet_1_image"
            )
    returned = returned or only
    counting = [c for c in controls if returned or c.conditioning_scale > 0]
    return ControlsPlan(tuple(counting), settings, returned, only)


def _check(name: str, request: ControlRequest) -> None:
    one_of(name, request.kind, list(CHOICES))
    within(f"{name}_conditioning_scale", request.conditioning_scale, 0, MAX_CONDITIONING_SCALE)
    within(f"{name}_start", request.start, 0, 1)
    within(f"{name}_end", request.end, 0, 1)
    if request.start >= request.end:
        raise InvalidRequest(
            f"{name}_start is {request.start:g} and {name}_end {request.end:g}; a control ends"
            " after it starts: use a start below the end, such as 0 and 1 for all steps"
        )
    if request.kind == NO_CONTROL and request.image is not None:
        raise InvalidRequest(
            f"{name}_image is given, but {name} is {NO_CONTROL!r}; choose what the picture"
            f" controls: one of {', '.join(CONTROLNETS)}"
        )
    if request.kind != NO_CONTROL and request.image is None:
        raise InvalidRequest(
            f"{name} is {request.kind}, but {name}_image is missing; send the picture that it is"
            f" taken from, or a ready-made map and {name}_is_map=true"
        )


def _resolve(name: str, request: ControlRequest, model: BaseModelSpec) -> ControlPlan:
    kind, entries = CONTROLNETS[request.kind], CATALOG[model.edition]
    weights = kind.weights.get(model.lineage)
    if weights is None or weights not in entries:
        possible = ", ".join(kinds_of(model))
        why = "exists" if weights is None else f"is among the {model.edition} weights"
        raise InvalidRequest(
            f"{name} is {kind.name}, and no ControlNet of that kind {why} for {model.name}"
            f" ({model.lineage}); use one of {possible}, or another model"
        )
    annotator = None if request.is_map else kind.annotator
    detector = ANNOTATORS[annotator].weights if annotator is not None else None
    if detector is not None and detector not in entries:
        raise InvalidRequest(
            f"{name} is {kind.name}, and the {model.edition} weights have nothing that makes such a"
            f" map of a picture; send a ready-made map and {name}_is_map=true, or set"
            " WEIGHTS_EDITION=full"
        )
    return ControlPlan(
        name,
        kind,
        weights,
        request.conditioning_scale,
        request.start,
        request.end,
        annotator,
    )


def kinds_of(model: BaseModelSpec) -> list[str]:
    """Names of the kinds that the model can be controlled with."""
    entries = CATALOG[model.edition]
    return [
        kind.name for kind in CONTROLNETS.values() if kind.weights.get(model.lineage) in entries
    ]
