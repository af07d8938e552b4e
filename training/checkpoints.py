"""Where a training can go on after it was stopped, whenever that happens.

<folder>/step-000100/    has its name only once it is complete
  state.pt               parameters, optimizers
  state.json             step, history, and which training it belongs to
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import TrainPlan
from training.dataset import Latents
from training.errors import DiskFull, WrongCheckpoint
from training.optimizers import Group
from training.progress import History
from weights.messages import disk_full_raises

_NAME = re.compile(r"step-(\d{6})")
# Settings that may change between two parts of one training.
_FREE = {"verbose", "checkpointing_steps", "preview_prompts", "preview_steps", "exchange_files"}


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on."""

    step: int
    history: History


def fingerprint(plan: TrainPlan, data: Sequence[Latents]) -> str:
    """A digest of all that decides a training's result: its settings and its examples."""
    settings = {k: v for k, v in dataclasses.asdict(plan).items() if k not in _FREE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for item in data:
        digest.update(item.caption.encode() + item.time_ids.numpy().tobytes())
        # Not every bit: another kernel rounds another way.
        digest.update(b"".join(str(v.mean.mean().item())[:5].encode() for v in item.views))
    return digest.hexdigest()


def save(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    optimizers: Sequence[torch.optim.Optimizer],
    history: History,
    training: str,
) -> Path:
    """Write a checkpoint aside, give it its name, remove older ones. `training`: fingerprint.

    Raises DiskFull; the checkpoint before it stays then.
    """
    tensors = {
        "parameters": {g.name: {k: p.detach() for k, p in g.parameters.items()} for g in groups},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    state = {"step": step, "training": training, "history": history.to_json()}
    aside, final = folder / ".partial", folder / f"step-{step:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with disk_full_raises(lambda: _disk_full(folder, step)):
            aside.mkdir(parents=True)
            with (aside / "state.pt").open("wb") as file:
                torch.save(tensors, file)
                _to_disk(file)
            with (aside / "state.json").open("w", encoding="utf-8") as text:
                json.dump(state, text)
                _to_disk(text)
    except BaseException:  # a cancelled one too
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for older in _all(folder)[:-1]:
        shutil.rmtree(older)
    return final


def _disk_full(folder: Path, step: int) -> DiskFull:
    return DiskFull(
        f"the checkpoint of step {step} does not fit into {folder}: the disk is full; free some"
        " room there and start the same training again, which goes on from its last checkpoint, or"
        " set TRAINING_CHECKPOINTS to a folder with more"
    )


def _to_disk(file: Any) -> None:  # noqa: ANN401
    file.flush()
    os.fsync(file.fileno())


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def resume(
    folder: Path,
    groups: Sequence[Group],
    optimizers: Sequence[torch.optim.Optimizer],
    training: str,
) -> Resumed | None:
    """Take over the newest checkpoint's state; None if there is none.

    Raises WrongCheckpoint for one of other settings or examples.
    """
    found = _all(folder)
    if not found:
        return None
    content = json.loads((found[-1] / "state.json").read_text("utf-8"))
    if content["training"] != training:
        raise WrongCheckpoint(
            f"{found[-1]} belongs to a training with other settings, another seed or other"
            " pictures; remove the folder to begin anew, or train with what it was begun with"
        )
    state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for group in groups:
            for name, parameter in group.parameters.items():
                parameter.copy_(state["parameters"][group.name][name])
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    return Resumed(content["step"], History.from_json(content["history"]))
