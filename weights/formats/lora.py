"""Read LoRAs of every trainer from a safetensors file as deltas of the model's modules."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.errors import BadWeights
from weights.formats.detect import ANOTHER_MODEL, guess_family
from weights.formats.key_map import Role, build_key_map, split_key
from weights.formats.safetensors_checks import SafetensorsFile
from weights.formats.types import TEXT_ENCODERS, UNET, LoraDelta, ModelShapes
from weights.messages import quote

PEFT_HEADER_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base
_GET_AGAIN = "The file is incomplete or was merged badly: export it again"


@dataclass(frozen=True)
class Lora:
    """The adapters of one file."""

    deltas: Mapping[str, LoraDelta]  # "<part>.<module path>"
    description: str


@dataclass(frozen=True)
class _PeftConfig:
    """The scaling of PEFT's LoraConfig; files of other trainers carry their alpha."""

    alpha: float | None = None
    patterns: Mapping[str, float] | None = None  # end of a module's path → its own alpha
    rank_stabilised: bool = False  # arXiv:2312.03732: alpha / sqrt(rank)


def is_lora_key(key: str) -> bool:
    """Return whether a tensor's name is one that a LoRA has."""
    return split_key(key) is not None


def read_lora(
    file: SafetensorsFile, keys: Iterable[str], shapes: ModelShapes, adapter_config: object
) -> Lora:
    """Return the deltas that the tensors `keys` describe, in the shapes of the model's modules.

    `adapter_config`: the content of PEFT's adapter_config.json, or None. Raises BadWeights for
    modules that the model lacks or has in another shape, and for incomplete tensors.
    """
    modules = shapes.modules()
    groups, styles = _group(file, keys, modules)
    configs = _read_configs(file, adapter_config)
    tensors = file.read(key for roles in groups.values() for key in roles.values())
    deltas = {}
    for module, roles in groups.items():
        config = configs.get(module.split(".", 1)[0]) or configs.get("") or _PeftConfig()
        found = {role: tensors[key] for role, key in roles.items()}
        deltas[module] = _delta(file.subject, module, found, modules[module], config)
    misfits = [module for module, delta in deltas.items() if not _fits(delta, modules[module])]
    if misfits:
        module, delta = misfits[0], deltas[misfits[0]]
        raise BadWeights(
            f"{file.subject} does not fit this model: {len(misfits)} of {len(deltas)} modules, the"
            f" first {quote(module)}, with down {tuple(delta.down.shape)} and up"
            f" {tuple(delta.up.shape)} for a weight of {modules[module]}"
            f"{guess_family(file.shapes)}. {ANOTHER_MODEL}."
        )
    return Lora(deltas, _describe(deltas, styles))


def _fits(delta: LoraDelta, weight_shape: tuple[int, ...]) -> bool:
    return delta.up.shape[0] == weight_shape[0] and delta.down.shape[1:] == weight_shape[1:]


def _group(
    file: SafetensorsFile, keys: Iterable[str], modules: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[Role, str]], Counter[str]]:
    """Return the tensors' names by module and role, and how often each style of naming occurs."""
    key_map = build_key_map(modules)
    groups: dict[str, dict[Role, str]] = {}
    styles: Counter[str] = Counter()
    unknown: dict[str, None] = {}
    for key in keys:
        split = split_key(key)
        assert split is not None  # keys were chosen by is_lora_key
        # PEFT's own wrapper around a model that diffusers or a trainer saved as it was.
        match = key_map.get(split[0]) or key_map.get(split[0].removeprefix("base_model.model."))
        if match is None:
            unknown[split[0]] = None
            continue
        styles[match.style] += 1
        roles = groups.setdefault(match.module, {})
        if roles.setdefault(split[1], key) != key:
            both = f"{quote(roles[split[1]])} and {quote(key)}"
            raise BadWeights(f"{file.subject} has two tensors for a matrix, {both}. {_GET_AGAIN}.")
    if unknown:
        raise BadWeights(
            f"{file.subject} is a LoRA with {len(unknown)} of {len(unknown) + len(groups)} modules"
            f" that this model lacks, the first {quote(next(iter(unknown)))}"
            f"{guess_family(file.shapes)}. {ANOTHER_MODEL}."
        )
    return groups, styles


def _delta(
    subject: str,
    module: str,
    found: Mapping[Role, Tensor],
    weight_shape: tuple[int, ...],
    config: _PeftConfig,
) -> LoraDelta:
    where = f"{subject}: module {quote(module)}"
    down, up = found.get(Role.DOWN), found.get(Role.UP)
    if down is None or up is None:
        missing = "down" if down is None else "up"
        raise BadWeights(f"{where} has no {missing} matrix. {_GET_AGAIN}.")
    if Role.MID in found:
        down = _fold_middle(where, down, found[Role.MID])
    down, up = (_as_weight(matrix, len(weight_shape)) for matrix in (down, up))
    if not (
        down.is_floating_point()
        and up.is_floating_point()
        and down.ndim == up.ndim == len(weight_shape)
        and up.shape[1] == down.shape[0]
        and all(side == 1 for side in up.shape[2:])
    ):
        raise BadWeights(
            f"{where} has matrices that do not belong together: down {tuple(down.shape)}, up"
            f" {tuple(up.shape)}, for a weight of {weight_shape}. {_GET_AGAIN}."
        )
    given = found.get(Role.ALPHA)
    if given is not None and given.numel() != 1:
        raise BadWeights(f"{where} has {given.numel()} values for alpha, not one. {_GET_AGAIN}.")
    alpha = _peft_alpha(config, module, down.shape[0]) if given is None else float(given.item())
    return LoraDelta(down, up, alpha, _dora_scale(where, found, weight_shape))


def _fold_middle(where: str, down: Tensor, mid: Tensor) -> Tensor:
    """Multiply LyCORIS' (rank, in, 1, 1) and (rank, rank, kh, kw) to one (rank, in, kh, kw)."""
    rank = down.shape[0]
    if not (mid.ndim == 4 and mid.shape[:2] == (rank, rank) and down.shape[2:] == (1, 1)):
        shapes = f"{tuple(mid.shape)} that does not fit its down matrix {tuple(down.shape)}"
        raise BadWeights(f"{where} has a middle matrix {shapes}. {_GET_AGAIN}.")
    # lycoris/functional/general.py, rebuild_tucker
    return torch.einsum("oikl,ij->ojkl", mid.float(), down.flatten(1).float())


def _as_weight(matrix: Tensor, dimensions: int) -> Tensor:
    """Turn a 1x1 convolution's matrix into a linear layer's, or back: trainers mix them up."""
    if dimensions == 2 and matrix.ndim == 4 and matrix.shape[2:] == (1, 1):
        return matrix.flatten(1)
    if dimensions == 4 and matrix.ndim == 2:
        return matrix[:, :, None, None]
    return matrix


def _dora_scale(
    where: str, found: Mapping[Role, Tensor], weight_shape: tuple[int, ...]
) -> Tensor | None:
    """Return the magnitude as (out, 1, …) or (1, in, …), broadcastable to the weight."""
    out, in_ = weight_shape[:2]
    ones = (1,) * (len(weight_shape) - 2)
    if (magnitude := found.get(Role.MAGNITUDE)) is not None:
        per_output = magnitude.numel() == out
    elif (magnitude := found.get(Role.DORA_SCALE)) is not None:
        # (out, 1, …) by default, (1, in, …) with wd_on_output=False; PEFT's (out,) under this name.
        per_output = magnitude.numel() == out and magnitude.shape[:1] == (out,)
    else:
        return None
    per_input = magnitude.shape[:2] == (1, in_) and magnitude.numel() == in_
    if per_output and magnitude.is_floating_point():
        return magnitude.reshape(out, 1, *ones)
    if per_input and magnitude.is_floating_point() and Role.MAGNITUDE not in found:
        return magnitude.reshape(1, in_, *ones)
    shape = tuple(magnitude.shape)
    raise BadWeights(
        f"{where} has a DoRA magnitude {shape} for a weight of {weight_shape}. {_GET_AGAIN}."
    )


def _read_configs(file: SafetensorsFile, adapter_config: object) -> dict[str, _PeftConfig]:
    """Return PEFT's configuration by part; under "" the one for all parts."""
    configs = {}
    if adapter_config is not None:
        configs[""] = _config(f"{file.subject}: adapter_config.json", adapter_config, "")
    text = file.metadata.get(PEFT_HEADER_KEY)
    if text is not None:
        where = f"{file.subject}: header entry {PEFT_HEADER_KEY}"
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadWeights(f"{where} is no JSON. {_GET_AGAIN}.") from error
        for part in (UNET, *TEXT_ENCODERS):
            configs[part] = _config(where, header, f"{part}.")
        if "lora_alpha" in header:  # UNet2DConditionModel.save_lora_adapter: no parts
            configs = {"": _config(where, header, "")}
    return configs


def _config(where: str, content: object, prefix: str) -> _PeftConfig:
    if not isinstance(content, dict):
        raise BadWeights(f"{where} is not a JSON object. {_GET_AGAIN}.")
    alpha = content.get(f"{prefix}lora_alpha")
    patterns = content.get(f"{prefix}alpha_pattern") or {}
    rank_stabilised = content.get(f"{prefix}use_rslora") or False
    numbers = [*patterns.values()] if isinstance(patterns, dict) else [None]
    numbers += [] if alpha is None else [alpha]
    if not all(map(_is_number, numbers)) or not isinstance(rank_stabilised, bool):
        raise BadWeights(f"{where} has an alpha that is no number. {_GET_AGAIN}.")
    # PEFT takes the keys for regular expressions; they are names, and a stranger's expression can
    # run for ever.
    plain = {key.removeprefix("^").replace("\\.", "."): value for key, value in patterns.items()}
    for key in plain:
        if not all(part.isidentifier() or part.isdigit() for part in key.split(".")):
            raise BadWeights(
                f"{where} has an alpha_pattern that is no module's name, {quote(key)}."
                " Export it again with plain names."
            )
    return _PeftConfig(alpha, plain, rank_stabilised)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e9


def _peft_alpha(config: _PeftConfig, module: str, rank: int) -> float:
    part, path = module.split(".", 1)
    if part in TEXT_ENCODERS:  # patterns have the level that transformers 5 dropped from one
        path = f"text_model.{path.removeprefix('text_model.')}"
    alpha = float(rank) if config.alpha is None else float(config.alpha)
    for end, own in (config.patterns or {}).items():
        if path == end or path.endswith(f".{end}"):  # peft.utils.other.get_pattern_key
            alpha = float(own)
            break
    # alpha / sqrt(rank) = (alpha * sqrt(rank)) / rank
    return alpha * math.sqrt(rank) if config.rank_stabilised else alpha


def _describe(deltas: Mapping[str, LoraDelta], styles: Counter[str]) -> str:
    # The text encoders' names are alike in two styles: the UNet's tell more.
    longest = max(styles, key=lambda style: (len(style) > len("kohya LoRA"), styles[style]))
    ranks = sorted({delta.rank for delta in deltas.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    extras = {
        "DoRA": any(delta.dora_scale is not None for delta in deltas.values()),
        "with convolutions": any(delta.down.ndim == 4 for delta in deltas.values()),
        "text encoders only": not any(module.startswith("unet.") for module in deltas),
    }
    present = [name for name, is_present in extras.items() if is_present]
    return ", ".join([longest, *present, f"rank {rank}", f"{len(deltas)} modules"])
