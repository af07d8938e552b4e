"""Loaded by every Python process of a server under test, which has this folder in PYTHONPATH.

In the worker, names and addresses become the test's, waiting between tries and the size of a file
are cut short, and a record is kept of where the worker connects, what it writes and what it runs.
FAKE_NAMES says which and where to: see tests/server/internet.py.
"""

import json
import os
import socket
import sys

# Event of Python's audit hooks → which of its arguments is the path that comes to be or changes.
WRITES = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "os.truncate": 0}
RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
RUNS |= {"pickle.find_class"}


def become_the_tests(settings: dict) -> None:
    from tests.helpers import fake_names
    from weights import retry
    from weights.user import resolve

    file = os.open(settings["record"], os.O_WRONLY | os.O_APPEND)

    def record(what: str, *details: object) -> None:
        os.write(file, json.dumps([what, *map(str, details)]).encode() + b"\n")

    def whole(path: str | bytes) -> str:
        return os.path.abspath(os.fsdecode(path))  # noqa: PTH100  links are not followed

    def hear(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(path, int):
                record("write", whole(path))
        elif event in WRITES:
            record("write", whole(arguments[WRITES[event]]))
        elif event == "socket.connect":
            record("socket", *arguments[1][:2])
        elif event in RUNS:
            record("run", event, arguments)

    dns, routes = settings["dns"], settings["routes"]
    socket.getaddrinfo = fake_names.lookup(dns, lambda _: None)
    socket.create_connection = fake_names.connect(dns, routes, lambda to: record("connect", *to))
    retry.sleep = lambda _: None
    resolve.MAX_BYTES = settings["max_bytes"]
    sys.addaudithook(hear)


if "FAKE_NAMES" in os.environ and "_run_worker" in sys.orig_argv[-1]:
    become_the_tests(json.loads(os.environ["FAKE_NAMES"]))
