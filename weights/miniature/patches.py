"""A second lesson for a vision transformer that starts from nothing: what its patches show.

From captions or masks alone it learns colours soon and shapes late. Two linear layers over its
patches, thrown away after training, ask of each patch which shape it belongs to and what colour
covers it; that is 64 answers a picture instead of one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weights.miniature.world import COLOURS, SHAPES, Scene

SHAPE_COVERAGE = 0.1  # of a patch, from which it belongs to the shape
COLOUR_COVERAGE = 0.5
KINDS, PALETTE = list(SHAPES), list(COLOURS)
NO_LABEL = -100  # torch's own: not part of the loss

Labels = NDArray[np.int64]  # (2, P): 0 or 1 + the shape's index; the colour's index


def label_patches(scenes: Sequence[Scene], masks: NDArray[np.float32], patch: int) -> Labels:
    """What each patch of a picture shows, row by row.

    Args:
        scenes: the shapes on the picture; all have one background.
        masks: (N, H, W) in [0, 1], their coverage.
        patch: the patches' side in pixels.
    """
    count, height, width = masks.shape
    cells = masks.reshape(count, height // patch, patch, width // patch, patch).mean(axis=(2, 4))
    coverage = cells.reshape(count, -1)
    kinds = np.zeros(coverage.shape[1], np.int64)
    colours = np.full(coverage.shape[1], PALETTE.index(scenes[0].background))
    for scene, covered in zip(scenes, coverage, strict=True):
        kinds[covered > SHAPE_COVERAGE] = 1 + KINDS.index(scene.shape)
        colours[covered > COLOUR_COVERAGE] = PALETTE.index(scene.colour)
    return np.stack([kinds, colours])


class PatchLesson(nn.Module):
    """The two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kinds = nn.Linear(width, 1 + len(KINDS))
        self.colours = nn.Linear(width, len(PALETTE))

    def forward(self, states: Tensor, labels: list[Labels]) -> Tensor:
        """The loss of hidden states (B, 1 + P, width), whose first is no patch's."""
        patches = self.norm(states[:, 1:])
        wanted = torch.from_numpy(np.stack(labels)).to(states.device)
        kinds = self.kinds(patches).transpose(1, 2)  # (B, classes, P)
        # Half of the weight on patches of shapes, of which there are few.
        each = nn.functional.cross_entropy(kinds, wanted[:, 0], reduction="none")
        shown = wanted[:, 0] > 0
        loss: Tensor = (each[shown].mean() + each[~shown].mean()) / 2
        colours = self.colours(patches).transpose(1, 2)
        return loss + nn.functional.cross_entropy(colours, wanted[:, 1])
