"""Rules about one value of a request, whatever it means."""

from generation.errors import InvalidRequest


def one_of(name: str, value: str | None, names: list[str]) -> None:
    """Raise InvalidRequest unless the value, if there is one, is among the names."""
    if value is not None and value not in names:
        raise InvalidRequest(
            f"{name} {value!r} is not known; choose one of {', '.join(map(str, names))}"
        )


def within(name: str, value: float | None, low: float, high: float) -> None:
    """Raise InvalidRequest unless the value, if there is one, is from `low` to `high`."""
    # Written so that NaN fails too.
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must be from {low} to {high}")
