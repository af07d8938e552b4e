"""What engines go through in tests of their state, and how what they hold and make compares."""

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

from generation.base_models import MINIATURE_SDXL
from generation.engine import Engine
from generation.errors import OutOfDeviceMemory
from tests.requests import REQUEST

STEPS = 3
UNET = ("UNet2DConditionModel",)
EVERY_MODEL = (*UNET, "CLIPTextModel", "Encoder", "Decoder")


class Cancelled(BaseException):
    """As Cog raises it: no `except Exception` sees it."""


Error = Callable[[], BaseException]
# Kind → the error that happens, and the one that is reported.
ERRORS: dict[str, tuple[Error, type[BaseException]]] = {
    "failure": (lambda: RuntimeError("a kernel failed"), RuntimeError),
    "cancel": (Cancelled, Cancelled),
    "memory": (lambda: torch.OutOfMemoryError("full"), OutOfDeviceMemory),
}


def pictures(engine: Engine, sources: Path, **changes: object) -> list[np.ndarray]:
    """Of a request with these changes, (H, W, 3) each; images are given by their names."""
    images = {k: sources / f"{changes[k]}.png" for k in ("image", "mask") if k in changes}
    request = replace(REQUEST, **{"num_inference_steps": STEPS, **changes, **images})
    with tempfile.TemporaryDirectory() as folder:
        files = engine.generate(request, Path(folder)).files
        return [np.asarray(Image.open(file)).astype(int) for file in files]


def fingerprint(engine: Engine) -> dict[str, str]:
    """Part of a model → hash of all that it holds: parameters, buffers, settings, modes, words."""
    models = {
        "base": engine._store.load(MINIATURE_SDXL),
        "refiner": engine._store.load_refiner(MINIATURE_SDXL),
    }
    return {
        f"{model} {part}": _hash(content)
        for model, loaded in models.items()
        for part, content in [*loaded.parts.items(), ("scheduler", loaded.scheduler_config)]
    }


def _hash(part: object) -> str:
    if not isinstance(part, torch.nn.Module):
        plain = part if isinstance(part, dict | bool | None) else type(part).__name__
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
    """Raise what `make` makes when models of these classes run for the `count`-th time.

    Nothing here keeps the error: it goes with whoever has caught it.
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
    """Qualified names of the functions that the module's text defines → their instructions."""
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
    """The same before the `count`-th instruction that runs in a function of the module, or in any.

    Counted over all calls. A context manager's instructions are also those by which
    contextlib enters and leaves it. Yields a list that names, once it has happened, the function.
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
