"""One training, from ready examples to trained weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from training import checkpoints, dataset, optimizers
from training.config import Prior, TrainConfig, TrainPlan, check_class_images, resolve
from training.dataset import Batch, Example, Latents
from training.errors import Diverged, InvalidTraining
from training.learner import Learner, prepared
from training.model import TrainableModel, uncompiled
from training.progress import (
    Bar,
    CheckpointSaved,
    Event,
    HeldOutLoss,
    History,
    OnEvent,
    Previews,
    Started,
    StepDone,
    WordFrozen,
)
from weights.formats.types import TrainedWeights
from weights.trigger_words import replace_trigger_words

HELD_OUT_NOISES = 8  # for each held-out example, over all noise levels
CHECKPOINTS = "checkpoints"  # in the work folder

# The live model's parts by component name, prompts as the text encoders read them, and seeds.
Paint = Callable[[Mapping[str, object], Sequence[str], Sequence[int]], list[Image.Image]]


@dataclass(frozen=True)
class Trained:
    """What a training has made, before it is written in anyone's format."""

    weights: TrainedWeights
    plan: TrainPlan
    history: History


@dataclass(frozen=True)
class _Data:
    """All examples as latents."""

    examples: list[Latents]
    held_out: list[Latents]
    class_images: list[Latents]


def fit(
    examples: Sequence[Example],
    class_images: Sequence[Example],
    config: TrainConfig,
    model: TrainableModel,
    workdir: Path,
    on_event: OnEvent,
    paint: Paint | None,
) -> Trained:
    """Train; goes on from a checkpoint in `workdir` if there is one.

    Every process of several calls this with the same arguments; only the first one tells events
    and writes. `class_images` are for prior_preservation class_images alone. With method full the
    model stays changed. Raises TrainingError.
    """
    plan = resolve(config, model.spec, len(examples))
    _check(examples, class_images, plan, paint)
    accelerator = Accelerator(
        cpu=model.device.type == "cpu",
        mixed_precision="bf16" if model.device.type == "cuda" else "no",
    )
    if plan.train_batch_size % accelerator.num_processes:
        raise InvalidTraining(
            f"train_batch_size is {plan.train_batch_size}, to be shared by"
            f" {accelerator.num_processes} processes; make it a multiple of them"
        )
    data = _encode(model, plan, examples, class_images)
    with prepared(model, plan) as learner, closing(Bar()) as bar:
        history = History()

        def tell(event: Event) -> None:
            history.record(event)
            if accelerator.is_main_process:
                if plan.verbose:
                    bar(event)
                on_event(event)

        _Training(accelerator, learner, data, workdir / CHECKPOINTS, history, tell, paint).run()
        return Trained(learner.result(), plan, history)


def _check(
    examples: Sequence[Example],
    class_images: Sequence[Example],
    plan: TrainPlan,
    paint: Paint | None,
) -> None:
    dataset.check_examples(examples, "example")
    dataset.check_examples(class_images, "class image")
    dataset.check_captions(dataset.split(examples, plan)[0], plan)
    check_class_images(bool(class_images), plan.prior)
    if plan.preview_prompts and paint is None:
        raise InvalidTraining("there are preview_prompts, but nothing that draws them; leave out")


def _encode(
    model: TrainableModel,
    plan: TrainPlan,
    examples: Sequence[Example],
    class_images: Sequence[Example],
) -> _Data:
    kept, held_out = dataset.split(examples, plan)
    described = [replace(e, caption=e.caption or plan.class_prompt) for e in class_images]
    return _Data(
        dataset.encode(model.vae, kept, plan.random_flip),
        dataset.encode(model.vae, held_out, False),
        dataset.encode(model.vae, described, plan.random_flip),
    )


@dataclass(frozen=True)
class _Training:
    """The loop, and what stays the same over its steps."""

    accelerator: Accelerator
    learner: Learner
    data: _Data
    checkpoints: Path
    history: History
    tell: OnEvent
    paint: Paint | None

    def run(self) -> None:
        """Exactly max_train_steps optimizer steps, less those that a checkpoint has done."""
        plan, groups = self.learner.plan, self.learner.groups
        device = self.learner.model.device
        movers = [optimizers.build(plan.optimizer, group, device) for group in groups]
        training = checkpoints.fingerprint(plan, self.data.examples)
        resumed = checkpoints.resume(self.checkpoints, groups, movers, training)
        first = resumed.step if resumed else 0
        if resumed:
            self.history.replace_by(resumed.history)
        self.tell(Started(plan, len(self.data.examples), first))
        batches = self._skip(self._orders(self.data.examples), first)
        priors = self._skip(self._orders(self.data.class_images), first)
        began = time.monotonic()
        for step in range(first, plan.max_train_steps):
            self._freeze(step)
            losses = self._accumulate(step, next(batches), next(priors))
            rates = self._move(step, movers)
            loss, prior = self._fetch(step, losses)
            seconds = (time.monotonic() - began) / (step + 1 - first)
            left = seconds * (plan.max_train_steps - step - 1)
            self.tell(StepDone(step + 1, loss, prior, rates, seconds, left))
            self._look(step + 1)
            if plan.checkpointing_steps and (step + 1) % plan.checkpointing_steps == 0:
                self._save(step + 1, movers, training)

    def _orders(self, data: list[Latents]) -> Iterator[list[list[int]]]:
        """For each step, its batches' examples."""
        plan = self.learner.plan
        if not data:
            while True:
                yield []
        order = dataset.Order([item.size for item in data], plan.train_batch_size, plan.seed)
        batches = order.batches()
        while True:
            yield [next(batches) for _ in range(plan.gradient_accumulation_steps)]

    def _skip(self, orders: Iterator[list[list[int]]], count: int) -> Iterator[list[list[int]]]:
        for _ in range(count):
            next(orders)
        return orders

    def _freeze(self, step: int) -> None:
        """Stop what has learnt enough; what captions mean is then computed once."""
        encoders_learn = False
        for group in self.learner.groups:
            learns = step < group.until
            encoders_learn |= learns and group.name in ("word", "text_encoders")
            for parameter in group.parameters.values():
                parameter.requires_grad_(learns)
        if step == self.learner.plan.pivot_step:
            self.tell(WordFrozen(step))
        if not encoders_learn:
            self.learner.reader.remember()

    def _accumulate(self, step: int, batches: list[list[int]], priors: list[list[int]]) -> Tensor:
        """Gradients of one step, the mean over its batches; the loss and the prior's, (2,)."""
        plan, learner = self.learner.plan, self.learner
        total = torch.zeros(2, device=learner.model.device)
        for k, indices in enumerate(batches):
            batch = self._draw(self.data.examples, indices, dataset.TRAINING, step, k)
            with self.accelerator.autocast():
                loss = own = learner.loss(batch)
                if plan.prior is not Prior.OFF:
                    if plan.prior is Prior.TEACHER:
                        prior = learner.teacher_loss(batch)
                    else:
                        kind = dataset.CLASS_IMAGES
                        seen = self._draw(self.data.class_images, priors[k], kind, step, k)
                        prior = learner.loss(seen)
                    loss = own + plan.prior_loss_weight * prior
                    total[1] += prior.detach() / len(batches)
            total[0] += own.detach() / len(batches)
            self.accelerator.backward(loss / len(batches))
        return total

    def _fetch(self, step: int, losses: Tensor) -> tuple[float, float | None]:
        """The step's losses as numbers. A GPU is waited for here, with all of its step queued."""
        plan = self.learner.plan
        own_mean, prior_mean = self.accelerator.reduce(losses, "mean").tolist()
        if not math.isfinite(own_mean + prior_mean):
            raise Diverged(
                f"the loss became {own_mean} in step {step + 1}; lower the learning rates, or use"
                " more warm-up steps"
            )
        return own_mean, None if plan.prior is Prior.OFF else prior_mean

    def _draw(
        self, data: list[Latents], indices: list[int], kind: int, step: int, number: int
    ) -> Batch:
        """This process's part of a step's batch `number`."""
        plan, share = self.learner.plan, len(indices) // self.accelerator.num_processes
        start = self.accelerator.process_index * share
        items = [data[i] for i in indices[start : start + share]]
        first = number * len(indices) + start
        n_places = len(indices) * plan.gradient_accumulation_steps
        places = range(first, first + share)
        return dataset.draw(items, kind, step, places, n_places, plan, self.learner.model.noise)

    def _move(self, step: int, movers: list[torch.optim.Optimizer]) -> dict[str, float]:
        """One optimizer step of each group that learns; the rates they had."""
        plan = self.learner.plan
        rates = {}
        for group, mover in zip(self.learner.groups, movers, strict=True):
            if step >= group.until:
                continue
            parameters = list(group.parameters.values())
            if self.accelerator.num_processes > 1:
                for parameter in parameters:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
            rates[group.name] = group.learning_rate * optimizers.rate_factor(plan, step)
            for own in mover.param_groups:
                own["lr"] = rates[group.name]
            mover.step()
            mover.zero_grad(set_to_none=True)
        self.learner.word.keep_norms()
        return rates

    def _look(self, step: int) -> None:
        """Measure and draw, where it is time to."""
        plan = self.learner.plan
        last = step == plan.max_train_steps
        if plan.validation_steps and (step % plan.validation_steps == 0 or last):
            with uncompiled():
                loss = self._held_out_loss()
            self.tell(HeldOutLoss(step, loss))
        due = plan.preview_steps is not None and step % plan.preview_steps == 0
        if plan.preview_prompts and (due or last) and self.accelerator.is_main_process:
            with uncompiled():
                images = self._paint()
            self.tell(Previews(step, plan.preview_prompts, images))

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """The same examples, noise and noise levels each time; every process computes all of it."""
        plan, noise = replace(self.learner.plan, caption_dropout=0.0), self.learner.model.noise
        places = range(HELD_OUT_NOISES)
        total = 0.0
        for number, item in enumerate(self.data.held_out):
            items = [item] * len(places)
            batch = dataset.draw(items, dataset.HELD_OUT, number, places, len(places), plan, noise)
            with self.accelerator.autocast():
                total += self.learner.loss(batch).item()
        return total / len(self.data.held_out)

    @torch.no_grad()
    def _paint(self) -> list[Image.Image]:
        assert self.paint is not None
        model, plan = self.learner.model, self.learner.plan
        tokenizers = self.learner.word.tokenizers
        parts = {
            "unet": model.unet,
            "vae": model.vae,
            **model.text_encoders,
            "tokenizer": tokenizers["text_encoder"],
            "tokenizer_2": tokenizers["text_encoder_2"],
            "scheduler_config": model.scheduler_config,
        }
        prompts = [replace_trigger_words(p, plan.trigger_words) for p in plan.preview_prompts]
        seeds = range(len(prompts))
        with self.accelerator.autocast():
            return self.paint(parts, prompts, seeds)

    def _save(self, step: int, movers: list[torch.optim.Optimizer], training: str) -> None:
        if self.accelerator.is_main_process:
            folder = checkpoints.save(
                self.checkpoints, step, self.learner.groups, movers, self.history, training
            )
            self.tell(CheckpointSaved(step, folder))
        self.accelerator.wait_for_everyone()
