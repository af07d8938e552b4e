"""The only reader of trained weights that users bring: a local file → TrainedWeights.

Every file is hostile until it was checked. Formats are told apart by content: a file's own tensors,
or an archive of files (cog-sdxl's trained_model.tar and its relatives). Only safetensors and JSON
are ever parsed.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from torch import Tensor

from weights import archive
from weights.checkpoint_formats import is_checkpoint, read_checkpoint
from weights.embedding_formats import (
    BUNDLE_PREFIX,
    Word,
    is_embedding_file,
    merge_pairs,
    read_bundle,
    read_words,
)
from weights.errors import BadWeights
from weights.fit import check_fits
from weights.lora_formats import Lora, is_lora_key, read_lora
from weights.recognise import (
    READABLE,
    Container,
    find_container,
    find_foreign_kind,
    find_other_checkpoint,
    find_other_model,
    find_whole_model,
    guess_family,
    quote,
)
from weights.safe_file import SafeFile, open_safe
from weights.trained_types import (
    TEXT_ENCODERS,
    LoraDelta,
    ModelShapes,
    Pooling,
    TokenVectors,
    TrainedWeights,
)
from weights.trigger_words import MAX_TRIGGER_CHARACTERS, can_be_typed

__all__ = [
    "LoraDelta",
    "ModelShapes",
    "Pooling",
    "TokenVectors",
    "TrainedWeights",
    "check_fits",
    "read_trained",
]

POOLING_HEADER_KEY = "pooling"  # our own, in the metadata of any safetensors file of an archive
MAX_TRIGGERS = 100
_ANOTHER = "Use one that was trained for this model"


@dataclass
class _Found:
    """What the files have held so far."""

    name: str
    lora: Lora | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)  # "<part>.<name>"
    checkpoint: bool = False
    words: list[Word] = field(default_factory=list)
    poolings: set[Pooling] = field(default_factory=set)  # those that headers name


def read_trained(
    path: Path, name: str, shapes: ModelShapes, file_name: str | None = None
) -> TrainedWeights:
    """Read and check the file at `path` for the model with these `shapes`; tensors on the CPU.

    `name` is the input's name, for messages; `file_name` what the file was called where it comes
    from, if `path` does not say so. Raises BadWeights, which says what the file is; NotEnoughDisk
    where an archive does not fit into the temporary folder; OSError if it cannot be read at all.
    """
    called = PurePosixPath(path.name if file_name is None else file_name)
    container = find_container(path, called.suffix, name)
    found = _Found(name)
    special: dict[str, str] | None = None
    if container is Container.SAFETENSORS:
        _add_file(found, open_safe(path, name), called.stem, shapes, None)
    else:
        with archive.unpacked(path, container, name) as members:
            special = _read_archive(found, members, shapes)
    return _finish(found, special, shapes)


def _read_archive(
    found: _Found, members: list[archive.Member], shapes: ModelShapes
) -> dict[str, str] | None:
    """Add every file of an archive; the content of its special_params.json, if it has one."""
    texts = {_base(member): member.path for member in members if member.path.suffix == ".json"}
    adapter_config = _read_json(found.name, "adapter_config.json", texts)
    special = _read_json(found.name, "special_params.json", texts)
    weights = [member for member in members if member.path.suffix == ".safetensors"]
    # cog-sdxl's embeddings first: special_params.json calls their tokens <s0>, <s1> …
    for member in sorted(weights, key=lambda m: (not m.name.endswith(".pti"), m.name)):
        file = open_safe(member.path, f"{found.name} (its member {quote(member.name)})")
        _add_file(found, file, PurePosixPath(_base(member)).stem, shapes, adapter_config)
        if special is None and Pooling.ARGMAX in {word.pooling for word in found.words}:
            raise BadWeights(
                f"{file.subject} has new tokens, but no special_params.json says which word stands"
                ' for them. Add it to the archive: {"TOK": "<s0><s1>"}, for two tokens.'
            )
    return None if special is None else _check_special(found.name, special)


def _base(member: archive.Member) -> str:
    return PurePosixPath(member.name.replace("\\", "/")).name


def _read_json(name: str, base: str, texts: Mapping[str, Path]) -> object:
    if base not in texts:
        return None
    try:
        content: object = json.loads(texts[base].read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadWeights(
            f"{name}: {base} in it is no valid JSON. Train or export it again."
        ) from error
    return content


def _check_special(name: str, content: object) -> dict[str, str]:
    if not isinstance(content, dict) or len(content) > MAX_TRIGGERS:
        raise BadWeights(
            f"{name}: special_params.json in it is not a JSON object of up to {MAX_TRIGGERS}"
            ' entries like {"TOK": "<s0><s1>"}. Write it so.'
        )
    for word, tokens in content.items():
        _check_trigger(name, word)
        if not isinstance(tokens, str):
            raise BadWeights(
                f"{name}: special_params.json in it gives {quote(word)} a value that is no text."
                ' Write it as {"TOK": "<s0><s1>"}.'
            )
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


def _add_file(
    found: _Found, file: SafeFile, stem: str, shapes: ModelShapes, adapter_config: object
) -> None:
    """Read one safetensors file for whatever it holds."""
    bundled = [key for key in file.tensors if key.startswith(BUNDLE_PREFIX)]
    keys = [key for key in file.tensors if not key.startswith(BUNDLE_PREFIX)]
    if bundled:
        found.words += read_bundle(file, bundled, shapes)
    if keys and all(is_lora_key(key) for key in keys):
        _refuse_foreign(file, find_foreign_kind(keys))
        model = find_other_model(keys)
        _refuse_foreign(file, model and f"an adapter for {model}, which is another model")
        _refuse_second(file, found)
        found.lora = read_lora(file, keys, shapes, adapter_config)
    elif keys and find_foreign_kind(keys) is None and is_embedding_file(file):
        found.words += read_words(file, stem, shapes)
    elif keys:
        _refuse_foreign(file, find_foreign_kind(keys))
        family = find_other_checkpoint(keys)
        why = "of another family than this model"
        if not any(name.startswith(TEXT_ENCODERS[1]) for name in shapes.parameters):
            why = "and whole models can be brought to Stable Diffusion XL only"
        _refuse_foreign(file, family and f"a full checkpoint of {family}, {why}")
        if is_checkpoint(keys):
            _add_checkpoint(found, file, shapes)
        else:
            _add_unet(found, file, keys, shapes)
    pooling = file.metadata.get(POOLING_HEADER_KEY)
    if pooling is not None:
        if pooling not in {str(known) for known in Pooling}:
            raise BadWeights(
                f"{file.subject}: its header asks for pooling {quote(pooling)}; there are"
                f" {' and '.join(Pooling)}. Export it again."
            )
        found.poolings.add(Pooling(pooling))


def _refuse_foreign(file: SafeFile, what: str | None) -> None:
    if what is not None:
        raise BadWeights(
            f"{file.subject} is {what}, and cannot be used here. {READABLE}, for this model."
        )


def _refuse_second(file: SafeFile, found: _Found) -> None:
    if found.lora or found.parameters:
        raise BadWeights(
            f"{file.subject} is the second LoRA, UNet or checkpoint in the archive. Pack the one"
            " that you mean."
        )


def _add_checkpoint(found: _Found, file: SafeFile, shapes: ModelShapes) -> None:
    _refuse_second(file, found)
    found.parameters = read_checkpoint(file, shapes)
    found.checkpoint = True


def _add_unet(found: _Found, file: SafeFile, keys: list[str], shapes: ModelShapes) -> None:
    """A whole or partial UNet under diffusers' names; anything else is refused."""
    if not any(f"unet.{key}" in shapes.parameters for key in keys):
        whole = find_whole_model(keys)
        _refuse_foreign(file, whole)
        shown = ", ".join(quote(key) for key in keys[:3])
        loras = sum(is_lora_key(key) for key in keys)
        what = "is a LoRA with other tensors in it" if loras else "has tensors of no known kind"
        odd = next((quote(key) for key in keys if not is_lora_key(key)), shown)
        raise BadWeights(f"{file.subject} {what}: {odd if loras else shown}. {READABLE}.")
    _refuse_second(file, found)
    unknown = [key for key in keys if f"unet.{key}" not in shapes.parameters]
    if unknown:
        raise BadWeights(
            f"{file.subject} is a UNet with {len(unknown)} of {len(keys)} parameters that this"
            f" model has not, the first {quote(unknown[0])}{guess_family(file.shapes)}. {_ANOTHER}."
        )
    found.parameters = {f"unet.{key}": tensor for key, tensor in file.read(keys).items()}


def _finish(found: _Found, special: dict[str, str] | None, shapes: ModelShapes) -> TrainedWeights:
    words = merge_pairs(found.words, found.name)
    embeddings, triggers = _name_tokens(found.name, words, special)
    if len(found.poolings) > 1:
        raise BadWeights(f"{found.name}: its files ask for both ways of pooling. Export it again.")
    # What a header names counts; else cog-sdxl's layout tells its way, and all others pool at EOS.
    pooling = next(iter(found.poolings), None) or (
        Pooling.ARGMAX if any(w.pooling is Pooling.ARGMAX for w in words) else Pooling.EOS
    )
    weights = TrainedWeights(
        lora=found.lora.deltas if found.lora else {},
        parameters=found.parameters,
        checkpoint=found.checkpoint,
        embeddings=embeddings,
        trigger_words=triggers,
        pooling=pooling,
        description=_describe(found, embeddings, triggers),
    )
    check_fits(weights, shapes, found.name)
    return weights


def _name_tokens(
    name: str, words: Iterable[Word], special: dict[str, str] | None
) -> tuple[tuple[TokenVectors, ...], dict[str, str]]:
    """Placeholder tokens <s0>, <s1> … (cog-sdxl's names) for all rows, and what stands for them."""
    triggers = dict(special or {})
    embeddings = []
    first = 0
    for word in words:
        tokens = tuple(f"<s{first + i}>" for i in range(word.n_tokens))
        first += word.n_tokens
        embeddings.append(TokenVectors(tokens, word.vectors))
        if any(tokens[0] in value for value in (special or {}).values()):
            continue
        for trigger in word.triggers:
            _check_trigger(name, trigger)
            if trigger in triggers:
                raise BadWeights(
                    f"{name} gives the trigger word {quote(trigger)} to two textual inversions."
                    " Rename one."
                )
            triggers[trigger] = "".join(tokens)
    known = {token for entry in embeddings for token in entry.placeholder_tokens}
    for trigger, value in triggers.items():
        parts = re.findall(r"<s\d+>", value)
        if not parts or "".join(parts) != re.sub(r"\s", "", value) or not set(parts) <= known:
            raise BadWeights(
                f"{name}: special_params.json in it says that {quote(trigger)} stands for"
                f" {quote(value)}, but there are vectors only for"
                f" {', '.join(sorted(known)) or 'nothing'}. Pack the embeddings that belong to it."
            )
    return tuple(embeddings), triggers


def _describe(
    found: _Found, embeddings: tuple[TokenVectors, ...], triggers: Mapping[str, str]
) -> str:
    parts = [found.lora.description] if found.lora else []
    if found.parameters:
        whole = any(not name.startswith("unet.") for name in found.parameters)
        kind = "checkpoint" if whole else "UNet of a checkpoint" if found.checkpoint else "UNet"
        parts.append(f"{kind}, {len(found.parameters)} parameters")
    for entry in embeddings:
        both = len(entry.vectors) == len(TEXT_ENCODERS)
        where = "both text encoders" if both else f"{next(iter(entry.vectors))} only"
        parts.append(f"textual inversion, {len(entry.placeholder_tokens)} vectors for {where}")
    if triggers:
        parts.append(f"trigger words {', '.join(quote(word) for word in triggers)}")
    return "; ".join(parts)
