"""What a training tells while it runs, and what it remembers of itself."""

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
    n_examples: int  # that are learnt from; the held-out ones are not counted
    step: int  # 0, or where a checkpoint goes on


@dataclass(frozen=True)
class StepDone:
    """One optimizer step."""

    step: int  # from 1
    loss: float
    prior_loss: float | None  # as it was added to the loss, without its weight
    learning_rates: dict[str, float]  # of each group that learns
    seconds_per_step: float
    seconds_left: float


@dataclass(frozen=True)
class WordFrozen:
    """The pivot: from here on the new word's vectors stay as they are."""

    step: int


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on examples that are not learnt from, always with the same noise."""

    step: int
    loss: float


@dataclass(frozen=True)
class Previews:
    """Pictures of the preview prompts, always with the same seeds."""

    step: int
    prompts: tuple[str, ...]
    images: list[Image.Image]


@dataclass(frozen=True)
class CheckpointSaved:
    """From here the training can go on after a stop."""

    step: int
    folder: Path


Event = Started | StepDone | WordFrozen | HeldOutLoss | Previews | CheckpointSaved
OnEvent = Callable[[Event], None]


@dataclass
class History:
    """A training's course in numbers; as JSON a part of each checkpoint."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    prior_losses: list[float | None] = field(default_factory=list)
    learning_rates: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # that each step took
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    pivot_step: int | None = None

    def record(self, event: Event) -> None:
        """Remember what an event says."""
        if isinstance(event, StepDone):
            self.steps.append(event.step)
            self.losses.append(event.loss)
            self.prior_losses.append(event.prior_loss)
            self.learning_rates.append(event.learning_rates)
            self.seconds.append(event.seconds_per_step)
        elif isinstance(event, HeldOutLoss):
            self.held_out.append((event.step, event.loss))
        elif isinstance(event, WordFrozen):
            self.pivot_step = event.step

    def replace_by(self, other: History) -> None:
        """Become what a checkpoint remembers."""
        vars(self).update(vars(other))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> History:
        """The reverse."""
        held_out = [(int(step), float(loss)) for step, loss in content["held_out"]]
        return cls(**{**content, "held_out": held_out})


class Bar:
    """A progress bar on stderr, with the loss and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        from tqdm import tqdm

        if isinstance(event, Started):
            total = event.plan.max_train_steps
            self._bar = tqdm(total=total, initial=event.step, desc="Training", unit="step")
        elif isinstance(event, StepDone) and self._bar is not None:
            self._bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
            self._bar.update()
        elif isinstance(event, HeldOutLoss) and self._bar is not None:
            self._bar.write(f"step {event.step}: held-out loss {event.loss:.4f}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
