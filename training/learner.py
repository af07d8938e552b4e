"""What learns: the three methods as groups of parameters, and the loss they learn from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training import lora, losses
from training.base_models import Method
from training.config import Prior, TrainPlan
from training.cuda_graphs import Graphed, Pass
from training.dataset import Batch
from training.model import TrainableModel, compiled, training_mode
from training.optimizers import Group
from training.textual_inversion import NewWord, Reader, known, text_pass
from weights.formats.types import TEXT_ENCODERS, UNET, Pooling, TokenVectors, TrainedWeights
from weights.trigger_words import replace_trigger_words

LORA_DECAY, UNET_DECAY = 1e-4, 1e-2  # AdamW's weight decay
# Bytes of a GPU that holds the activations of four pictures of 1024x1024 pixels beside the rest; an
# estimate, not measured.
ENOUGH_MEMORY, ENOUGH_MEMORY_FULL = 70e9, 130e9
WORD_DECAY = 0.0  # the vectors' norms have a rule of their own


@dataclass(frozen=True)
class Learner:
    """A model with everything attached that one training needs."""

    model: TrainableModel
    plan: TrainPlan
    word: NewWord
    reader: Reader
    groups: list[Group]
    unet: Pass
    teacher: Pass | None  # method full: the UNet as it was

    def loss(self, batch: Batch) -> Tensor:
        """What the batch costs."""
        model, device = self.model, self.model.device
        latents, noise, timesteps = (
            t.to(device) for t in (batch.latents, batch.noise, batch.timesteps)
        )
        wanted = model.wanted(latents, noise, timesteps)
        predicted = self._predict(self.unet, batch, batch.captions)
        mask = batch.mask.to(device)
        error = losses.masked_error(predicted, wanted, mask, self.plan.mask_floor)
        return (error * self._weights(timesteps)).mean()

    def _weights(self, timesteps: Tensor) -> Tensor:
        model = self.model
        snr = losses.signal_to_noise(model.noising.alphas_cumprod, timesteps)
        return losses.snr_weights(snr, self.plan.snr_gamma, model.prediction_type)

    def teacher_loss(self, batch: Batch) -> Tensor:
        """How far the model has gone from what the base model answers for the class.

        The captions with the class in the new word's place; no pictures of the class are needed
        (ostris/ai-toolkit, diff_output_preservation).
        """
        words = {self.plan.token_string: self.plan.class_prompt}
        captions = [replace_trigger_words(caption, words) for caption in batch.captions]
        device = self.model.device
        with (
            torch.no_grad(),
            lora.switched_off(self.model.unet, *self.model.text_encoders.values()),
        ):
            wanted = self._predict(self.teacher or self.unet, batch, captions)
        predicted = self._predict(self.unet, batch, captions)
        error = losses.masked_error(predicted, wanted, torch.ones_like(batch.mask).to(device), 1.0)
        return (error * self._weights(batch.timesteps.to(device))).mean()

    def _predict(self, unet: Pass, batch: Batch, captions: list[str]) -> Tensor:
        device = self.model.device
        noisy = self.model.noising.add_noise(batch.latents, batch.noise, batch.timesteps)
        embeds, pooled = self.reader.read(captions)
        (predicted,) = unet(
            noisy.to(device, self.model.unet_dtype),
            batch.timesteps.to(device),
            embeds,
            pooled,
            batch.time_ids.to(device, embeds.dtype),
        )
        return predicted

    def result(self) -> TrainedWeights:
        """What has been learnt, on the CPU."""
        plan, modules = self.plan, self.model.modules()
        deltas = {}
        if plan.lora is not None:
            for part, module in modules.items():
                deltas.update(lora.deltas(module, part, plan.lora))
        parameters = {}
        if plan.method is Method.FULL:
            parameters = {
                f"{UNET}.{name}": p.detach().to("cpu", copy=True)
                for name, p in self.model.unet.named_parameters()
            }
        vectors = {part: v.detach().float().cpu().clone() for part, v in self.word.vectors.items()}
        return TrainedWeights(
            lora=deltas,
            parameters=parameters,
            checkpoint=False,
            embeddings=(TokenVectors(plan.placeholder_tokens, vectors),),
            trigger_words=plan.trigger_words,
            pooling=Pooling.EOS,
            description=f"trained here: {plan.method}, {plan.max_train_steps} steps",
        )


@contextmanager
def prepared(model: TrainableModel, plan: TrainPlan) -> Iterator[Learner]:
    """Attach what learns, and take it off again; method full leaves the UNet changed."""
    with ExitStack() as stack:
        word = NewWord(model, plan)
        stack.enter_context(known(word, model))
        words = {f"{part}.vectors": v for part, v in word.vectors.items()}
        groups = [Group("word", words, plan.ti_lr, WORD_DECAY, plan.pivot_step)]
        end = plan.max_train_steps
        teacher = None
        stack.enter_context(training_mode(model.unet, _recomputes(model, plan)))
        stack.enter_context(compiled(model, plan.compile_unet))
        if plan.lora is not None:
            attach = lora.attached(model.unet, plan.lora, lora.UNET_TARGETS, plan.seed)
            stack.enter_context(attach)
            learning = lora.parameters(model.unet)
            groups.append(Group("lora", learning, plan.lora_lr, LORA_DECAY, end))
            if plan.lora.text_encoder:
                groups.append(_text_encoder_group(stack, model, plan))
        elif plan.method is Method.FULL:
            if plan.prior is Prior.TEACHER:
                teacher = unet_pass(copy.deepcopy(model.unet).requires_grad_(False))
            model.unet.requires_grad_(True)
            stack.callback(model.unet.requires_grad_, False)
            learning = dict(model.unet.named_parameters())
            groups.append(Group("unet", learning, plan.unet_learning_rate, UNET_DECAY, end))
        unet, encode = unet_pass(model.unet), text_pass(model.text_encoders)
        if _replays(model, plan):
            # Each with its own parameters: what another pass has under way must not be touched.
            own = {group.name: list(group.parameters.values()) for group in groups}
            texts = own["word"] + own.get("text_encoders", [])
            unet = stack.enter_context(closing(Graphed(unet, own.get("lora", []))))
            encode = stack.enter_context(closing(Graphed(encode, texts)))
        reader = Reader(encode, word.tokenizers, plan.trigger_words, model.device)
        yield Learner(model, plan, word, reader, groups, unet, teacher)


def unet_pass(unet: nn.Module) -> Pass:
    """The UNet as a function of tensors: noisy latents, timesteps, embeddings, pooled, time ids."""

    def predict(
        noisy: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> tuple[Tensor]:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return (unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample,)

    return predict


def _replays(model: TrainableModel, plan: TrainPlan) -> bool:
    """Whether passes become CUDA graphs: where each forward pass is followed by its backward one.

    Not with method full, whose gradients would be in memory twice, nor where activations are
    recomputed, which asks the GPU for its random state.
    """
    return (
        model.device.type == "cuda"
        and plan.method is not Method.FULL
        and plan.prior is Prior.OFF
        and plan.gradient_accumulation_steps == 1
        and not _recomputes(model, plan)
    )


def _recomputes(model: TrainableModel, plan: TrainPlan) -> bool:
    """Whether to recompute activations: as asked, or where the GPU is too small to keep them."""
    if plan.gradient_checkpointing is not None:
        return plan.gradient_checkpointing
    if model.device.type != "cuda":
        return False
    enough = ENOUGH_MEMORY_FULL if plan.method is Method.FULL else ENOUGH_MEMORY
    return torch.cuda.get_device_properties(model.device).total_memory < enough


def _text_encoder_group(stack: ExitStack, model: TrainableModel, plan: TrainPlan) -> Group:
    assert plan.lora is not None
    learning = {}
    for number, part in enumerate(TEXT_ENCODERS):
        encoder = model.text_encoders[part]
        seed = (plan.seed + 1 + number) % 2**32
        stack.enter_context(lora.attached(encoder, plan.lora, lora.TEXT_TARGETS, seed))
        learning.update({f"{part}.{k}": p for k, p in lora.parameters(encoder).items()})
    return Group("text_encoders", learning, plan.text_encoder_lr, LORA_DECAY, plan.max_train_steps)
