"""Names and addresses that lead where a test says: the lookup and the connection are replaced."""

import errno
import os
import socket
from collections.abc import Callable

Place = tuple[str, int]


def lookup(
    dns: dict[str, list[list[str]]], on_lookup: Callable[[str], object]
) -> Callable[..., list[tuple]]:
    """For socket.getaddrinfo: `dns` has each name's successive answers, of which the last stays."""
    real = socket.getaddrinfo

    def answer(host, port, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in dns:
            if ":" in name or name.replace(".", "").isdigit():
                return real(host, port, *args, **kwargs)  # a number, not a name
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        on_lookup(name)
        addresses = dns[name].pop(0) if len(dns[name]) > 1 else dns[name][0]
        families = [socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (ip, port))
            for family, ip in zip(families, addresses, strict=True)
        ]

    return answer


def connect(
    dns: dict[str, list[list[str]]],
    routes: dict[str, int],
    on_connect: Callable[[Place], object],
) -> Callable[..., socket.socket]:
    """For socket.create_connection: `routes` says which addresses lead to a port of this machine.

    This machine itself can be reached, and nothing else.
    """
    real = socket.create_connection

    def go(place, *args, **kwargs):
        on_connect(place)
        host = dns[place[0]][0][0] if place[0] in dns else place[0]
        if host in routes:
            return real(("127.0.0.1", routes[host]), *args, **kwargs)
        if host == "127.0.0.1":
            return real((host, place[1]), *args, **kwargs)
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    return go
