"""A loss recorded as CUDA graphs: models this small wait for nothing but launches."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]  # of the model and tensors


class Recorded:
    """A loss that is recorded at its first call with tensors of each shape, and then replayed.

    Elsewhere than on a CUDA GPU it is called as it is. It may not look at a tensor's values. What
    it gives lies where the next call writes.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._recordings: dict[object, Callable[..., Tensor]] = {}

    def __call__(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        """The loss of `model`, always the same one."""
        if tensors[0].device.type != "cuda":
            return self._loss(model, *tensors)
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._recordings:
            samples = tuple(tensor.clone() for tensor in tensors)
            module = _Module(self._loss, model)
            torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
            self._recordings[shapes] = module
        return self._recordings[shapes](*tensors)


class _Module(nn.Module):
    """The form in which PyTorch takes a pass."""

    def __init__(self, loss: Loss, model: nn.Module) -> None:
        super().__init__()
        self._loss = loss
        self.model = model

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._loss(self.model, *tensors)
