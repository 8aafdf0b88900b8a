"""Draws are a pure function of (seed, stream, sample_id, epoch, draw), and those five are never mixed up."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from slipstream import RandomResizedCrop
from slipstream.draws import Draws, fresh_sample_ids, stream_key

IDS = np.arange(64)
# Seeds and ids below are fixed, so each statistic is one number; chance alone would fail its bound once in 100,000.
CHANCE = 1e-5


def uniform(ids, seed=0, stream="crop", epoch=0, first=0, count=1) -> np.ndarray:
    return Draws(stream_key(seed, stream), ids, epoch).uniform(first, count).reshape(len(ids), -1)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def correlation_bound(n: int) -> float:
    """4.42 standard deviations of the correlation of n independent pairs: two-sided chance 1e-5."""
    return 4.42 / np.sqrt(n)


def test_key_is_the_documented_hash():
    digest = hashlib.blake2b(b"-2a:crop", digest_size=8).digest()
    assert stream_key(-42, "crop") == int.from_bytes(digest, "little")


def test_ids_on_both_sides_of_the_sign_bit_are_ids():
    """numpy makes floats of such a list."""
    ids = [5, 2**63 + 5, np.uint64(2**64 - 1)]
    expected = Draws(1, np.array(ids, np.uint64), 0).words(0)
    assert np.array_equal(Draws(1, ids, 0).words(0), expected)
    images = torch.arange(3 * 3 * 9 * 9).to(torch.uint8).view(3, 3, 9, 9)
    crop = RandomResizedCrop(4)
    assert torch.equal(crop(images, sample_ids=ids), crop(images, sample_ids=np.array(ids, np.uint64)))
    for wrong in ([2**63, 1.0], [2**63, -1], [2**63, True, 2**64]):
        with pytest.raises(TypeError, match="sample_ids must be whole numbers"):
            Draws(1, wrong, 0)


def test_keys_of_unlike_seeds_and_streams_differ():
    seeds = [0, 1, -1, 42, -42, 2**63, 2**64, -(2**64), 2**64 + 42, 10**5000]
    streams = ["", "0", "1", ":", "a:b", "a", "b", "crop", "crop ", "\udc80", "é"]
    keys = {stream_key(seed, stream) for seed in seeds for stream in streams}
    assert len(keys) == len(seeds) * len(streams)
    assert all(0 <= key < 2**64 for key in keys)
    # What a plain join of seed and stream would confuse.
    assert stream_key(1, "2:a") != stream_key(12, ":a")
    assert stream_key(1, "0") != stream_key(10, "")


def test_numpy_ints_are_seeds_as_good_as_ints():
    assert stream_key(np.int64(7), "a") == stream_key(np.uint8(7), "a") == stream_key(7, "a")


@pytest.mark.parametrize("seed", [1.0, "1", None, True, np.True_])
def test_seed_of_another_type_is_refused(seed):
    with pytest.raises(TypeError, match="seed must be an int, got"):
        stream_key(seed, "a")


def test_stream_of_another_type_is_refused():
    with pytest.raises(TypeError, match="stream must be a str, got 3"):
        stream_key(0, 3)  # pyright: ignore[reportArgumentType]


def test_same_question_same_answer_in_any_order():
    draws = Draws(stream_key(5, "a"), IDS, 2)
    later = draws.words(7, 3)
    draws.words(0, 50)
    assert (draws.words(7, 3) == later).all()
    assert (Draws(stream_key(5, "a"), IDS, 2).words(7, 3) == later).all()


def test_blocks_asked_together_equal_blocks_asked_one_by_one():
    draws = Draws(1, IDS, 0)
    together = draws.words(3, 5)
    assert together.dtype == np.uint32
    assert together.shape == (64, 5, 4)
    assert (together == np.concatenate([draws.words(3 + j) for j in range(5)], axis=1)).all()


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_numbers_do_not_depend_on_the_batch(batch):
    whole = Draws(9, IDS, 4).words(0, 4)
    parts = [Draws(9, IDS[i : i + batch], 4).words(0, 4) for i in range(0, 64, batch)]
    assert (np.concatenate(parts) == whole).all()
    order = np.random.default_rng(0).permutation(64)
    assert (Draws(9, IDS[order], 4).words(0, 4) == whole[order]).all()


def test_layout_and_type_of_the_ids_do_not_matter():
    expected = Draws(9, IDS[::2], 0).words(0)
    for ids in (IDS[::2].tolist(), IDS[::2].astype(np.uint64), IDS.astype(np.int32)[::2], torch.arange(0, 64, 2)):
        assert (Draws(9, ids, 0).words(0) == expected).all()


def test_ids_are_copied():
    ids = IDS.astype(np.uint64)
    draws = Draws(9, ids, 0)
    before = draws.words(0)
    ids += 1
    assert (draws.words(0) == before).all()


def test_uniform_is_words_over_two_to_the_32():
    draws = Draws(3, np.arange(10_000), 0)
    values = draws.uniform(2, 2)
    assert values.dtype == np.float64
    assert (values == draws.words(2, 2) / 2**32).all()
    assert values.min() >= 0
    assert values.max() < 1


def test_anything_that_differs_gives_other_words():
    """Every word of 2 streams x 2 epochs x 4 ids (two of which share their low half) x 4 draws is another one."""
    ids = np.array([0, 1, 2**32, 2**64 - 1], np.uint64)
    words = [
        Draws(stream_key(0, stream), ids, epoch).words(0, 4) for stream in ("a", "b") for epoch in (0, 1, 2**32 - 1)
    ]
    flat = np.concatenate(words).ravel()
    assert len(np.unique(flat)) == flat.size


def test_seeds_and_ids_are_never_summed():
    ids = np.arange(4096)
    for other_seed, other_ids, other_epoch in [(1, ids - 1, 0), (1, ids, 0), (0, ids, 1), (-1, ids + 1, 0)]:
        keep = other_ids >= 0
        here = uniform(ids[keep], seed=0)
        there = uniform(other_ids[keep], seed=other_seed, epoch=other_epoch)
        assert not (here == there).any()
        assert abs(correlation(here, there)) < correlation_bound(here.size)
    # Epoch e + 1 at draw d, id i + 1 at epoch e, and so on: no shift along one coordinate is a shift along another.
    base = uniform(ids, first=1)
    for shifted in (uniform(ids, epoch=1), uniform(ids + 1), uniform(ids + 2**32)):
        assert not (base == shifted).any()


def test_neighbouring_ids_are_uncorrelated():
    u = uniform(np.arange(100_001))
    for lag in (1, 2, 64):
        for a in range(4):
            for b in range(4):
                x, y = u[:-lag, a], u[lag:, b]
                assert abs(correlation(x, y)) < correlation_bound(len(x)), (lag, a, b)


@pytest.mark.parametrize(
    "other",
    [
        {"epoch": 1},
        {"epoch": 2},
        {"stream": "crop1"},
        {"stream": "crop2"},
        {"seed": 1},
        {"seed": -1},
        {"first": 1},
    ],
    ids=str,
)
def test_neighbouring_epochs_streams_seeds_and_draws_are_uncorrelated(other):
    ids = np.arange(100_000)
    assert abs(correlation(uniform(ids), uniform(ids, **other))) < correlation_bound(4 * len(ids))


def test_the_four_words_of_a_block_are_uncorrelated():
    u = uniform(np.arange(100_000))
    off_diagonal = np.corrcoef(u.T) - np.eye(4)
    assert np.abs(off_diagonal).max() < correlation_bound(len(u))


@pytest.mark.parametrize("shift", [0, 12, 24])
def test_words_are_uniform(shift):
    """Chi-square of 256 cells on the low, middle and high bits of 1.6 million words."""
    words = Draws(stream_key(3, "uniform"), np.arange(100_000), 0).words(0, 4)
    counts = np.bincount((words.ravel() >> np.uint32(shift)) & 255, minlength=256)
    statistic = ((counts - words.size / 256) ** 2 / (words.size / 256)).sum()
    assert chi2.ppf(CHANCE, 255) < statistic < chi2.isf(CHANCE, 255)


def test_pairs_of_neighbouring_ids_are_uniform():
    """Chi-square of a 16 x 16 grid of (u(i), u(i + 1)), disjoint pairs: dependence that a correlation would miss."""
    u = (uniform(np.arange(200_000))[:, 0] * 16).astype(int).reshape(-1, 2)
    counts = np.bincount(u[:, 0] * 16 + u[:, 1], minlength=256)
    statistic = ((counts - len(u) / 256) ** 2 / (len(u) / 256)).sum()
    assert chi2.ppf(CHANCE, 255) < statistic < chi2.isf(CHANCE, 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, IDS, 0), r"key must be in \[0, 18446744073709551616\), got -1"),
        ((2**64, IDS, 0), "key must be in .*, got 18446744073709551616"),
        ((0, IDS, -1), r"epoch must be in \[0, 4294967296\), got -1"),
        ((0, IDS, 2**32), "epoch must be in .*, got 4294967296"),
        ((0, [3, -5], 0), r"sample_ids must be in \[0, 2\*\*64\), got -5"),
        ((0, [[1]], 0), r"sample_ids must have one dimension, got shape \(1, 1\)"),
        ((0, 1, 0), r"sample_ids must have one dimension, got shape \(\)"),
    ],
)
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Draws(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, IDS, 0), "key must be an int, got 0.5"),
        ((0, IDS, "1"), "epoch must be an int, got '1'"),
        ((0, [0.5], 0), "sample_ids must be whole numbers .*, got dtype float64"),
        ((0, [True], 0), "sample_ids must be whole numbers .*, got dtype bool"),
    ],
)
def test_wrong_types_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        Draws(*arguments)


def test_draws_out_of_range_are_refused():
    draws = Draws(0, IDS, 0)
    assert draws.words(2**32 - 2, 2).shape == (64, 2, 4)
    with pytest.raises(ValueError, match=r"count must be in \[0, 3\), got 3"):
        draws.words(2**32 - 2, 3)
    with pytest.raises(ValueError, match=r"first must be in .*, got -1"):
        draws.words(-1)


def test_an_empty_batch_draws_nothing():
    assert Draws(0, [], 0).uniform(0, 2).shape == (0, 2, 4)


def test_a_child_is_the_stream_of_its_name_under_its_parents_key():
    parent = Draws(stream_key(3, "RandomApply"), IDS, 2)
    child = parent.child("ColorJitter\x1f0")
    expected = Draws(stream_key(parent.key, "ColorJitter\x1f0"), IDS, 2)
    assert (child.words(0, 3) == expected.words(0, 3)).all()
    keys = {parent.key, child.key, parent.child("ColorJitter\x1f1").key, child.child("ColorJitter\x1f0").key}
    assert len(keys) == 4


def test_children_are_uncorrelated_with_each_other_and_their_parent():
    parent = Draws(stream_key(0, "RandomOrder"), np.arange(50_000), 0)
    numbers = np.stack([each.uniform(0).ravel() for each in (parent, parent.child("a"), parent.child("b"))])
    off_diagonal = np.corrcoef(numbers) - np.eye(3)
    assert np.abs(off_diagonal).max() < correlation_bound(numbers.shape[1])


def test_fresh_sample_ids_follow_manual_seed_and_advance():
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        first, second = fresh_sample_ids(100), fresh_sample_ids(100)
        torch.manual_seed(1)
        assert (fresh_sample_ids(100) == first).all()
    finally:
        torch.set_rng_state(state)
    assert first.dtype == np.uint64
    assert len(np.union1d(first, second)) == 200
    assert first.max() < 2**63
    assert first.max() > 2**62


def test_fresh_sample_ids_ignore_the_default_device():
    with torch.device("meta"):
        assert fresh_sample_ids(3).shape == (3,)


def test_a_batch_draws_in_microseconds():
    """About 15 us for 256 ids x 4 blocks on one core of 2023; the bound leaves room for a loaded machine."""
    draws = Draws(0, np.arange(256), 0)
    draws.words(0, 4)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        draws.words(0, 4)
        times.append(time.perf_counter() - start)
    assert min(times) < 100e-6
