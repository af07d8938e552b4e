"""How well an image follows a control map, from 0 to 1."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tests.evals.cases import SIDE
from weights.miniature.controls import Subject
from weights.miniature.world import read_picture

TOLERANCE = 2  # pixels between two edges that are one

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Case:
    """The subject of a control map, and what the prompt describes."""

    subject: Subject
    colour: str
    background: str
    seed: int

    @property
    def prompt(self) -> str:
        what = "stick figure" if self.subject.pose is not None else self.subject.scene.shape
        return f"a {self.colour} {what} on a {self.background} background"

    @property
    def mask(self) -> Mask:
        return self.subject.mask(SIDE, SIDE) > 0.5


Measure = Callable[[Case, Image.Image, Image.Image], float]  # of a case, its map and the image


def edges(image: Image.Image) -> Mask:
    return cv2.Canny(np.asarray(image.convert("RGB")), 100, 200) > 0


def edge_agreement(found: Mask, wanted: Mask, tolerance: int = TOLERANCE) -> float:
    """Return the F1 of edge pixels; each counts if one of the other's is within the tolerance."""
    if not found.any() or not wanted.any():
        return float(not found.any() and not wanted.any())
    far_from_wanted, far_from_found = (ndimage.distance_transform_edt(~m) for m in (wanted, found))
    precision = float((far_from_wanted[found] <= tolerance).mean())
    recall = float((far_from_found[wanted] <= tolerance).mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def overlap(a: Mask, b: Mask) -> float:
    """Return the intersection over union."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def edge_measure(case: Case, control: Image.Image, image: Image.Image) -> float:
    """Return the F1 of the image's edges and the map's lines."""
    return edge_agreement(edges(image), np.asarray(control.convert("L")) > 127)


def region_measure(case: Case, control: Image.Image, image: Image.Image) -> float:
    """Return the overlap of the shape that the judge finds and the scene's."""
    return overlap(read_picture(image).mask, case.mask)


def limbs_measure(case: Case, control: Image.Image, image: Image.Image) -> float:
    """Return how well the figure covers the skeleton and nothing else.

    F1 of both, within a limb's width.
    """
    found, wanted = read_picture(image).mask, case.mask
    near = case.subject.scene.radius * SIDE * 0.16
    return edge_agreement(found, wanted, round(near))


def colour_measure(case: Case, control: Image.Image, image: Image.Image) -> float:
    """Return 1 for an image whose blurred copy is the map; 0 for one 64 of 255 steps away."""
    small = (SIDE // 8, SIDE // 8)
    ours, wanted = (
        np.asarray(p.convert("RGB").resize(small, Image.Resampling.BOX), dtype=float)
        for p in (image, control)
    )
    return max(0.0, 1 - float(np.abs(ours - wanted).mean()) / 64)
