"""Archives as bytes."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path


def tar_bytes(members, format=tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    """A tar of {name: content}, or of (TarInfo, content) pairs in order."""
    pairs = members.items() if isinstance(members, dict) else members
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for info, content in pairs:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def tar_members(path: Path) -> dict[str, bytes]:
    """Return the contents of the files in a tar that is not compressed, by name.

    Read and not extracted: `extractall` has its `filter` since Python 3.11.4 only.
    """
    with tarfile.open(path, "r:") as tar:
        return {info.name: tar.extractfile(info).read() for info in tar if info.isfile()}


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_bytes(members, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of {name: content}, or of (ZipInfo, content) pairs in order."""
    pairs = members.items() if isinstance(members, dict) else members
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for info, content in pairs:
            archive.writestr(info, content, compression)
    return stream.getvalue()


def gz_bytes(content: bytes) -> bytes:
    return gzip.compress(content, 9, mtime=0)
