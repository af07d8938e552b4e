"""References, names and answers that weights are not fetched from, with what the refusals say.

Tests of the parts and of the server share them.
"""

import random

from tests.helpers.fake_web import PUBLIC, Page
from weights import errors

CONTENT = random.Random(2).randbytes(200_000)

# One a word, so that they are easy to compare.
REFERENCES = r"""
/etc/passwd  ../../secret.safetensors  ./lora.safetensors  ~/lora.safetensors  lora.safetensors
file:///etc/passwd  file://files.example/x  FILE:/etc/passwd  s3://bucket/x  gs://bucket/x
ftp://files.example/x  gopher://files.example:70/x  ssh://files.example  javascript://x  http:x
http://files.example/x  https://  https:///x  https:/files.example/x  //files.example/x
https://user:secret@files.example/x  https://secret@files.example/x  https://@127.0.0.1/x
https://files.example@127.0.0.1/x  https://127.0.0.1\@files.example/x
https://files.example:99999/  https://127.0.0.1/x  https://127.1/x  https://127.0.0.1./x
https://0/x  https://0.0.0.0/x  https://2130706433/x  https://0x7f000001/x  https://0x7f.0.0.1/x
https://0177.0.0.1/x  https://017700000001/x  https://127.0.0.01/x  https://%31%32%37.0.0.1/x
https://１２７.0.0.1/x  https://files.example%2f@127.0.0.1/  https://169.254.169.254/latest/meta-data
https://10.1.2.3/x  https://172.16.0.1/x  https://192.168.1.1/x  https://100.64.0.1/x
https://100.100.100.200/x  https://168.63.129.16/x  https://224.0.0.1/x  https://255.255.255.255/x
https://198.18.0.1/x  https://[::1]/x  https://[::]/x  https://[::ffff:127.0.0.1]/x
https://[::ffff:a9fe:a9fe]/x  https://[::127.0.0.1]/x  https://[64:ff9b::10.0.0.1]/x
https://[64:ff9b:1::1]/x  https://[2002:7f00:1::]/x  https://[2001:0:4136:e378::1]/x
https://[fd00:ec2::254]/x  https://[fe80::1]/x  https://[fe80::1%25eth0]/x
https://[2606:4700::1%25eth0]/x  https://[fec0::1]/x  https://[ff02::1]/x  https://[2001:db8::1]/x
https://[::1  https://-x-/y  https://a..b:x/  acme  acme/  /lora  acme/lora/file.safetensors
acme/../lora  acme/lora:../x.safetensors  acme/lora:/etc/x.tar  acme/lora:model.bin
acme/lora:a.ckpt  acme/lora@../x  acme/lora@:x.tar  acme/lora@v1/../..:x.tar  acme/lora:a//b.tar
acme/lo--ra  acme/lora.git  acmé/lora  https://huggingface.co/acme
https://huggingface.co/acme/lora/resolve/main/x.pt
https://huggingface.co/acme/lora/blob/main/..%2Fx.tar  https://civitai.com/models/abc
https://civitai.com/models/1?modelVersionId=2%2F..  data:,hello  data:text/plain;base64,!!!!
data:;base64,  data:application/octet-stream,AAAA
""".split()  # noqa: SIM905
WITH_BLANKS = ["", " ", "https://a b/x", "acme/lo ra", "https://files.example/a\r\nHost:b", "a/b\0"]

# What a name resolves to: one address that is not public is enough.
NOT_PUBLIC = [
    ["127.0.0.1"],
    [PUBLIC, "10.0.0.1"],
    [PUBLIC, "::1"],
    ["::ffff:169.254.169.254"],
    ["fd00::1"],
]

# Where a redirect leads; inner.example is 192.168.0.7.
BAD_PLACES = """
http://files.example/x  https://127.0.0.1/x  https://169.254.169.254/x  https://[::1]/x
https://[::ffff:10.0.0.1]/x  https://2130706433/x  https://0x7f.1/x  https://[64:ff9b::a00:1]/x
https://127.1/x  https://inner.example/x  https://user:pw@cdn.example/x  file:///etc/passwd
ftp://cdn.example/x  //127.0.0.1/x  https://[fe80::1%25eth0]/x
""".split()  # noqa: SIM905

ENDLESS = Page(b"x" * 50_000, framing="chunked", endless=True, etag=None, ranges=False)
BAD_ANSWERS: dict[str, tuple[Page, type[errors.DownloadError], str]] = {
    "401": (Page(status=401), errors.AccessDenied, "token"),
    "403": (Page(status=403), errors.AccessDenied, "expired"),
    "404": (Page(status=404), errors.NotOnServer, "check the address"),
    "418": (Page(status=418), errors.DownloadError, "418"),
    "304 unasked": (Page(status=304), errors.DownloadError, "304"),
    "503": (Page(status=503), errors.TransferFailed, "gave up after 3"),
    "asks for too much patience": (
        Page(status=429, headers=(("Retry-After", "99"),)),
        errors.TransferFailed,
        "99 s",
    ),
    "web page": (
        Page(b"<html>", headers=(("Content-Type", "text/html; charset=utf-8"),)),
        errors.NotOnServer,
        "a web page came",
    ),
    "packed": (
        Page(b"\x1f\x8b", headers=(("Content-Encoding", "gzip"),)),
        errors.DownloadError,
        "packed",
    ),
    "empty": (Page(b"", ranges=False), errors.NotOnServer, "empty"),
    "announces too much": (Page(CONTENT, announced=10**13), errors.TooLarge, "1000000 bytes"),
    "endless": (ENDLESS, errors.TooLarge, "1000000 bytes"),
    "no end marked": (
        Page(CONTENT, framing="none", ranges=False),
        errors.DownloadError,
        "does not say where the file ends",
    ),
    "announced longer than it is": (
        Page(CONTENT, announced=len(CONTENT) + 9, ranges=False),
        errors.TransferFailed,
        "200000 of 200009|peer closed",
    ),
    "range longer than the file": (
        Page(CONTENT, announced=len(CONTENT) - 9, framing="chunked"),
        errors.ChecksumMismatch,
        "199991 are expected",
    ),
}
