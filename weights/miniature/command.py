"""What every training script takes on its command line."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Recipe = TypeVar("Recipe", bound=DataclassInstance)

FLAGS = ("steps", "learning_rate", "pictures", "seed")


def parse(
    parser: argparse.ArgumentParser, recipe: "Recipe"
) -> tuple[argparse.Namespace, "Recipe", torch.device]:
    """The arguments, the recipe as they change it, and the device: CUDA where there is one."""
    for name in FLAGS:
        default = getattr(recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    changed = replace(recipe, **{name: getattr(arguments, name) for name in FLAGS})
    return arguments, changed, torch.device(arguments.device)
