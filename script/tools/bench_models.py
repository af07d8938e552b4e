"""Which model a benchmark measures."""

import argparse

MINIATURE, SDXL = "miniature", "sdxl"


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        choices=[MINIATURE, SDXL],
        default=MINIATURE,
        help="sdxl: its architecture with random weights, on a GPU",
    )


def check(model: str, parser: argparse.ArgumentParser) -> None:
    """End with an error where the model cannot be measured."""
    import torch

    if model == SDXL and not torch.cuda.is_available():
        parser.error("--model sdxl needs a CUDA GPU; leave it out to measure on the miniature")
