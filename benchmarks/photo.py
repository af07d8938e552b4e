"""An image like a photo, for benchmarks of what happens to an image once it is generated."""

from typing import Any

import numpy as np


def photo(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return (height, width, 3): smooth waves under noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = (
        128 + 90 * np.sin(x / 97) + 20 * np.sin(y / 31),
        120 + 80 * np.cos(y / 77),
        130 + 60 * np.sin((x + y) / 143),
    )
    noisy = np.stack(waves, -1) + np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)
