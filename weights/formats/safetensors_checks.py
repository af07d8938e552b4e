"""Read an untrusted safetensors file: the header is checked before anything else.

The format: 8 bytes little-endian N, N bytes of JSON, the tensors' bytes
(https://github.com/huggingface/safetensors#format). Nothing else is ever deserialised.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.errors import BadWeights
from weights.messages import quote

# The format allows 100 MB. A LoRA's header has about 0.3 MB and training logs of a few MB in its
# metadata; parsed JSON takes up to twenty times its size.
MAX_HEADER_BYTES = 16_000_000
MAX_TENSORS = 20_000  # an SDXL checkpoint has 2,515
MAX_DIMENSIONS = 8
_MALFORMED = "The file is damaged or was not written by a safetensors library: get it again"
_REMEDY = "Save it again, in float16, bfloat16 or float32"

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_FLOATS = ("F16", "BF16", "F32", "F64")
_INTEGERS = ("U8", "I8", "U16", "I16", "I32", "I64")  # single numbers: some trainers' alpha


@dataclass(frozen=True)
class TensorInfo:
    """A tensor by its entry in the header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file with a valid header; no tensor has been read."""

    path: Path
    subject: str  # for messages: the input's name, and the member's of an archive
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors' shapes by name."""
        return {key: info.shape for key, info in self.tensors.items()}

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors, on the CPU, in the file's dtype, independent of the file.

        Raises BadWeights for other dtypes than floating point, and for NaN or infinity.
        """
        keys = list(keys)
        for key in keys:
            info = self.tensors[key]
            is_number = info.dtype in _INTEGERS and math.prod(info.shape) == 1
            if info.dtype not in _FLOATS and not is_number:
                fault = f"tensor {quote(key)} is of type {info.dtype}"
                raise BadWeights(f"{self.subject}: {fault}. {_REMEDY}.")
        try:
            # pread, not mmap: a mapped file that is cut short later kills the process.
            with safe_open(self.path, framework="pt", device="cpu", backend="pread") as file:
                return {key: self._checked(key, file.get_tensor(key)) for key in keys}
        except SafetensorError as error:
            raise BadWeights(f"{self.subject} is no valid safetensors file: {error}") from error

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            raise BadWeights(f"{self.subject}: tensor {quote(key)} is empty. {_MALFORMED}.")
        # No copy, unlike isfinite().all(); both extremes are NaN where any value is.
        if tensor.is_floating_point() and not all(
            torch.isfinite(extreme) for extreme in torch.aminmax(tensor)
        ):
            raise BadWeights(
                f"{self.subject}: tensor {quote(key)} has values that are not finite. The training"
                " diverged: use an earlier checkpoint, or a lower learning rate."
            )
        return tensor


def open_safetensors(path: Path, subject: str) -> SafetensorsFile:
    """Check the header of a safetensors file. Raises BadWeights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            fault = f"its header alone is {length} bytes long, and the file {size}"
            raise BadWeights(f"{subject} is cut short: {fault}. Get it again.")
        if length > MAX_HEADER_BYTES:
            fault = f"a header of {length} bytes; {MAX_HEADER_BYTES} are allowed"
            raise BadWeights(f"{subject}: {fault}. Save it again with less metadata.")
        content = file.read(length)
    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
        metadata, tensors = _check(header, size - 8 - length)
    except RecursionError:
        raise BadWeights(f"{subject}: its header is nested too deep. {_MALFORMED}.") from None
    except ValueError as error:  # also what json and utf-8 raise
        fault = f"is no valid safetensors file: {str(error)[:300]}"
        raise BadWeights(f"{subject} {fault}. {_MALFORMED}.") from error
    return SafetensorsFile(path, subject, tensors, metadata)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _check(header: object, data_bytes: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Everything the format demands of a header; ValueError says what is wrong."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not texts")
    if not header:
        raise ValueError("it holds no tensors")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors; {MAX_TENSORS} are allowed")
    tensors = {}
    spans = []
    for key, entry in header.items():
        tensors[key], span = _check_entry(key, entry)
        spans.append((*span, key))
    end = 0
    for start, stop, key in sorted(spans):
        if start != end:
            fault = "overlaps another" if start < end else "leaves a gap before it"
            raise ValueError(f"tensor {quote(key)} {fault}")
        end = stop
    if end != data_bytes:
        fault = "cut short" if end > data_bytes else "followed by other bytes"
        raise ValueError(f"it is {fault}: its tensors take {end} bytes, and it has {data_bytes}")
    return metadata, tensors


def _check_entry(key: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    shown = quote(key)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {shown} has the unknown type {quote(str(dtype))}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {shown} has the impossible shape {quote(str(shape))}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown} has the impossible offsets {quote(str(offsets))}")
    n_bytes = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != n_bytes:
        raise ValueError(f"tensor {shown} has {offsets[1] - offsets[0]} bytes, and needs {n_bytes}")
    return TensorInfo(dtype, tuple(shape)), (offsets[0], offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
