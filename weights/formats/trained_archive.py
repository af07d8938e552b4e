"""Take the useful files of an untrusted archive of trained weights into a private folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from weights.errors import BadWeights, DiskFull
from weights.formats.archive import ArchiveError, Container, Limits, Member, read_members
from weights.formats.detect import PICKLE_REFUSED, PICKLE_SUFFIXES, READABLE
from weights.messages import disk_full_raises, quote, quote_list

MAX_MEMBERS = 1000
MAX_TOTAL_BYTES = 12_000_000_000  # SDXL's UNet in fp32 is 10.3 GB
MAX_LORA_BYTES = 4_000_000_000  # rank 256 on every layer in fp32 is 3.4 GB
MAX_EMBEDDING_BYTES = 1_000_000_000
MAX_JSON_BYTES = 1_000_000
# Trained weights hardly shrink, but matrices of zeros do: small archives may expand as they like.
MAX_RATIO = 200
FREE_BYTES = 64_000_000

JSON_NAMES = ("special_params.json", "adapter_config.json")


@dataclass(frozen=True)
class TrainedFile:
    """One useful file of an archive."""

    name: str  # as the archive calls it; for messages, never a path on disk
    path: Path  # inside the private folder

    @property
    def base_name(self) -> str:
        """The name without its folders."""
        return _posix(self.name).name


@dataclass
class _Extraction:
    folder: Path
    ignored: list[str] = field(default_factory=list)
    files: list[TrainedFile] = field(default_factory=list)


@contextmanager
def extracted(path: Path, container: Container, name: str) -> Iterator[list[TrainedFile]]:
    """Extract the safetensors and JSON files of an archive; they are gone when the block is left.

    `name` is the input's. Raises BadWeights, or DiskFull.
    """

    def disk_full() -> DiskFull:
        return DiskFull(
            f"{name} does not fit into {tempfile.gettempdir()}: free some room there, or"
            " set TMPDIR to a folder with more"
        )

    limits = Limits(MAX_MEMBERS, MAX_TOTAL_BYTES, MAX_RATIO, FREE_BYTES, "Pack only the weights")
    with tempfile.TemporaryDirectory(prefix="trained-weights-") as folder:
        extraction = _Extraction(Path(folder))
        try:
            with disk_full_raises(disk_full):
                for member in read_members(path, container, limits):
                    _take(member, extraction)
            if not any(file.path.suffix == ".safetensors" for file in extraction.files):
                raise _nothing_useful(extraction)
        except ArchiveError as error:
            raise BadWeights(f"{name} (an archive) {error}") from error
        yield extraction.files


def _posix(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))


def _limit(name: str) -> int | None:
    """Return how many bytes a member may have; None for one that is ignored."""
    path = _posix(name)
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return None
    if path.name in JSON_NAMES:
        return MAX_JSON_BYTES
    if path.suffix.lower() == ".pti":
        return MAX_EMBEDDING_BYTES
    if path.suffix.lower() == ".safetensors":
        return MAX_TOTAL_BYTES if "unet" in path.name else MAX_LORA_BYTES
    return None


def _take(member: Member, extraction: _Extraction) -> None:
    base = _posix(member.name).name
    if base == "data.pkl":  # PyTorch's own format is a zip with a pickle of this name
        raise ArchiveError(f"is {PICKLE_REFUSED}", READABLE)
    limit = _limit(member.name)
    if limit is None:
        extraction.ignored.append(member.name)
        return
    if member.size > limit:
        raise ArchiveError(
            f"has a member {quote(member.name)} of {member.size} bytes; {limit} are allowed",
            "Save the weights in float16",
        )
    if any(file.base_name == base for file in extraction.files):
        raise ArchiveError(f"has two members called {quote(base)}", "Pack the one that you mean")
    suffix = ".json" if base.endswith(".json") else ".safetensors"  # a .pti is safetensors too
    path = extraction.folder / f"{len(extraction.files)}{suffix}"
    member.save(path)
    extraction.files.append(TrainedFile(member.name, path))


def _nothing_useful(extraction: _Extraction) -> ArchiveError:
    names = [*extraction.ignored, *(file.name for file in extraction.files)]
    for name in names:
        if name.lower().endswith(PICKLE_SUFFIXES):
            return ArchiveError(f"holds {quote(name)}, {PICKLE_REFUSED}", READABLE)
    return ArchiveError(f"has no safetensors file in it, but {quote_list(names)}", READABLE)
