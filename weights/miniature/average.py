"""Average two trained UNets: `python -m weights.miniature.average A B --out FOLDER`.

Of two ends of one training, the mean is steadier than either (model soups, arXiv:2203.05482).
"""

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel


@torch.no_grad()
def average(first: Path, second: Path, out: Path) -> None:
    """Write the mean of the UNets in two model folders into a third, as fp16 safetensors."""
    options = {"variant": "fp16", "dtype": torch.float32}
    mean, other = (
        UNet2DConditionModel.from_pretrained(folder / "unet", **options)
        for folder in (first, second)
    )
    for ours, theirs in zip(mean.parameters(), other.parameters(), strict=True):
        ours.lerp_(theirs, 0.5)
    mean.register_to_config(_name_or_path="")
    mean.half().save_pretrained(out / "unet", variant="fp16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs=2, help="trained model folders")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    first, second = arguments.folders
    average(first, second, arguments.out)


if __name__ == "__main__":
    main()
