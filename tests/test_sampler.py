"""Every epoch is a permutation; orders are random by statistics that an affine map is shown to fail."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy.stats import chi2
from slipstream_kernels.philox import philox_blocks

from slipstream.draws import stream_key
from slipstream.sampler import Sampler

# Seeds are fixed, so each p-value is one number; chance alone would fail this bound once in 100,000.
CHANCE = 1e-5
CELLS = 64


class Affine:
    """a * position + b mod length, a and b random in every epoch: a bijection, and no shuffle."""

    def __init__(self, length: int, *, shuffle: bool, seed: int) -> None:
        self.length, self.seed = length, seed

    def sample_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        units = [a for a in rng.integers(1, max(2, self.length), 64).tolist() if math.gcd(a, self.length) == 1]
        return (units[0] * positions + int(rng.integers(self.length))) % self.length


def orders(kind, length: int, epochs: int, seed: int = 0) -> np.ndarray:
    sampler = kind(length, shuffle=True, seed=seed)
    positions = np.arange(length)
    return np.stack([sampler.sample_ids(epoch, positions) for epoch in range(epochs)])


def two_sided_p(counts: np.ndarray, correction: float = 1.0) -> float:
    """Chi-square against equal counts. Too even is as suspicious as too uneven, so both tails count."""
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum() / correction
    return 2 * min(chi2.sf(statistic, len(counts) - 1), chi2.cdf(statistic, len(counts) - 1))


def binned(values: np.ndarray, length: int) -> np.ndarray:
    return np.bincount(values * CELLS // length, minlength=CELLS)


def first_differences(kind) -> float:
    n = 64 * 1571 - 1
    order = orders(kind, n, 1)[0]
    return two_sided_p(binned(np.diff(order) % n, n))


def second_differences(kind) -> float:
    n = 64 * 1571 - 1
    order = orders(kind, n, 1)[0]
    return two_sided_p(binned(np.diff(order, 2) % n, n))


def first_tenth_of_the_epoch(kind) -> float:
    order = orders(kind, 64 * 1000, 1)[0]
    # Drawn without replacement, so the counts vary less by the share that is left.
    return two_sided_p(binned(order[: len(order) // 10], len(order)), correction=0.9)


def differences_between_epochs(kind) -> float:
    n = 64 * 1571 - 1
    first, second = orders(kind, n, 2)
    return two_sided_p(binned((second - first) % n, n))


def correlation_p(a: np.ndarray, b: np.ndarray) -> float:
    return math.erfc(abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a) / 2))


def correlation_of_neighbours(kind) -> float:
    order = orders(kind, 100_003, 1)[0]
    return correlation_p(order[:-1], order[1:])


def orders_of(kind, n: int, epochs: int) -> float:
    codes = orders(kind, n, epochs) @ n ** np.arange(n)
    _, seen = np.unique(codes, return_counts=True)
    return two_sided_p(np.pad(seen, (0, math.factorial(n) - len(seen))))


def orders_of_4(kind) -> float:
    return orders_of(kind, 4, 10_000)


def orders_of_5(kind) -> float:
    return orders_of(kind, 5, 20_000)


HARD = [
    first_differences,
    second_differences,
    first_tenth_of_the_epoch,
    differences_between_epochs,
    correlation_of_neighbours,
    orders_of_4,
    orders_of_5,
]


@pytest.mark.parametrize("statistic", HARD)
def test_order_passes(statistic):
    assert statistic(Sampler) > CHANCE


@pytest.mark.parametrize("statistic", HARD)
def test_affine_map_fails(statistic):
    assert statistic(Affine) < CHANCE


# From here on an affine map would pass: two points of it are random enough.


def test_all_orders_of_3_are_equally_likely():
    assert orders_of(Sampler, 3, 10_000) > CHANCE


def test_both_orders_of_2_are_equally_likely():
    assert orders_of(Sampler, 2, 10_000) > CHANCE


@pytest.mark.parametrize("element", [0, 1, 500, 999])
def test_a_sample_is_anywhere_over_many_epochs(element):
    where = np.argmax(orders(Sampler, 1000, 2000) == element, axis=1)
    assert two_sided_p(np.bincount(where // 20, minlength=50)) > CHANCE


@pytest.mark.parametrize("position", [0, 1, 500, 999])
def test_a_position_holds_anything_over_many_epochs(position):
    sampler = Sampler(1000, shuffle=True, seed=3)
    held = np.concatenate([sampler.sample_ids(epoch, np.array([position])) for epoch in range(4000)])
    assert two_sided_p(np.bincount(held // 20, minlength=50)) > CHANCE
    assert correlation_p(held[:-1], held[1:]) > CHANCE


@pytest.mark.parametrize("other", [("epoch", 1), ("epoch", 2), ("seed", 1), ("seed", -1)])
def test_epochs_and_seeds_are_uncorrelated(other):
    n = 100_003
    epoch, seed = (other[1], 0) if other[0] == "epoch" else (0, other[1])
    a = Sampler(n, shuffle=True, seed=0).sample_ids(0, np.arange(n))
    b = Sampler(n, shuffle=True, seed=seed).sample_ids(epoch, np.arange(n))
    assert correlation_p(a, b) > CHANCE
    # Independent orders share one place on average.
    assert (a == b).sum() < 12


def test_seed_and_epoch_are_never_summed():
    n = 1000
    a = Sampler(n, shuffle=True, seed=0).sample_ids(1, np.arange(n))
    b = Sampler(n, shuffle=True, seed=1).sample_ids(0, np.arange(n))
    assert (a == b).sum() < 12


@pytest.mark.parametrize("n", [7, 8, 14, 15, 16])
def test_even_and_odd_permutations_are_equally_likely(n):
    """The network alone gives a mean sign of +-n (n - 1) / 240 here: 0.2 at 7, 0.9 at 15, 1 at 16."""
    epochs = 2000
    order = orders(Sampler, n, epochs)
    i, j = np.triu_indices(n, 1)
    signs = 1 - 2 * ((order[:, i] > order[:, j]).sum(axis=1) % 2)
    assert abs(signs.mean()) < 4.42 / math.sqrt(epochs)


LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1000, 4095, 4096, 4097, 65537, 100_003]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("epoch", [0, 2**32 - 1])
def test_an_epoch_is_a_permutation(length, epoch):
    ids = Sampler(length, shuffle=True, seed=length).sample_ids(epoch, np.arange(length))
    assert ids.dtype == np.int64
    assert (np.sort(ids) == np.arange(length)).all()


@pytest.mark.parametrize("length", [10**10, 2**32, 2**32 + 1, 2**33 - 1, 2**61 + 1, 2**62 - 1, 2**62])
def test_huge_lengths_stay_inside_and_never_repeat(length):
    positions = np.unique(np.random.default_rng(0).integers(0, length, 5000))
    positions = np.union1d(positions, [0, 1, length // 2, length - 2, length - 1])
    ids = Sampler(length, shuffle=True, seed=1).sample_ids(2, positions)
    assert ids.min() >= 0
    assert ids.max() < length
    assert len(np.unique(ids)) == len(positions)
    assert two_sided_p(np.bincount(ids // (length // CELLS + 1), minlength=CELLS)) > CHANCE


def reference(length: int, seed: int, epoch: int, position: int) -> int:
    """The network as the docstring of sampler.py words it, in Python integers."""
    key = stream_key(seed, "order")

    def word(half: int, draw: int) -> int:
        return int(philox_blocks(key, np.array([half], np.uint64), epoch, draw, 1)[0, 0, 0])

    bits = max(4, (length - 1).bit_length())
    sizes = [bits - bits // 2, bits // 2]
    if position < 2 <= length:
        position ^= word(0, 24) % 2
    while True:
        halves = [position >> sizes[1], position % 2 ** sizes[1]]
        for r in range(24):
            halves[r % 2] ^= word(halves[1 - r % 2], r) % 2 ** sizes[r % 2]
        position = halves[0] << sizes[1] | halves[1]
        if position < length:
            return position


@pytest.mark.parametrize("length", [1, 2, 5, 33, 4096, 10**10, 2**61 + 1, 2**62])
def test_order_equals_the_documented_network(length):
    positions = np.unique(np.random.default_rng(1).integers(0, length, 20))
    positions = np.union1d(positions, [0, min(1, length - 1), length - 1])
    for seed, epoch in [(0, 0), (-7, 2**32 - 1), (2**70, 12345)]:
        ids = Sampler(length, shuffle=True, seed=seed).sample_ids(epoch, positions)
        assert ids.tolist() == [reference(length, seed, epoch, p) for p in positions.tolist()]


def test_the_order_of_a_seed_is_frozen():
    """A run resumed with a newer Slipstream goes on in the same order."""
    assert Sampler(10, shuffle=True, seed=0).sample_ids(0, np.arange(10)).tolist() == [7, 5, 6, 0, 1, 2, 4, 3, 8, 9]


def test_positions_are_answered_one_by_one_as_together():
    sampler = Sampler(1000, shuffle=True, seed=2)
    together = sampler.sample_ids(3, np.arange(1000))
    again = Sampler(1000, shuffle=True, seed=2)
    assert [int(again.sample_ids(3, np.array([p]))[0]) for p in range(0, 1000, 37)] == together[::37].tolist()
    repeated = np.array([5, 999, 5, 0])
    assert (sampler.sample_ids(3, repeated) == together[repeated]).all()
    assert repeated.tolist() == [5, 999, 5, 0]


def test_any_whole_number_array_or_list_of_positions_will_do():
    sampler = Sampler(1000, shuffle=True, seed=2)
    expected = sampler.sample_ids(0, np.arange(0, 1000, 2))
    for positions in (np.arange(1000)[::2], np.arange(0, 1000, 2, dtype=np.uint16), list(range(0, 1000, 2))):
        assert (sampler.sample_ids(0, positions) == expected).all()
    assert sampler.sample_ids(0, []).shape == (0,)


@pytest.mark.parametrize("shuffle", [False, True])
def test_length(shuffle):
    assert len(Sampler(10**10, shuffle=shuffle, seed=0)) == 10**10
    empty = Sampler(0, shuffle=shuffle, seed=0)
    assert len(empty) == 0
    assert empty.sample_ids(0, np.empty(0, np.int64)).shape == (0,)
    with pytest.raises(IndexError, match=r"positions must be in \[0, 0\), got 0"):
        empty.sample_ids(0, np.array([0]))


def test_without_shuffle_the_order_is_the_identity_in_an_array_of_its_own():
    positions = np.array([3, 0, 99])
    ids = Sampler(100, shuffle=False, seed=0).sample_ids(7, positions)
    assert ids.tolist() == [3, 0, 99]
    ids[:] = 0
    assert positions.tolist() == [3, 0, 99]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bad", [-1, 100, 2**62, -(2**62)])
def test_position_outside_the_epoch_is_named(shuffle, bad):
    with pytest.raises(IndexError, match=rf"positions must be in \[0, 100\), got {bad}"):
        Sampler(100, shuffle=shuffle, seed=0).sample_ids(0, np.array([5, bad, 7]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sampler(-1, shuffle=True, seed=0), ValueError, r"length must be in \[0, 2\*\*62\], got -1"),
        (lambda: Sampler(2**62 + 1, shuffle=True, seed=0), ValueError, "length must be in"),
        (lambda: Sampler(1.5, shuffle=True, seed=0), TypeError, "length must be an int, got 1.5"),
        (lambda: Sampler(5, shuffle="yes", seed=0), TypeError, "shuffle must be True or False, got 'yes'"),
        (lambda: Sampler(5, shuffle=True, seed="a"), TypeError, "seed must be an int, got 'a'"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("epoch", "positions", "error", "message"),
    [
        (-1, [0], ValueError, r"epoch must be in \[0, 2\*\*32\), got -1"),
        (2**32, [0], ValueError, "epoch must be in"),
        (0.0, [0], TypeError, "epoch must be an int, got 0.0"),
        (0, [0.5], TypeError, "positions must be whole numbers, got dtype float64"),
        (0, [[1]], ValueError, r"positions must have one dimension, got shape \(1, 1\)"),
    ],
)
def test_bad_questions_are_named(epoch, positions, error, message):
    with pytest.raises(error, match=message):
        Sampler(5, shuffle=True, seed=0).sample_ids(epoch, positions)


def test_position_a_billion_of_ten_billion_takes_microseconds():
    """About 8 us, of which Philox takes under one; the bound leaves room for a loaded machine."""
    sampler = Sampler(10**10, shuffle=True, seed=0)
    position = np.array([10**9])
    sampler.sample_ids(0, position)
    times = []
    for epoch in range(200):
        start = time.perf_counter()
        sampler.sample_ids(epoch, position)
        times.append(time.perf_counter() - start)
    print(f"position 10**9 of 10**10: {min(times) * 1e6:.1f} us")
    assert min(times) < 100e-6
