"""Checks of what a user wrote: each returns the value in its settled form, or says what is wrong and what allowed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

BACKENDS = (None, "triton", "cpu")


def whole(field: str, value: Any, minimum: int | None = None) -> int:
    """An int (bool is none), at least `minimum`."""
    number = None if isinstance(value, bool) else _index(value)
    if number is None:
        raise TypeError(f"{field} must be an int, got {value!r}")
    if minimum is not None and number < minimum:
        raise ValueError(f"{field} must be {minimum} or more, got {value!r}")
    return number


def seed(field: str, value: Any) -> int | None:
    """An int of any size, or None."""
    return None if value is None else whole(field, value)


def flag(field: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True or False, got {value!r}")
    return value


def size(field: str, value: Any) -> tuple[int, int]:
    """A size in pixels: one int, or (h, w); each 1 or more."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{field} must be an int or (h, w), got {value!r}")
        h, w = (whole(field, side, 1) for side in value)
        return h, w
    side = whole(field, value, 1)
    return side, side


def number(field: str, value: Any) -> float:
    """A real number."""
    if isinstance(value, bool):
        raise TypeError(f"{field} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{field} must be a number, got {value!r}") from None


def interval(field: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Two numbers (a, b) with low < a <= b <= high; a list is as good as a tuple."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{field} must be two numbers (low, high), got {value!r}")
    a, b = (number(field, end) for end in value)
    if not low < a <= b <= high:
        top = "" if high == float("inf") else f" <= {high:g}"
        raise ValueError(f"{field} must satisfy {low:g} < low <= high{top}, got {value!r}")
    return a, b


def probability(field: str, value: Any) -> float:
    """A number in [0, 1]."""
    p = number(field, value)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{field} must be in [0, 1], got {value!r}")
    return p


def three(field: str, value: Any) -> tuple[float, float, float]:
    """Three numbers, one a channel."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise TypeError(f"{field} must be three numbers, one a channel, got {value!r}")
    red, green, blue = (number(field, channel) for channel in value)
    return red, green, blue


def one_of(field: str, value: Any, allowed: Collection[Any]) -> Any:
    """One of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _index(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None
