"""The judge is right on drawn truth and says no to wrong pictures."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from weights.miniature.captions import (
    describe,
    held_out_captions,
    training_scene,
)
from weights.miniature.world import (
    COLOURS,
    POSITIONS,
    SHAPES,
    Expectation,
    is_held_out,
    judge,
    place,
    random_scene,
    read_picture,
    render,
)


def _truth(scene):
    return Expectation(scene.shape, scene.colour, scene.background, scene.position, scene.size)


def test_the_world_is_large_enough():
    assert len(SHAPES) >= 8
    assert len(COLOURS) >= 10


@pytest.mark.parametrize(("size", "count"), [((128, 128), 120), ((160, 104), 40), ((256, 256), 15)])
def test_the_judge_reads_drawn_pictures_right(size, count):
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng) for _ in range(count)]
    right = [judge(render(scene, *size), _truth(scene)).all_right for scene in scenes]
    assert sum(right) >= 0.99 * len(right)


def test_the_judge_says_no_to_every_attribute_that_is_wrong():
    rng = np.random.default_rng(2)
    accepted = Counter()
    for _ in range(50):
        scene = random_scene(rng)
        wrong = {}
        for attribute in ("shape", "colour", "background", "position", "size"):
            other = random_scene(rng)
            while getattr(other, attribute) == getattr(scene, attribute):
                other = random_scene(rng)
            wrong[attribute] = getattr(other, attribute)
        verdict = judge(render(scene, 128, 128), Expectation(**wrong))
        accepted.update(name for name in wrong if getattr(verdict, name))
    assert not accepted


def test_the_judge_says_no_to_pictures_without_a_shape():
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    flat = Image.new("RGB", (128, 128), COLOURS["blue"])
    ramp = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8)[:, None, None], (1, 128, 3)))
    scene = place("circle", "red", "blue", "small", "center", rng)
    smeared = render(scene, 128, 128).filter(ImageFilter.GaussianBlur(24))
    for picture in (noise, flat, ramp, smeared):
        assert read_picture(picture).shape is None


def test_a_blob_is_no_named_shape():
    named = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        low = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
        blob = np.asarray(low.resize((128, 128), Image.Resampling.BICUBIC)) > 150
        pixels = np.where(blob[..., None], COLOURS["red"], COLOURS["blue"]).astype(np.uint8)
        named += read_picture(Image.fromarray(pixels)).shape is not None
    assert named <= 2


def test_two_shapes_are_judged_by_the_larger():
    rng = np.random.default_rng(5)
    large = render(place("circle", "red", "blue", "large", "left", rng), 128, 128)
    small = render(place("star", "red", "blue", "small", "top right", rng), 128, 128)
    large.paste(small.crop((88, 0, 128, 40)), (88, 0))
    assert read_picture(large).shape == "circle"


def test_captions_never_leak_held_out_combinations():
    rng = np.random.default_rng(6)
    assert not any(is_held_out(training_scene(rng)) for _ in range(2000))
    held = held_out_captions(64, seed=0)
    assert len({c.text for c in held}) >= 60
    for caption in held:
        expected = caption.expected
        assert expected.colour in caption.text
        assert expected.background in caption.text
        assert expected.position in POSITIONS


def test_a_caption_tells_the_truth():
    rng = np.random.default_rng(7)
    for _ in range(500):
        scene = training_scene(rng)
        named = set(describe(scene, rng).replace(".", "").replace(",", "").split()) & set(COLOURS)
        assert named <= {scene.colour, scene.background}


def test_rendering_is_deterministic():
    scene = random_scene(np.random.default_rng(8))
    assert render(scene, 128, 128).tobytes() == render(scene, 128, 128).tobytes()
