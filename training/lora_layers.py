"""LoRA on a linear layer, in fewer and larger operations than PEFT's forward pass."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear, LoraConfig
from torch import Tensor, nn
from torch.nn import functional


class MergedLinear(Linear):
    """PEFT's layer with a single adapter, without dropout and without variants such as DoRA.

    A weight in fp32 gets the update added to it before one product: thin matrices are slow on a
    CPU. A weight of lower precision would round the update away: then the two thin products are
    computed, and the second one is added to the output in the same operation.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Map (..., n_in) to (..., n_out)."""
        base = cast("nn.Linear", self.base_layer)
        if self.disable_adapters:
            return cast("Tensor", base(x, *args, **kwargs))
        (name,) = self.active_adapters
        down, up = (cast("nn.Linear", m[name]).weight for m in (self.lora_A, self.lora_B))
        scaling = self.scaling[name]
        if base.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            weight = torch.addmm(base.weight, up, down, alpha=scaling)
            return functional.linear(x, weight, base.bias)
        output = base(x, *args, **kwargs)
        thin = functional.linear(x, down.to(x.dtype))
        change = torch.addmm(
            output.flatten(0, -2), thin.flatten(0, -2), up.to(x.dtype).T, alpha=scaling
        )
        return change.view_as(output)


def use(config: LoraConfig) -> None:
    """Let `inject_adapter_in_model` build these layers.

    The method's name is private, but PEFT documents it as the way to do so (huggingface/peft,
    docs/source/developer_guides/custom_models.md, "Experimental support for dynamic dispatch").
    """
    config._register_custom_module({nn.Linear: MergedLinear})
