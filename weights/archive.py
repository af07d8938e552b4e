"""The useful files of an archive that a stranger made, in a private folder, under our names."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from weights.errors import BadWeights, NotEnoughDisk
from weights.recognise import PICKLE_REFUSED, PICKLE_SUFFIXES, READABLE, Container, quote
from weights.unpack import Limits, OpenMember, disk_full_is, read_members

MAX_MEMBERS = 1000
MAX_TOTAL_BYTES = 12_000_000_000  # SDXL's UNet in fp32 is 10.3 GB
MAX_LORA_BYTES = 4_000_000_000  # rank 256 on every layer in fp32 is 3.4 GB
MAX_TOKENS_BYTES = 1_000_000_000
MAX_JSON_BYTES = 1_000_000
# Trained weights hardly shrink, but matrices of zeros do: small archives may expand as they like.
MAX_RATIO = 200
FREE_BYTES = 64_000_000

JSON_NAMES = ("special_params.json", "adapter_config.json")


@dataclass(frozen=True)
class Member:
    """One useful file of an archive."""

    name: str  # as the archive calls it; for messages and stems, never a path on disk
    path: Path  # where it is, inside the private folder


@dataclass
class _Unpacking:
    """What has been taken out so far, and where to."""

    subject: str
    folder: Path
    ignored: list[str] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)

    def bad(self, fault: str, remedy: str) -> BadWeights:
        return BadWeights(f"{self.subject} {fault}. {remedy}.")

    def refuse_pickles(self, names: list[str]) -> None:
        """PyTorch's own format is a zip with a pickle of this name."""
        if any(PurePosixPath(name).name == "data.pkl" for name in names):
            raise BadWeights(f"{self.subject} is {PICKLE_REFUSED}.")


@contextmanager
def unpacked(path: Path, container: Container, name: str) -> Iterator[list[Member]]:
    """The useful members of an archive; their files are gone when the block is left.

    Every member is checked, also those that are left alone. Raises BadWeights, or NotEnoughDisk.
    """

    def disk_full() -> NotEnoughDisk:
        return NotEnoughDisk(
            f"{name} does not fit into {tempfile.gettempdir()}: free some room there, or"
            " set TMPDIR to a folder with more"
        )

    limits = Limits(MAX_MEMBERS, MAX_TOTAL_BYTES, MAX_RATIO, FREE_BYTES, "Pack only the weights")
    with tempfile.TemporaryDirectory(prefix="trained-weights-") as folder:
        unpacking = _Unpacking(f"{name} (an archive)", Path(folder))
        with disk_full_is(disk_full):
            for member in read_members(
                path, container, limits, unpacking.bad, unpacking.refuse_pickles
            ):
                _take(member, unpacking)
        if not any(member.path.suffix == ".safetensors" for member in unpacking.members):
            raise _nothing_useful(unpacking)
        yield unpacking.members


def _limit(name: str) -> int | None:
    """How large a member may be, in bytes; None for one that is left alone."""
    path = PurePosixPath(name.replace("\\", "/"))
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return None
    if path.name in JSON_NAMES:
        return MAX_JSON_BYTES
    if path.suffix.lower() == ".pti":
        return MAX_TOKENS_BYTES
    if path.suffix.lower() == ".safetensors":
        return MAX_TOTAL_BYTES if "unet" in path.name else MAX_LORA_BYTES
    return None


def _take(member: OpenMember, unpacking: _Unpacking) -> None:
    limit = _limit(member.name)
    if limit is None:
        unpacking.ignored.append(member.name)
        return
    if member.size > limit:
        raise unpacking.bad(
            f"has a member {quote(member.name)} of {member.size} bytes; {limit} are allowed",
            "Save the weights in float16",
        )
    base = PurePosixPath(member.name.replace("\\", "/")).name
    if any(
        PurePosixPath(other.name.replace("\\", "/")).name == base for other in unpacking.members
    ):
        raise unpacking.bad(f"has two members called {quote(base)}", "Pack the one that you mean")
    suffix = ".json" if base.endswith(".json") else ".safetensors"  # a .pti is safetensors too
    path = unpacking.folder / f"{len(unpacking.members)}{suffix}"
    member.save(path)
    unpacking.members.append(Member(member.name, path))


def _nothing_useful(unpacking: _Unpacking) -> BadWeights:
    names = [*unpacking.ignored, *(member.name for member in unpacking.members)]
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return BadWeights(f"{unpacking.subject}: {quote(pickles[0])} is {PICKLE_REFUSED}.")
    shown = ", ".join(quote(name) for name in names[:8]) or "nothing at all"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return unpacking.bad(f"has no safetensors file in it, but {shown}{more}", READABLE)
