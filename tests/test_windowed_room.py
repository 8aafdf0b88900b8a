"""The room that a windowed order takes in the cache: the least that a loader accepts holds an epoch."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cache_files import SIZE, Files
from litdata_samples import largest_chunk, photos, plain, write

from slipstream import SlipstreamDataset, SlipstreamLoader
from slipstream.fetch_ahead import FetchAhead
from slipstream.sampler_windowed import WindowedSampler
from slipstream.shares import Shares
from slipstream.source_cache import CachedFiles

CHUNKS, EACH = 64, 8
COUNT = CHUNKS * EACH


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("set"), plain(photos(COUNT)), chunk_size=EACH)


def dataset_of(folder: Path, cache: Path, limit: int) -> SlipstreamDataset:
    return SlipstreamDataset(remote_dir=folder, cache_dir=cache, max_cache_size=limit)


def loader_of(dataset: SlipstreamDataset, **more) -> SlipstreamLoader:
    more = {"shuffle": "windowed:4", "device": "cpu", "num_threads": 2, "verbose": False} | more
    return SlipstreamLoader(dataset, **more)


def least(folder: Path, cache: Path, **more) -> int:
    chunk = largest_chunk(folder)
    with pytest.raises(ValueError, match="lanes of 5 chunks") as caught:
        loader_of(dataset_of(folder, cache, chunk), **more)
    return int(re.findall(r"give (\d+) bytes or more", str(caught.value))[0])


@pytest.mark.parametrize("batch_size", [4, 48])
def test_the_least_that_is_accepted_holds_an_epoch(folder, tmp_path, monkeypatch, batch_size):
    fetched = Counter()
    fetch = CachedFiles._write
    monkeypatch.setattr(
        CachedFiles, "_write", lambda self, number, *more: (fetched.update([number]), fetch(self, number, *more))
    )
    dataset = dataset_of(folder, tmp_path, least(folder, tmp_path, batch_size=batch_size))
    with loader_of(dataset, batch_size=batch_size) as loader:
        ids = [number for batch in loader for number in batch["_indices"].tolist()]
    assert sorted(ids) == list(range(COUNT))
    assert fetched.total() <= CHUNKS + 8  # those at the lanes' ends twice, and one that a window has nearly done with


def test_ranks_that_do_not_divide_the_lanes_need_them_all(folder, tmp_path, monkeypatch):
    of = {world: least(folder, tmp_path, batch_size=8, rank=0, world_size=world) for world in (1, 2, 3, 4)}
    assert of[1] == of[3] > of[2] > of[4]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun does for two on this machine
    assert least(folder, tmp_path, batch_size=8, rank=0, world_size=2) == of[1]


def test_ranks_in_step_do_not_remove_what_others_want_next(tmp_path):
    """Four that share the least room: whoever needs some is given the farthest of the others', not all they hold."""
    chunks, each, world = 100, 100, 4
    sampler = WindowedSampler(np.arange(each, each * chunks + 1, each), seed=1, lanes=8)
    shares = [Shares(length=len(sampler), batch_size=16, rank=r, world_size=world, tail="pad") for r in range(world)]
    files = [Files(tmp_path, limit=(8 + 1) * 5 * SIZE, count=chunks) for _ in shares]
    aheads = []
    for own, share in zip(files, shares, strict=True):
        own.before = lambda: time.sleep(0.01)
        numbers = [np.unique(sampler.sample_ids(0, share.positions(step)[0]) // each) for step in range(len(share))]
        aheads.append(FetchAhead(own, lambda step, numbers=numbers: numbers[step].tolist(), len(share)))
    for _ in range(len(shares[0])):
        for ahead in aheads:
            with ahead.reading():
                time.sleep(0.002)
    for ahead in aheads:
        ahead.stop()
    assert sum(len(own.made) for own in files) <= 2 * chunks
