"""Trained weights of every kind for the miniature, and requests that use them.

`python -m tests.miniature.request_pool FOLDER` generates every request's images, each in a process
that has done nothing else: `FOLDER/<name>.npz`; after the plain one, `FOLDER/fingerprint <…>.json`.
"""

import base64
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from generation.engine import Engine
from generation.errors import InvalidRequest
from tests.helpers.trained_files import (
    checkpoint_tensors,
    cog_embeddings,
    cog_lora_tensors,
    cog_members,
    kohya_name,
    kohya_tensors,
    miniature_shapes,
    small_lora,
    tar_bytes,
)
from tests.miniature.isolation import fingerprint, images_of
from weights.catalog import Edition
from weights.errors import BadWeights, InvalidSource, NotOnServer
from weights.formats.types import Pooling
from weights.miniature.evaluate import FOLDER, load_pipeline

GENTLY = 0.06  # random LoRAs times this change the image without ruining it
OPERATORS = "words"

# What each request changes in SMALL; weights are given by the names of FILES.
SMALL: dict[str, object] = {
    # Trigger words of all files, and text after them: whatever is left behind changes the image.
    "prompt": "a large TOK circle on a red cat background",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
}
EXPERT = {"refine": "expert_ensemble_refiner", "high_noise_frac": 0.5}
GUIDED = {"guidance_scale": 5.0, "negative_prompt": "TOK, a cat"}
PLAIN: dict[str, dict[str, object]] = {
    "plain": {},
    "plain, guided": GUIDED,
    "plain, expert": EXPERT,
    "plain, image": {"image": "image", "prompt_strength": 1.0},
}
NAMED: dict[str, dict[str, object]] = {
    "kohya": {"replicate_weights": "kohya"},
    "kohya, negative": {"replicate_weights": "kohya", "lora_scale": -0.7},
    "kohya, nothing": {"replicate_weights": "kohya", "lora_scale": 0.0},
    "words": {"replicate_weights": "words"},
    "words, negative prompt": {"replicate_weights": "words", "lora_scale": 1.0, **GUIDED},
    "words, expert": {"replicate_weights": "words", **EXPERT},
    "words, image": {"replicate_weights": "words", "image": "image", "prompt_strength": 1.0},
    "words at the end": {"replicate_weights": "words at the end"},
    "other words": {"replicate_weights": "other words", "refine": "base_image_refiner"},
    "unet": {"replicate_weights": "unet"},
    "dora": {"replicate_weights": "dora"},
    "inversion": {"replicate_weights": "inversion", "lora_scale": 0.0},
    "checkpoint": {"replicate_weights": "checkpoint"},
    "same words twice": {"replicate_weights": "words", "loras": ("other words",)},
    "twice the same": {"replicate_weights": "kohya", "loras": ("kohya",), "lora_scales": (-1.0,)},
    "three on a unet": {
        "replicate_weights": "unet",
        "loras": ("other kohya", "dora", "inversion"),
        "lora_scales": (0.5, -0.4, 1.0),
    },
    "words on a checkpoint": {"replicate_weights": "checkpoint", "loras": ("words at the end",)},
}
# On top of the operator's, where there are any.
STACKED: dict[str, dict[str, object]] = {
    "stacked kohya": {"loras": ("kohya",), "lora_scales": (0.6,)},
    "stacked words": {"loras": ("words at the end", "dora"), "lora_scales": (1.0, -0.3), **GUIDED},
}
REQUESTS = {**PLAIN, **NAMED, **STACKED}
SCALED: dict[str, dict[str, object]] = {  # without weights in the request
    "operator's, stronger": {"lora_scale": 1.2},
    "operator's, taken away": {"lora_scale": 0.0},
}


def requests_of(operators: bool) -> dict[str, dict[str, object]]:
    """Return the requests for an engine with or without the operator's weights."""
    return {**REQUESTS, **SCALED} if operators else REQUESTS


def reference_of(name: str, operators: bool) -> str:
    """Return the name of the images that a request must equal: its weights replace others."""
    return f"operator {name}" if operators and name not in NAMED else name


def write_files(folder: Path) -> None:
    """Write every file of FILES."""
    pipeline = load_pipeline(FOLDER)
    parts = {part: getattr(pipeline, part) for part in ("unet", "text_encoder", "text_encoder_2")}
    for name, (file, make) in FILES.items():
        torch.manual_seed(len(name))
        (folder / file).write_bytes(make(parts))


def data_url(folder: Path, name: str) -> str:
    """Return a file as a data URL."""
    file = FILES[name][0]
    content = base64.b64encode((folder / file).read_bytes()).decode()
    return f"data:;name={file};base64,{content}"


def with_references(
    changes: Mapping[str, object], refer: Callable[[str], str]
) -> dict[str, object]:
    """Return a request's changes with references in place of its weights' names."""
    changes = {**SMALL, **changes}
    if named := changes.get("replicate_weights"):
        changes["replicate_weights"] = refer(named)
    changes["loras"] = tuple(refer(name) for name in changes.get("loras", ()))
    return changes


Parts = dict[str, nn.Module]


def _gentle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v * GENTLY if k.endswith("up.weight") else v for k, v in tensors.items()}


def _kohya(rank: int) -> bytes:
    """Return a LoRA of all matrices and convolutions of the UNet and both text encoders."""
    return save(_gentle(kohya_tensors(miniature_shapes().modules(), rank)))


def _dora(parts: Parts) -> bytes:
    modules = [m for m in miniature_shapes().modules() if ".attn2." in m or ".fc1" in m]
    tensors = _gentle(kohya_tensors(modules))
    for module in modules:
        part, path = module.split(".", 1)
        weight = parts[part].get_submodule(path).weight
        magnitude = 1.2 * weight.detach().flatten(1).norm(dim=1, keepdim=True)
        tensors[f"{kohya_name(module, True)}.dora_scale"] = magnitude
    return save(tensors)


def _words(n: int, pooling: Pooling | None = None) -> bytes:
    """Return cog-sdxl's trained_model.tar with `n` tokens, and `pooling` in its header if given."""
    vectors = {key: value.float() * GENTLY for key, value in cog_embeddings(n).items()}
    lora = _gentle(cog_lora_tensors(rank=n))
    return tar_bytes(
        {
            "lora.safetensors": save(lora, {"pooling": pooling} if pooling else None),
            "embeddings.pti": save(vectors),
            "special_params.json": json.dumps({"TOK": _tokens(n)}).encode(),
        }
    )


def _tokens(n: int) -> str:
    return "".join(f"<s{i}>" for i in range(n))


def _unet(parts: Parts) -> bytes:
    return tar_bytes(
        {
            "unet.safetensors": save(_near(parts["unet"].state_dict(), torch.float16)),
            "embeddings.pti": save(cog_embeddings(1)),
            "special_params.json": json.dumps({"TOK": _tokens(1)}).encode(),
        }
    )


def _checkpoint(parts: Parts) -> bytes:
    return save(_near(checkpoint_tensors(parts), torch.float32))


def _near(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Change every value by some hundredths of itself."""
    return {
        key: (value * (1 + 0.05 * torch.randn(value.shape))).to(dtype).contiguous()
        if value.is_floating_point()
        else value
        for key, value in tensors.items()
    }


def _inversion(_: Parts) -> bytes:
    first, second = (value.float() * GENTLY for value in cog_embeddings(4).values())
    return save({"clip_l": first, "clip_g": second})


FILES: dict[str, tuple[str, Callable[[Parts], bytes]]] = {
    "kohya": ("kohya.safetensors", lambda _: _kohya(4)),
    "other kohya": ("other_kohya.safetensors", lambda _: _kohya(8)),
    "dora": ("dora.safetensors", _dora),
    "words": ("words.tar", lambda _: _words(2)),
    "other words": ("other_words.tar", lambda _: _words(3)),
    "words at the end": ("words_at_the_end.tar", lambda _: _words(2, Pooling.EOS)),
    "unet": ("unet.tar", _unet),
    "inversion": ("cat.safetensors", _inversion),
    "checkpoint": ("checkpoint.safetensors", _checkpoint),
}


def _url(content: bytes, name: str = "x.safetensors") -> str:
    return f"data:;name={name};base64,{base64.b64encode(content).decode()}"


def _without(member: str) -> bytes:
    return tar_bytes({k: v for k, v in cog_members().items() if k != member})


# What is rejected before anything changes. `a checkpoint` is one of FILES.
REJECTED: dict[str, tuple[str, type[Exception]]] = {
    "no weights": (_url(b"no weights at all"), BadWeights),
    "a pickle": (_url(b"\x80\x02}q\x00.", "x.ckpt"), BadWeights),
    "half an archive": (_url(tar_bytes(cog_members())[:9000], "x.tar"), BadWeights),
    "no words": (_url(_without("special_params.json"), "x.tar"), BadWeights),
    "no vectors": (_url(_without("embeddings.pti"), "x.tar"), BadWeights),
    "no safetensors": (_url(small_lora()[:-9]), BadWeights),
    "an inner address": ("https://10.0.0.1/x.safetensors", InvalidSource),
    "no page": ("https://files.example/none.safetensors", NotOnServer),
    "a checkpoint": ("checkpoint", InvalidRequest),
}


def _generate_in_fork(engine: Engine, folder: Path, name: str, operators: bool) -> None:
    if operators:
        engine.load(str(folder / FILES[OPERATORS][0]))
    changes = with_references(requests_of(operators)[name], lambda n: data_url(folder, n))
    made = images_of(engine, folder, **changes)
    np.savez(folder / f"{reference_of(name, operators)}.npz", *made)
    if name == "plain":
        path = folder / f"fingerprint {operators}.json"
        path.write_text(json.dumps(fingerprint(engine)))


def main(folder: Path) -> None:
    """Load once, which takes most of a process's time, and fork for each request."""
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load()
    for operators in (False, True):
        for name in requests_of(operators):
            if operators and name in NAMED:
                continue  # the same as without the operator's
            if (child := os.fork()) == 0:
                try:
                    _generate_in_fork(engine, folder, name, operators)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
