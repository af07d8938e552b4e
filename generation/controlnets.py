"""The registry of ControlNets, their inputs and their rules. To add a control type, add an entry.

A ControlNet (arXiv:2302.05543) makes images follow a map of edges, depths, poses or the like. An
annotator takes the map from an image, or the map itself is sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from generation.base_models import BaseModel, BaseModelSpec
from inputs import option
from weights.catalog import CATALOG

NO_CONTROL = "none"  # fofr/cog-sdxl-multi-controlnet-lora's name for none
UNION = "controlnet-union-sdxl"


@dataclass(frozen=True)
class ControlNetSpec:
    """One control type."""

    name: str  # also the choice of the input
    description: str  # what it takes from the control image, in the README
    annotator: str | None  # of preprocess.annotators; None: the image is the map
    weights: Mapping[BaseModel, str]  # catalog entries, where one was published
    # Its index in SDXL's union model (diffusers, ControlNetUnionModel); None: it has none
    union_index: int | None
    is_label_map: bool = False  # colours of the map are labels: never interpolate


def _spec(
    name: str,
    description: str,
    annotator: str | None,
    union_index: int,
    sd15: str,
    sd21: str | None,
    is_label_map: bool = False,
) -> ControlNetSpec:
    """Return a control type of SDXL's union model, with a ControlNet each for SD 1.5 and 2.1."""
    weights = {BaseModel.SDXL: UNION, BaseModel.SD15: f"controlnet-{sd15}-sd15"}
    if sd21 is not None:
        weights[BaseModel.SD21] = f"controlnet-{sd21}-sd21"
    return ControlNetSpec(name, description, annotator, weights, union_index, is_label_map)


_SPECS = (
    _spec("edge_canny", "sharp edges", "canny", 3, "canny", "canny"),
    _spec("depth_midas", "near and far", "depth_midas", 1, "depth", "depth"),
    _spec("depth_leres", "near and far, with more detail", "depth_leres", 1, "depth", "depth"),
    _spec("depth_zoe", "near and far, in true proportion", "depth_zoe", 1, "depth", "zoedepth"),
    _spec("soft_edge_hed", "soft outlines", "soft_edge_hed", 2, "softedge", "hed"),
    _spec("soft_edge_pidi", "soft outlines, fewer of them", "soft_edge_pidi", 2, "softedge", "hed"),
    _spec("lineart", "drawn lines", "lineart", 3, "lineart", "lineart"),
    _spec("lineart_anime", "lines of an anime", "lineart_anime", 3, "lineart", "lineart"),
    _spec("mlsd", "straight lines: rooms, buildings", "mlsd", 3, "mlsd", None),
    _spec("scribble", "the gist of outlines", "scribble", 2, "scribble", "scribble"),
    _spec("openpose", "how people stand", "openpose", 0, "openpose", "openpose"),
    _spec("segmentation", "what is where", "segmentation", 5, "segmentation", "segmentation", True),
    _spec("normal_bae", "which way surfaces face", "normal_bae", 4, "normal", "normal"),
    _spec("tile", "colours and composition; details are new", None, 6, "tile", None),
    ControlNetSpec(
        "illusion",
        "light and dark: patterns and QR codes hidden in a scene",
        annotator=None,
        weights={
            BaseModel.SDXL: "controlnet-illusion-sdxl",
            BaseModel.SD15: "controlnet-illusion-sd15",
        },
        union_index=None,
    ),
)
CONTROLNETS: dict[str, ControlNetSpec] = {spec.name: spec for spec in _SPECS}
CHOICES = (NO_CONTROL, *CONTROLNETS)


@dataclass(frozen=True)
class ControlRequest:
    """The inputs of one ControlNet."""

    control_type: str = option(
        NO_CONTROL,
        "Control type of ControlNet {n}: what is taken from controlnet_{n}_image.",
        choices=CHOICES,
        name="",
    )
    image: Path | None = option(
        None, "Control image {n}, or its control map. Cropped to the size of the output."
    )
    conditioning_scale: float = option(
        0.75, "Conditioning scale of ControlNet {n}. 0 turns it off.", ge=0, le=4
    )
    start: float = option(0, "Fraction of the steps after which ControlNet {n} starts.", ge=0, le=1)
    end: float = option(1, "Fraction of the steps after which ControlNet {n} ends.", ge=0, le=1)
    is_map: bool = option(
        False, "Use controlnet_{n}_image as the control map: edges, a depth map, a skeleton."
    )


@dataclass(frozen=True)
class ControlNetPlan:
    """A ControlNet to apply."""

    name: str  # of the input, for messages
    spec: ControlNetSpec
    weights: str  # catalog entry
    conditioning_scale: float
    start: float  # fractions of the steps between which it acts
    end: float
    annotator: str | None  # None: the image is the map

    @property
    def has_effect(self) -> bool:
        """Whether it changes images; otherwise only its map is returned."""
        return self.conditioning_scale > 0


def control_types_of(model: BaseModelSpec) -> list[str]:
    """Return the names of the control types that exist for the model."""
    entries = CATALOG[model.edition]
    return [
        spec.name for spec in CONTROLNETS.values() if spec.weights.get(model.base_model) in entries
    ]
