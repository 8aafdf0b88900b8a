"""A loader whose set is fetched into a cache, larger than the set or not: each chunk once, ahead, no vain wait."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from botocore.config import Config
from cache_files import used
from faulty_proxy import FaultyProxy
from litdata_samples import edit_index, jpeg, largest_chunk, maps_of, photos, plain, write
from s3_store import KEYS, bucket_in, upload
from tar_samples import sample
from tar_samples import write as write_tar

from slipstream import ReadError, SlipstreamDataset, SlipstreamLoader, fetch_ahead
from slipstream.source_cache_limit import CacheLimitError

URL = "s3://ahead/val"
CHUNKS, EACH = 64, 8
COUNT = CHUNKS * EACH
BAD = "chunk-0-5.bin"


pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("set"), plain(photos(COUNT)), chunk_size=EACH)


@pytest.fixture(scope="module")
def size(folder: Path) -> int:
    return largest_chunk(folder)


@pytest.fixture(scope="module")
def store(server: str, folder: Path) -> Iterator[str]:
    with bucket_in(server, "ahead") as client:
        upload(client, folder, "ahead", "val")
        yield server


@pytest.fixture
def proxy(store: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(store) as proxy:
        yield proxy


def options(proxy: FaultyProxy) -> dict:
    config = Config(retries={"mode": "standard", "total_max_attempts": 2})
    return {"endpoint_url": proxy.url, "region_name": "us-east-1", "config": config, **KEYS}


def dataset_of(proxy: FaultyProxy, cache: Path, **more) -> SlipstreamDataset:
    dataset = SlipstreamDataset(URL, cache_dir=cache, storage_options=options(proxy), **more)
    dict(dataset.fields)  # which ranges of the first chunk tell
    proxy.requests.clear()
    return dataset


def loader_of(dataset: SlipstreamDataset, **more) -> SlipstreamLoader:
    more = {"batch_size": EACH, "device": "cpu", "num_threads": 2, "verbose": False} | more
    return SlipstreamLoader(dataset, **more)


def ids_of(batches) -> list[int]:
    return [number for batch in batches for number in batch["_indices"].tolist()]


def gets(proxy: FaultyProxy) -> Counter:
    return Counter(name for method, name, _ in proxy.requests if method == "GET" and name.endswith(".bin"))


def ours() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("slipstream"))


class Watch:
    """Looks how many bytes a cache holds, all the time."""

    def __init__(self, cache: Path) -> None:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, args=(cache,))

    def _look(self, cache: Path) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, used(cache))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_windowed_epoch_reads_each_chunk_once_on_a_smaller_disk(proxy, tmp_path, size):
    dataset = dataset_of(proxy, tmp_path, max_cache_size=28 * size)
    with Watch(tmp_path) as watch, loader_of(dataset, shuffle="windowed:4", batch_size=16) as loader:
        for epoch in range(2):
            proxy.requests.clear()
            batches = list(loader)
            ids = ids_of(batches)
            assert sorted(ids) == list(range(COUNT))
            assert ids[:32] != sorted(ids[:32])
            paths = [path for batch in batches for path in batch["path"]]
            assert paths == [f"class/{number}.jpg" for number in ids]
            counts = gets(proxy)
            # the chunks at the lanes' ends twice, and of the epoch before some are there
            assert max(counts.values()) <= 2 and sum(counts.values()) <= CHUNKS + 4
            assert epoch or len(counts) == CHUNKS
            assert not [line for line in maps_of(tmp_path) if "deleted" in line]
    # a chunk that is renamed between two looks is seen twice
    assert 20 * size < watch.most <= 28 * size + 8 * size
    assert used(tmp_path) <= 28 * size
    assert maps_of(tmp_path) == []


RANK = """
import sys
from slipstream import SlipstreamDataset, SlipstreamLoader
endpoint, cache, most, rank = sys.argv[1:]
options = {"endpoint_url": endpoint, "region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}
data = SlipstreamDataset("s3://ahead/val", cache_dir=cache, storage_options=options, max_cache_size=most)
loader = SlipstreamLoader(
    data, 8, shuffle="windowed:4", rank=int(rank), world_size=2, device="cpu", num_threads=1, verbose=False
)
print("ready", flush=True)
sys.stdin.readline()
with loader:
    print(*(number for batch in loader for number in batch["_indices"].tolist()))
"""


def test_two_ranks_share_one_small_cache(proxy, tmp_path, size):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, proxy.url, str(tmp_path), str(28 * size), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with Watch(tmp_path) as watch:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        ids = [[int(number) for number in process.communicate(timeout=120)[0].split()] for process in processes]
    assert sorted(ids[0] + ids[1]) == list(range(COUNT))
    counts = gets(proxy)
    assert len(counts) == CHUNKS and sum(counts.values()) <= CHUNKS + 12
    assert watch.most <= 28 * size + 8 * size
    assert used(tmp_path) <= 28 * size


def test_loaders_that_look_far_ahead_make_room_for_each_other(proxy, tmp_path, size):
    """Each alone would hold the whole cache; they take turns."""
    loaders = [
        loader_of(dataset_of(proxy, tmp_path, max_cache_size=4 * size), prefetch=1, exclude_fields=["label"])
        for _ in range(2)
    ]
    loaders[1].set_epoch(0)
    first = iter(loaders[0])
    taken = [next(first) for _ in range(4)]
    second = iter(loader_of(dataset_of(proxy, tmp_path, max_cache_size=4 * size, indices=range(300, COUNT))))
    assert ids_of([next(second) for _ in range(20)]) == list(range(300, 460))
    assert ids_of([*taken, *first]) == list(range(COUNT))
    assert len(list(second)) == (COUNT - 300 + 7) // 8 - 20
    for loader in loaders:
        loader.shutdown()


def test_samples_from_all_over_a_set_that_is_too_large_are_refused(proxy, tmp_path, size, folder):
    total = sum(path.stat().st_size for path in folder.glob("*.bin"))
    dataset = dataset_of(proxy, tmp_path, max_cache_size=28 * size)
    with pytest.raises(ValueError, match=rf'shuffle=True reads .*use shuffle="windowed", or give {total} bytes'):
        loader_of(dataset, shuffle=True)
    with pytest.raises(ValueError, match=r'16 lanes of 5 chunks .* or more, or fewer lanes: shuffle="windowed:4"'):
        loader_of(dataset, shuffle="windowed")
    with pytest.raises(ValueError, match='shuffle must be True, False or "windowed"'):
        loader_of(dataset, shuffle="windowed:0")
    loader_of(dataset, shuffle="windowed", rank=0, world_size=4).shutdown()
    loader_of(dataset_of(proxy, tmp_path, max_cache_size=total), shuffle=True).shutdown()
    few = dataset_of(proxy, tmp_path, max_cache_size=28 * size, indices=range(100))
    with loader_of(few, shuffle=True) as loader:
        assert sorted(ids_of(loader)) == list(range(100))


def test_a_batch_that_does_not_fit_says_what_would(proxy, tmp_path, size):
    scattered = [number * EACH for number in range(CHUNKS)]
    dataset = dataset_of(proxy, tmp_path, max_cache_size=8 * size, indices=[*range(64), *scattered])
    with loader_of(dataset, batch_size=32) as loader:
        batches = iter(loader)
        assert ids_of([next(batches), next(batches)]) == list(range(64))
        with pytest.raises(CacheLimitError, match=r"max_cache_size is .* and must be at least \d+ bytes"):
            next(batches)


def test_a_good_batch_does_not_wait_for_the_chunk_of_another(proxy, tmp_path):
    proxy.script["GET", BAD] = ["stall"]
    with loader_of(dataset_of(proxy, tmp_path), prefetch=2) as loader:
        batches = iter(loader)
        begin = time.monotonic()
        assert ids_of([next(batches) for _ in range(5)]) == list(range(40))
        assert proxy.stalled.is_set() and time.monotonic() - begin < 20  # it stalls for 30
        limit = time.monotonic() + 20
        while len(gets(proxy)) < 12 and time.monotonic() < limit:
            time.sleep(0.01)
        assert len(gets(proxy)) >= 12  # those of far later batches come meanwhile
        proxy.gate.set()
        assert ids_of(batches) == list(range(40, COUNT))
    assert max(gets(proxy).values()) == 1


def test_shutdown_does_not_wait_for_a_download(proxy, tmp_path):
    proxy.script["GET", "chunk-0-1.bin"] = ["stall"]
    loader = loader_of(dataset_of(proxy, tmp_path, max_cache_size="1MB"))
    batches = iter(loader)
    next(batches)
    assert proxy.stalled.wait(20)
    begin = time.monotonic()
    loader.shutdown()
    assert time.monotonic() - begin < 3
    proxy.gate.set()
    limit = time.monotonic() + 20
    while ours() and time.monotonic() < limit:
        time.sleep(0.01)
    assert ours() == []


def test_a_dropped_iterator_stops_fetching(proxy, tmp_path, size):
    proxy.faults, proxy.rate = ["delay"], 1.0
    dataset = dataset_of(proxy, tmp_path, max_cache_size=16 * size)
    with loader_of(dataset) as loader:
        for _batch in loader:
            break
        gc.collect()
        count = len(proxy.requests)
        assert [name for name in ours() if not name.startswith("slipstream-crop")] == []
        time.sleep(0.3)
        assert len(proxy.requests) <= count + 8
        limit = dataset.source._store.limit
        assert not limit._users and limit._aside == 0
        proxy.rate = 0.0
        assert ids_of(loader) == list(range(COUNT))


@pytest.mark.parametrize("limited", [False, True])
def test_a_chunk_that_stays_wrong_is_fetched_once_and_fails_alone(proxy, tmp_path, limited, size):
    proxy.script["GET", BAD] = ["truncate*"]
    more = {"max_cache_size": 16 * size} if limited else {}
    dataset = dataset_of(proxy, tmp_path, **more)
    with loader_of(dataset, batch_size=4) as loader:
        good, bad = [], []
        batches = iter(loader)
        for step in range(len(loader)):
            try:
                good += next(batches)["_indices"].tolist()
            except ReadError as error:
                bad.append((step, BAD in str(error)))
        assert bad == [(10, True), (11, True)] and sorted(good) == [n for n in range(COUNT) if n // EACH != 5]
    assert proxy.count("GET", BAD) == 5  # one fetch's tries
    proxy.script.clear()
    dataset.source._store._failures.clear()  # a minute later
    with loader_of(dataset) as loader:
        assert ids_of(loader) == list(range(COUNT))


def test_other_samples_stand_in_for_a_chunk_that_cannot_be_fetched(proxy, tmp_path, size):
    proxy.script["GET", BAD] = ["truncate*"]
    dataset = dataset_of(proxy, tmp_path, max_cache_size=16 * size)
    with loader_of(dataset, on_error="resample") as loader:
        ids = ids_of(loader)
        assert len(ids) == COUNT and not {*range(40, 48)} & {*ids}
        assert loader.report().resampled >= 8
    assert proxy.count("GET", BAD) == 5


def test_chunks_met_in_search_of_other_samples_are_fetched_once_too(proxy, tmp_path, monkeypatch):
    lost = [f"chunk-0-{number}.bin" for number in range(1, CHUNKS, 2)]
    proxy.script |= {("HEAD", name): ["404*"] for name in lost}
    proxy.faults, proxy.rate = ["delay"], 1.0
    monkeypatch.setattr(fetch_ahead, "_TO_COME", 1)  # so that the walk has not met all before
    with loader_of(dataset_of(proxy, tmp_path), on_error="resample") as loader:
        ids = ids_of(batch for batch, _ in zip(loader, range(12), strict=False))
        assert len(ids) == 96 and all(number // EACH % 2 == 0 for number in ids)
    assert {proxy.count("HEAD", name) for name in lost} <= {0, 1, 2, 3}  # one fetch's tries


def test_what_others_remove_is_fetched_again(proxy, tmp_path):
    with loader_of(dataset_of(proxy, tmp_path), prefetch=1) as loader:
        batches = iter(loader)
        ids = ids_of([next(batches)])
        limit = time.monotonic() + 30
        while len([*tmp_path.rglob("*.bin")]) < CHUNKS and time.monotonic() < limit:
            time.sleep(0.01)
        for path in tmp_path.rglob("*.bin"):
            path.unlink()
        assert ids + ids_of(batches) == list(range(COUNT))
    assert max(gets(proxy).values()) == 2


@pytest.mark.parametrize("limit", [None, "1MB"])
def test_a_chunk_that_was_there_once_is_looked_for_again(proxy, tmp_path, limit):
    source = dataset_of(proxy, tmp_path, max_cache_size=limit).source
    for _ in range(2):
        assert source.read([9])[0].tobytes() == jpeg(9)
        for path in tmp_path.rglob("*.bin"):
            path.unlink()
        source._opened.close()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_slow_folder_goes_the_same_way(tmp_path, folder, size, compression):
    if compression:
        (tmp_path / "set").mkdir()
        for path in folder.glob("*.bin"):
            (tmp_path / "set" / path.name).write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
        shutil.copy(folder / "index.json", tmp_path / "set")
        edit_index(tmp_path / "set", lambda index: index["config"].update(compression="zstd"))
        folder = tmp_path / "set"
    cache = tmp_path / "cache"
    cache.mkdir()
    dataset = SlipstreamDataset(remote_dir=folder, cache_dir=cache, max_cache_size=28 * size)
    with Watch(cache) as watch, loader_of(dataset, shuffle="windowed:4") as loader:
        assert sorted(ids_of(loader)) == list(range(COUNT))
    # packed chunks lie beside those that they become for a moment
    assert used(cache) <= 28 * size and watch.most <= (28 + 16) * size
    assert dataset[3]["image"] == jpeg(3)


def test_tars_in_s3_larger_than_the_cache(server, tmp_path):
    for shard in range(12):
        write_tar(tmp_path / "shards" / f"{shard:02}.tar", [each for n in range(4) for each in sample(4 * shard + n)])
    size = max(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    cache = tmp_path / "cache"
    cache.mkdir()
    with bucket_in(server, "ahead-tars") as client, FaultyProxy(server) as proxy:
        upload(client, tmp_path / "shards", "ahead-tars", "set")
        given = {"cache_dir": cache, "storage_options": options(proxy)}
        with Watch(cache) as watch:
            dataset = SlipstreamDataset("s3://ahead-tars/set", max_cache_size=4 * size, **given)
            assert len([*cache.rglob("*.tar")]) <= 4
            proxy.requests.clear()
            with loader_of(dataset, batch_size=6) as loader:
                batches = list(loader)
        assert ids_of(batches) == list(range(48))
        assert [key for batch in batches for key in batch["key"]] == [f"train/{number:05d}" for number in range(48)]
        counts = Counter(name for method, name, _ in proxy.requests if method == "GET")
        assert max(counts.values()) == 1
        assert watch.most <= 4 * size + 4 * size
        with pytest.raises(
            ValueError, match=rf"max_cache_size must be at least the {size} bytes of s3://ahead-tars/set/"
        ):
            SlipstreamDataset("s3://ahead-tars/set", max_cache_size=size - 1, **given)


def test_bad_limits_are_refused(tmp_path, folder):
    for value, message in [("much", "a number of bytes or a text"), (0, "must be > 0"), (True, "a number of bytes")]:
        with pytest.raises(ValueError, match=f"max_cache_size .*{message}" if value == "much" else "max_cache_size"):
            SlipstreamDataset(remote_dir=folder, cache_dir=tmp_path, max_cache_size=value)
    source = SlipstreamDataset(local_dir=folder, max_cache_size="2GB").source
    with pytest.raises(ValueError, match="max_cache_size does not apply to a Source object"):
        SlipstreamDataset(source, max_cache_size="2GB")
    assert os.listdir(tmp_path) == []
