"""The windowed order: every sample once, few chunks open at a time, the same for any world size."""

from __future__ import annotations

import itertools
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slipstream import RandomResizedCrop, SlipstreamDataset, SlipstreamLoader
from slipstream.sampler_windowed import WindowedSampler
from slipstream.shares import Shares


def order(sampler: WindowedSampler, epoch: int = 0) -> np.ndarray:
    return sampler.sample_ids(epoch, np.arange(len(sampler)))


@pytest.mark.parametrize("chunks", [[1], [5], [3, 1, 4, 1, 5, 9, 2, 6], [10] * 37, [100] * 64 + [7], [1000, 1, 1]])
@pytest.mark.parametrize("lanes", [1, 3, 64])
def test_every_sample_comes_once(chunks: list[int], lanes: int) -> None:
    sampler = WindowedSampler(np.cumsum(chunks), seed=1, lanes=lanes, window=2)
    for epoch in (0, 1):
        assert sorted(order(sampler, epoch)) == list(range(sum(chunks)))


def test_a_position_does_not_depend_on_which_others_are_asked() -> None:
    sampler = WindowedSampler(np.cumsum([50] * 40), seed=1, lanes=8)
    whole = order(sampler, 3)
    some = np.random.default_rng(0).integers(0, 2000, 300)
    assert np.array_equal(sampler.sample_ids(3, some), whole[some])
    assert not np.array_equal(order(sampler, 4), whole)
    assert not np.array_equal(order(WindowedSampler(np.cumsum([50] * 40), seed=2, lanes=8), 3), whole)


def test_a_thread_of_another_epoch_in_between_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WindowedSampler(np.cumsum([7] * 40), seed=1, lanes=4)
    expected = [order(sampler, epoch) for epoch in (1, 0)]
    cumsum, met = np.cumsum, []

    def interrupted(values):
        if not met:
            met.append(None)
            met.append(order(sampler, 0))  # as a thread that a newer iterator has left behind
        return cumsum(values)

    monkeypatch.setattr(np, "cumsum", interrupted)
    assert np.array_equal(order(sampler, 1), expected[0])
    assert np.array_equal(met[1], expected[1])


def test_few_chunks_are_open_at_a_time() -> None:
    count, size, lanes, window = 400, 50, 8, 4
    sampler = WindowedSampler(np.cumsum([size] * count), seed=1, lanes=lanes, window=window)
    chunks = order(sampler) // size
    last = {chunk: place for place, chunk in enumerate(chunks)}
    open_now, most = set(), 0
    for place, chunk in enumerate(chunks):
        open_now.add(chunk)
        most = max(most, len(open_now))
        if last[chunk] == place:
            open_now.remove(chunk)
    # a window of a lane reaches into one chunk more than its size, and hardly two lanes begin the next at a time
    assert lanes * window / 2 <= most <= lanes * (window + 1) + 2 * window


def test_lanes_come_to_new_chunks_one_after_another() -> None:
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(90, 111, 1000))
    sampler, batch = WindowedSampler(ends, seed=1, lanes=16), 256
    chunks = [
        np.unique(np.searchsorted(ends, part, side="right"))
        for part in np.split(order(sampler), range(0, len(sampler), batch))
    ]
    assert max(map(len, chunks)) <= 16 * 5 + 4
    new = [len(np.setdiff1d(here, before)) for before, here in itertools.pairwise(chunks[1:])]
    assert max(new) <= 16  # and not some 64 in every 25th batch


def test_threads_of_two_epochs_do_not_mix_them() -> None:
    sampler, bad, over = WindowedSampler(np.cumsum([50] * 40), seed=1, lanes=8), [], threading.Event()
    right = [order(WindowedSampler(np.cumsum([50] * 40), seed=1, lanes=8), epoch) for epoch in range(2)]

    def work(epoch: int) -> None:
        while not over.is_set():
            if not np.array_equal(sampler.sample_ids(epoch, np.arange(8)), right[epoch][:8]):
                bad.append(epoch)

    threads = [threading.Thread(target=work, args=(epoch,)) for epoch in range(2)]
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        over.wait(3)
        over.set()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not bad


@pytest.mark.parametrize(("count", "lanes", "given"), [(400, 8, 8), (100, 16, 64), (255, 32, 64), (70, 16, 48)])
def test_ranks_read_each_chunk_once_but_for_the_lanes_ends(count: int, lanes: int, given: int) -> None:
    size = 50
    sampler = WindowedSampler(np.cumsum([size] * count), seed=1, lanes=given)
    assert sampler.lanes == lanes  # also where there are too few chunks for all lanes
    for world in (2, 4, 8):
        readers = np.zeros(count, int)
        for rank in range(world):
            shares = Shares(length=len(sampler), batch_size=16, rank=rank, world_size=world, tail="uneven")
            mine = np.concatenate([shares.positions(step)[0] for step in range(len(shares))])
            readers[np.unique(sampler.sample_ids(0, mine) // size)] += 1
        assert readers.sum() <= count + lanes
        assert readers.min() == 1


def test_samples_of_a_window_are_shuffled_evenly() -> None:
    """Where a chunk's first sample comes within its window, over many epochs: chi-square, seven degrees of freedom."""
    sampler = WindowedSampler(np.cumsum([8] * 16), seed=3, lanes=2, window=4)
    offsets = np.zeros(8, int)
    for epoch in range(400):
        ids = order(sampler, epoch)
        places = np.empty(128, int)
        places[ids] = np.arange(128)
        offsets += np.bincount(places // 2 % 32 // 4, minlength=8)
    counts = np.zeros(8)
    for epoch in range(400, 800):
        places = np.empty(128, int)
        places[order(sampler, epoch)] = np.arange(128)
        counts += np.bincount(places[::8] // 2 % 32 // 4, minlength=8)
    expected = counts.sum() / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # p = 1e-3
    assert (offsets == offsets[0]).all()


def test_a_large_index_is_reached_at_once() -> None:
    import time

    sampler = WindowedSampler(np.arange(1, 100_001) * 10_000, seed=0)
    sampler.sample_ids(0, np.arange(2))
    begin = time.perf_counter()
    ids = sampler.sample_ids(0, 900_000_000 + np.arange(256))
    assert time.perf_counter() - begin < 0.5
    assert len(np.unique(ids)) == 256


def test_a_loader_takes_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / f"{index:02}.jpg")
    data = SlipstreamDataset(local_dir=tmp_path)

    def ids(**options) -> list[int]:
        options = {"batch_size": 6, "shuffle": "windowed", "pipelines": {"image": RandomResizedCrop(8)}} | options
        with SlipstreamLoader(data, device="cpu", verbose=False, **options) as loader:
            return [number for batch in loader for number in batch["_indices"].tolist()]

    assert sorted(ids()) == list(range(40))
    assert ids() == ids(batch_size=5) != ids(seed=1)
    with pytest.raises(ValueError, match="shuffle must be True, False or \"windowed\", got 'lanes'"):
        ids(shuffle="lanes")
    with pytest.raises(TypeError, match="shuffle must be True, False"):
        ids(shuffle=1)
    with pytest.raises(ValueError, match="not with indices="):
        SlipstreamLoader(SlipstreamDataset(local_dir=tmp_path, indices=[1, 2]), 2, shuffle="windowed", device="cpu")
