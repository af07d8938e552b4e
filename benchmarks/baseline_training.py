"""The training loop of replicate/cog-sdxl (trainer_pti.py at c79cb3c), written again as a baseline.

What takes time or memory there is kept: LoRA as separate layers inside the attention processors,
both text encoders forwards and backwards in every step (after the pivot too), gradients and
optimizer state for the whole vocabularies, vectors pulled back twice a step, the loss fetched for
each step. One of its bugs is not: it trains here at the size that
it states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.baseline_lora import LoraProcessor
from models.tokens import tokenize
from training.dataset import CachedExample
from training.model import TrainableModel

TOKENS = ["<s0>", "<s1>"]
LORA_LR, TI_LR = 1e-4, 3e-4
LORA_DECAY, TI_DECAY = 1e-4, 1e-3
RETRACT_POWER = 0.1


@dataclass
class CogSdxlTraining:
    """One training."""

    model: TrainableModel
    items: Sequence[CachedExample]
    batch_size: int
    rank: int
    steps: int

    def run(self, on_step: Callable[[int, float], None]) -> None:
        """Train; `on_step` gets the number of each step, from 1, and its loss."""
        loader = self._loader()
        layers = self._attach()
        tables = [
            encoder.get_input_embeddings().weight.requires_grad_(True)
            for encoder in self.model.components.text_encoders.values()
        ]
        originals = [table.detach().clone() for table in tables]
        deviations = [table[: -len(TOKENS)].std() for table in originals]
        groups = [
            {"params": layers, "lr": LORA_LR, "weight_decay": LORA_DECAY},
            {"params": tables, "lr": TI_LR, "weight_decay": TI_DECAY},
        ]
        optimizer = torch.optim.AdamW(groups)
        step = 0
        while step < self.steps:
            for batch in loader:
                if step == self.steps // 2:
                    optimizer = torch.optim.AdamW(groups[:1])
                loss = self._loss(batch[:-2], *batch[-2:])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                self._retract(tables, originals, deviations)
                step += 1
                on_step(step, loss.item())
                if step == self.steps:
                    break

    def _loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches of both encoders' tokens, one frozen latent sample, and its mask."""
        components, device = self.model.components, self.model.device
        columns: list[Tensor] = []
        captions = [item.caption.replace("TOK", "".join(TOKENS)) for item in self.items]
        for part, tokenizer in components.tokenizers.items():
            tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
            components.text_encoders[part].resize_token_embeddings(len(tokenizer))
            columns.append(torch.cat([tokenize(tokenizer, text) for text in captions]).to(device))
        views = [item.views[0] for item in self.items]
        latents = [view.mean + view.std * torch.randn_like(view.std) for view in views]
        columns.append(torch.stack(latents) * self.model.noise.latent_scale)
        columns.append(torch.stack([view.mask.expand_as(view.mean) for view in views]))
        return DataLoader(TensorDataset(*columns), batch_size=self.batch_size, shuffle=True)

    def _attach(self) -> list[nn.Parameter]:
        unet = self.model.components.unet
        processors = {}
        for name in unet.attn_processors:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = LoraProcessor(attention, self.rank, 1.0).to(self.model.device)
        layers = [p for processor in processors.values() for p in processor.parameters()]
        unet.set_attn_processor(processors)  # which empties the dictionary
        return layers

    def _loss(self, tokens: Sequence[Tensor], latents: Tensor, mask: Tensor) -> Tensor:
        model, device = self.model, self.model.device
        states, pooled = [], None
        for ids, encoder in zip(tokens, model.components.text_encoders.values(), strict=True):
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        height, width = (8 * side for side in latents.shape[-2:])
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(latents))
        latents, mask = latents.to(device, model.unet_dtype), mask.to(device)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, model.noise.n_timesteps, (len(latents),), device=device)
        predicted = model.components.unet(
            model.noise_scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            torch.cat(states, dim=-1),
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": time_ids.to(device, model.unet_dtype),
            },
        ).sample
        target = model.target(latents, noise, timesteps)
        loss: Tensor = ((predicted - target).square() * mask).mean()
        return loss

    @torch.no_grad()
    def _retract(
        self, tables: list[Tensor], originals: list[Tensor], deviations: list[Tensor]
    ) -> None:
        new = slice(-len(TOKENS), None)
        for _ in range(2):  # a loop over both encoders around one that goes over both itself
            for table, original, deviation in zip(tables, originals, deviations, strict=True):
                table[: new.start] = original[: new.start]
                table[new] *= (deviation / table[new].std()) ** RETRACT_POWER
