"""Numbers of a law: their statistics at fixed seeds, and each formula against numpy's own functions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slipstream.distributions import exp, log, log_between, sine, standard_normal, symmetric_beta
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


def test_exp_is_the_librarys_to_a_last_bit_or_two() -> None:
    x = np.concatenate([np.linspace(-5, 5, 20_001), np.random.default_rng(6).uniform(-5, 5, 20_000), [0.0]])
    expected = np.array([math.exp(value) for value in x])
    assert np.abs(exp(x) / expected - 1).max() < 1e-15
    assert exp(np.zeros(1)) == 1.0


def test_log_and_sine_are_the_librarys() -> None:
    x = np.concatenate([np.random.default_rng(7).uniform(0, 2, 20_000), 2.0 ** -np.arange(1.0, 60.0)])
    x = x[x > 0]
    assert np.abs(log(x) - np.log(x)).max() < 2e-14
    angles = np.linspace(0, np.pi / 2, 20_001)
    assert np.abs(sine(angles) - np.sin(angles)).max() < 3e-16


def test_log_between_covers_its_range_evenly_in_the_logarithm() -> None:
    u = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(np.log(log_between(u, (0.75, 4 / 3))), np.log(0.75) + u * np.log(16 / 9), atol=1e-11)


def test_standard_normal_is_box_and_mullers_cosine() -> None:
    words = Draws(2, np.arange(5000), 0).words(0)[:, 0, :2]
    u, v = (words[:, 0] + 0.5) * 2.0**-32, words[:, 1] * 2.0**-32
    np.testing.assert_allclose(
        standard_normal(words), np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v), rtol=1e-12, atol=1e-14
    )


def test_normal_numbers_are_normal_and_finite():
    words = Draws(stream_key(0, "normal"), np.arange(50_000), 0).words(0).reshape(-1, 2)
    numbers = standard_normal(words)
    assert numbers.shape == (100_000,)
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    ends = np.array([[0, 0], [2**32 - 1, 2**32 - 1]], np.uint32)
    assert np.isfinite(standard_normal(ends)).all()
