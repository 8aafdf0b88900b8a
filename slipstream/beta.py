"""Beta-distributed numbers from random words, in float64, by operations that round the same on every machine."""

from __future__ import annotations

import math

import numpy as np

from .crop_random import _exp


def symmetric_beta(words: np.ndarray, alpha: float) -> np.ndarray:
    """Numbers of Beta(alpha, alpha), float64 [B], from words uint32 [B, 4]; exact in law, without rejection.

    T = sqrt(2a (u^(-1/a) - 1)) cos(2 pi v) is Student's t with 2a degrees of freedom (Bailey 1994), and
    1/2 + T / (2 sqrt(2a + T^2)) is Beta(a, a). With w = u^(1/a) and c the cosine, 1 - 4x(1 - x) is
    (1 - w) c^2 / (w + (1 - w) c^2), of which the root next to 0 is taken without cancellation.
    """
    u, v = (words[:, column].astype(np.float64) + 0.5 for column in range(2))
    w = _exp(np.maximum(_log(u * 2.0**-32) / alpha, -700.0))  # below, the number is 0 or 1 in float64 anyway
    c = _sine(v * (math.pi / 2 * 2.0**-32))  # |cos| of a uniform angle; its sign is a bit of its own
    odd = (1.0 - w) * c * c
    small = 0.5 * (w / (w + odd)) / (1.0 + np.sqrt(odd / (w + odd)))
    return np.where(words[:, 2] >> np.uint32(31) == 1, small, 1.0 - small)


# By the four operations and frexp, which round the same everywhere; a library's log and sin need not.
def _log(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    s = (mantissa - 1.0) / (mantissa + 1.0)  # log m = 2 atanh s, |s| <= 1/3: 18 terms pass the last bit
    total = np.zeros_like(s)
    for n in range(37, 0, -2):
        total = 1.0 / n + s * s * total
    return exponent * math.log(2.0) + 2.0 * s * total


def _sine(x: np.ndarray) -> np.ndarray:
    total = np.ones_like(x)  # x in [0, pi / 2]: the series ends below a last bit after 12 terms
    for n in range(12, 0, -1):
        total = 1.0 - x * x / (2 * n * (2 * n + 1)) * total
    return x * total
