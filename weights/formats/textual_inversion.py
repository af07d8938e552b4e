"""Read textual inversions of every trainer as rows for the text encoders."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from weights.errors import BadWeights
from weights.formats.detect import ANOTHER_MODEL, guess_embedding_family
from weights.formats.safetensors_checks import SafetensorsFile
from weights.formats.types import TEXT_ENCODERS, ModelShapes, Pooling
from weights.messages import quote

MAX_VECTORS = 75  # a prompt has 77 places, two of them for its start and end
BUNDLE_PREFIX = "bundle_emb."

# Names that say which encoder the rows are for.
_ENCODER_OF_KEY = {
    "text_encoders_0": "text_encoder",  # cog-sdxl
    "text_encoders_1": "text_encoder_2",
    "clip_l": "text_encoder",  # kohya, ComfyUI, A1111, OneTrainer
    "clip_g": "text_encoder_2",
}
_COG_SDXL_KEYS = {"text_encoders_0", "text_encoders_1"}
# A1111's names for a tensor whose token is the file's name; only the width tells the encoder.
_NAMELESS = re.compile(r"emb_params|string_to_param(?:\..*)?|\*")
# diffusers' textual_inversion_sdxl.py writes two files, each with its token's name as the only key.
_DIFFUSERS_STEMS = {"learned_embeds": "text_encoder", "learned_embeds_2": "text_encoder_2"}


@dataclass(frozen=True)
class Embedding:
    """One textual inversion: the words that people type for it, and its rows."""

    triggers: tuple[str, ...]
    vectors: Mapping[str, Tensor]  # "text_encoder", "text_encoder_2" → (n, width), one n
    pooling: Pooling

    @property
    def n_tokens(self) -> int:
        """Return the number of rows for each encoder."""
        return int(next(iter(self.vectors.values())).shape[0])


def is_embedding_file(file: SafetensorsFile) -> bool:
    """Return whether the tensors' names are those of a textual inversion."""
    ranks = [len(shape) for shape in file.shapes.values()]
    return (
        all(key.removesuffix("_out") in _ENCODER_OF_KEY for key in file.tensors)
        or all(_NAMELESS.fullmatch(key) for key in file.tensors)
        or ranks in ([1], [2])  # diffusers: one tensor, under its token's name
    )


def read_embeddings(file: SafetensorsFile, stem: str, shapes: ModelShapes) -> list[Embedding]:
    """Read a file for which is_embedding_file() holds. `stem`: of the file's original name.

    Raises BadWeights where the rows do not fit the model's text encoders.
    """
    keys = list(file.tensors)
    if all(key in _ENCODER_OF_KEY or key.endswith("_out") for key in keys):
        by_key = {key: key for key in keys}
        pooling = Pooling.ARGMAX if set(keys) <= _COG_SDXL_KEYS else Pooling.EOS
        return [_read_named(file, by_key, (stem,), shapes, pooling)]
    if len(keys) != 1:
        what = f"is a textual inversion of {len(keys)} words in an old format"
        raise BadWeights(f"{file.subject} {what}. Convert it to tensors clip_l and clip_g.")
    key = keys[0]
    triggers = (stem,) if _NAMELESS.fullmatch(key) else tuple(dict.fromkeys((key, stem)))
    tensor = _rows(file, key, file.read([key])[key])
    encoder = _find_encoder(file, key, tensor.shape[1], stem, shapes)
    return [Embedding(triggers, {encoder: tensor}, Pooling.EOS)]


def read_bundle(file: SafetensorsFile, keys: Iterable[str], shapes: ModelShapes) -> list[Embedding]:
    """Read what is bundled in a LoRA: `bundle_emb.<word>.clip_l` and `.clip_g` (OneTrainer)."""
    by_word: dict[str, dict[str, str]] = {}
    for key in keys:
        word, _, rest = key.removeprefix(BUNDLE_PREFIX).rpartition(".")
        if rest.removesuffix("_out") not in _ENCODER_OF_KEY or not word:
            what = f"has a bundled textual inversion under an unknown name, {quote(key)}"
            raise BadWeights(
                f"{file.subject} {what}. Name it bundle_emb.<word>.clip_l and .clip_g."
            )
        by_word.setdefault(word, {})[rest] = key
    return [
        _read_named(file, by_key, (word,), shapes, Pooling.EOS) for word, by_key in by_word.items()
    ]


def merge_pairs(embeddings: Iterable[Embedding], subject: str) -> list[Embedding]:
    """Merge those with the same trigger: diffusers writes a file for each encoder."""
    merged: dict[str, Embedding] = {}
    for embedding in embeddings:
        other = merged.get(embedding.triggers[0])
        if other is None:
            merged[embedding.triggers[0]] = embedding
            continue
        twice = other.vectors.keys() & embedding.vectors.keys()
        if twice or other.n_tokens != embedding.n_tokens:
            what = f"has two textual inversions called {quote(embedding.triggers[0])}"
            raise BadWeights(f"{subject} {what}. Pack the one that you mean.")
        # The stems are "learned_embeds" and "learned_embeds_2": not words that anyone would type.
        merged[embedding.triggers[0]] = Embedding(
            embedding.triggers[:1], {**other.vectors, **embedding.vectors}, embedding.pooling
        )
    return list(merged.values())


def _read_named(
    file: SafetensorsFile,
    by_key: Mapping[str, str],
    triggers: tuple[str, ...],
    shapes: ModelShapes,
    pooling: Pooling,
) -> Embedding:
    """Read tensors that name their encoders. `by_key`: "clip_l" → the tensor's name."""
    outputs = [key for key in by_key if key.endswith("_out")]
    if outputs:
        what = f"has an output embedding ({quote(outputs[0])}), which only OneTrainer applies"
        raise BadWeights(f"{file.subject} {what}. Train without it.")
    tensors = file.read(by_key.values())
    vectors = {
        _ENCODER_OF_KEY[key]: _rows(file, full, tensors[full]) for key, full in by_key.items()
    }
    vectors = dict(sorted(vectors.items()))  # a file's tensors come in any order
    if len(vectors) != len(by_key):
        raise BadWeights(f"{file.subject} has vectors twice for one encoder. Export it again.")
    for encoder, tensor in vectors.items():
        width = shapes.text_width(encoder)
        if width != tensor.shape[1]:
            raise BadWeights(
                f"{file.subject} is a textual inversion with vectors of width {tensor.shape[1]} for"
                f" {encoder}; this model's are {width or 'not there'}"
                f"{guess_embedding_family(tensor.shape[1])}. {ANOTHER_MODEL}."
            )
    if len({tensor.shape[0] for tensor in vectors.values()}) != 1:
        counts = " and ".join(str(tensor.shape[0]) for tensor in vectors.values())
        what = f"has {counts} vectors for the two text encoders, which need the same number"
        raise BadWeights(f"{file.subject} {what}. Export it again.")
    return Embedding(triggers, vectors, pooling)


def _rows(file: SafetensorsFile, key: str, tensor: Tensor) -> Tensor:
    """Return (n, width), from that or from one vector (width,)."""
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not rows.is_floating_point() or rows.shape[0] > MAX_VECTORS:
        raise BadWeights(
            f"{file.subject}: tensor {quote(key)} of shape {tuple(tensor.shape)} and type"
            f" {tensor.dtype} is no textual inversion, which is 1 to {MAX_VECTORS} rows of floats."
        )
    return rows


def _find_encoder(
    file: SafetensorsFile, key: str, width: int, stem: str, shapes: ModelShapes
) -> str:
    """Return which encoder rows are for: by their width; if that is both's, by diffusers' names."""
    widths = {encoder: shapes.text_width(encoder) for encoder in TEXT_ENCODERS}
    candidates = [encoder for encoder, each in widths.items() if each == width]
    if len(candidates) == 1:
        return candidates[0]
    if candidates and stem in _DIFFUSERS_STEMS:
        return _DIFFUSERS_STEMS[stem]
    if candidates:
        what = "is a textual inversion that does not say which text encoder it is for"
        raise BadWeights(f"{file.subject} {what}. Save it as the tensors clip_l and clip_g.")
    wanted = " and ".join(str(each) for each in widths.values() if each)
    raise BadWeights(
        f"{file.subject} has one tensor, {quote(key)}; a textual inversion for this model would be"
        f" {wanted} wide, and it is {width}{guess_embedding_family(width)}. {ANOTHER_MODEL}."
    )
