"""LoRA layers compute what PEFT's do."""

import pytest
import torch
from peft.tuners.lora import Linear

from tests.unit.test_training_config import plan as resolved
from training import lora, lora_layers
from training.config import LoraFormat
from training.lora_layers import MergedLinear

PLAN = resolved(lora_rank=3, lora_alpha=4.0)
TARGETS = ("to_q", "to_out")


class Small(torch.nn.Module):
    """One layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(6, 8, bias=False)
        self.to_out = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.to_out(torch.tanh(self.to_q(x)))


def outputs_and_gradients(x, plan=PLAN, dtype=torch.float32, autocast=False):
    """Return the layers' classes, the output and the gradients of a LoRA that is not zero."""
    torch.manual_seed(0)
    module = Small().to(dtype).requires_grad_(False)
    with lora.attached(module, plan, TARGETS, seed=1):
        kinds = {type(m) for m in module.modules() if isinstance(m, Linear)}
        g = torch.Generator().manual_seed(2)
        for name, parameter in lora.parameters(module).items():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=g)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(x)
        output.float().square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in lora.parameters(module).items()}
        with lora.disabled(module):
            off = module(x)
    assert torch.equal(off, module(x))
    return kinds, output.detach(), gradients


@pytest.fixture
def with_peft(monkeypatch):
    """Return the same function with PEFT's layers."""

    def with_peft(*arguments, **options):
        with monkeypatch.context() as context:
            context.setattr(lora_layers, "use", lambda config: None)
            return outputs_and_gradients(*arguments, **options)

    return with_peft


@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 7, 6)], ids=str)
def test_fp32_equals_peft_to_rounding(with_peft, shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    kinds, output, gradients = outputs_and_gradients(x)
    theirs, wanted, wanted_gradients = with_peft(x)
    assert (kinds, theirs) == ({MergedLinear}, {Linear})
    torch.testing.assert_close(output, wanted)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name])


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_keeps_updates_that_its_weights_would_lose(with_peft, autocast):
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
    _, output, gradients = outputs_and_gradients(x, dtype=torch.bfloat16, autocast=autocast)
    _, wanted, wanted_gradients = with_peft(x, dtype=torch.bfloat16, autocast=autocast)
    torch.testing.assert_close(output, wanted, rtol=0.02, atol=0.02)
    for name, gradient in gradients.items():
        error = (gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()
        assert error < 0.02, name


def test_dora_uses_pefts_layers():
    kinds, _, _ = outputs_and_gradients(
        torch.randn(2, 6),
        resolved(lora_rank=3, lora_alpha=4.0, use_dora=True, lora_format=LoraFormat.KOHYA),
    )
    assert kinds == {Linear}
