"""Captions of the picture world, in varied wording, and the captions held out for evaluation."""

from dataclasses import dataclass

import numpy as np

from weights.miniature.world import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Expectation,
    Scene,
    is_held_out,
    place,
    random_scene,
)

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "dot"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "cross", "plus sign"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "ring": ("ring", "ring", "donut"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
POSITION_WORDS: dict[str, tuple[str, ...]] = {
    "center": ("in the center", "in the middle", "in the centre"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "top left": ("in the top left corner", "at the top left", "in the top left"),
    "top right": ("in the top right corner", "at the top right", "in the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the bottom right"),
}
TEXTURE_WORDS = {"plain": "plain", "gradient": "gradient", "striped": "striped", "cloudy": "cloudy"}
OPENINGS = (
    *("",) * 10,
    *("a picture of ", "a photo of ", "a drawing of ", "an illustration of ", "a painting of "),
)


@dataclass(frozen=True)
class HeldOutCaption:
    """A caption whose (shape, colour, background) was never rendered in training."""

    text: str
    expected: Expectation


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene; most name shape, colour and background, and some all the rest.

    One in twelve is only a fragment ("blue background"), so that single words mean something too,
    as a negative prompt needs them to.
    """
    shape = _pick(rng, SHAPE_WORDS[scene.shape])
    size = _pick(rng, SIZE_WORDS[scene.size]) if rng.random() < 0.6 else ""
    colour = scene.colour if rng.random() < 0.95 else ""
    figure = " ".join(word for word in (size, colour, shape) if word)
    texture = TEXTURE_WORDS[scene.texture] if rng.random() < 0.3 else ""
    ground = f"{texture} {scene.background}".strip()
    where = _pick(rng, POSITION_WORDS[scene.position]) if rng.random() < 0.65 else ""
    if rng.random() < 1 / 12:
        fragments = (f"{ground} background", scene.background, scene.colour, shape, figure)
        return _pick(rng, (*fragments, f"{colour} {shape}".strip(), f"{shape} {where}".strip()))
    if rng.random() < 0.05:
        return f"{_article(figure)} {where}".strip()
    opening = _pick(rng, OPENINGS)
    subject = opening + _article(figure)
    templates = (
        f"{subject} on {_article(ground)} background {where}",
        f"{subject} {where} on {_article(ground)} background",
        f"{subject} {where} of {_article(ground)} background",
        f"{subject} {where}, {ground} background",
        f"{ground} background with {_article(figure)} {where}",
        f"{figure} {where} on {ground}",
        f"{subject} on {ground} {where}",
    )
    text = " ".join(_pick(rng, (templates[0], *templates)).split()).replace(" ,", ",")
    return text if rng.random() < 0.8 else text + "."


def training_scene(rng: np.random.Generator) -> Scene:
    """A random scene that is not held out."""
    while is_held_out(scene := random_scene(rng)):
        pass
    return scene


def held_out_captions(count: int, seed: int) -> list[HeldOutCaption]:
    """Captions that name shape, colour, background, position and size, evenly over the shapes."""
    rng = np.random.default_rng(seed)
    chosen: list[HeldOutCaption] = []
    while len(chosen) < count:
        shape = list(SHAPES)[len(chosen) % len(SHAPES)]
        colour, background = (str(c) for c in rng.choice(list(COLOURS), size=2, replace=False))
        size, position = str(rng.choice(list(SIZES))), str(rng.choice(list(POSITIONS)))
        scene = place(shape, colour, background, size, position, rng)
        if not is_held_out(scene):
            continue
        where = _pick(rng, POSITION_WORDS[position])
        subject = _article(f"{size} {colour} {shape}")
        templates = (
            f"{subject} on {_article(background)} background {where}",
            f"{subject} {where} on {_article(background)} background",
            f"{background} background with {subject} {where}",
            f"{subject} {where}, {background} background",
        )
        text = _pick(rng, templates)
        chosen.append(HeldOutCaption(text, Expectation(shape, colour, background, position, size)))
    return chosen
