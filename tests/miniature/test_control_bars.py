"""Controls keep their bars; `python -m tests.miniature.control_bars` prints the figures."""

import numpy as np
import pytest
from scipy import ndimage

from tests.miniature import control_bars as bars
from tests.miniature.control_bars import COLOURS_KEPT, HALVES, KINDS, ROWS, TWICE
from tests.miniature.mode_bars import Bench

FEWER = 3  # of the report's 16 seeds
STEPS = {"num_inference_steps": 8}
QUICK = [
    pytest.param(
        model,
        kind,
        marks=() if model == "sdxl" or kind is KINDS[0] else pytest.mark.slow,
        id=f"{model}-{kind.name}",
    )
    for model, kind in ROWS
]


@pytest.fixture(scope="module")
def bench(engine, tmp_path_factory) -> Bench:
    return Bench(engine, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(("model", "kind"), QUICK)
def test_pictures_follow_their_controls(bench, tmp_path, model, kind):
    found = bars.measure(bench, tmp_path, model, kind, FEWER, **STEPS)
    assert found.score >= kind.bar - 0.05  # of few seeds and steps
    assert not kind.doubles or found.score >= TWICE * found.without
    assert found.colours >= COLOURS_KEPT - 1 / FEWER


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), ROWS, ids=[f"{m}-{k.name}" for m, k in ROWS])
def test_pictures_follow_their_controls_with_all_seeds(bench, tmp_path, model, kind):
    assert bars.meets(kind, bars.measure(bench, tmp_path, model, kind))


@pytest.mark.parametrize("model", bars.FEW_STEPS)
def test_pictures_of_few_steps_follow_edges(bench, tmp_path, model):
    found = bars.measure(bench, tmp_path, model, KINDS[0], FEWER)
    assert found.score >= max(bars.FEW_STEPS_BAR, TWICE * found.without)


@pytest.mark.parametrize("mode", bars.MODES)
def test_pictures_that_start_from_one_follow_edges(bench, tmp_path, mode):
    score, without = bars.measure_mode(bench, tmp_path, mode, KINDS[0], FEWER, **STEPS)
    assert score >= max(KINDS[0].bar - 0.05, TWICE * without)


@pytest.mark.parametrize("model", ["sdxl", "sd15"])
def test_two_controls_are_both_obeyed(bench, tmp_path, model):
    halves = bars.measure_halves(bench, tmp_path, model, FEWER, **STEPS)
    assert min(halves.edges, halves.segments) >= HALVES
    assert halves.edges >= TWICE * halves.without[0]


# The measures


def square(left: int) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[20:40, left : left + 20] = True
    return mask


def test_edges_agree_within_two_pixels():
    outline = square(20) & ~ndimage.binary_erosion(square(20))
    assert bars.edge_agreement(outline, outline) == 1
    for shift, low, high in ((2, 0.99, 1), (6, 0, 0.75)):
        assert low <= bars.edge_agreement(np.roll(outline, shift, axis=1), outline) <= high
    assert bars.edge_agreement(np.zeros_like(outline), outline) == 0
    assert bars.edge_agreement(np.zeros_like(outline), np.zeros_like(outline)) == 1


def test_overlap_is_intersection_over_union():
    assert bars.overlap(square(20), square(20)) == 1
    assert bars.overlap(square(0), square(40)) == 0
    assert bars.overlap(square(20), square(30)) == pytest.approx(1 / 3)


def test_cases_are_the_same_at_each_call_and_of_other_colours():
    for kind in KINDS:
        first, second = bars.cases(kind), bars.cases(kind)
        assert first == second
        assert all(c.subject.scene.shape in kind.shapes for c in first)
        same = [c.subject.scene.colour == c.colour for c in first]
        assert np.mean(same) < 0.5 or kind.own_colours
