"""Retries: which failures are worth one, how many, and how long to wait before each (tenacity)."""

import email.utils
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import sleep
from typing import TypeVar

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from weights.errors import TransferFailed

T = TypeVar("T")


class TemporaryFailure(Exception):
    """Something that may work a moment later; `retry_after_s` is what the server demands."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to try."""

    tries: int
    longest_retry_after_s: float  # a server that demands more is taken as a refusal
    remedy: str  # after the last try: "run again to resume, or …"


CATALOG_RETRIES = RetryPolicy(
    tries=6,
    longest_retry_after_s=300.0,
    remedy="set WEIGHTS_MIRROR or HF_ENDPOINT to another server",
)
# For a file that a user waits for, at an address that may well be mistyped: about four seconds.
USER_RETRIES = replace(
    CATALOG_RETRIES, tries=3, longest_retry_after_s=30.0, remedy="use another address"
)
_BACKOFF = wait_exponential_jitter(initial=1.0, max=30.0, jitter=1.0)


def with_retries(attempt: Callable[[], T], policy: RetryPolicy) -> T:
    """Return what `attempt` returns, retrying after TemporaryFailure. Raises TransferFailed."""

    def stop(state: RetryCallState) -> bool:
        demanded_s = _failure(state).retry_after_s or 0.0
        last = stop_after_attempt(policy.tries)(state)
        return last or demanded_s > policy.longest_retry_after_s

    def give_up(state: RetryCallState) -> T:
        failure = _failure(state)
        demanded_s = failure.retry_after_s
        why = f" (it asks to wait {demanded_s:.0f} s)" if demanded_s is not None else ""
        raise TransferFailed(
            f"{failure}{why}; gave up after {state.attempt_number} failures. What arrived is kept:"
            f" run again to resume, or {policy.remedy}"
        ) from failure

    retrying = Retrying(
        retry=retry_if_exception_type(TemporaryFailure),
        wait=_wait_s,
        stop=stop,
        sleep=sleep,
        retry_error_callback=give_up,
    )
    return retrying(attempt)


def raise_if_busy(response: httpx.Response) -> None:
    """Raise TemporaryFailure for a status that may go away, with the wait that is demanded."""
    if response.status_code in (408, 425, 429, 500, 502, 503, 504):
        url = response.request.url.copy_with(userinfo=b"", query=None, fragment=None)
        message = f"{url} answered {response.status_code}"
        raise TemporaryFailure(message, retry_after_s(response))


def retry_after_s(response: httpx.Response) -> float | None:
    """Return the Retry-After header, seconds or a date, as seconds from now (RFC 9110 §10.2.3)."""
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


def _failure(state: RetryCallState) -> TemporaryFailure:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, TemporaryFailure)
    return error


def _wait_s(state: RetryCallState) -> float:
    demanded_s = _failure(state).retry_after_s
    return _BACKOFF(state) if demanded_s is None else demanded_s
