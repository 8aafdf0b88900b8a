"""Checks of what a user wrote: each returns the value in its settled form, or says what is wrong and what allowed."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Sequence
from typing import Any

BACKENDS = (None, "triton", "cpu")
_LONGEST = 100  # letters of a value in a message: a preset's repr has thousands


def settle(spec: Any, **values: Any) -> None:
    """Put the settled forms into a frozen spec, in its __post_init__."""
    for name, value in values.items():
        object.__setattr__(spec, name, value)


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
    result = None if value is None or isinstance(value, bool) else _index(value)
    if value is not None and result is None:
        raise TypeError(f"{field} must be an int or None, got {value!r}")
    return result


def flag(field: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True or False, got {value!r}")
    return value


def path(field: str, value: Any) -> str:
    """A file's or folder's name: a str, or what os.fspath makes one of."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{field} must be a path, got {value!r}")
    return os.fspath(value)


def size(field: str, value: Any) -> tuple[int, int]:
    """A size in pixels: one int, or (h, w); each 1 or more."""
    pair = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    sides = list(value) if pair else [value, value]
    if len(sides) != 2:
        raise ValueError(f"{field} must be an int or two ints (h, w), got {value!r}")
    h, w = (None if isinstance(side, bool) else _index(side) for side in sides)
    if h is None or w is None:
        raise TypeError(f"{field} must be an int or two ints (h, w), got {value!r}")
    if min(h, w) < 1:
        raise ValueError(f"{field} must be 1 pixel or more, got {value!r}")
    return h, w


_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}


def byte_count(field: str, value: Any, most: str | None = None) -> int:
    """A number of bytes > 0, at most `most`: an int, or a text such as "64MB" (units of 1000)."""
    text = str(value).strip().upper()
    number = text.rstrip("BKMGT")
    unit = _UNITS.get(text[len(number) :])
    if isinstance(value, bool) or not number.strip().isdecimal() or unit is None:
        raise ValueError(f"{field} must be a number of bytes or a text such as '64MB', got {value!r}")
    count = int(number) * unit
    if count == 0 or (most is not None and count > byte_count(field, most)):
        raise ValueError(f"{field} must be > 0{f' and at most {most}' if most else ''}, got {value!r}")
    return count


def byte_text(count: int) -> str:
    """A number of bytes for people: "1.5 GB"."""
    unit = max((unit for unit, size in _UNITS.items() if unit and size <= max(count, 1)), key=_UNITS.__getitem__)
    return f"{count / _UNITS[unit]:.4g} {unit}"


def number(field: str, value: Any) -> float:
    """A finite real number (a string that reads as one is none)."""
    try:
        result = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        wrong = ValueError if isinstance(value, float) else TypeError
        raise wrong(f"{field} must be a finite number, got {value!r}")
    return result


def interval(field: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Two numbers (a, b) with low < a <= b <= high; a list is as good as a tuple."""
    a, b = numbers(field, value, 2, "two numbers (low, high)")
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
    red, green, blue = numbers(field, value, 3, "three numbers, one a channel")
    return red, green, blue


def numbers(field: str, value: Any, count: int, what: str) -> list[float]:
    """That many finite numbers, which a message calls `what`."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{field} must be {what}, got {value!r}")
    if len(value) != count:
        raise ValueError(f"{field} must be {what}, got {value!r}")
    try:
        return [number(field, each) for each in value]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{field} must be {what}, all finite, got {value!r}") from None


def one_of(field: str, value: Any, allowed: Collection[Any]) -> Any:
    """One of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def brief(value: Any) -> str:
    """A repr for a message, cut where it is so long that what the message says would be out of sight."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _index(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def refuse_torchvision(field: str, value: Any) -> None:
    """Raise TypeError for a transform of torchvision's: many have the names of ours, and print as ours do."""
    if type(value).__module__.startswith("torchvision."):
        raise TypeError(
            f"{field} must not be torchvision's {type(value).__name__}: use slipstream's, which draw for each sample "
            f"and not once for a batch, or a function that calls it, if that is what you want"
        )
