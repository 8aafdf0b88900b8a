"""Sets of the real sizes: ImageNet's 1.28 million samples, and 10**9 samples in 10**5 chunks that are all one file.

Times are bounded loosely, for busy machines; what they are on a quiet one stands beside the bound.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from litdata_samples import maps_of, photos, plain, write
from PIL import Image

from slipstream import MultiRandomResizedCrop, SlipstreamDataset, SlipstreamLoader
from slipstream.source import MAX_MAPS
from slipstream.source_chunks import ChunkStore
from slipstream.source_litdata import LitDataSource
from slipstream.source_tar import open_tar

ORDERS = [True, "windowed"]
PIPELINES = {"image": MultiRandomResizedCrop({"a": dict(size=16)})}


def make_index(folder: Path, chunks: int, samples: int) -> Path:
    """One real chunk of `samples`, and an index.json that names it `chunks` times; gives the chunk's file."""
    write(folder / "one", plain(photos(20) * (samples // 20)), chunk_size=samples)
    index = json.loads((folder / "one" / "index.json").read_text())
    (entry,) = index["chunks"]
    index["chunks"] = [{**entry, "filename": f"chunk-0-{number}.bin"} for number in range(chunks)]
    (folder / "index.json").write_text(json.dumps(index))
    return folder / "one" / entry["filename"]


def make_local(folder: Path, chunks: int, samples: int) -> Path:
    real = make_index(folder, chunks, samples)
    for number in range(chunks):
        os.link(real, folder / f"chunk-0-{number}.bin")
    return folder


class OneChunk:
    """An origin whose chunks are all the same file, as far as they are fetched."""

    def __init__(self, folder: Path, real: Path) -> None:
        self.name, self._folder, self._real = str(folder), folder, real
        self.fetched: list[str] = []

    def identity(self) -> str:
        return ""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        path = self._folder / name if name == "index.json" else self._real
        return path.read_bytes()[start:stop]

    def fetch(self, name: str, path: str, on_bytes=None) -> None:
        self.fetched.append(name)
        os.link(self._real, path)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    passed = time.perf_counter() - begin
    assert passed < seconds, f"{passed:.3f} s"


def held(make) -> tuple[object, int]:
    """What `make` gives, and how many bytes it holds."""
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        gc.collect()
        return made, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def census() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def loader_of(dataset: SlipstreamDataset, shuffle: bool | str, **options) -> SlipstreamLoader:
    options = {"pipelines": PIPELINES, "device": "cpu", "num_threads": 2, "verbose": False, **options}
    return SlipstreamLoader(dataset, 256, shuffle=shuffle, **options)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_local(tmp_path_factory.mktemp("imagenet"), 2300, 560)


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("billion")
    return folder, make_index(folder, 100_000, 10_000)


def test_imagenet_starts_in_under_a_second(imagenet: Path) -> None:
    with loader_of(SlipstreamDataset(local_dir=imagenet), True) as loader:
        next(iter(loader))  # what is loaded and compiled once
    with within(1.0):  # 0.03 s
        dataset = SlipstreamDataset(local_dir=imagenet)
        loader = loader_of(dataset, True)
    assert len(dataset) == 2300 * 560
    loader.shutdown()


def test_an_index_takes_half_a_kilobyte_a_chunk_and_nothing_a_sample(imagenet: Path) -> None:
    dataset, n_bytes = held(lambda: SlipstreamDataset(local_dir=imagenet))
    assert isinstance(dataset, SlipstreamDataset)
    assert n_bytes < 512 * 2300  # 0.9 bytes a sample; allowed were 16. 10**5 chunks are 40 MB


@pytest.mark.parametrize("shuffle", ORDERS)
def test_a_billion_samples_start_and_seek(billion: tuple[Path, Path], shuffle: bool | str, tmp_path: Path) -> None:
    folder, real = billion
    origin = OneChunk(folder, real)
    before = census()
    with within(10):  # 0.5 s, most of it the parsing of 13 MB of JSON, and the fingerprint
        source = LitDataSource(ChunkStore(origin, cache_dir=tmp_path, in_place=False))
        loader = loader_of(SlipstreamDataset(source), shuffle)
    state = loader.state_dict()
    assert state["position"] == 0 and len(loader) == -(-(10**9) // 256)
    for position in (0, 123_456_789, 999_999_700):
        with within(0.1):  # 0.05 ms
            loader.load_state_dict({**state, "epoch": 3, "position": position})
        assert loader.state_dict()["position"] == position
    batches = iter(loader)
    batch = next(batches)
    expected = loader._sampler.sample_ids(3, np.arange(999_999_700, 999_999_956))
    assert batch["_indices"].tolist() == expected.tolist()
    assert [len(batch["_indices"]) for batch in batches] == [44]
    assert len(set(origin.fetched)) <= 301  # those of the samples handed out, and the first for what the fields are
    loader.shutdown()
    after = census()
    assert after[0] <= before[0] + 1 and after[1] <= before[1] + 1


@pytest.mark.parametrize("shuffle", ORDERS)
def test_any_position_of_a_billion_is_milliseconds_away(billion: tuple[Path, Path], shuffle: bool | str) -> None:
    folder, real = billion
    source = LitDataSource(ChunkStore(OneChunk(folder, real), cache_dir=folder / "cache", in_place=False))
    with loader_of(SlipstreamDataset(source), shuffle) as loader:
        order = loader._sampler
        with within(5):  # the windowed order of 10**5 chunks is made once an epoch: 0.1 s
            order.sample_ids(7, np.arange(2))
        positions = np.random.default_rng(0).integers(0, 10**9 - 256, 20)
        with within(20 * 0.02):  # 0.2 ms, windowed 0.8 ms
            for position in positions.tolist():
                ids = order.sample_ids(7, np.arange(position, position + 256))
                assert ids.min() >= 0 and ids.max() < 10**9 and len(set(ids.tolist())) == 256


def test_no_more_chunks_are_mapped_than_are_kept(tmp_path: Path) -> None:
    chunks = MAX_MAPS + 500
    folder = make_local(tmp_path / "set", chunks, 20)
    dataset = SlipstreamDataset(local_dir=folder)
    before = len(os.listdir("/proc/self/fd"))
    for first in range(0, chunks, 512):
        ids = 20 * np.arange(first, min(first + 512, chunks)) + 3
        views = dataset.source.read(ids)
        assert len(maps_of(tmp_path)) <= MAX_MAPS + 512  # one more for each view that is in use
        assert len(os.listdir("/proc/self/fd")) == before
    assert bytes(views[-1]) == bytes(dataset.source.read([3])[0])
    del views
    assert MAX_MAPS - 1 <= len(maps_of(tmp_path)) <= MAX_MAPS
    dataset.source.close()
    assert maps_of(tmp_path) == []


def test_the_time_of_a_scan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "0.jpg")
    tar = tmp_path / "0.tar"
    with tarfile.open(tar, "w") as writer:
        writer.add(folder / "0.jpg", "0.jpg")
    for source, what in (
        (tmp_path / "images", "1 samples of 1 classes"),
        (open_tar(tar, cache_dir=tmp_path / "cache"), "1 samples"),
    ):
        loader_of(SlipstreamDataset(source), False, verbose=True).shutdown()
        line = capsys.readouterr().out
        assert line.startswith(f"slipstream: {what} (found in 0.") and line.endswith(" s), batches of 256 on cpu\n")
