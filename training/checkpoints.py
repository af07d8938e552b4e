"""Checkpoints that a training is resumed from, whenever it was stopped.

<folder>/step-000100/    has its name only once it is complete
  state.pt               parameters, optimizers
  state.json             step, history, and the fingerprint of the training
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

import torch

from training.dataset import CachedExample
from training.errors import DiskFull, WrongCheckpoint
from training.optimizers import ParameterGroup
from training.plan import TrainPlan
from training.progress import History
from weights.messages import disk_full_raises

_NAME = re.compile(r"step-(\d{6})")
# Settings that may differ when a training is resumed; archives count by their examples.
_NOT_IN_FINGERPRINT = {
    *("verbose", "checkpointing_steps", "preview_prompts", "preview_steps", "exchange_files"),
    *("input_images", "class_images", "input_images_filetype"),
}


@dataclass(frozen=True)
class TrainingState:
    """The tensors that a training changes, and the digest of all that decides its result."""

    groups: Sequence[ParameterGroup]
    optimizers: Sequence[torch.optim.Optimizer]
    fingerprint: str


def fingerprint(plan: TrainPlan, data: Sequence[CachedExample]) -> str:
    """Return a digest of the settings and examples that decide a training's result."""
    settings = dataclasses.asdict(plan)
    settings = {k: v for k, v in settings.items() if k not in _NOT_IN_FINGERPRINT}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for item in data:
        digest.update(item.caption.encode() + item.time_ids.numpy().tobytes())
        # Few digits, as kernels may round another way after a restart.
        digest.update(b"".join(str(v.mean.mean().item())[:5].encode() for v in item.views))
    return digest.hexdigest()


def save(folder: Path, step: int, state: TrainingState, history: History) -> Path:
    """Write a checkpoint, rename it once it is complete, and remove older ones.

    Raises DiskFull; the previous checkpoint stays then.
    """
    parameters = {
        group.name: {name: p.detach() for name, p in group.parameters.items()}
        for group in state.groups
    }
    optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
    content = {"step": step, "training": state.fingerprint, "history": history.to_json()}
    partial, final = folder / ".partial", folder / f"step-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_full_raises(lambda: _disk_full(folder, step)):
            partial.mkdir(parents=True)
            with (partial / "state.pt").open("wb") as file:
                torch.save({"parameters": parameters, "optimizers": optimizers}, file)
                file.flush()
                os.fsync(file.fileno())
            with (partial / "state.json").open("w", encoding="utf-8") as text:
                json.dump(content, text)
                text.flush()
                os.fsync(text.fileno())
    except BaseException:  # a cancellation too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older)
    return final


def _disk_full(folder: Path, step: int) -> DiskFull:
    return DiskFull(
        f"the checkpoint of step {step} does not fit into {folder}: the disk is full; free some"
        " room there and start the same training again, which resumes from its last checkpoint, or"
        " set TRAINING_CHECKPOINTS to a folder with more"
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Return all that are complete, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def resume(folder: Path, state: TrainingState) -> tuple[int, History]:
    """Load the newest checkpoint into `state`; return its step and history, 0 and none without one.

    Raises WrongCheckpoint if it is of other settings or examples.
    """
    found = _checkpoints(folder)
    if not found:
        return 0, History()
    content = json.loads((found[-1] / "state.json").read_text("utf-8"))
    if content["training"] != state.fingerprint:
        raise WrongCheckpoint(
            f"{found[-1]} belongs to a training with other settings, another seed or other images;"
            " remove the folder to start anew, or train with those settings"
        )
    saved = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for group in state.groups:
            for name, parameter in group.parameters.items():
                parameter.copy_(saved["parameters"][group.name][name])
    for optimizer, content_of in zip(state.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(content_of)
    return content["step"], History.from_json(content["history"])
