"""The invisible watermark of Stability AI's images, on any device.

A message of 48 bits, again and again over the image, in its blue: each 8x8 pixels hold one bit.
Written for the decoder of ShieldMnt/invisible-watermark (imwatermark/maxDct.py, EmbedMaxDct), which
looks at the largest wavelet coefficient of a block. The encoder there may lower that one below its
neighbours, so that the decoder looks at another; here it stays the largest by a margin.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Stability-AI/generative-models, scripts/demo/streamlit_helpers.py
MESSAGE = 0b101100111110110010010000011110111011000110011110
BITS = tuple(int(bit) for bit in f"{MESSAGE:048b}")
SCALE = 36.0  # imwatermark's for U, the second channel
BLOCK = 4  # wavelet coefficients on a side
MARGIN = 6.0  # by which a block's largest coefficient exceeds the others: what JPEG may add to them
# ITU-R BT.601, as OpenCV has it: U = 0.492 (B - Y) + 128, Y = 0.299 R + 0.587 G + 0.114 B
U_OF_RGB = (-0.147108, -0.288804, 0.435912)
U_OFFSET = 128.0
RGB_OF_U = (0.0, -0.395, 2.032)  # which leaves Y as it is


def apply(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 RGB to the same with the watermark.

    A image without a single block of 8x8 pixels comes back as it is.
    """
    device = pixels.device
    rows, columns = (side // (2 * BLOCK) for side in pixels.shape[-2:])
    if not rows or not columns:
        return pixels
    seen = pixels[..., : rows * 2 * BLOCK, : columns * 2 * BLOCK].float()
    # The wavelet's approximation (Haar) of U: half the sum of four pixels, always positive.
    kernel = torch.tensor(U_OF_RGB, device=device)[None, :, None, None].expand(1, 3, 2, 2) / 2
    band = functional.conv2d(seen, kernel, stride=2) + 2 * U_OFFSET  # (N, 1, H/2, W/2)
    blocks = band.view(-1, rows, BLOCK, columns, BLOCK).transpose(2, 3).flatten(3)
    largest, places = blocks[..., 1:].topk(2, dim=-1)  # the decoder leaves the first one out
    value, second = largest.unbind(-1)
    place = places[..., 0] + 1
    bits = torch.tensor(BITS, device=device, dtype=torch.float32)
    order = torch.arange(rows * columns, device=device).view(rows, columns) % len(BITS)
    rest = (0.25 + 0.5 * bits[order]) * SCALE
    # The least value that says the bit and is the largest.
    wanted = ((second + MARGIN - rest) / SCALE).ceil() * SCALE + rest
    change = (wanted - value) / 2  # of U, in each of the coefficient's four pixels
    top = 2 * (torch.arange(rows, device=device)[:, None] * BLOCK + place // BLOCK)
    left = 2 * (torch.arange(columns, device=device) * BLOCK + place % BLOCK)
    down, right = (
        torch.tensor([0, 0, 1, 1], device=device),
        torch.tensor([0, 1, 0, 1], device=device),
    )
    where = (top[..., None] + down) * pixels.shape[-1] + left[..., None] + right
    where = where.flatten(1)[:, None].expand(-1, 3, -1)  # (N, 3, 4 rows columns)
    flat = pixels.flatten(2)
    four = change[..., None].expand(*change.shape, 4).flatten(1)[:, None]
    return flat.scatter(2, where, _changed(flat.gather(2, where), four)).view_as(pixels)


def _changed(colours: Tensor, change: Tensor) -> Tensor:
    """Colours (N, 3, M) uint8 with as much more U, where they can have it.

    White cannot get bluer without getting darker, which would show: it keeps its colour.
    """
    gains = torch.tensor(U_OF_RGB, device=colours.device)[:, None]
    start = colours.float()
    moved = start + change * torch.tensor(RGB_OF_U, device=colours.device)[:, None]
    moved = moved.round().clamp(0, 255)
    gained = (gains * (moved - start)).sum(dim=1, keepdim=True)
    return torch.where((gained - change).abs() <= MARGIN / 2, moved, start).to(torch.uint8)
