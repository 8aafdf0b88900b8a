"""Beta numbers: the law, to the bounds of its statistics, and the formula to float64."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.beta import symmetric_beta
from slipstream.draws import Draws, stream_key


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_the_number_is_beta(alpha: float) -> None:
    """Kolmogorov-Smirnov at a fixed seed; the moments too, which a wrong sign or a lost half would show."""
    count = 40_000
    lam = symmetric_beta(Draws(stream_key(3, "beta"), np.arange(count), 0).words(0)[:, 0], alpha)
    assert lam.min() >= 0 and lam.max() <= 1
    assert abs(lam.mean() - 0.5) < 4 * lam.std() / count**0.5
    assert lam.var() == pytest.approx(0.25 / (2 * alpha + 1), rel=0.03)
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    neighbours = np.corrcoef(lam[:-1], lam[1:])[0, 1]
    assert abs(neighbours) < 4 / count**0.5


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e6, 1e300])
def test_extreme_alphas_give_numbers(alpha: float) -> None:
    words = np.concatenate(
        [
            Draws(0, np.arange(1000), 0).words(0)[:, 0],
            np.array([[a, b, c, 0] for a in (0, 2**32 - 1) for b in (0, 2**32 - 1) for c in (0, 2**32 - 1)], np.uint32),
        ]
    )
    lam = symmetric_beta(words, alpha)
    assert np.isfinite(lam).all() and lam.min() >= 0 and lam.max() <= 1
    inner = lam[:1000]
    assert ((np.minimum(inner, 1 - inner) < 0.01) if alpha < 1 else (abs(inner - 0.5) < 0.01)).mean() > 0.98


def test_the_number_follows_the_law_to_float64() -> None:
    """Against the same formula with numpy's own functions."""
    words = Draws(1, np.arange(2000), 0).words(0)[:, 0]
    u, v = (words[:, 0] + 0.5) * 2.0**-32, (words[:, 1] + 0.5) * 2.0**-32
    for alpha in (0.2, 1.0, 8.0):
        t = np.sqrt(2 * alpha * (u ** (-1 / alpha) - 1)) * np.sin(np.pi / 2 * v) * np.where(words[:, 2] >> 31, -1, 1)
        np.testing.assert_allclose(
            symmetric_beta(words, alpha), 0.5 + 0.5 * t / np.sqrt(2 * alpha + t * t), rtol=1e-9, atol=1e-12
        )
