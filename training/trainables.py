"""What a method trains, attached to the base model, and the losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.components import UNET
from training import lora
from training.config import Method, Prior
from training.cuda_graphs import ForwardPass, GraphedCallable
from training.dataset import Batch
from training.losses import masked_mse, min_snr_weights
from training.model import TrainableModel, compile_unet, training_mode
from training.optimizers import ParameterGroup
from training.plan import TrainPlan
from training.tokens import CaptionEncoder, PlaceholderTokens, install_tokens, text_forward
from weights.formats.types import Pooling, TokenVectors, TrainedWeights
from weights.trigger_words import replace_trigger_words

LORA_DECAY, UNET_DECAY = 1e-4, 1e-2  # AdamW's weight decay
TOKEN_DECAY = 0.0  # the embeddings' norms are clamped instead
# Bytes of GPU memory that hold the activations of four images of 1024x1024 pixels beside the rest;
# an estimate, not measured.
ENOUGH_MEMORY, ENOUGH_MEMORY_FULL = 70e9, 130e9


@dataclass(frozen=True)
class Trainables:
    """A model with the parameters that a training trains."""

    model: TrainableModel
    plan: TrainPlan
    tokens: PlaceholderTokens
    captions: CaptionEncoder
    groups: list[ParameterGroup]
    unet: ForwardPass
    teacher: ForwardPass | None  # method full: the base model's UNet

    def loss(self, batch: Batch) -> Tensor:
        """Return the masked, SNR-weighted denoising loss of the batch (scalar)."""
        target = self.model.target(batch.latents, batch.noise, batch.timesteps)
        predicted = self._predict(self.unet, batch, batch.captions)
        target, mask = target.to(self.model.device), batch.mask.to(self.model.device)
        return self._weighted(batch, masked_mse(predicted, target, mask, self.plan.mask_floor))

    def teacher_loss(self, batch: Batch) -> Tensor:
        """Return the loss against the base model's predictions for class_prompt (scalar).

        The captions have the class in place of the trigger word; no images of the class are needed
        (ostris/ai-toolkit, diff_output_preservation).
        """
        words = {self.plan.token_string: self.plan.class_prompt}
        captions = [replace_trigger_words(caption, words) for caption in batch.captions]
        parts = self.model.components
        with torch.no_grad(), lora.disabled(parts.unet, *parts.text_encoders.values()):
            target = self._predict(self.teacher or self.unet, batch, captions)
        predicted = self._predict(self.unet, batch, captions)
        everything = torch.ones_like(batch.mask).to(self.model.device)
        return self._weighted(batch, masked_mse(predicted, target, everything, 1.0))

    def _weighted(self, batch: Batch, error: Tensor) -> Tensor:
        weights = min_snr_weights(self.model.noise_scheduler, batch.timesteps, self.plan.snr_gamma)
        return (error * weights.to(error.device)).mean()

    def _predict(self, unet: ForwardPass, batch: Batch, captions: list[str]) -> Tensor:
        device = self.model.device
        noisy = self.model.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        embeds, pooled = self.captions.encode(captions)
        (predicted,) = unet(
            noisy.to(device, self.model.unet_dtype),
            batch.timesteps.to(device),
            embeds,
            pooled,
            batch.time_ids.to(device, embeds.dtype),
        )
        return predicted

    def result(self) -> TrainedWeights:
        """Return a copy of the trained weights on the CPU."""
        plan, components = self.plan, self.model.components
        deltas = {}
        if plan.method is Method.LORA:
            for name, module in components.adaptable().items():
                deltas.update(lora.deltas(module, name, plan))
        parameters = {}
        if plan.method is Method.FULL:
            parameters = {
                f"{UNET}.{name}": p.detach().to("cpu", copy=True)
                for name, p in components.unet.named_parameters()
            }
        embeddings = {
            name: rows.detach().float().cpu().clone()
            for name, rows in self.tokens.embeddings.items()
        }
        return TrainedWeights(
            lora=deltas,
            parameters=parameters,
            checkpoint=False,
            embeddings=(TokenVectors(plan.placeholder_tokens, embeddings),),
            trigger_words=plan.trigger_words,
            pooling=Pooling.EOS,
            description=f"trained here: {plan.method}, {plan.max_train_steps} steps",
        )


@contextmanager
def attach_trainables(model: TrainableModel, plan: TrainPlan) -> Iterator[Trainables]:
    """Attach what is trained, and detach it on exit; method full leaves the UNet changed."""
    with ExitStack() as stack:
        tokens = PlaceholderTokens(model, plan)
        stack.enter_context(install_tokens(tokens, model))
        rows = {f"{name}.rows": rows for name, rows in tokens.embeddings.items()}
        groups = [ParameterGroup("tokens", rows, plan.ti_lr, TOKEN_DECAY, plan.pivot_step)]
        unet, encoders = model.components.unet, model.components.text_encoders
        stack.enter_context(training_mode(unet, _gradient_checkpointing(model, plan)))
        predict = unet_forward(compile_unet(model) if plan.compile_unet else unet)
        encode = text_forward(encoders)
        teacher = None
        if plan.method is Method.LORA:
            groups += _attach_lora(stack, model, plan)
        elif plan.method is Method.FULL:
            if plan.prior_preservation is Prior.TEACHER:
                teacher = unet_forward(copy.deepcopy(unet).requires_grad_(False))
            stack.callback(unet.requires_grad_, False)
            trained = dict(unet.requires_grad_(True).named_parameters())
            rate, end = plan.unet_learning_rate, plan.max_train_steps
            groups.append(ParameterGroup("unet", trained, rate, UNET_DECAY, end))
        if _uses_cuda_graphs(model, plan):
            # Each graph with its own parameters: it must not touch gradients of the other one's.
            of = {group.name: list(group.parameters.values()) for group in groups}
            texts = of["tokens"] + of.get("text_encoders", [])
            predict = stack.enter_context(closing(GraphedCallable(predict, of.get("lora", []))))
            encode = stack.enter_context(closing(GraphedCallable(encode, texts)))
        captions = CaptionEncoder(encode, tokens.tokenizers, plan.trigger_words, model.device)
        yield Trainables(model, plan, tokens, captions, groups, predict, teacher)


def unet_forward(unet: nn.Module) -> ForwardPass:
    """Return the UNet as a function of noisy latents, timesteps, embeddings, pooled, time ids."""

    def predict(
        noisy: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> tuple[Tensor]:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return (unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample,)

    return predict


def _attach_lora(stack: ExitStack, model: TrainableModel, plan: TrainPlan) -> list[ParameterGroup]:
    unet, end = model.components.unet, plan.max_train_steps
    stack.enter_context(lora.attached(unet, plan, lora.UNET_TARGETS, plan.seed))
    groups = [ParameterGroup("lora", lora.parameters(unet), plan.lora_lr, LORA_DECAY, end)]
    if plan.train_text_encoder:
        trained = {}
        for number, (name, encoder) in enumerate(model.components.text_encoders.items(), 1):
            seed = (plan.seed + number) % 2**32
            stack.enter_context(lora.attached(encoder, plan, lora.TEXT_TARGETS, seed))
            trained.update({f"{name}.{k}": p for k, p in lora.parameters(encoder).items()})
        rate = plan.text_encoder_lr
        groups.append(ParameterGroup("text_encoders", trained, rate, LORA_DECAY, end))
    return groups


def _uses_cuda_graphs(model: TrainableModel, plan: TrainPlan) -> bool:
    """Whether to capture CUDA graphs: where a backward pass follows each forward pass.

    Not with method full, whose gradients would be in memory twice, nor with gradient checkpointing,
    which reads the GPU's random state.
    """
    return (
        model.device.type == "cuda"
        and plan.method is not Method.FULL
        and plan.prior_preservation is Prior.OFF
        and plan.gradient_accumulation_steps == 1
        and not _gradient_checkpointing(model, plan)
    )


def _gradient_checkpointing(model: TrainableModel, plan: TrainPlan) -> bool:
    """Whether to recompute activations: as set, or where the GPU is too small to keep them."""
    if plan.gradient_checkpointing is not None:
        return plan.gradient_checkpointing
    if model.device.type != "cuda":
        return False
    enough = ENOUGH_MEMORY_FULL if plan.method is Method.FULL else ENOUGH_MEMORY
    return torch.cuda.get_device_properties(model.device).total_memory < enough
