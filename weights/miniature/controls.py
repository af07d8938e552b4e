"""What controls a picture, known exactly: maps of scenes, as ControlNet's annotators make them.

All are RGB pictures of the size of the scene's picture, in the conventions of the published models:
lines are white on black, near is white, normals point at the viewer in blue, each kind of thing has
a colour of its own, skeletons are drawn in OpenPose's colours.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from weights.miniature.captions import describe
from weights.miniature.world import SHAPES, Point, Scene, paint, render_mask

Map = NDArray[np.uint8]  # (H, W, 3)
STRAIGHT = ("square", "triangle", "star", "cross", "diamond")  # all of whose edges are lines

# A person's joints and limbs as OpenPose numbers them: nose, neck, then right and left shoulder,
# elbow, wrist; right and left hip, knee, ankle.
NOSE, NECK = 0, 1
LIMBS = (
    *((1, 2), (2, 3), (3, 4)),
    *((1, 5), (5, 6), (6, 7)),
    *((1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13)),
    (1, 0),
)
FIGURE = "stick figure"


@dataclass(frozen=True)
class Pose:
    """A person's fourteen joints, in units of the shape's radius around its centre."""

    joints: tuple[Point, ...]


@dataclass(frozen=True)
class Subject:
    """A scene, or a stick figure in its shape's place."""

    scene: Scene
    pose: Pose | None = None

    def mask(self, width: int, height: int) -> NDArray[np.float32]:
        """Where the shape or figure is, (H, W) in [0, 1]."""
        if self.pose is None:
            return render_mask(self.scene, width, height)
        return _figure_mask(self.scene, self.pose, width, height)

    def picture(self, width: int, height: int) -> Image.Image:
        return paint(self.scene, self.mask(width, height))

    def caption(self, rng: np.random.Generator) -> str:
        if self.pose is None:
            return describe(self.scene, rng)
        return f"a {self.scene.colour} {FIGURE} on a {self.scene.background} background"


def random_pose(rng: np.random.Generator) -> Pose:
    """Arms and legs at any angle that looks like a person."""
    joints: list[Point] = [(0.0, -0.72), (0.0, -0.45)]
    for side in (-1, 1):  # the person's right is on the left
        shoulder = (0.2 * side, -0.42)
        upper, lower = rng.uniform(-1.3, 1.3, size=2)
        joints += _limb(shoulder, side, upper, lower, 0.38)
    for side in (-1, 1):
        hip = (0.13 * side, 0.15)
        upper = rng.uniform(0.75, 1.5)
        joints += _limb(hip, side, upper, upper + rng.uniform(-0.3, 0.3), 0.42)
    return Pose(tuple(joints))


def _limb(start: Point, side: int, upper: float, lower: float, length: float) -> list[Point]:
    """Three joints; angles in radians below the horizontal, outwards."""
    points = [start]
    for angle in (upper, lower):
        x, y = points[-1]
        points.append((x + side * length * math.cos(angle), y + length * math.sin(angle)))
    return points


def _places(scene: Scene, pose: Pose, width: int, height: int, scale: int = 1) -> list[Point]:
    side = min(width, height) * scale
    cx, cy, r = scene.x * width * scale, scene.y * height * scale, scene.radius * side
    return [(cx + r * x, cy + r * y) for x, y in pose.joints]


def _figure_mask(scene: Scene, pose: Pose, width: int, height: int) -> NDArray[np.float32]:
    scale = 4
    canvas = Image.new("L", (width * scale, height * scale))
    draw = ImageDraw.Draw(canvas)
    places = _places(scene, pose, width, height, scale)
    thick = 0.16 * scene.radius * min(width, height) * scale
    for a, b in (*LIMBS, (2, 5), (8, 11)):
        draw.line([places[a], places[b]], fill=255, width=round(thick))
    for x, y in places:
        draw.ellipse([x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=255)
    (x, y), head = places[NOSE], 1.5 * thick
    draw.ellipse([x - head, y - head, x + head, y + head], fill=255)
    small = canvas.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


# The maps


def canny(subject: Subject, width: int, height: int) -> Map:
    """OpenCV's edges of the picture itself, at the annotator's default thresholds."""
    return _lines(cv2.Canny(np.asarray(subject.picture(width, height)), 100, 200))


def lineart(subject: Subject, width: int, height: int) -> Map:
    """The outline, one pixel wide; no texture."""
    return _lines(_outline(subject, width, height))


def straight_lines(subject: Subject, width: int, height: int) -> Map:
    """As M-LSD: the outlines of what has straight edges, and nothing else."""
    straight = subject.pose is None and subject.scene.shape in STRAIGHT
    outline = _outline(subject, width, height)
    return _lines(outline if straight else np.zeros_like(outline))


def soft_edge(subject: Subject, width: int, height: int) -> Map:
    """As HED: a wide, blurred outline."""
    outline = _outline(subject, width, height).astype(np.float32)
    soft = ndimage.gaussian_filter(outline, min(width, height) / 80)
    return _lines(soft / max(float(soft.max()), 1e-6) * 255)


def scribble(subject: Subject, width: int, height: int) -> Map:
    """The outline by an unsteady hand."""
    side = min(width, height)
    rng = np.random.default_rng(subject.scene.texture_seed + 2)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    shaken = [
        cv2.resize(rng.normal(0, side / 60, (6, 6)).astype(np.float32), (width, height))
        for _ in range(2)
    ]
    mask = cv2.remap(subject.mask(width, height), xs + shaken[0], ys + shaken[1], cv2.INTER_LINEAR)
    inside = mask > 0.5
    line = ndimage.binary_dilation(inside, iterations=max(1, side // 64)) & ~inside
    return _lines(line * 255)


def depth(subject: Subject, width: int, height: int) -> Map:
    """A far, sloping ground, and the shape as a near dome: the larger, the nearer."""
    mask = subject.mask(width, height)
    slope = np.linspace(0.08, 0.25, height, dtype=np.float32)[:, None]
    near = 0.55 + 0.8 * (subject.scene.radius - 0.15) + 0.15 * _dome(mask)
    return _lines(np.where(mask > 0.5, near, slope) * 255)


def normal(subject: Subject, width: int, height: int) -> Map:
    """The dome's normals, on ground that faces the viewer."""
    relief = _dome(subject.mask(width, height)) * min(width, height) * 0.06
    relief = ndimage.gaussian_filter(relief, 1)
    down, across = np.gradient(relief)
    vectors = np.stack([-across, -down, np.ones_like(relief)], axis=-1)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    colours: Map = ((vectors * [1, -1, 1] * 0.5 + 0.5) * 255).round().astype(np.uint8)
    return colours


def segmentation(subject: Subject, width: int, height: int) -> Map:
    """The ground in one colour, and each kind of shape in its own."""
    kinds = [*SHAPES, FIGURE]
    kind = FIGURE if subject.pose is not None else subject.scene.shape
    inside = (subject.mask(width, height) > 0.5)[..., None]
    drawn: Map = np.where(inside, SEGMENTS[1 + kinds.index(kind)], SEGMENTS[0])
    return drawn


SEGMENTS: NDArray[np.uint8] = (
    np.array(  # as far apart as ADE20K's are, and none of the world's own colours
        [(40, 40, 40), *(np.array(colorsys.hsv_to_rgb(k / 9, 0.75, 0.85)) * 255 for k in range(9))]
    )
    .round()
    .astype(np.uint8)
)


def pose(subject: Subject, width: int, height: int) -> Map:
    """OpenPose's skeleton; black where nobody is."""
    canvas = Image.new("RGB", (width, height))
    if subject.pose is not None:
        draw = ImageDraw.Draw(canvas)
        places = _places(subject.scene, subject.pose, width, height)
        thick = max(2, round(min(width, height) / 48))
        for k, (a, b) in enumerate(LIMBS):
            draw.line([places[a], places[b]], fill=_hue(k, len(LIMBS), 0.6), width=thick)
        for k, (x, y) in enumerate(places):
            colour = _hue(k, len(places), 1.0)
            draw.ellipse([x - thick, y - thick, x + thick, y + thick], fill=colour)
    return np.asarray(canvas)


def tile(subject: Subject, width: int, height: int) -> Map:
    """The picture itself, blurred to an eighth of its size."""
    small = subject.picture(width, height).resize((width // 8, height // 8), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def _hue(k: int, count: int, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(k / count, 1, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _outline(subject: Subject, width: int, height: int) -> NDArray[np.uint8]:
    inside = subject.mask(width, height) > 0.5
    return np.where(inside & ~ndimage.binary_erosion(inside), 255, 0).astype(np.uint8)


def _dome(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) in [0, 1]: how far inside, rounded off."""
    far = ndimage.distance_transform_edt(mask > 0.5)
    share = far / max(float(far.max()), 1e-6)
    height: NDArray[np.float32] = np.sqrt(1 - (1 - share) ** 2).astype(np.float32)
    return height


def _lines(values: NDArray[np.generic]) -> Map:
    grey = np.asarray(values).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


# Kind → how its map is drawn, and its number in the union model (diffusers, ControlNetUnionModel).
MAPS: dict[str, tuple[Callable[[Subject, int, int], Map], int]] = {
    "openpose": (pose, 0),
    "depth": (depth, 1),
    "scribble": (scribble, 2),
    "soft_edge": (soft_edge, 2),
    "canny": (canny, 3),
    "lineart": (lineart, 3),
    "mlsd": (straight_lines, 3),
    "normal": (normal, 4),
    "segmentation": (segmentation, 5),
    "tile": (tile, 6),
}
