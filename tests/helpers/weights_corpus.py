"""Every hostile or mistaken reference to weights, for a server whose internet is a fake web.

Files come as data:, where nothing depends on an address or a name; web pages lie below /<number>/.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.helpers.fake_hub import COMMIT
from tests.helpers.fake_web import Page
from tests.helpers.hostile_files import ARCHIVES, CONTAINERS, HEADERS, LORA, UNFIT, with_size
from tests.helpers.hostile_references import BAD_ANSWERS, BAD_PLACES, REFERENCES, WITH_BLANKS
from tests.helpers.trained_files import (
    cog_members,
    gz_bytes,
    tar_bytes,
    tar_info,
    zip_bytes,
)
from tests.helpers.user_weight_fixtures import data_uri
from tests.server.internet import INNER_NAMES, hub_pages
from weights.formats.safetensors_checks import MAX_HEADER_BYTES

BOMB_BYTES = 70_000_000  # more than may be expanded whatever the ratio
TEN_GB = 10 << 30
PICKLE_NAMES = ("x.ckpt", "x.pt", "x.bin", "x.PTH", "x.pkl")
NOT_PUBLIC_RULE = "it has an address that is not public"


@dataclass(frozen=True)
class Case:
    """What somebody names, the pages that it leads to, and what the refusal has to say."""

    name: str
    reference: str
    fault: str  # a regular expression
    pages: dict[str, Page] = field(default_factory=dict, repr=False)


def corpus() -> list[Case]:
    """Every case, the same each time."""
    return [*_references(), *_files(), *_names(), *_answers(), *_lookups(), *_redirects(), *_hub()]


def _references() -> Iterator[Case]:
    too_long = "https://files.example/" + "a" * 9000
    for reference in [*REFERENCES, *filter(str.strip, WITH_BLANKS), too_long]:
        # Quoted as Python does, which escapes what cannot be printed.
        yield Case(f"reference {reference[:60]!r}", reference, r"='[^?#]*': .+; \w")


def _files() -> Iterator[Case]:
    for kind, table in (("header", HEADERS), ("file", CONTAINERS), ("archive", ARCHIVES)):
        for name, (content, fault) in table.items():
            empty = "an empty file" if not content else re.escape(fault)
            yield Case(f"{kind}: {name}", data_uri(content), empty)
    for name, (content, fault) in (_LARGE | UNFIT).items():
        yield Case(f"file: {name}", data_uri(content), re.escape(fault))


def _header_of(length: int) -> bytes:
    return length.to_bytes(8, "little") + b"{" + bytes(length - 1)


def _sparse() -> bytes:
    content = b"1\n0\n0\n".ljust(512, b"\0")  # one piece of no bytes
    fields = {"major": "1", "minor": "0", "realsize": str(TEN_GB)}
    headers = {f"GNU.sparse.{key}": value for key, value in fields.items()}
    info = tar_info("lora.safetensors", size=len(content), pax_headers=headers)
    return tar_bytes([(info, content)])


_BOMB = gz_bytes(tar_bytes({"x.txt": bytes(BOMB_BYTES)}))
_LARGE = {
    "tar.gz bomb": (_BOMB, "expands to more than 200 times its size"),
    "zip bomb": (zip_bytes({"l.safetensors": bytes(BOMB_BYTES)}), "expands to more than 200"),
    "bombs in an archive": (
        zip_bytes({"a.tar.gz": _BOMB, "b.zip": zip_bytes({"x": _BOMB})}),
        "but 'a.tar.gz', 'b.zip'",
    ),
    "10 GB, said in base 256": (
        with_size(b"\x80" + TEN_GB.to_bytes(11, "big")),
        f"of {TEN_GB} bytes; 4000000000 are allowed",
    ),
    "10 GB, sparse": (_sparse(), "not a regular file"),
    "a header of 16 MB": (_header_of(MAX_HEADER_BYTES + 8), "a header of 16000008 bytes"),
    "a header of 100 MB that is not there": (
        (100_000_000).to_bytes(8, "little") + b"{}",
        "its header alone is 100000000 bytes long",
    ),
}


def _page(number: str, page: Page, file: str = "lora.safetensors") -> tuple[str, dict[str, Page]]:
    path = f"/{number}/{file}"
    return f"https://files.example{path}", {path: page}


def _names() -> Iterator[Case]:
    """A file that says it is a pickle is not even opened, whatever is in it."""
    for name in PICKLE_NAMES:
        reference, pages = _page("name", Page(LORA), name)
        yield Case(f"address ends in {name}", reference, "can run code", pages)
        said = (("Content-Disposition", f'attachment; filename="{name}"'),)
        reference, pages = _page(f"said-{name}", Page(LORA, headers=said))
        yield Case(f"server says {name}", reference, "can run code", pages)
        yield Case(f"data: says {name}", data_uri(LORA, name), "can run code")


def _answers() -> Iterator[Case]:
    for name, (page, _, fault) in BAD_ANSWERS.items():
        reference, pages = _page(f"answer {name}".replace(" ", "-"), page)
        yield Case(f"answer: {name}", f"{reference}?sig=hush", fault, pages)
    for name in ("web page", "LFS", "gguf", "torch zip", "empty"):
        content, fault = CONTAINERS[name]
        reference, pages = _page(f"content {name}".replace(" ", "-"), Page(content, ranges=False))
        yield Case(f"content: {name}", reference, re.escape(fault), pages)
    members = tar_bytes({f"../{name}": content for name, content in cog_members().items()})
    reference, pages = _page("slip", Page(members), "trained_model.tar")
    yield Case("zip slip from an address", reference, "points outside of it", pages)
    yield Case("no such host", "https://nowhere.example/x", "nowhere.example cannot be looked up")


def _lookups() -> Iterator[Case]:
    """Names that lead to addresses that are not public, at once or only the second time."""
    for host in INNER_NAMES:
        rule = f"{re.escape(host)}: {NOT_PUBLIC_RULE}"
        yield Case(f"name {host}", f"https://{host}/lora.safetensors", rule)
    rebinding = "https://rebinding.example/rebinding/lora.safetensors"
    page = {"/rebinding/lora.safetensors": Page(LORA)}
    yield Case("rebinding", rebinding, f"rebinding.example: {NOT_PUBLIC_RULE}", page)


def _redirects() -> Iterator[Case]:
    for number, place in enumerate(
        [*BAD_PLACES, "https://metadata.google.internal/computeMetadata"]
    ):
        page = Page(status=302, headers=(("Location", place),))
        reference, pages = _page(f"redirect-{number}", page)
        yield Case(f"redirect to {place}", reference, "https:// address on the public", pages)
    loop = Page(status=302, headers=(("Location", "/loop/lora.safetensors"),))
    reference, pages = _page("loop", loop)
    yield Case("redirect loop", reference, "more than 5 redirects", pages)


def _hub() -> Iterator[Case]:
    gated = Page(status=403, headers=(("X-Error-Code", "GatedRepo"),))
    absent = Page(status=404, headers=(("X-Error-Code", "RepoNotFound"),))
    api = "/api/models/{}/revision/main"
    page = Page(b"<html>", headers=(("Content-Type", "text/html"),), ranges=False)
    false = hub_pages("acme/false", {"x.safetensors": LORA}, COMMIT)
    false[f"/acme/false/resolve/{COMMIT}/x.safetensors"] = Page(LORA[::-1])
    pickles = hub_pages("acme/pickles", {"model.bin": b"x", "model.ckpt": b"x"}, COMMIT)
    several = hub_pages("acme/several", {"a.safetensors": LORA, "b.safetensors": LORA}, COMMIT)
    for name, reference, fault, pages in (
        ("absent", "acme/absent", "check what you wrote", {api.format("acme/absent"): absent}),
        ("gated", "acme/gated", "give an hf_api_token", {api.format("acme/gated"): gated}),
        ("web page", "acme/page", "check HF_ENDPOINT", {api.format("acme/page"): page}),
        ("false hash", "acme/false", "git-sha1 .* are expected", false),
        ("pickles alone", "acme/pickles", "archives: nothing at all", pickles),
        ("several files", "acme/several", "name one as acme/several:file", several),
        ("no such file", "acme/several:c.tar", "c.tar is not in", several),
    ):
        yield Case(f"hub: {name}", reference, fault, pages)
    yield Case("civitai: no such model", "https://civitai.com/models/404", "answered 404")
    no_json = {"/api/v1/models/7": Page(b"[]")}
    yield Case("civitai: nothing in it", "https://civitai.com/models/7", "no version", no_json)
