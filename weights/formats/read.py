"""Read trained weights that users provide: a local file → TrainedWeights.

Every file is untrusted until it was checked. Formats are told apart by content: a file's own
tensors, or an archive of files (cog-sdxl's trained_model.tar and its relatives). Only safetensors
and JSON are ever parsed.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from torch import Tensor

from weights.errors import BadWeights
from weights.formats.checkpoint import is_checkpoint, read_checkpoint
from weights.formats.detect import (
    ANOTHER_MODEL,
    READABLE,
    find_adapter_kind,
    find_container,
    find_other_checkpoint,
    find_other_model,
    find_part,
    guess_family,
)
from weights.formats.lora import Lora, is_lora_key, read_lora
from weights.formats.safetensors_checks import SafetensorsFile, open_safetensors
from weights.formats.textual_inversion import (
    BUNDLE_PREFIX,
    Embedding,
    is_embedding_file,
    merge_pairs,
    read_bundle,
    read_embeddings,
)
from weights.formats.trained_archive import TrainedFile, extracted
from weights.formats.types import (
    TEXT_ENCODERS,
    UNET,
    ModelShapes,
    Pooling,
    TokenVectors,
    TrainedWeights,
)
from weights.messages import quote, quote_list
from weights.trigger_words import MAX_TRIGGER_CHARACTERS, can_be_typed

POOLING_HEADER_KEY = "pooling"  # ours, in the metadata of any safetensors file of an archive
MAX_TRIGGERS = 100
_SPECIAL_PARAMS = "special_params.json"


@dataclass
class _Found:
    """What the files have held so far."""

    name: str
    shapes: ModelShapes
    lora: Lora | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)  # "<part>.<name>"
    checkpoint: bool = False
    embeddings: list[Embedding] = field(default_factory=list)
    poolings: set[Pooling] = field(default_factory=set)  # those that headers name


def read_trained(
    path: Path, name: str, shapes: ModelShapes, file_name: str | None = None
) -> TrainedWeights:
    """Read and check the file at `path` for the model with these `shapes`; tensors on the CPU.

    `name` is the input's name, for messages; `file_name` the file's original name, if `path` has
    another. Raises BadWeights, which says what the file is; DiskFull where an archive does not fit
    into the temporary folder; OSError if it cannot be read at all.
    """
    original = PurePosixPath(path.name if file_name is None else file_name)
    container = find_container(path, original.suffix, name)
    found = _Found(name, shapes)
    special: dict[str, str] | None = None
    if container is None:
        _add_file(found, open_safetensors(path, name), original.stem, None)
    else:
        with extracted(path, container, name) as files:
            special = _read_archive(found, files)
    return _finish(found, special)


def _read_archive(found: _Found, files: list[TrainedFile]) -> dict[str, str] | None:
    """Add every file of an archive. Returns the content of its special_params.json, if any."""
    texts = {file.base_name: file.path for file in files if file.path.suffix == ".json"}
    adapter_config = _read_json(found.name, "adapter_config.json", texts)
    special = _read_json(found.name, _SPECIAL_PARAMS, texts)
    weights = [file for file in files if file.path.suffix == ".safetensors"]
    # cog-sdxl's embeddings first: special_params.json calls their tokens <s0>, <s1> …
    for member in sorted(weights, key=lambda m: (not m.name.endswith(".pti"), m.name)):
        file = open_safetensors(member.path, f"{found.name} (its member {quote(member.name)})")
        _add_file(found, file, PurePosixPath(member.base_name).stem, adapter_config)
        if special is None and Pooling.ARGMAX in {each.pooling for each in found.embeddings}:
            raise BadWeights(
                f"{file.subject} has new tokens, but no {_SPECIAL_PARAMS} says which word stands"
                ' for them. Add it to the archive: {"TOK": "<s0><s1>"}, for two tokens.'
            )
    return None if special is None else _check_special(found.name, special)


def _read_json(name: str, base: str, texts: Mapping[str, Path]) -> object:
    if base not in texts:
        return None
    try:
        content: object = json.loads(texts[base].read_bytes())
    except (ValueError, RecursionError) as error:
        fault = f"{base} in it is no valid JSON"
        raise BadWeights(f"{name}: {fault}. Train or export it again.") from error
    return content


def _check_special(name: str, content: object) -> dict[str, str]:
    example = 'Write it as {"TOK": "<s0><s1>"}.'
    if not isinstance(content, dict) or len(content) > MAX_TRIGGERS:
        fault = f"is not a JSON object of up to {MAX_TRIGGERS} entries"
        raise BadWeights(f"{name}: {_SPECIAL_PARAMS} in it {fault}. {example}")
    for word, tokens in content.items():
        _check_trigger(name, word)
        if not isinstance(tokens, str):
            fault = f"gives {quote(word)} a value that is no text"
            raise BadWeights(f"{name}: {_SPECIAL_PARAMS} in it {fault}. {example}")
    return content


def _check_trigger(name: str, word: str) -> None:
    if not word:
        raise BadWeights(
            f"{name} is a textual inversion whose trigger word is the file's name, and it came"
            " without one. In a data: URL, write data:;name=word.safetensors;base64,..."
        )
    if not can_be_typed(word):
        raise BadWeights(
            f"{name} has the trigger word {quote(word)}, which nobody can type: it has to be 1 to"
            f" {MAX_TRIGGER_CHARACTERS} printable characters. Rename it."
        )


def _add_file(found: _Found, file: SafetensorsFile, stem: str, adapter_config: object) -> None:
    """Read one safetensors file for whatever it holds. `stem`: of the file's original name."""
    bundled = [key for key in file.tensors if key.startswith(BUNDLE_PREFIX)]
    keys = [key for key in file.tensors if not key.startswith(BUNDLE_PREFIX)]
    if bundled:
        found.embeddings += read_bundle(file, bundled, found.shapes)
    kind = find_adapter_kind(keys)
    if keys and all(is_lora_key(key) for key in keys):
        model = find_other_model(keys)
        _refuse(file, kind or (model and f"an adapter for {model}, which is another model"))
        _refuse_second(file, found)
        found.lora = read_lora(file, keys, found.shapes, adapter_config)
    elif keys and kind is None and is_embedding_file(file):
        found.embeddings += read_embeddings(file, stem, found.shapes)
    elif keys:
        _refuse(file, kind)
        _add_model(found, file, keys)
    pooling = file.metadata.get(POOLING_HEADER_KEY)
    if pooling is not None:
        if pooling not in {str(known) for known in Pooling}:
            fault = f"pooling {quote(pooling)}; there are {' and '.join(Pooling)}"
            raise BadWeights(f"{file.subject}: its header has {fault}. Export it again.")
        found.poolings.add(Pooling(pooling))


def _refuse(file: SafetensorsFile, what: str | None) -> None:
    if what is not None:
        fault = f"is {what}, and cannot be used here"
        raise BadWeights(f"{file.subject} {fault}. {READABLE}, for this model.")


def _refuse_second(file: SafetensorsFile, found: _Found) -> None:
    if found.lora or found.parameters:
        fault = "is the second LoRA, UNet or checkpoint in the archive"
        raise BadWeights(f"{file.subject} {fault}. Pack the one that you mean.")


def _add_model(found: _Found, file: SafetensorsFile, keys: list[str]) -> None:
    """Read a checkpoint, or a whole or partial UNet under diffusers' names; refuse others."""
    parameters = found.shapes.parameters
    family = find_other_checkpoint(keys)
    why = "of another family than this model"
    if not any(name.startswith(TEXT_ENCODERS[1]) for name in parameters):
        why = "and whole models can be used with Stable Diffusion XL only"
    _refuse(file, family and f"a full checkpoint of {family}, {why}")
    if is_checkpoint(keys):
        _refuse_second(file, found)
        found.parameters = read_checkpoint(file, found.shapes)
        found.checkpoint = True
        return
    unknown = [key for key in keys if f"{UNET}.{key}" not in parameters]
    if len(unknown) == len(keys):
        _refuse(file, find_part(keys))
        others = [key for key in keys if not is_lora_key(key)]
        is_lora = len(others) < len(keys)
        what = "is a LoRA with other tensors in it" if is_lora else "has tensors of no known kind"
        raise BadWeights(f"{file.subject} {what}: {quote_list(others, 3)}. {READABLE}.")
    _refuse_second(file, found)
    if unknown:
        raise BadWeights(
            f"{file.subject} is a UNet with {len(unknown)} of {len(keys)} parameters that this"
            f" model lacks, the first {quote(unknown[0])}{guess_family(file.shapes)}."
            f" {ANOTHER_MODEL}."
        )
    bad = [key for key in keys if parameters[f"{UNET}.{key}"] != file.shapes[key]]
    if bad:
        raise BadWeights(
            f"{file.subject} is a UNet that does not fit this model: {len(bad)} of {len(keys)}"
            f" parameters, the first {quote(bad[0])} with {file.shapes[bad[0]]} for"
            f" {parameters[f'{UNET}.{bad[0]}']}{guess_family(file.shapes)}. {ANOTHER_MODEL}."
        )
    found.parameters = {f"{UNET}.{key}": tensor for key, tensor in file.read(keys).items()}


def _finish(found: _Found, special: dict[str, str] | None) -> TrainedWeights:
    merged = merge_pairs(found.embeddings, found.name)
    embeddings, triggers = _name_tokens(found.name, merged, special)
    if len(found.poolings) > 1:
        raise BadWeights(f"{found.name}: its files name both ways of pooling. Export it again.")
    # What a header names counts; else cog-sdxl's layout implies its way, and others pool at EOS.
    pooling = next(iter(found.poolings), None) or (
        Pooling.ARGMAX if any(each.pooling is Pooling.ARGMAX for each in merged) else Pooling.EOS
    )
    return TrainedWeights(
        lora=found.lora.deltas if found.lora else {},
        parameters=found.parameters,
        checkpoint=found.checkpoint,
        embeddings=embeddings,
        trigger_words=triggers,
        pooling=pooling,
        description=_describe(found, embeddings, triggers),
    )


def _name_tokens(
    name: str, read: Iterable[Embedding], special: dict[str, str] | None
) -> tuple[tuple[TokenVectors, ...], dict[str, str]]:
    """Give every row a placeholder token <s0>, <s1> … (cog-sdxl's names), and map the triggers."""
    triggers = dict(special or {})
    embeddings = []
    first = 0
    for embedding in read:
        tokens = tuple(f"<s{first + i}>" for i in range(embedding.n_tokens))
        first += embedding.n_tokens
        embeddings.append(TokenVectors(tokens, embedding.vectors))
        if any(tokens[0] in value for value in (special or {}).values()):
            continue
        for trigger in embedding.triggers:
            _check_trigger(name, trigger)
            if trigger in triggers:
                fault = f"gives the trigger word {quote(trigger)} to two textual inversions"
                raise BadWeights(f"{name} {fault}. Rename one.")
            triggers[trigger] = "".join(tokens)
    known = {token for entry in embeddings for token in entry.placeholder_tokens}
    for trigger, value in triggers.items():
        parts = re.findall(r"<s\d+>", value)
        if not parts or "".join(parts) != re.sub(r"\s", "", value) or not set(parts) <= known:
            raise BadWeights(
                f"{name}: {_SPECIAL_PARAMS} in it says that {quote(trigger)} stands for"
                f" {quote(value)}, but there are vectors only for"
                f" {', '.join(sorted(known)) or 'nothing'}. Pack the embeddings that belong to it."
            )
    return tuple(embeddings), triggers


def _describe(
    found: _Found, embeddings: tuple[TokenVectors, ...], triggers: Mapping[str, str]
) -> str:
    parts = [found.lora.description] if found.lora else []
    if found.parameters:
        whole = any(not name.startswith(f"{UNET}.") for name in found.parameters)
        kind = "checkpoint" if whole else "UNet of a checkpoint" if found.checkpoint else "UNet"
        parts.append(f"{kind}, {len(found.parameters)} parameters")
    for entry in embeddings:
        both = len(entry.vectors) == len(TEXT_ENCODERS)
        where = "both text encoders" if both else f"{next(iter(entry.vectors))} only"
        parts.append(f"textual inversion, {len(entry.placeholder_tokens)} vectors for {where}")
    if triggers:
        parts.append(f"trigger words {', '.join(quote(word) for word in triggers)}")
    return "; ".join(parts)
