"""Parse what users write to name weights, without a network.

    https://files.example/lora.safetensors         a file on the public internet
    owner/name[@revision][:folder/file.safetensors]  a repository on the hub
    https://huggingface.co/owner/name[/tree|blob|resolve/...]  the same, copied from its page
    https://civitai.com/models/1[?modelVersionId=2]  a model on Civitai, copied from its page
    data:[type][;name=file.safetensors];base64,... the file itself

The operator, who sets COG_WEIGHTS, may also name a file on the disk, http and inner addresses.
"""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import httpx

from weights.errors import InvalidSource
from weights.user.ssrf_guard import REMEDY, broken_rule

OPERATOR = "COG_WEIGHTS"
MAX_INLINE_BYTES = 300_000_000  # decoded
MAX_REFERENCE_CHARACTERS = 8192  # of anything but data:
SUFFIXES = (".safetensors", ".tar", ".tar.gz", ".tgz", ".zip")

_SHOWN_CHARACTERS = 100
_MAX_PATH_CHARACTERS = 4000
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_CIVITAI_HOSTS = ("civitai.com", "www.civitai.com")
_FORMS = (
    "give an https:// address, a hub repository as owner/name or owner/name:file.safetensors, or"
    " the file itself as data:...;base64,..."
)
# As huggingface_hub.utils.validate_repo_id, without its import.
_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,200}", re.ASCII)
_HUB = re.compile(r"(?P<repo>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?=//)|data:|file:", re.ASCII | re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\xa0\\]")


@dataclass(frozen=True)
class WebFile:
    """A file at an address; with `trusted` the rules for users' addresses are off."""

    name: str
    url: str = field(repr=False)  # may hold a signature
    trusted: bool


@dataclass(frozen=True)
class CivitaiModel:
    """The newest version of a model on Civitai."""

    name: str
    model: int


@dataclass(frozen=True)
class HubRepository:
    """A file of a repository on the hub; which one is chosen later, where `file` is None."""

    name: str
    repo: str
    revision: str
    file: str | None


@dataclass(frozen=True)
class InlineFile:
    """The content itself."""

    name: str
    file_name: str  # "" where the reference names none
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine's disk, named by the operator."""

    name: str
    path: Path


Source = WebFile | CivitaiModel | HubRepository | InlineFile | LocalFile


@dataclass(frozen=True)
class Tokens:
    """Secrets, each sent to the host that it is for and over https only. None: nothing is sent.

    The operator's HF_TOKEN is used only if it is passed here: with it, whoever may name weights
    may read what the operator may read.
    """

    hub: str | None = field(repr=False)
    civitai: str | None = field(repr=False)

    def __post_init__(self) -> None:
        for name, value in (("hf_api_token", self.hub), ("civitai_api_token", self.civitai)):
            # Else an HTTP library would refuse the header, quoting it.
            if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value):
                raise InvalidSource(
                    f"{name} is empty, or has a blank, a line break or a character beyond ASCII;"
                    " copy it again"
                )


def parse_source(reference: str, name: str) -> Source:
    """Parse `reference`, the value of the input `name`. Raises InvalidSource."""
    return _parse(reference.strip(), name, trusted=False)


def parse_operator_source(reference: str) -> Source:
    """Parse COG_WEIGHTS; a path begins with / ./ ../ ~/ or file:, or is that of a file.

    Raises InvalidSource.
    """
    text = reference.strip()
    if len(text) <= _MAX_PATH_CHARACTERS and "\0" not in text:
        path = Path(re.sub(r"^file:(//(localhost)?(?=/))?", "", text))
        if text.startswith("~/"):
            path = path.expanduser()
        if path.is_file():
            return LocalFile(OPERATOR, path)
        if re.match(r"/|\.\.?/|~/|file:", text):
            raise _invalid(text, OPERATOR, "no such file", "check the path inside the container")
    return _parse(text, OPERATOR, trusted=True)


def shown(reference: str) -> str:
    """Return a reference for messages: shortened, without query, user name or content."""
    if reference[:5].lower() == "data:":
        return reference[:5] + "…"
    text = re.sub(r"[?#].*", "", reference[: 10 * _SHOWN_CHARACTERS], flags=re.DOTALL)
    text = re.sub(r"//.*@", "//…@", text, flags=re.DOTALL)
    text = re.sub(r"^[^/]*:[^/]*@", "…@", text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _parse(text: str, name: str, trusted: bool) -> Source:
    if text[:5].lower() == "data:":
        return _inline(text, name)
    if len(text) > MAX_REFERENCE_CHARACTERS:
        rule = f"longer than {MAX_REFERENCE_CHARACTERS} characters"
        raise _invalid(text, name, rule, _FORMS)
    if _UNPRINTABLE.search(text):
        raise _invalid(text, name, "has a blank, backslash or control character", _FORMS)
    if _SCHEME.match(text):
        return _web(text, name, trusted)
    found = _HUB.fullmatch(text)
    if found is None or not _REPO.fullmatch(found["repo"]):
        raise _invalid(text, name, "neither an address nor a repository on the hub", _FORMS)
    return _repository(found["repo"], found["revision"] or "main", found["file"], text, name)


def _inline(text: str, name: str) -> InlineFile:
    head, comma, payload = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        rule = "a data: URL of another form than data:...;base64,..."
        raise _invalid(text, name, rule, "encode the file with base64")
    if len(payload) * 3 // 4 > MAX_INLINE_BYTES + 2:
        rule = f"more than {MAX_INLINE_BYTES} bytes in a data: URL"
        raise _invalid(text, name, rule, "put the file at an https:// address")
    try:
        content = base64.b64decode(payload, validate=True)
    except ValueError:
        raise _invalid(text, name, "its base64 is damaged", "encode the file again") from None
    if not content:
        raise _invalid(text, name, "an empty file", "encode a weights file")
    named = re.search(r";(?:file)?name=([^;]+)", head, re.IGNORECASE)
    return InlineFile(name, PurePosixPath(unquote(named[1])).name if named else "", content)


def _web(text: str, name: str, trusted: bool) -> Source:
    """Parse an address; pages of the hub and of Civitai mean what they are about."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise _invalid(text, name, "not an address", _FORMS) from None
    if not trusted:
        rule = broken_rule(url)
        if rule is not None:
            raise _invalid(text, name, rule, REMEDY)
    elif url.scheme not in ("https", "http") or not url.host:
        raise _invalid(text, name, "not an https:// or http:// address", _FORMS)
    if url.scheme == "https" and url.port is None:
        parts = [unquote(part) for part in url.raw_path.decode().partition("?")[0].split("/")[1:]]
        if url.host in _HUB_HOSTS and parts[0] not in ("datasets", "spaces"):
            return _hub_page([part for part in parts if part], text, name)
        if url.host in _CIVITAI_HOSTS and parts[0] == "models" and len(parts) > 1:
            return _civitai_page(parts[1], url.params.get("modelVersionId"), text, name)
    return WebFile(name, text, trusted)


def _hub_page(parts: list[str], text: str, name: str) -> HubRepository:
    """Parse huggingface.co/owner/name[/tree/revision | /resolve|blob|raw/revision/file]."""
    if len(parts) == 2 or (len(parts) == 4 and parts[2] == "tree"):
        return _repository("/".join(parts[:2]), (parts[3:] or ["main"])[0], None, text, name)
    if len(parts) >= 5 and parts[2] in ("resolve", "blob", "raw"):
        return _repository("/".join(parts[:2]), parts[3], "/".join(parts[4:]), text, name)
    rule = "not the page of a repository or of a file on the hub"
    raise _invalid(text, name, rule, "copy the address of a file's page, or write owner/name:file")


def _civitai_page(model: str, version: str | None, text: str, name: str) -> WebFile | CivitaiModel:
    """Parse civitai.com/models/id[/title][?modelVersionId=version]."""
    if not all(each.isascii() and each.isdigit() for each in (model, version or "0")):
        rule = "not the page of a model on Civitai"
        raise _invalid(text, name, rule, "copy the address of the model's page")
    if version is None:
        return CivitaiModel(name, int(model))
    # Not `trusted`: nothing about this address is the operator's choice.
    return WebFile(name, f"https://civitai.com/api/download/models/{version}", trusted=False)


def _repository(repo: str, revision: str, file: str | None, text: str, name: str) -> HubRepository:
    if not _REPO.fullmatch(repo) or re.search(r"--|\.\.|[.-]$|\.git$", repo):
        raise _invalid(text, name, "no repository on the hub can have this name", _FORMS)
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        rule = "no branch, tag or commit can have this name"
        raise _invalid(text, name, rule, "write owner/name@revision:file.safetensors")
    if file is not None:
        if not set(file.split("/")).isdisjoint({"", ".", ".."}):
            raise _invalid(text, name, "the file's path is not one inside a repository", _FORMS)
        if not file.lower().endswith(SUFFIXES):
            rule = f"the file is none of {', '.join(SUFFIXES)}"
            raise _invalid(text, name, rule, "name a safetensors file or an archive that holds one")
    return HubRepository(name, repo, revision, file)


def _invalid(text: str, name: str, rule: str, remedy: str) -> InvalidSource:
    return InvalidSource(f"{name}={shown(text)!r}: {rule}; {remedy}")
