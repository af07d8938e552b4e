"""The training loop: from examples to trained weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from training import checkpoints, dataset
from training.checkpoints import TrainingState
from training.config import Prior, TrainConfig
from training.dataset import Batch, CachedExample, Example
from training.errors import Diverged, InvalidTraining
from training.model import TrainableModel, without_compiling
from training.optimizers import build_lr_scheduler, build_optimizer
from training.plan import TrainPlan, check_class_images, resolve
from training.previews import GeneratePreviews, generate_previews
from training.progress import (
    CheckpointSaved,
    Event,
    HeldOutLoss,
    History,
    OnEvent,
    Previews,
    ProgressBar,
    Started,
    StepDone,
    TokensFrozen,
)
from training.trainables import Trainables, attach_trainables
from weights.formats.types import TrainedWeights
from weights.trigger_words import replace_trigger_words

HELD_OUT_NOISES = 8  # for each held-out example, over all noise levels
CHECKPOINTS = "checkpoints"  # in the work folder


@dataclass(frozen=True)
class Trained:
    """The result of a training, in no file format yet."""

    weights: TrainedWeights
    plan: TrainPlan
    history: History


@dataclass(frozen=True)
class _Data:
    examples: list[CachedExample]
    held_out: list[CachedExample]
    class_images: list[CachedExample]


def fit(
    examples: Sequence[Example],
    class_images: Sequence[Example],
    config: TrainConfig,
    model: TrainableModel,
    workdir: Path,
    on_event: OnEvent,
    generate: GeneratePreviews = generate_previews,
) -> Trained:
    """Train, resuming from a checkpoint in `workdir` if there is one.

    All processes of a distributed training call this with the same arguments; only the first one
    calls `on_event` and writes. `class_images` are for prior_preservation class_images alone.
    Method full changes the model's UNet. Raises a TrainingError.
    """
    plan = resolve(config, model.spec, len(examples))
    kept, held_out = dataset.split(examples, plan)
    dataset.check_captions(kept, plan)
    check_class_images(bool(class_images), plan.prior_preservation)
    accelerator = Accelerator(
        cpu=model.device.type == "cpu",
        mixed_precision="bf16" if model.device.type == "cuda" else "no",
    )
    if plan.train_batch_size % accelerator.num_processes:
        raise InvalidTraining(
            f"train_batch_size is {plan.train_batch_size}, to be shared by"
            f" {accelerator.num_processes} processes; make it a multiple of them"
        )
    vae = model.components.vae
    captioned = [replace(e, caption=e.caption or plan.class_prompt) for e in class_images]
    data = _Data(
        dataset.encode(vae, kept, plan.random_flip),
        dataset.encode(vae, held_out, False),
        dataset.encode(vae, captioned, plan.random_flip),
    )
    with attach_trainables(model, plan) as trainables, closing(ProgressBar()) as bar:

        def report(event: Event) -> None:
            if accelerator.is_main_process:
                if plan.verbose:
                    bar(event)
                on_event(event)

        training = _Training(accelerator, trainables, data, workdir / CHECKPOINTS, report, generate)
        history = training.run()
        return Trained(trainables.result(), plan, history)


@dataclass(frozen=True)
class _Training:
    """The loop, and what is the same in all of its steps."""

    accelerator: Accelerator
    trainables: Trainables
    data: _Data
    checkpoints: Path
    report: OnEvent
    generate: GeneratePreviews

    def run(self) -> History:
        """Run exactly max_train_steps optimizer steps, less those of a checkpoint."""
        plan, groups = self.trainables.plan, self.trainables.groups
        device = self.trainables.model.device
        optimizers = [build_optimizer(plan.optimizer, group, device) for group in groups]
        state = TrainingState(groups, optimizers, checkpoints.fingerprint(plan, self.data.examples))
        first, history = checkpoints.resume(self.checkpoints, state)
        lr_schedulers = [
            build_lr_scheduler(plan, group.learning_rate, optimizer, first)
            for group, optimizer in zip(groups, optimizers, strict=True)
        ]

        def report(event: Event) -> None:
            history.record(event)
            self.report(event)

        report(Started(plan, len(self.data.examples), first))
        batches = self._batches(self.data.examples, dataset.TRAINING, first)
        class_batches = self._batches(self.data.class_images, dataset.CLASS_IMAGES, first)
        for step in range(first, plan.max_train_steps):
            if step == plan.pivot_step:
                report(TokensFrozen(step))
            self._freeze_parameters(step)
            losses = self._backward(next(batches), next(class_batches))
            rates = self._optimizer_step(step, lr_schedulers)
            loss, prior_loss = self._losses_to_host(step, losses)
            report(StepDone(step + 1, loss, prior_loss, rates))
            for event in self._validate_and_preview(step + 1):
                report(event)
            if plan.checkpointing_steps and (step + 1) % plan.checkpointing_steps == 0:
                if self.accelerator.is_main_process:
                    folder = checkpoints.save(self.checkpoints, step + 1, state, history)
                    report(CheckpointSaved(step + 1, folder))
                self.accelerator.wait_for_everyone()
        return history

    def _batches(
        self, items: list[CachedExample], kind: int, first_step: int
    ) -> Iterator[list[Batch]]:
        process, n_processes = self.accelerator.process_index, self.accelerator.num_processes
        plan, noise = self.trainables.plan, self.trainables.model.noise
        return dataset.step_batches(items, kind, first_step, plan, noise, process, n_processes)

    def _freeze_parameters(self, step: int) -> None:
        """Freeze the groups that have ended; captions are encoded once when no encoder learns."""
        for group in self.trainables.groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(step < group.end)
        encoders = [g for g in self.trainables.groups if g.name in ("tokens", "text_encoders")]
        if all(step >= group.end for group in encoders):
            self.trainables.captions.freeze()

    def _backward(self, batches: list[Batch], class_batches: list[Batch]) -> Tensor:
        """Add up the gradients of a step's batches; return its mean loss and prior loss (2,)."""
        plan, trainables = self.trainables.plan, self.trainables
        total = torch.zeros(2, device=trainables.model.device)
        for k, batch in enumerate(batches):
            with self.accelerator.autocast():
                loss = denoising_loss = trainables.loss(batch)
                if plan.prior_preservation is not Prior.OFF:
                    if plan.prior_preservation is Prior.TEACHER:
                        prior_loss = trainables.teacher_loss(batch)
                    else:
                        prior_loss = trainables.loss(class_batches[k])
                    loss = denoising_loss + plan.prior_loss_weight * prior_loss
                    total[1] += prior_loss.detach() / len(batches)
            total[0] += denoising_loss.detach() / len(batches)
            self.accelerator.backward(loss / len(batches))
        return total

    def _optimizer_step(self, step: int, lr_schedulers: list[LambdaLR]) -> dict[str, float]:
        """Update each group that is trained; return the learning rates used."""
        plan = self.trainables.plan
        rates = {}
        for group, lr_scheduler in zip(self.trainables.groups, lr_schedulers, strict=True):
            if step >= group.end:
                continue
            parameters = list(group.parameters.values())
            if self.accelerator.num_processes > 1:
                for parameter in parameters:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
            rates[group.name] = float(lr_scheduler.get_last_lr()[0])
            lr_scheduler.optimizer.step()
            lr_scheduler.optimizer.zero_grad(set_to_none=True)
            lr_scheduler.step()
        self.trainables.tokens.clamp_norms()
        return rates

    def _losses_to_host(self, step: int, losses: Tensor) -> tuple[float, float | None]:
        """Return loss and prior loss as numbers, when the whole step is queued on the GPU."""
        loss, prior_loss = self.accelerator.reduce(losses, "mean").tolist()
        if not math.isfinite(loss + prior_loss):
            raise Diverged(
                f"the loss became {loss} in step {step + 1}; lower the learning rates, or use more"
                " warm-up steps"
            )
        return (
            loss,
            prior_loss if self.trainables.plan.prior_preservation is not Prior.OFF else None,
        )

    def _validate_and_preview(self, step: int) -> Iterator[HeldOutLoss | Previews]:
        """Yield the held-out loss and previews that are due after `step` steps."""
        plan = self.trainables.plan
        last = step == plan.max_train_steps
        if plan.validation_steps and (step % plan.validation_steps == 0 or last):
            yield HeldOutLoss(step, self._held_out_loss())
        due = last or (plan.preview_steps is not None and step % plan.preview_steps == 0)
        if plan.preview_prompts and due and self.accelerator.is_main_process:
            yield Previews(step, plan.preview_prompts, self._previews())

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Return the mean loss over the same examples, noise and timesteps each time.

        Every process computes all of it.
        """
        plan, model = replace(self.trainables.plan, caption_dropout=0.0), self.trainables.model
        total = 0.0
        for number, item in enumerate(self.data.held_out):
            items, slots = [item] * HELD_OUT_NOISES, range(HELD_OUT_NOISES)
            batch = dataset.sample_batch(
                items, dataset.HELD_OUT, number, slots, len(slots), plan, model.noise
            )
            with without_compiling(), self.accelerator.autocast():
                total += self.trainables.loss(batch).item()
        return total / len(self.data.held_out)

    @torch.no_grad()
    def _previews(self) -> list[Image.Image]:
        plan = self.trainables.plan
        components = replace(
            self.trainables.model.components, tokenizers=self.trainables.tokens.tokenizers
        )
        prompts = [replace_trigger_words(p, plan.trigger_words) for p in plan.preview_prompts]
        with without_compiling(), self.accelerator.autocast():
            return self.generate(components, prompts)
