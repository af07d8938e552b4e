"""Scenes for the models that look at pictures: held-out ones, and groups that share a picture."""

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


def absent_colour(group: Group, rng: np.random.Generator) -> str:
    """A colour that neither a shape nor the background has."""
    present = {group.background, *(scene.colour for scene in group.scenes)}
    return str(rng.choice([name for name in COLOURS if name not in present]))
