"""Failures that tests of isolation inject into an engine, and what of it they compare."""

import dis
import hashlib
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType, ModuleType

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedTokenizerBase

from generation.engine import Engine
from generation.errors import OutOfDeviceMemory
from models.components import ModelComponents
from tests.helpers.engines import base_model, refiner
from tests.helpers.request import REQUEST
from tests.miniature.pipeline_components import to_pipeline

STEPS = 3
UNET = ("UNet2DConditionModel",)
EVERY_MODEL = (*UNET, "CLIPTextModel", "Encoder", "Decoder")


class Cancelled(BaseException):
    """A cancellation as Cog raises it: `except Exception` does not catch it."""


Error = Callable[[], BaseException]
# Kind → the error that happens, and the one that is reported.
ERRORS: dict[str, tuple[Error, type[BaseException]]] = {
    "failure": (lambda: RuntimeError("a kernel failed"), RuntimeError),
    "cancel": (Cancelled, Cancelled),
    "memory": (lambda: torch.OutOfMemoryError("full"), OutOfDeviceMemory),
}


def images_of(engine: Engine, sources: Path, **changes: object) -> list[np.ndarray]:
    """Return the images (H, W, 3) of a request with these changes; its images are given by name."""
    inputs = {k: sources / f"{changes[k]}.png" for k in ("image", "mask") if k in changes}
    request = replace(REQUEST, **{"num_inference_steps": STEPS, **changes, **inputs})
    with tempfile.TemporaryDirectory() as folder:
        files = engine.generate(request, Path(folder)).files
        return [np.asarray(Image.open(file)).astype(int) for file in files]


def fingerprint(engine: Engine) -> dict[str, str]:
    """Return the hash of each component of SDXL and its refiner, by name.

    Of parameters, buffers, settings, modes and vocabularies.
    """
    return {
        f"{model} {part}": _hash(content)
        for model, loaded in (("base", base_model(engine)), ("refiner", refiner(engine)))
        for part, content in _contents(loaded.components).items()
    }


def _contents(components: ModelComponents) -> dict[str, object]:
    return {
        **to_pipeline(components),
        "scheduler": components.scheduler_config,
        "requires_aesthetics_score": components.requires_aesthetics_score,
    }


def _hash(part: object) -> str:
    if not isinstance(part, torch.nn.Module):
        plain = part
        if isinstance(part, PreTrainedTokenizerBase):
            plain = (sorted(part.get_vocab().items()), sorted(part.special_tokens_map.items()))
        return hashlib.sha256(repr(plain).encode()).hexdigest()
    config = part.config if isinstance(part.config, dict) else part.config.to_dict()
    # What begins with _ is about the files, in an order that differs between processes.
    public = sorted((key, str(value)) for key, value in config.items() if key[0] != "_")
    modes = [(module.training, getattr(module, "eos_token_id", None)) for module in part.modules()]
    digest = hashlib.sha256(repr((public, modes, part.dtype)).encode())
    for name, tensor in part.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def failing_at(count: int, models: tuple[str, ...], make: Error) -> Iterator[None]:
    """Raise `make()` when models of these classes run for the `count`-th time.

    Nothing here keeps a reference to the error.
    """
    calls = 0

    def hook(module: torch.nn.Module, _: object) -> None:
        nonlocal calls
        calls += type(module).__name__ in models
        if calls == count:
            raise make()

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def functions_of(module: ModuleType) -> dict[str, int]:
    """Return the number of instructions of a module's functions, by qualified name."""
    functions: dict[str, int] = {}

    def add(code: CodeType) -> None:
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                if inner.co_flags & inspect.CO_OPTIMIZED and ".<" not in inner.co_qualname:
                    functions[inner.co_qualname] = len(list(dis.get_instructions(inner)))
                add(inner)

    add(compile(Path(module.__file__).read_text(), module.__file__, "exec"))
    return functions


@contextmanager
def failing_in(
    module: ModuleType, function: str | None, count: int, make: Error
) -> Iterator[list[str]]:
    """Raise `make()` before the `count`-th instruction that a function of a module runs.

    Counted over all calls; None stands for any function. A context manager's instructions include
    those by which contextlib enters and leaves it. Yields a list, to which the name of the function
    is added once that has happened.
    """
    struck: list[str] = []
    run = 0

    def on_call(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        if not _belongs(frame, module, function):
            return None
        frame.f_trace_opcodes = True
        return on_instruction

    def on_instruction(frame: FrameType, event: str, _: object) -> Callable[..., object]:
        nonlocal run
        run += event == "opcode"
        if run == count and not struck:
            struck.append(frame.f_code.co_qualname)
            raise make()
        return on_instruction

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield struck
    finally:
        sys.settrace(before)


def _belongs(frame: FrameType, module: ModuleType, function: str | None) -> bool:
    code = frame.f_code
    if code.co_filename.endswith("contextlib.py"):
        code = getattr(getattr(frame.f_locals.get("self"), "gen", None), "gi_code", code)
    return code.co_filename == module.__file__ and function in (code.co_qualname, None)
