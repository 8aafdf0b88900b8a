"""Numbers of a law from random words, in float64, by operations that round the same on every machine.

The four operations, square roots and rounding are IEEE's everywhere; a library's log, exp and sin need not agree in the
last bit, which would move a box by a pixel here and not there. So they are series of the four operations here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def between(u: np.ndarray, limits: Any) -> np.ndarray:
    """Uniform in [low, high), from u uniform in [0, 1) of any shape. limits: (low, high)."""
    low, high = limits
    return low + u * (high - low)


def below(words: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Whole numbers in [0, end), int64, from words uint32; end: below 2**32."""
    return (words.astype(np.uint64) * end.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def log_between(u: np.ndarray, limits: Any) -> np.ndarray:
    """Uniform in the logarithm, in [low, high), from u uniform in [0, 1). limits: (low, high), above 0."""
    # a library's log, of two numbers, with the bits rounded away in which another's may differ
    return exp(between(u, [round(math.log(limit) * 2.0**40) * 2.0**-40 for limit in limits]))


def standard_normal(words: np.ndarray) -> np.ndarray:
    """Standard normal numbers, float64 [...], from pairs of words, uint32 [..., 2] (Box and Muller's cosine)."""
    u, quarter_turns = (words[..., 0] + 0.5) * 2.0**-32, words[..., 1] * 2.0**-30
    whole = np.floor(quarter_turns)
    rest = quarter_turns - whole
    odd = whole % 2 == 1
    cosine = sine(np.where(odd, rest, 1.0 - rest) * (math.pi / 2))
    return np.sqrt(-2.0 * log(u)) * np.where((whole == 1) | (whole == 2), -cosine, cosine)


def symmetric_beta(words: np.ndarray, alpha: float) -> np.ndarray:
    """Numbers of Beta(alpha, alpha), float64 [B], from words uint32 [B, 4]; exact in law, without rejection.

    T = sqrt(2a (u^(-1/a) - 1)) cos(2 pi v) is Student's t with 2a degrees of freedom (Bailey 1994), and
    1/2 + T / (2 sqrt(2a + T^2)) is Beta(a, a). With w = u^(1/a) and c the cosine, 1 - 4x(1 - x) is
    (1 - w) c^2 / (w + (1 - w) c^2), of which the root next to 0 is taken without cancellation.
    """
    u, v = (words[:, column].astype(np.float64) + 0.5 for column in range(2))
    w = exp(np.maximum(log(u * 2.0**-32) / alpha, -700.0))  # below, the number is 0 or 1 in float64 anyway
    c = sine(v * (math.pi / 2 * 2.0**-32))  # |cos| of a uniform angle; its sign is a bit of its own
    odd = (1.0 - w) * c * c
    small = 0.5 * (w / (w + odd)) / (1.0 + np.sqrt(odd / (w + odd)))
    return np.where(words[:, 2] >> np.uint32(31) == 1, small, 1.0 - small)


_LOG2_HIGH, _LOG2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")


def exp(x: np.ndarray) -> np.ndarray:
    """e**x to a last bit or two, for |x| to 700."""
    # With x = k log 2 + r the series of exp(r) ends below a last bit after 14 terms; log 2 is split so that k times its
    # first part is exact.
    k = np.rint(x / (_LOG2_HIGH + _LOG2_LOW))
    r = (x - k * _LOG2_HIGH) - k * _LOG2_LOW
    total = np.ones_like(r)
    for n in range(14, 0, -1):
        total = 1.0 + r / n * total
    return np.ldexp(total, k.astype(np.int64))


def log(x: np.ndarray) -> np.ndarray:
    """The natural logarithm of numbers above 0, to a few last bits of the result or of 1."""
    mantissa, exponent = np.frexp(x)
    s = (mantissa - 1.0) / (mantissa + 1.0)  # log m = 2 atanh s, |s| <= 1/3: 18 terms pass the last bit
    total = np.zeros_like(s)
    for n in range(37, 0, -2):
        total = 1.0 / n + s * s * total
    return exponent * math.log(2.0) + 2.0 * s * total


def sine(x: np.ndarray) -> np.ndarray:
    """sin x, for x in [0, pi / 2]."""
    total = np.ones_like(x)  # the series ends below a last bit after 12 terms
    for n in range(12, 0, -1):
        total = 1.0 - x * x / (2 * n * (2 * n + 1)) * total
    return x * total
