"""The events of a training, its history, and its progress bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.plan import TrainPlan

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Started:
    """The model and the examples are ready."""

    plan: TrainPlan
    n_examples: int  # without those held out
    step: int  # 0, or that of the checkpoint


@dataclass(frozen=True)
class StepDone:
    """One optimizer step."""

    step: int  # from 1
    loss: float
    prior_loss: float | None  # without its weight
    learning_rates: dict[str, float]  # of each group that is trained


@dataclass(frozen=True)
class TokensFrozen:
    """The pivot: from here on the token embeddings stay as they are."""

    step: int


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on the held-out examples, always with the same noise."""

    step: int
    loss: float


@dataclass(frozen=True)
class Previews:
    """Images of the preview prompts, always with the same seeds."""

    step: int
    prompts: tuple[str, ...]
    images: list[Image.Image]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint that the training can be resumed from."""

    step: int
    folder: Path


Event = Started | StepDone | TokensFrozen | HeldOutLoss | Previews | CheckpointSaved
OnEvent = Callable[[Event], None]


@dataclass
class History:
    """The course of a training in numbers, saved in each checkpoint."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    pivot_step: int | None = None

    def record(self, event: Event) -> None:
        """Add an event."""
        if isinstance(event, StepDone):
            self.steps.append(event.step)
            self.losses.append(event.loss)
        elif isinstance(event, HeldOutLoss):
            self.held_out.append((event.step, event.loss))
        elif isinstance(event, TokensFrozen):
            self.pivot_step = event.step

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> History:
        """Return the history that `to_json` was called on."""
        held_out = [(int(step), float(loss)) for step, loss in content["held_out"]]
        return cls(**{**content, "held_out": held_out})


class ProgressBar:
    """A progress bar on stderr, with the loss and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        from tqdm import tqdm

        if isinstance(event, Started):
            total = event.plan.max_train_steps
            self._bar = tqdm(total=total, initial=event.step, desc="Training", unit="step")
        elif isinstance(event, StepDone):
            self._bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
            self._bar.update()
        elif isinstance(event, HeldOutLoss):
            self._bar.write(f"step {event.step}: held-out loss {event.loss:.4f}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
