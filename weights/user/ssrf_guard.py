"""Restrict where users can make this machine connect to: public addresses, over https.

The check is part of the connection: `GuardedTransport` looks a host up once, refuses it if any of
its addresses is not public, and connects to one of exactly those addresses. So neither a changing
DNS answer (rebinding) nor a redirect gets past it; TLS still verifies the name, and `Host` and SNI
keep it. Proxies from the environment are not used: a proxy would look the name up again, itself.

`WEIGHTS_ALLOW_HOSTS` is the operator's exception: `files.internal,http://127.0.0.1:8000`. Without a
scheme, or with https://, an entry lifts the rule about addresses; with http:// also the one about
https. Without a port it means the scheme's own.
"""

import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator

import httpcore
import httpx

from weights.errors import RefusedAddress, TransferFailed, WrongSetting

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0  # without any byte
MINIMUM_RATE = 16 << 10  # bytes per second, over every PACE_WINDOW_S of waiting for the server
PACE_WINDOW_S = 60.0
LONGEST_FETCH_S = 3600.0  # one file, with all redirects and retries
MOST_ADDRESSES_TRIED = 4

REMEDY = "give an https:// address on the public internet"
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# Not ipaddress.is_global, whose answers differ between Python's patch releases.
# https://www.iana.org/assignments/iana-ipv4-special-registry
_IPV4_REFUSED = [
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # public by number, but Azure's wire server to every machine there
    )
]
# https://www.iana.org/assignments/iana-ipv6-special-registry: of the one block that is handed out,
# without protocol assignments (Teredo among them), documentation and 6to4.
_IPV6_GLOBAL = ipaddress.IPv6Network("2000::/3")
_IPV6_REFUSED = [
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: how IPv6-only networks reach IPv4

_HOST = re.compile(r"[a-z0-9]([a-z0-9_.-]*[a-z0-9_])?\.?")
_NUMERIC_LABEL = re.compile(r"0x[0-9a-f]*|[0-9]+")  # as last label: some spelling of IPv4 (WHATWG)


def is_public(address: IPAddress) -> bool:
    """Return whether an address is on the public internet, also behind IPv6's forms of IPv4."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _IPV4_REFUSED)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _IPV6_GLOBAL and not any(address in network for network in _IPV6_REFUSED)


def broken_rule(url: httpx.URL) -> str | None:
    """Return which rule for users' addresses `url` breaks; None for none that shows before DNS."""
    scheme, host = url.scheme, _host(url)
    if url.userinfo:
        return "an address must not hold a user name or password"
    if scheme not in ("https", "http") or not host:
        return "only https:// addresses are fetched"
    if not 0 < _port(url) < 1 << 16:
        return "its port is not one"
    allowed_over_http = _allowed_hosts().get((host, _port(url)))
    if scheme == "http" and not allowed_over_http:
        return "only https:// addresses are fetched"
    literal = _literal(host)
    if literal is None:
        if not _HOST.fullmatch(host):
            return "its host is not a host name"
        if _NUMERIC_LABEL.fullmatch(host.rstrip(".").rpartition(".")[2]):
            return "its host is an unusual spelling of an IPv4 address"
    elif allowed_over_http is None and not is_public(literal):
        return "its host is not a public address"
    return None


def guarded_client() -> httpx.Client:
    """Return a client for users' addresses, good for one file: LONGEST_FETCH_S starts now.

    Requests raise RefusedAddress where an address is not allowed, TransferFailed when time is up.
    """
    return httpx.Client(
        transport=GuardedTransport(time.monotonic() + LONGEST_FETCH_S),
        timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


class GuardedTransport(httpx.BaseTransport):
    """Checks every request, redirected ones too, and connects to checked addresses only."""

    def __init__(self, deadline: float) -> None:
        self._pool = httpcore.ConnectionPool(
            # SSL_CERT_FILE and SSL_CERT_DIR are the operator's: an own certificate authority.
            ssl_context=httpx.create_ssl_context(trust_env=True),
            network_backend=_GuardedBackend(deadline),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. Raises RefusedAddress, and httpcore's errors as they are."""
        url = request.url
        rule = broken_rule(url)
        if rule is not None:
            raise RefusedAddress(f"{shown_url(url)}: {rule}; {REMEDY}")
        response = self._pool.handle_request(
            httpcore.Request(
                request.method,
                httpcore.URL(
                    scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                ),
                headers=request.headers.raw,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=response.extensions,
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        yield from self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


class _GuardedBackend(httpcore.NetworkBackend):
    """Looks hosts up, checks the addresses and connects: the only place that does."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._network = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in _checked_addresses(host, port)[:MOST_ADDRESSES_TRIED]:
            try:
                stream = self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            return _PacedStream(stream, self._deadline)
        raise failure


class _PacedStream(httpcore.NetworkStream):
    """Ends a connection that is kept open by a trickle of bytes; headers count as well as content.

    Only time spent waiting for the server counts, not what we do between two reads.
    """

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline
        self._waited_s = 0.0  # in this window
        self._bytes = 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left_s = PACE_WINDOW_S - self._waited_s
        started = time.monotonic()
        if started > self._deadline:
            raise TransferFailed(
                f"the file takes longer than {LONGEST_FETCH_S:.0f} s. What arrived is kept: run"
                " again to resume"
            )
        data = self._stream.read(max_bytes, min(left_s, timeout or left_s))
        self._waited_s += time.monotonic() - started
        self._bytes += len(data)
        if self._bytes >= MINIMUM_RATE * PACE_WINDOW_S:
            self._waited_s, self._bytes = 0.0, 0
        elif data and self._waited_s >= PACE_WINDOW_S:
            raise httpcore.ReadTimeout(f"only {self._bytes} bytes in {PACE_WINDOW_S:.0f} s")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, timeout)
        return _PacedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def shown_url(url: httpx.URL) -> str:
    """Return an address for messages: without query, which may hold a signature, and user name."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


def _checked_addresses(host: str, port: int) -> list[str]:
    """Look `host` up, once. Raises RefusedAddress if any of its addresses is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore.ConnectError(f"{host} cannot be looked up: {error}") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    allowed = (host.lower().rstrip("."), port) in _allowed_hosts()
    if not allowed and not all(is_public(ipaddress.ip_address(a)) for a in addresses):
        # Without the address itself: it would be information about the inner network.
        raise RefusedAddress(
            f"{host}: it has an address that is not public; {REMEDY} (who runs this container may"
            f" allow it with WEIGHTS_ALLOW_HOSTS={host}:{port})"
        )
    return addresses


def _allowed_hosts() -> dict[tuple[str, int], bool]:
    """Return WEIGHTS_ALLOW_HOSTS: host and port → whether http is allowed. Raises WrongSetting."""
    allowed: dict[tuple[str, int], bool] = {}
    for entry in os.environ.get("WEIGHTS_ALLOW_HOSTS", "").split(","):
        if not entry.strip():
            continue
        text = entry.strip() if "://" in entry else f"https://{entry.strip()}"
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL:
            url = httpx.URL()
        is_host = bool(_HOST.fullmatch(_host(url)) or _literal(_host(url)))
        if url.scheme not in ("https", "http") or not is_host or url.path not in ("", "/"):
            raise WrongSetting(
                f"WEIGHTS_ALLOW_HOSTS has {entry.strip()!r}: write host, host:port or"
                " http://host:port, with commas between"
            )
        place = _host(url), _port(url)
        allowed[place] = allowed.get(place, False) or url.scheme == "http"
    return allowed


def _host(url: httpx.URL) -> str:
    """Return the host as it is looked up: ASCII, lower case, without the dot of the root."""
    return url.raw_host.decode("ascii").lower().rstrip(".")


def _port(url: httpx.URL) -> int:
    if url.port is not None:
        return url.port
    return 80 if url.scheme == "http" else 443


def _literal(host: str) -> IPAddress | None:
    """Return the address that `host` is, in its canonical spelling; None for a name."""
    try:
        return ipaddress.ip_address(host) if "%" not in host else None  # %eth0: a zone
    except ValueError:
        return None
