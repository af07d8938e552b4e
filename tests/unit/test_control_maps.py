"""Exact maps of scenes: what they show is where the shape is, and of the right size."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from weights.miniature.controls import MAPS, STRAIGHT, Subject, random_pose
from weights.miniature.world import SHAPES, place

SIZES = [(128, 128), (160, 104)]
SCENE = place("star", "red", "blue", "large", "center", np.random.default_rng(0))
PLAIN = replace(SCENE, texture="plain")
LINES = ("canny", "lineart", "mlsd", "soft_edge", "scribble")


def posed() -> Subject:
    return Subject(PLAIN, random_pose(np.random.default_rng(1)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MAPS)
def test_maps_are_images_of_the_scenes_size(name, size):
    for subject in (Subject(SCENE), posed()):
        drawn = MAPS[name][0](subject, *size)
        assert drawn.shape == (size[1], size[0], 3)
        assert drawn.dtype == np.uint8
        assert np.array_equal(drawn, MAPS[name][0](subject, *size))


@pytest.mark.parametrize("name", LINES)
def test_lines_are_where_the_outline_is(name):
    mask = Subject(PLAIN).mask(128, 128) > 0.5
    outline = mask & ~ndimage.binary_erosion(mask)
    far = ndimage.distance_transform_edt(~outline)
    lines = MAPS[name][0](Subject(PLAIN), 128, 128)[..., 0] > 127
    assert lines.any()
    assert far[lines].max() <= (8 if name == "scribble" else 2)


@pytest.mark.parametrize("name", ["depth", "segmentation", "normal"])
def test_what_covers_the_shape_differs_from_the_ground(name):
    mask = Subject(PLAIN).mask(128, 128) > 0.5
    drawn = MAPS[name][0](Subject(PLAIN), 128, 128).astype(int)
    ground = np.median(drawn[~mask], axis=0)
    changed = np.abs(drawn - ground).max(axis=-1)
    if name == "normal":  # a dome's middle faces the viewer as the ground does
        assert changed[mask].mean() > 10 * max(changed[~mask].mean(), 0.1)
    else:
        assert changed[mask].min() > changed[~mask].max()


def test_near_is_white_and_large_is_near():
    small, large = (
        MAPS["depth"][0](Subject(replace(PLAIN, radius=r)), 128, 128)[64, 64, 0]
        for r in (0.15, 0.31)
    )
    assert 127 < small < large


def test_normals_are_of_length_one():
    vectors = MAPS["normal"][0](Subject(PLAIN), 128, 128) / 127.5 - 1
    assert np.abs(np.linalg.norm(vectors, axis=-1) - 1).max() < 0.02


def test_straight_lines_are_those_of_straight_shapes():
    for shape in SHAPES:
        drawn = MAPS["mlsd"][0](Subject(replace(PLAIN, shape=shape)), 128, 128)
        assert drawn.any() == (shape in STRAIGHT)


def test_a_skeleton_lies_on_its_figure_and_shapes_have_none():
    assert not MAPS["openpose"][0](Subject(PLAIN), 128, 128).any()
    figure = posed()
    bones = MAPS["openpose"][0](figure, 128, 128).any(axis=-1)
    near = ndimage.binary_dilation(figure.mask(128, 128) > 0.5, iterations=3)
    assert bones.sum() > 100
    assert near[bones].mean() > 0.98


def test_every_kind_of_shape_has_a_colour_of_its_own():
    colours = {
        tuple(MAPS["segmentation"][0](Subject(replace(PLAIN, shape=shape)), 128, 128)[y, x])
        for shape in SHAPES
        for y, x in [np.argwhere(Subject(replace(PLAIN, shape=shape)).mask(128, 128) > 0.9)[40]]
    }
    assert len(colours) == len(SHAPES)
