"""The picture world: coloured shapes on coloured backgrounds, with a renderer and a judge.

The miniature models are trained on it and the tests measure against it, so it has a known ground
truth: `render` draws a `Scene`, `read_picture` measures one back from pixels alone, and `judge`
compares what was measured with what was asked. Positions and radii are fractions of the picture's
sides (the radius: of the shorter one); x grows to the right and y downwards.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Point = tuple[float, float]

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB 0..255
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 215, 50),
    "green": (40, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (35, 80, 215),
    "purple": (125, 45, 170),
    "pink": (250, 150, 190),
    "white": (245, 245, 245),
    "black": (22, 22, 26),
}

SIZES: dict[str, float] = {"small": 0.15, "medium": 0.22, "large": 0.31}  # radius
SIZE_LIMITS = (0.185, 0.265)  # radii that part small from medium and medium from large
MARGIN = 0.05  # clear border between a shape and the edge, for every position

POSITIONS: dict[str, Point] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}

TEXTURES = ("plain", "gradient", "striped", "cloudy")
TEXTURE_CONTRAST = 0.14  # how far a texture's light and dark tones are from the named colour


def _around(count: int, radius: Callable[[int], float], start: float = -90.0) -> list[Point]:
    angles = [math.radians(start + 360.0 * i / count) for i in range(count)]
    return [(radius(i) * math.cos(a), radius(i) * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[Point]:
    # The classical parametric heart, 16 sin^3 t (MathWorld, "Heart Curve", sixth form).
    points = []
    for i in range(64):
        t = 2 * math.pi * i / 64
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3, -y))
    return points


def _cross(arm: float) -> list[Point]:
    corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    return [*corners, *((-x, -y) for x, y in corners)]


def _fit(points: list[Point]) -> list[Point]:
    """Centre the bounding box on the origin and scale its longer half side to 1."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    cx, cy = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    scale = 2 / max(max(xs) - min(xs), max(ys) - min(ys))
    return [((x - cx) * scale, (y - cy) * scale) for x, y in points]


SHAPES: dict[str, list[Point]] = {  # outlines; a ring is a circle with RING_HOLE cut out
    "circle": _fit(_around(72, lambda i: 1.0)),
    "square": _fit([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _fit(_around(3, lambda i: 1.0)),
    "star": _fit(_around(10, lambda i: 1.0 if i % 2 == 0 else 0.45)),
    "heart": _fit(_heart()),
    "cross": _fit(_cross(0.33)),
    "diamond": _fit([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]),
    "ring": _fit(_around(72, lambda i: 1.0)),
}
RING_HOLE = 0.55  # inner radius over outer radius


@dataclass(frozen=True)
class Scene:
    """One picture's ground truth. `x`, `y`, `radius` are fractions (see the module's docstring)."""

    shape: str
    colour: str
    background: str
    size: str
    position: str
    texture: str
    x: float
    y: float
    radius: float
    texture_seed: int


@dataclass(frozen=True)
class Expectation:
    """What a picture must show; None leaves an attribute open."""

    shape: str | None = None
    colour: str | None = None
    background: str | None = None
    position: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Reading:
    """What the judge measured; None where nothing could be told. `mask`: (H, W) bool, the shape."""

    shape: str | None
    colour: str | None
    background: str | None
    position: str | None
    size: str | None
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """Which expectations hold; an attribute that was left open counts as held."""

    shape: bool
    colour: bool
    background: bool
    position: bool
    size: bool

    @property
    def all_right(self) -> bool:
        return self.shape and self.colour and self.background and self.position and self.size


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute drawn at random; half of them stand in the centre."""
    shape = str(rng.choice(list(SHAPES)))
    colour, background = (str(c) for c in rng.choice(list(COLOURS), size=2, replace=False))
    centred = rng.random() < 0.5
    position = "center" if centred else str(rng.choice(list(POSITIONS)))
    return place(shape, colour, background, str(rng.choice(list(SIZES))), position, rng)


def place(
    shape: str, colour: str, background: str, size: str, position: str, rng: np.random.Generator
) -> Scene:
    """A scene of the given attributes; the exact place, radius and texture are drawn by `rng`."""
    radius = SIZES[size] * float(rng.uniform(0.94, 1.06))
    reach = 0.5 - MARGIN - radius
    jitter = rng.uniform(-0.12, 0.12, size=2) * reach
    dx, dy = POSITIONS[position]
    x, y = 0.5 + 0.88 * reach * dx + jitter[0], 0.5 + 0.88 * reach * dy + jitter[1]
    texture = str(rng.choice(TEXTURES))
    seed = int(rng.integers(2**31))
    return Scene(
        shape, colour, background, size, position, texture, float(x), float(y), radius, seed
    )


def is_held_out(scene: Scene) -> bool:
    """Whether (shape, colour, background) is kept from training: about one in twelve."""
    return zlib.crc32(f"{scene.shape}|{scene.colour}|{scene.background}".encode()) % 12 == 0


def render_mask(scene: Scene, width: int, height: int) -> NDArray[np.float32]:
    """The shape's coverage, (H, W) in [0, 1], anti-aliased by four times supersampling."""
    scale = 4
    side = min(width, height) * scale
    cx, cy, r = scene.x * width * scale, scene.y * height * scale, scene.radius * side
    canvas = Image.new("L", (width * scale, height * scale), 0)
    draw = ImageDraw.Draw(canvas)
    outline = SHAPES[scene.shape]
    draw.polygon([(cx + r * x, cy + r * y) for x, y in outline], fill=255)
    if scene.shape == "ring":
        draw.polygon([(cx + r * RING_HOLE * x, cy + r * RING_HOLE * y) for x, y in outline], fill=0)
    small = canvas.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255.0


def _texture(scene: Scene, width: int, height: int) -> NDArray[np.float32]:
    """The background's tone, (H, W): 0 is dark, 0.5 the named colour, 1 light."""
    rng = np.random.default_rng(scene.texture_seed)
    angle = rng.uniform(0, 2 * math.pi)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    along = (xs / width - 0.5) * math.cos(angle) + (ys / height - 0.5) * math.sin(angle)
    tone = np.full((height, width), 0.5)
    if scene.texture == "gradient":
        tone = np.clip(0.5 + along, 0, 1)
    elif scene.texture == "striped":
        bands = np.sin(along * 2 * math.pi * rng.integers(3, 6) + rng.uniform(0, 6))
        tone = np.clip(0.5 + 2.0 * bands, 0.1, 0.9)
    elif scene.texture == "cloudy":
        blobs = Image.fromarray(rng.random((7, 7)).astype(np.float32))
        tone = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    return tone.astype(np.float32)


def _tone(
    rgb: tuple[int, int, int], tone: NDArray[np.float32], contrast: float
) -> NDArray[np.float32]:
    """(H, W, 3) in 0..255: `rgb` darkened where tone < 0.5 and lightened where tone > 0.5."""
    colour = np.asarray(rgb, dtype=np.float32)
    signed = (tone[..., None] * 2 - 1) * contrast
    return np.where(signed < 0, colour * (1 + signed), colour + (255 - colour) * signed)


def render(scene: Scene, width: int, height: int) -> Image.Image:
    """Draw a scene as an RGB picture of the given size in pixels."""
    return paint(scene, render_mask(scene, width, height))


def paint(scene: Scene, mask: NDArray[np.float32]) -> Image.Image:
    """The scene's colours and textures; `mask` (H, W) in [0, 1] is where the shape is."""
    height, width = mask.shape
    rng = np.random.default_rng(scene.texture_seed + 1)
    coverage = mask[..., None]
    background = _tone(COLOURS[scene.background], _texture(scene, width, height), TEXTURE_CONTRAST)
    tone = np.full((height, width), 0.5 + rng.uniform(-0.2, 0.2), dtype=np.float32)
    shape = _tone(COLOURS[scene.colour], tone, TEXTURE_CONTRAST)
    pixels = coverage * shape + (1 - coverage) * background
    pixels += rng.normal(0, 1.5, size=pixels.shape)  # sensor-like grain, in 8-bit steps
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _lab(rgb: NDArray[np.floating]) -> NDArray[np.float64]:
    """sRGB 0..255 (..., 3) to CIE L*a*b*, D65 (IEC 61966-2-1 and CIE 15)."""
    c = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


# Distances in L*a*b*; lightness counts half, because textures and shading move mostly that.
_LIGHTNESS_WEIGHT = np.array([0.5, 1.0, 1.0])
_PALETTE = _lab(np.array(list(COLOURS.values()), dtype=np.float64)) * _LIGHTNESS_WEIGHT
MAX_COLOUR_DISTANCE = 26.0  # further from every palette colour than this is no named colour
MIN_CONTRAST = 14.0  # a shape stands out from its background by at least this
MIN_AREA, MAX_AREA = 0.008, 0.5  # share of the picture a shape covers
MIN_OVERLAP = 0.72  # intersection over union with the best template
GRID = 40  # templates are compared on a GRID x GRID raster


def _nearest_colour(lab: NDArray[np.float64]) -> str | None:
    distances = np.linalg.norm(_PALETTE - lab, axis=1)
    best = int(distances.argmin())
    return list(COLOURS)[best] if distances[best] <= MAX_COLOUR_DISTANCE else None


def colour_shares(image: Image.Image) -> dict[str, float]:
    """Each colour's share of the pixels, every pixel counting for the colour nearest to it."""
    pixels = _lab(np.asarray(image.convert("RGB"))).reshape(-1, 3) * _LIGHTNESS_WEIGHT
    nearest = np.linalg.norm(pixels[:, None] - _PALETTE, axis=-1).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(COLOURS))
    return {name: float(count) / len(pixels) for name, count in zip(COLOURS, counts, strict=True)}


def _template(shape: str) -> NDArray[np.bool_]:
    scene = Scene(shape, "red", "blue", "large", "center", "plain", 0.5, 0.5, 0.5, 0)
    return _normalised(render_mask(scene, 4 * GRID, 4 * GRID) > 0.5)


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's bounding box, centred in a square and resampled to GRID x GRID."""
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    side = max(box.shape)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = (side - box.shape[0]) // 2, (side - box.shape[1]) // 2
    square[top : top + box.shape[0], left : left + box.shape[1]] = box * 255
    resized = Image.fromarray(square).resize((GRID, GRID), Image.Resampling.BILINEAR)
    return np.asarray(resized) > 127


_TEMPLATES = {shape: _template(shape) for shape in SHAPES}


def _shape_kind(mask: NDArray[np.bool_]) -> str | None:
    grid = _normalised(mask)
    overlaps = {
        name: np.logical_and(grid, t).sum() / np.logical_or(grid, t).sum()
        for name, t in _TEMPLATES.items()
    }
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= MIN_OVERLAP else None


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 4-connected region; all False where the mask is."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    areas = np.bincount(labels.ravel())
    areas[0] = 0  # the background
    return np.asarray(labels == areas.argmax())


def _position(mask: NDArray[np.bool_]) -> tuple[str, str]:
    """(position, size) of a mask, from its bounding box."""
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    radius = max(x1 - x0, y1 - y0) / 2 / min(width, height)
    reach = max(0.5 - MARGIN - radius, 0.05)
    offsets = (((x0 + x1) / 2 / width - 0.5) / reach, ((y0 + y1) / 2 / height - 0.5) / reach)
    dx, dy = (0 if abs(o) < 0.45 else int(math.copysign(1, o)) for o in offsets)
    position = next(name for name, direction in POSITIONS.items() if direction == (dx, dy))
    small, medium = SIZE_LIMITS
    return position, "small" if radius < small else "medium" if radius < medium else "large"


def read_picture(image: Image.Image) -> Reading:
    """Measure background, shape colour, shape kind, position and size from the pixels alone."""
    # 128 px on the short side is all the detail that the templates need.
    factor = max(1.0, min(image.size) / 128)
    size = (round(image.width / factor), round(image.height / factor))
    rgb = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.float64)
    lab = _lab(rgb) * _LIGHTNESS_WEIGHT
    border = max(2, round(min(size) * 0.03))
    frame = np.ones(lab.shape[:2], dtype=bool)
    frame[border:-border, border:-border] = False
    ground = np.median(lab[frame], axis=0)
    background = _nearest_colour(ground)

    contrast = np.linalg.norm(lab - ground, axis=-1)
    nothing = Reading(None, None, background, None, None, np.zeros(lab.shape[:2], dtype=bool))
    strong = contrast > max(MIN_CONTRAST, 0.6 * np.quantile(contrast, 0.99))
    if not MIN_AREA / 4 <= strong.mean() <= MAX_AREA:
        return nothing
    figure = np.median(lab[strong], axis=0)
    closer = np.linalg.norm(lab - figure, axis=-1) < contrast
    mask = _largest_component(closer & (contrast > MIN_CONTRAST / 2))
    if not MIN_AREA <= mask.mean() <= MAX_AREA:
        return nothing
    colour = _nearest_colour(np.median(lab[mask], axis=0))
    if colour == background:  # a tone of the background, not a shape on it
        return nothing
    position, size_name = _position(mask)
    return Reading(_shape_kind(mask), colour, background, position, size_name, mask)


def judge(image: Image.Image, expected: Expectation) -> Verdict:
    """Compare what the picture shows with what was asked."""
    seen = read_picture(image)

    def holds(name: str) -> bool:
        wanted = getattr(expected, name)
        return wanted is None or getattr(seen, name) == wanted

    return Verdict(*(holds(n) for n in ("shape", "colour", "background", "position", "size")))
