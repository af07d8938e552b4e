"""Make LoRAs smaller: `python -m weights.miniature.trim_loras SHARE NAME...`.

Each module's update up @ down is decomposed (SVD), and of all singular values of a file the most
valuable for their size are kept: SHARE of the file's values. A module so keeps the rank that it
needs, and the files their format.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent


def trim(tensors: dict[str, Tensor], share: float) -> tuple[dict[str, Tensor], float]:
    """The smaller file, and the share of the update's energy that is lost."""
    names = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    parts, candidates = {}, []
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        scale = float(tensors[f"{name}.alpha"]) / len(down)
        update = scale * (up.float().flatten(1) @ down.float().flatten(1))
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        parts[name] = (left, values, right)
        cost = left.shape[0] + right.shape[1]
        rank = min(len(down), len(values))
        candidates += [(float(values[k] ** 2) / cost, name, k, cost) for k in range(rank)]
    total = sum(cost for *_, cost in candidates)
    ranks, spent = dict.fromkeys(names, 1), sum(cost for _, _, k, cost in candidates if k == 0)
    for _, name, k, cost in sorted(candidates, reverse=True):
        if k > 0 and spent + cost <= share * total:
            ranks[name] = max(ranks[name], k + 1)
            spent += cost
    smaller, lost, energy = {}, 0.0, 0.0
    for name in names:
        left, values, right = parts[name]
        rank = ranks[name]
        root = values[:rank].sqrt()
        shapes = [tensors[f"{name}.lora_{half}.weight"].shape[1:] for half in ("up", "down")]
        up = (left[:, :rank] * root).reshape(-1, rank, *shapes[0][1:])
        down = (root[:, None] * right[:rank]).reshape(rank, *shapes[1])
        smaller[f"{name}.lora_up.weight"] = up.half().contiguous()
        smaller[f"{name}.lora_down.weight"] = down.half().contiguous()
        smaller[f"{name}.alpha"] = torch.tensor(float(rank)).half()
        lost += float(values[rank:].square().sum())
        energy += float(values.square().sum())
    return smaller, lost / energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("share", type=float)
    parser.add_argument("names", nargs="+", help="folders of weights/miniature")
    arguments = parser.parse_args()
    for name in arguments.names:
        (file,) = (HERE / name).glob("*.safetensors")
        before = file.stat().st_size
        smaller, lost = trim(load_file(file), arguments.share)
        save_file(smaller, file)
        print(f"{name}: {before} to {file.stat().st_size} bytes, {lost:.2%} of the update lost")


if __name__ == "__main__":
    main()
