"""What a loader leaves behind: nothing, however it ends."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slipstream import MultiRandomResizedCrop, SlipstreamDataset, SlipstreamLoader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index:02}.jpg")
    return root


@pytest.fixture(autouse=True)
def old() -> Iterator[None]:
    """What other tests left is not looked at again at each collection: late in a run that took half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def loader_of(folder: Path, **options) -> SlipstreamLoader:
    pipelines = {"image": MultiRandomResizedCrop({"a": dict(size=32), "b": dict(size=16)})}
    options = {"pipelines": pipelines, "device": "cpu", "verbose": False, "num_threads": 2, **options}
    return SlipstreamLoader(SlipstreamDataset(local_dir=folder), 4, **options)


def ours() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("slipstream"))


def census() -> tuple[int, int, int]:
    """Threads of the process (all of them), descriptors and maps."""
    gc.collect()
    return (
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
        len(Path("/proc/self/maps").read_text().splitlines()),
    )


def finished(loader: SlipstreamLoader) -> None:
    list(loader)
    loader.shutdown()
    loader.shutdown()


def in_mid_epoch(loader: SlipstreamLoader) -> None:
    next(iter(loader))
    loader.shutdown()


def dropped(loader: SlipstreamLoader) -> None:
    iterator = iter(loader)
    next(iterator)
    del iterator, loader


def left_by_an_exception(loader: SlipstreamLoader) -> None:
    with contextlib.suppress(KeyError), loader:
        for batch in loader:
            raise KeyError(batch["path"])


def never_used(loader: SlipstreamLoader) -> None:
    del loader


ENDINGS = [finished, in_mid_epoch, dropped, left_by_an_exception, never_used]


@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
def test_the_twentieth_loader_leaves_what_the_second_left(
    folder: Path, end: Callable[[SlipstreamLoader], None]
) -> None:
    after = []
    for _ in range(20):
        end(loader_of(folder))
        gc.collect()
        assert ours() == []
        after.append(census())
    end_of_wait = time.monotonic() + 5
    while after[-1][0] > after[1][0] and time.monotonic() < end_of_wait:  # a thread that has ended goes a little later
        time.sleep(0.05)
        after[-1] = census()
    threads, descriptors, maps = (np.array(column) for column in zip(*after, strict=True))
    assert threads[19] <= threads[1] and descriptors[19] <= descriptors[1]
    # the C allocator maps and joins its own memory as it likes: a leak would be a map a loader or more
    assert maps[19] - maps[1] < 10, maps


def test_an_iterator_that_is_dropped_stops_its_threads(folder: Path) -> None:
    with loader_of(folder) as loader:
        for _batch in loader:
            break
        gc.collect()
        assert [name for name in ours() if not name.startswith("slipstream-crop")] == []
        assert len(list(loader)) == len(loader)


def test_a_shut_down_loader_says_so(folder: Path) -> None:
    loader = loader_of(folder)
    iterator = iter(loader)
    batch = next(iterator)
    loader.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        next(iterator)
    with pytest.raises(RuntimeError, match="shut down"):
        iter(loader)
    assert batch["a"].shape == (4, 3, 32, 32) and batch["a"].float().mean() > 0


def test_shutdown_wakes_a_consumer_that_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(folder)
    source = loader.dataset.source
    read, release = source.read, threading.Event()

    def slow(ids, field="image"):
        release.wait(20)
        return read(ids, field)

    monkeypatch.setattr(source, "read", slow)
    iterator = iter(loader)
    errors = []

    def consume() -> None:
        try:
            next(iterator)
        except RuntimeError as error:
            errors.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.2)
    threading.Timer(0.2, release.set).start()
    loader.shutdown()
    consumer.join(10)
    assert not consumer.is_alive() and "shut down" in errors[0]


def _use_in_child(loader: SlipstreamLoader, iterator, queue) -> None:
    for use in (lambda: next(iterator), lambda: iter(loader)):
        try:
            use()
            queue.put("it ran")
        except RuntimeError as error:
            queue.put(str(error))
    loader.shutdown()  # does nothing there, and does not hang
    queue.put("shut down")


def test_use_in_a_forked_child_is_an_error_at_once(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    with loader_of(folder) as loader:
        iterator = iter(loader)
        next(iterator)
        queue = context.Queue()
        child = context.Process(target=_use_in_child, args=(loader, iterator, queue))
        child.start()
        answers = [queue.get(timeout=20) for _ in range(3)]
        child.join(20)
        assert child.exitcode == 0
        assert "after fork" in answers[0] and "after fork" in answers[1] and answers[2] == "shut down"
        assert len(list(iterator)) == len(loader) - 1  # the parent's goes on


def _epoch_in_child(folder: Path, queue) -> None:
    with loader_of(folder) as loader:
        queue.put(sum(int(batch["a"].sum()) for batch in loader))


def test_a_new_loader_in_a_forked_child_works(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    with loader_of(folder) as loader:
        expected = sum(int(batch["a"].sum()) for batch in loader)
        queue = context.Queue()
        child = context.Process(target=_epoch_in_child, args=(folder, queue))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join(20)
        assert child.exitcode == 0
