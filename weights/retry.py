"""Trying again: what is worth it, how often, how long to wait in between."""

import email.utils
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import httpx

from weights.errors import TransferFailed

PROGRESS_BYTES = 1 << 20  # a try that brought this much was no failure of the server

T = TypeVar("T")


class TemporaryFailure(Exception):
    """Something that may work a moment later; `retry_after_s` is what the server asked for."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently. `tries` counts failures in a row without progress."""

    tries: int
    first_wait_s: float  # doubled after each failure, up to longest_wait_s
    longest_wait_s: float
    longest_retry_after_s: float  # a server that asks for more is taken as a refusal
    sleep: Callable[[float], None]
    remedy: str  # what to do when patience ends, after "run again to resume, or"


RETRY = RetryPolicy(
    tries=6,
    first_wait_s=1.0,
    longest_wait_s=30.0,
    longest_retry_after_s=300.0,
    sleep=time.sleep,
    remedy="set WEIGHTS_MIRROR or HF_ENDPOINT to another server",
)
# For a file that somebody waits for, at an address that may well be mistyped: about three seconds.
FOR_PEOPLE = replace(
    RETRY, tries=3, longest_retry_after_s=30.0, remedy="bring the file from another address"
)


def with_retries(attempt: Callable[[], T], policy: RetryPolicy, progress: Callable[[], int]) -> T:
    """Run `attempt` until it stops raising TemporaryFailure, or raise TransferFailed.

    `progress()` is a number of bytes; a failure after real progress starts the count again.
    """
    failures = 0
    while True:
        before = progress()
        try:
            return attempt()
        except TemporaryFailure as failure:
            failures = 1 if progress() - before >= PROGRESS_BYTES else failures + 1
            wait_s = _wait_s(failure, failures, policy)
            if wait_s is None or failures >= policy.tries:
                asked = failure.retry_after_s
                why = f" (it asks to wait {asked:.0f} s)" if asked is not None else ""
                raise TransferFailed(
                    f"{failure}{why}; gave up after {failures} failures. What arrived is kept: run"
                    f" again to resume, or {policy.remedy}"
                ) from failure
            policy.sleep(wait_s)


def is_temporary(status: int) -> bool:
    """Whether an HTTP status may go away by itself."""
    return status in (408, 425, 429, 500, 502, 503, 504)


def retry_after_s(response: httpx.Response) -> float | None:
    """The Retry-After header, seconds or a date, as seconds from now (RFC 9110 §10.2.3)."""
    value: str | None = response.headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - time.time())


def _wait_s(failure: TemporaryFailure, failures: int, policy: RetryPolicy) -> float | None:
    """Seconds to wait before the next try; None for longer than the policy allows."""
    if failure.retry_after_s is not None:
        allowed = failure.retry_after_s <= policy.longest_retry_after_s
        return failure.retry_after_s if allowed else None
    wait_s: float = min(policy.longest_wait_s, policy.first_wait_s * 2 ** (failures - 1))
    return wait_s * random.uniform(0.5, 1.0)  # jitter: many containers may start together
