"""LoRA layers of PEFT on a model, and their weights as deltas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from training.plan import TrainPlan
from weights.formats.types import LoraDelta

# Attention, as cog-sdxl trains it, so that its format has room for all of it.
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
_ADAPTER = "default"


@contextmanager
def attached(
    module: nn.Module, plan: TrainPlan, targets: tuple[str, ...], seed: int
) -> Iterator[None]:
    """Add LoRA layers in fp32 to the module's `targets`, at first without effect."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    from training import lora_layers

    config = LoraConfig(
        r=plan.lora_rank,
        lora_alpha=plan.lora_alpha,  # type: ignore[arg-type]
        use_rslora=plan.use_rslora,
        use_dora=plan.use_dora,
        target_modules=list(targets),
        init_lora_weights="gaussian",  # down ~ N(0, 1 / rank²), up = 0, as diffusers does
    )
    if not plan.use_dora:
        lora_layers.use(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, module, _ADAPTER)
        for parameter in parameters(module).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        yield
    finally:
        recurse_remove_peft_layers(module)
        if hasattr(module, "peft_config"):  # by which diffusers and transformers list adapters
            del module.peft_config


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA layers' parameters, by name."""
    return {name: p for name, p in module.named_parameters() if ".lora_" in name}


@contextmanager
def disabled(*modules: nn.Module) -> Iterator[None]:
    """Run the modules without their LoRA layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with ExitStack() as stack:
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    stack.callback(layer.enable_adapters, True)
                    layer.enable_adapters(False)
        yield


def deltas(module: nn.Module, component: str, plan: TrainPlan) -> dict[str, LoraDelta]:
    """Return the LoRA layers' weights on the CPU: "<component>.<path>" → delta."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        inner: Any = layer
        down, up = (
            matrices[_ADAPTER].weight.detach().float().cpu().clone()
            for matrices in (inner.lora_A, inner.lora_B)
        )
        magnitude = None
        if plan.use_dora:
            magnitude = inner.lora_magnitude_vector[_ADAPTER].weight.detach().float().cpu()
            magnitude = magnitude.reshape(-1, 1).clone()
        alpha = plan.lora_scaling * plan.lora_rank  # a LoraDelta is scaled by alpha / rank
        found[f"{component}.{path}"] = LoraDelta(down, up, alpha, magnitude)
    return found
