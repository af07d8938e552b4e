"""Textual inversions in a safetensors file, whoever wrote it, as rows for the text encoders."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from weights.errors import BadWeights
from weights.recognise import quote
from weights.safe_file import SafeFile
from weights.trained_types import TEXT_ENCODERS, ModelShapes, Pooling

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
_FAMILY_OF_WIDTH = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "Stable Diffusion XL",
    4096: "a model with a T5 text encoder",
}


@dataclass(frozen=True)
class Word:
    """One new word: what people type for it, and its rows."""

    triggers: tuple[str, ...]
    vectors: Mapping[str, Tensor]  # "text_encoder", "text_encoder_2" → (n, width), one n
    pooling: Pooling

    @property
    def n_tokens(self) -> int:
        """Rows for each encoder."""
        return int(next(iter(self.vectors.values())).shape[0])


def is_embedding_file(file: SafeFile) -> bool:
    """Whether the tensors' names are those of a textual inversion."""
    keys = set(file.tensors)
    return (
        keys <= {*_ENCODER_OF_KEY, *(f"{key}_out" for key in _ENCODER_OF_KEY)}
        or all(_NAMELESS.fullmatch(key) for key in keys)
        or _is_diffusers(file)
    )


def _is_diffusers(file: SafeFile) -> bool:
    shapes = list(file.shapes.values())
    return len(shapes) == 1 and len(shapes[0]) in (1, 2)


def read_words(file: SafeFile, stem: str, shapes: ModelShapes) -> list[Word]:
    """The words of a file for which is_embedding_file() holds. `stem`: of the file's own name.

    Raises BadWeights where the rows do not fit the model's text encoders.
    """
    keys = list(file.tensors)
    if all(key in _ENCODER_OF_KEY or key.endswith("_out") for key in keys):
        by_key = {key: key for key in keys}
        pooling = Pooling.ARGMAX if set(keys) <= _COG_SDXL_KEYS else Pooling.EOS
        return [_word(file, by_key, (stem,), shapes, pooling)]
    if len(keys) != 1:
        raise BadWeights(
            f"{file.subject} is a textual inversion of {len(keys)} words in an old format. Convert"
            " it to one with the tensors clip_l and clip_g."
        )
    key = keys[0]
    triggers = (stem,) if _NAMELESS.fullmatch(key) else tuple(dict.fromkeys((key, stem)))
    tensor = _rows(file, key, file.read([key])[key])
    encoder = _find_encoder(file, key, tensor.shape[1], stem, shapes)
    return [Word(triggers, {encoder: tensor}, Pooling.EOS)]


def read_bundle(file: SafeFile, keys: Iterable[str], shapes: ModelShapes) -> list[Word]:
    """The words bundled in a LoRA file, `bundle_emb.<word>.clip_l` and `.clip_g` (OneTrainer)."""
    by_word: dict[str, dict[str, str]] = {}
    for key in keys:
        word, _, rest = key.removeprefix(BUNDLE_PREFIX).rpartition(".")
        if rest.removesuffix("_out") not in _ENCODER_OF_KEY or not word:
            raise BadWeights(
                f"{file.subject} has a bundled textual inversion under a name that we do not know,"
                f" {quote(key)}; bundle_emb.<word>.clip_l and .clip_g are. Export it again."
            )
        by_word.setdefault(word, {})[rest] = key
    return [_word(file, by_key, (word,), shapes, Pooling.EOS) for word, by_key in by_word.items()]


def merge_pairs(words: Iterable[Word], subject: str) -> list[Word]:
    """Words with the same trigger as one: diffusers writes a file for each encoder."""
    merged: dict[str, Word] = {}
    for word in words:
        other = merged.get(word.triggers[0])
        if other is None:
            merged[word.triggers[0]] = word
            continue
        if other.vectors.keys() & word.vectors.keys() or other.n_tokens != word.n_tokens:
            raise BadWeights(
                f"{subject} has two textual inversions called {quote(word.triggers[0])}. Pack the"
                " one that you mean."
            )
        # The stems are "learned_embeds" and "learned_embeds_2": not words that anyone would type.
        merged[word.triggers[0]] = Word(
            word.triggers[:1], {**other.vectors, **word.vectors}, word.pooling
        )
    return list(merged.values())


def _word(
    file: SafeFile,
    by_key: Mapping[str, str],
    triggers: tuple[str, ...],
    shapes: ModelShapes,
    pooling: Pooling,
) -> Word:
    """A word whose tensors name their encoders. `by_key`: "clip_l" → the tensor's name."""
    outputs = [key for key in by_key if key.endswith("_out")]
    if outputs:
        raise BadWeights(
            f"{file.subject} has an output embedding ({quote(outputs[0])}), which OneTrainer"
            " applies behind the text encoder and nothing here can. Train without it."
        )
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
                f"{_guess_family(tensor.shape[1])}. Use one that was trained for this"
                " model."
            )
    if len({tensor.shape[0] for tensor in vectors.values()}) != 1:
        counts = " and ".join(str(tensor.shape[0]) for tensor in vectors.values())
        raise BadWeights(
            f"{file.subject} has {counts} vectors for the two text encoders; both need the same"
            " number. Export it again."
        )
    return Word(triggers, vectors, pooling)


def _rows(file: SafeFile, key: str, tensor: Tensor) -> Tensor:
    """(n, width), from that or from one vector (width,)."""
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not rows.is_floating_point() or rows.shape[0] > MAX_VECTORS:
        raise BadWeights(
            f"{file.subject}: tensor {quote(key)} of shape {tuple(tensor.shape)} and type"
            f" {tensor.dtype} is no textual inversion: that is 1 to {MAX_VECTORS} rows of"
            " floating-point numbers. Give one that was exported as such."
        )
    return rows


def _find_encoder(file: SafeFile, key: str, width: int, stem: str, shapes: ModelShapes) -> str:
    """Which encoder rows are for: by their width; if both are as wide, by diffusers' file names."""
    widths = {encoder: shapes.text_width(encoder) for encoder in TEXT_ENCODERS}
    candidates = [encoder for encoder, own in widths.items() if own == width]
    if len(candidates) == 1:
        return candidates[0]
    if candidates and stem in _DIFFUSERS_STEMS:
        return _DIFFUSERS_STEMS[stem]
    if candidates:
        raise BadWeights(
            f"{file.subject} is a textual inversion that does not say which text encoder it is for,"
            " and this model's are equally wide. Save it with the tensors clip_l and clip_g."
        )
    own = " and ".join(str(w) for w in widths.values() if w)
    raise BadWeights(
        f"{file.subject} has one tensor, {quote(key)}; a textual inversion for this model would be"
        f" {own} wide, and it is {width}{_guess_family(width)}. Use one that was trained for"
        " this model."
    )


def _guess_family(width: int) -> str:
    family = _FAMILY_OF_WIDTH.get(width)
    return f"; it seems to be for {family}" if family else ""
