"""The loader's threads where things go wrong: an error, a failed device, the collector at an awkward moment."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from own_source import ImageSource
from PIL import Image

from slipstream import DecodeError, MultiRandomResizedCrop, SlipstreamDataset, SlipstreamLoader, decode, loader
from slipstream.decode_check import DecodeCheck
from slipstream.device import use_device
from slipstream.workers import Channel, Drawn, crop_batches, decode_batches


class MemorySource(ImageSource):
    """Forty small images; `on_read` is called before each read."""

    def __init__(self) -> None:
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(stream, "JPEG")
        self.encoded = [np.frombuffer(stream.getvalue(), np.uint8)] * 40
        self.on_read = lambda: None

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, ids, field="image"):
        self.on_read()
        return [self.encoded[i] for i in ids]


REST = dict(epoch=0, valid=np.ones(4, bool))


def loader_of(source: MemorySource) -> SlipstreamLoader:
    pipelines = {"image": MultiRandomResizedCrop({"a": dict(size=16)})}
    return SlipstreamLoader(
        SlipstreamDataset(source), 4, pipelines=pipelines, device="cpu", verbose=False, num_threads=2
    )


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("slipstream")]


def test_every_thread_that_calls_cuda_does_so_on_the_loaders_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on GPU 0, where a first call makes a context: half a gigabyte of it for each other rank."""
    used: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((threading.current_thread().name, device)))
    device = torch.device("cuda", 3)
    resources: Any = SimpleNamespace(device=device)
    nothing: Any = []
    decode_batches(resources, Channel(1), Channel(1), nothing, 0, nothing, None)
    crop_batches(resources, Channel(1), Channel(1), 0, 0)
    here = threading.current_thread().name
    assert used == [(here, device)] * 2
    check = DecodeCheck(lambda data: data, device)
    check._thread.submit(int).result()
    check.close()
    assert used[2:] == [("slipstream-check_0", device)]
    use_device(torch.device("cpu"))
    assert len(used) == 3


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_the_collector_may_end_a_loader_on_its_own_thread(no_collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a join would wait for itself, and the decoder's lock is held."""
    collect, collected = threading.Event(), threading.Event()
    read_header = decode.read_header

    def collecting(data):
        if threading.current_thread().name == "slipstream-decode" and collect.wait(10) and not collected.is_set():
            gc.collect()
            collected.set()
        return read_header(data)

    monkeypatch.setattr(decode, "read_header", collecting)

    def start() -> weakref.ref:
        made = loader_of(MemorySource())
        cycle: list[object] = [made, iter(made)]
        cycle.append(cycle)
        return weakref.ref(made._resources.decoder)

    decoder = start()
    collect.set()
    assert collected.wait(20)
    limit = time.monotonic() + 20
    while (ours() or decoder() is not None) and time.monotonic() < limit:
        time.sleep(0.01)
    assert ours() == [] and decoder() is None


def test_an_error_of_any_kind_reaches_the_consumer(no_collector) -> None:
    class Panic(BaseException):
        """As extensions in other languages raise."""

    source, outcome = MemorySource(), []

    def fail() -> None:
        source.on_read = lambda: None
        raise Panic

    def consume() -> None:
        batches = iter(made)
        with pytest.raises(Panic):
            next(batches)
        outcome.append(len(list(batches)))

    source.on_read = fail
    with loader_of(source) as made:
        consumer = threading.Thread(target=consume, daemon=True)
        consumer.start()
        consumer.join(20)
        assert outcome == [9]


def test_an_error_that_is_kept_holds_neither_bytes_nor_loader(no_collector) -> None:
    source = MemorySource()
    source.encoded = [data[: len(data) // 2] if i == 2 else data.copy() for i, data in enumerate(source.encoded)]
    encoded = weakref.ref(source.encoded[0])
    made = loader_of(source)
    batches = iter(made)
    with pytest.raises(DecodeError, match="memory:2") as caught:
        next(batches)
    kept = caught.value
    del caught
    next(batches)
    source.encoded[0] = source.encoded[4]
    assert encoded() is None
    kept.__traceback__ = None
    dropped = weakref.ref(made)
    del batches, made
    assert dropped() is None and ours() == []


def test_what_cannot_be_fetched_costs_its_own_batch_alone() -> None:
    class RemoteSource(MemorySource):
        def prefetch(self, ids, *, progress):
            if 9 in ids:
                raise OSError("no route to chunk 9")

        def read(self, ids, field="image"):
            self.prefetch(ids, progress=False)
            return super().read(ids, field)

    with loader_of(RemoteSource()) as made:
        batches = iter(made)
        assert [next(batches)["_indices"].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        with pytest.raises(OSError, match="chunk 9"):
            next(batches)
        assert len(list(batches)) == 7


class Event:
    """A CUDA event whose stream is still busy, or on a device that failed."""

    failed = False

    def record(self, stream) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        if self.failed:
            raise RuntimeError("CUDA error")


def test_a_launch_that_fails_holds_what_was_launched_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(resources, drawn):
        raise torch.cuda.OutOfMemoryError("of the second field's crops")

    monkeypatch.setattr(loader, "finish", finish)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with loader_of(MemorySource()) as made:
        batches = iter(made)
        images = made._resources.decoder.decode(MemorySource().encoded[:4], range(4), str)
        drawn = Drawn(sample_ids=np.arange(4), images={"image": (images, None, None)}, values={}, **REST)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            batches._launch(drawn)  # pyright: ignore[reportAttributeAccessIssue]
        assert [owners for _, owners in made._resources.held] == [[images]]


def test_a_failed_device_does_not_keep_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loader_of(MemorySource())
    next(iter(made))
    monkeypatch.setattr(Event, "failed", True)
    made._resources.hold(Event(), None)
    with pytest.raises(RuntimeError, match="CUDA error"):
        made.shutdown()
    assert ours() == []
    with pytest.raises(RuntimeError, match="closed"):
        made._resources.decoder.decode([], [], str)
