"""Scenes for the models that look at pictures: held-out ones, and groups that share a picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weights.miniature.world import (
    COLOURS,
    SHAPES,
    Scene,
    is_held_out,
    random_scene,
    render,
    render_mask,
)

CONTRAST = 90  # of a shape to its background, 8-bit steps over all channels
CLEARANCE = 0.02  # between two shapes' circles, a fraction of the shorter side


@dataclass(frozen=True)
class Group:
    """Scenes of one background that share a picture; no two have the same shape or colour."""

    scenes: tuple[Scene, ...]

    @property
    def background(self) -> str:
        return self.scenes[0].background


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes whose (shape, colour, background) is kept from training, evenly over the shapes."""
    rng, shapes = np.random.default_rng(seed), list(SHAPES)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if is_held_out(scene) and scene.shape == shapes[len(scenes) % len(shapes)]:
            scenes.append(scene)
    return scenes


def random_group(rng: np.random.Generator, count: int, held_out: bool) -> Group:
    """At most `count` scenes, fewer where no room was found; all of them held out, or none."""
    while is_held_out(first := random_scene(rng)) is not held_out:
        pass
    scenes = [first]
    for _ in range(40):
        if len(scenes) == count:
            break
        other = replace(
            random_scene(rng),
            background=first.background,
            texture=first.texture,
            texture_seed=int(rng.integers(2**31)),
        )
        if other.colour != other.background and is_held_out(other) is held_out:
            scenes += [other] if all(_apart(other, scene) for scene in scenes) else []
    return Group(tuple(scenes))


def _apart(a: Scene, b: Scene) -> bool:
    distance = np.hypot(a.x - b.x, a.y - b.y)
    different = a.shape != b.shape and a.colour != b.colour
    # A square's corner is further out than its radius.
    return bool(different and distance > 1.25 * (a.radius + b.radius) + CLEARANCE)


def render_group(group: Group, width: int, height: int) -> Image.Image:
    """The first scene's picture with the other shapes drawn onto it."""
    picture = np.asarray(render(group.scenes[0], width, height), dtype=np.float32)
    for scene in group.scenes[1:]:
        coverage = render_mask(scene, width, height)[..., None]
        drawn = np.asarray(render(scene, width, height), dtype=np.float32)
        picture = coverage * drawn + (1 - coverage) * picture
    return Image.fromarray(picture.round().astype(np.uint8))


def group_masks(group: Group, width: int, height: int) -> NDArray[np.float32]:
    """(N, H, W) in [0, 1]: each shape's coverage."""
    return np.stack([render_mask(scene, width, height) for scene in group.scenes])


def recolour(
    scenes: Sequence[Scene], masks: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """(H, W, 3): the scenes in colours at random; no held-out combination is nearest to them.

    A model that sees only the palette learns which combinations never occur: the held-out ones.
    """
    while True:
        ground, *colours = rng.uniform(0, 255, (1 + len(scenes), 3))
        background = _nearest(ground)
        named = (
            replace(scene, colour=_nearest(colour), background=background)
            for scene, colour in zip(scenes, colours, strict=True)
        )
        distances = [np.abs(colour - ground).sum() for colour in colours]
        if min(distances) > CONTRAST and not any(is_held_out(scene) for scene in named):
            break
    pixels = ground + rng.normal(0, 1.5, (*masks.shape[1:], 3))  # world.render's grain
    for colour, mask in zip(colours, masks, strict=True):
        pixels += mask[..., None] * (colour - ground)
    drawn: NDArray[np.uint8] = pixels.round().clip(0, 255).astype(np.uint8)
    return drawn


def _nearest(rgb: NDArray[np.float64]) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(rgb - COLOURS[name]).sum()))


def absent_colour(group: Group, rng: np.random.Generator) -> str:
    """A colour that neither a shape nor the background has."""
    present = {group.background, *(scene.colour for scene in group.scenes)}
    return str(rng.choice([name for name in COLOURS if name not in present]))
