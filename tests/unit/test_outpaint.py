"""Outpainting's canvases: margins in steps, and an image that keeps its bytes."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from generation import outpaint
from generation.outpaint import extend, margin_mask
from generation.sizes import Margins, outpaint_steps
from tests.helpers.images import noise

SIDE_MARGINS = st.builds(Margins, *[st.integers(0, 300)] * 4)


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), SIDE_MARGINS)
@example((2, 3), Margins(1, 0, 2, 3))
@settings(max_examples=300)
def test_the_steps_add_up_to_the_margins_in_small_parts(size, wanted):
    sides = (size[0], size[1], size[0], size[1])
    names = ("left", "top", "right", "bottom")
    margins = Margins(
        **{n: min(getattr(wanted, n), side) for n, side in zip(names, sides, strict=True)}
    )
    assume(margins)
    steps = list(outpaint_steps(size, margins))
    for name, side in zip(names, sides, strict=True):
        parts = [getattr(part, name) for part in steps]
        assert sum(parts) == getattr(margins, name)
        assert min(parts) >= 0
        assert max(parts) <= 0.3 * side + 1
    assert all(steps)  # none adds nothing


@pytest.mark.parametrize(
    ("margins", "count"),
    [
        (Margins(30, 0, 0, 0), 1),
        (Margins(28, 58, 29, 59), 1),
        (Margins(31, 0, 0, 0), 2),
        (Margins(0, 0, 0, 61), 2),
        (Margins(100, 0, 0, 200), 4),
    ],
)
def test_a_margin_of_up_to_30_percent_takes_one_step(margins, count):
    assert len(list(outpaint_steps((100, 200), margins))) == count


@pytest.mark.parametrize("most", [outpaint.FILL_PIXELS, 2000, 150])
@pytest.mark.parametrize(
    "margins",
    [Margins(20, 10, 5, 1), Margins(0, 0, 0, 30), Margins(61, 0, 0, 0), Margins(1, 1, 1, 1)],
)
def test_extending_keeps_the_image_byte_for_byte(monkeypatch, most, margins):
    monkeypatch.setattr(outpaint, "FILL_PIXELS", most)
    image = noise((61, 43))
    extended = extend(image, margins)
    assert extended.size == (61 + margins.left + margins.right, 43 + margins.top + margins.bottom)
    box = (margins.left, margins.top, margins.left + 61, margins.top + 43)
    assert extended.crop(box).tobytes() == image.tobytes()


@pytest.mark.parametrize("most", [outpaint.FILL_PIXELS, 2000, 150])
def test_extending_continues_the_colours(monkeypatch, most):
    monkeypatch.setattr(outpaint, "FILL_PIXELS", most)
    image = Image.new("RGB", (60, 40), (200, 30, 30))
    image.paste((20, 30, 220), (30, 0, 60, 40))
    extended = np.asarray(extend(image, Margins(20, 3, 20, 7)), int)
    assert np.abs(extended[23, 0] - (200, 30, 30)).max() < 90
    assert np.abs(extended[23, -1] - (20, 30, 220)).max() < 90
    plain = np.asarray(extend(Image.new("RGB", (61, 43), (9, 99, 199)), Margins(20, 10, 5, 1)), int)
    assert np.abs(plain - (9, 99, 199)).max() <= 1


@given(
    st.tuples(st.integers(1, 50), st.integers(1, 50)), st.builds(Margins, *[st.integers(0, 9)] * 4)
)
@settings(max_examples=50, deadline=None)
def test_the_margins_alone_are_repainted(size, margins):
    extended = extend(noise(size), margins)
    mask = margin_mask(extended.size, margins)
    assert mask.shape == extended.size[::-1]
    kept = mask[margins.top : margins.top + size[1], margins.left : margins.left + size[0]]
    assert (kept == 0).all()
    assert (mask == 0).sum() == size[0] * size[1]
    assert (mask == 255).sum() == mask.size - size[0] * size[1]
