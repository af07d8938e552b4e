"""LoRA in attention as cog-sdxl has it, from diffusers 0.25, which later versions lack."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

MATRICES = ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora")


def _lora_linear(n_in: int, n_out: int, rank: int) -> nn.Module:
    """Build a LoRALinearLayer."""
    down, up = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
    nn.init.normal_(down.weight, std=1 / rank)
    nn.init.zeros_(up.weight)
    return nn.Sequential(OrderedDict(down=down, up=up))


class LoraProcessor(nn.Module):
    """LoRAAttnProcessor2_0: LoRA beside the matrices of one attention module."""

    def __init__(self, attention: Any, rank: int, scale: float) -> None:  # noqa: ANN401
        super().__init__()
        self._scale = scale
        linear = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        for name, matrix in zip(MATRICES, linear, strict=True):
            setattr(self, name, _lora_linear(matrix.in_features, matrix.out_features, rank))

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def project(layer: Any, lora: Any, states: Tensor) -> Tensor:  # noqa: ANN401
            change: Tensor = lora(states.to(lora.down.weight.dtype)).to(states.dtype)
            projected: Tensor = layer(states) + self._scale * change
            return projected

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        query = heads(project(attn.to_q, self.to_q_lora, hidden_states))
        key = heads(project(attn.to_k, self.to_k_lora, context))
        value = heads(project(attn.to_v, self.to_v_lora, context))
        out = functional.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).flatten(-2).to(query.dtype)
        return attn.to_out[1](project(attn.to_out[0], self.to_out_lora, out))  # type: ignore[no-any-return]
