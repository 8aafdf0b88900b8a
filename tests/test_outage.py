"""A store that gives no answer, and a cache folder that cannot be written: they end next() under every policy.

Nothing is lost: the next next() reads the same batch again, and the whole is what an undisturbed run gives.
"""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from botocore.config import Config
from cache_files import Files, text
from faulty_proxy import FaultyProxy
from litdata_samples import largest_chunk, photos, plain, write
from own_source import ImageSource
from pack_sets import files_in
from s3_store import KEYS, bucket_in, upload

from slipstream import ReadError, SlipstreamDataset, SlipstreamLoader, UnavailableError, source_s3
from slipstream.bad_samples import POLICIES
from slipstream.fetch_ahead import FetchAhead
from slipstream.pack import pack
from slipstream.source import Kept
from slipstream.source_litdata import open_litdata
from slipstream.source_s3 import S3Origin

URL = "s3://outage/val"
CHUNKS, EACH, DOWN = 24, 4, 10
COUNT = CHUNKS * EACH
LATE = [f"chunk-0-{number}.bin" for number in range(DOWN, CHUNKS)]

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("set"), plain(photos(COUNT)), chunk_size=EACH)


@pytest.fixture(scope="module")
def size(folder: Path) -> int:
    return largest_chunk(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[tuple[int, bytes]]:
    """What a run that nothing disturbs gives: (id, pixels) in its order."""
    with loader_of(SlipstreamDataset(folder)) as loader:
        return samples_of(loader)


@pytest.fixture(scope="module")
def store(server: str, folder: Path) -> Iterator[str]:
    with bucket_in(server, "outage") as client:
        upload(client, folder, "outage", "val")
        yield server


@pytest.fixture
def proxy(store: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(store) as proxy:
        yield proxy


def options(endpoint: str, **more) -> dict[str, Any]:
    config = Config(retries={"mode": "standard", "total_max_attempts": 2}, **more)
    return {"endpoint_url": endpoint, "region_name": "us-east-1", "config": config, **KEYS}


def dataset_of(proxy: FaultyProxy, cache: Path, **more) -> SlipstreamDataset:
    return SlipstreamDataset(URL, cache_dir=cache, storage_options=options(proxy.url), **more)


def loader_of(dataset: SlipstreamDataset, **more) -> SlipstreamLoader:
    more = {"batch_size": EACH, "device": "cpu", "num_threads": 1, "verbose": False, "shuffle": False} | more
    return SlipstreamLoader(dataset, **more)


def samples_of(batches) -> list[tuple[int, bytes]]:
    return [
        (int(number), image.numpy().tobytes())
        for batch in batches
        for number, image in zip(batch["_indices"], batch["image"], strict=True)
    ]


def taken_until_it_fails(batches: Iterator) -> tuple[list[tuple[int, bytes]], UnavailableError]:
    taken: list[tuple[int, bytes]] = []
    while True:
        try:
            taken += samples_of([next(batches)])
        except UnavailableError as error:
            return taken, error


def goes_down(proxy: FaultyProxy, fault: str) -> None:
    proxy.script |= {(method, name): [fault + "*"] for name in LATE for method in ("GET", "HEAD")}


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("fault", ["reset", "503"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_store_that_is_down_in_mid_epoch(proxy, whole, tmp_path, monkeypatch, size, policy, fault, limited):
    monkeypatch.setattr(source_s3, "_PATIENCE", 0.1)
    dataset = dataset_of(proxy, tmp_path, **({"max_cache_size": 12 * size} if limited else {}))
    goes_down(proxy, fault)
    with loader_of(dataset, on_error=policy) as loader:
        batches = iter(loader)
        taken, error = taken_until_it_fails(batches)
        assert "cannot read s3://outage/val/chunk-0-" in str(error)
        assert len(taken) == EACH * DOWN == loader.state_dict()["position"]
        state = loader.state_dict()
        assert taken_until_it_fails(batches)[0] == [] and loader.state_dict() == state
        proxy.script.clear()
        taken += samples_of(batches)
        assert taken == whole
        assert loader.report().bad == ()
    with loader_of(dataset, on_error=policy) as loader:
        loader.load_state_dict(state)
        assert samples_of(loader) == whole[EACH * DOWN :]


class Fault:
    """Of the cache folder: what writes there fails with `code`, while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, code: int, call: str) -> None:
        self.on, done = False, getattr(os, call)

        def fails(path, *more, **options):
            last = str(more[0] if call == "replace" else path)
            if self.on and last.startswith(str(cache)) and last.removesuffix(".lock").endswith(tuple(LATE)):
                raise OSError(code, os.strerror(code), *([last] if code != errno.ENOSPC else []))
            return done(path, *more, **options)

        monkeypatch.setattr(os, call, fails)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize(
    ("code", "call"),
    [
        (errno.ENOSPC, "replace"),
        (errno.EDQUOT, "replace"),
        (errno.ENOSPC, "open"),
        (errno.EROFS, "open"),
        (errno.EACCES, "open"),
    ],
)
def test_a_cache_folder_that_cannot_be_written(proxy, whole, tmp_path, monkeypatch, size, code, call, limited):
    fault = Fault(monkeypatch, tmp_path, code, call)
    dataset = dataset_of(proxy, tmp_path, **({"max_cache_size": 12 * size} if limited else {}))
    fault.on = True
    with loader_of(dataset, on_error="replace") as loader:
        batches = iter(loader)
        taken, error = taken_until_it_fails(batches)
        assert error.errno == code and str(tmp_path) in str(error)
        assert len(taken) == EACH * DOWN == loader.state_dict()["position"]
        assert taken_until_it_fails(batches)[0] == []
        fault.on = False
        taken += samples_of(batches)
        assert taken == whole and loader.report().bad == ()


def test_a_file_of_the_data_that_cannot_be_read_stays_with_the_policy(folder, tmp_path, monkeypatch):
    """Though it is copied into the cache, and has the same errno."""
    source = open_litdata(folder, cache_dir=tmp_path)
    opened = builtins.open

    def refused(path, *more, **options):
        if str(path) == str(folder / LATE[0]):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(builtins, "open", refused)
    with pytest.raises(ReadError) as caught:
        source.read(range(COUNT))
    assert {failure[0] // EACH for failure in caught.value.failures} == {DOWN}


def test_what_holds_the_files_tries_again_too(tmp_path, monkeypatch):
    files = Files(tmp_path, limit=20_000)
    assert files.limit is not None
    use, broken = files.limit.use, threading.Event()

    def fails(*given, **options):
        if broken.is_set():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / ".limit"))
        return use(*given, **options)

    monkeypatch.setattr(files.limit, "use", fails)
    broken.set()
    ahead = FetchAhead(files, lambda step: [2 * step, 2 * step + 1], 5)
    try:
        for _ in range(3):
            with pytest.raises(UnavailableError, match=r"Read-only file system: .*\.limit"), ahead.reading():
                pass
        broken.clear()
        for step in range(5):
            with ahead.reading():
                assert [files.open(2 * step + number, text) for number in range(2)] == [
                    f"{2 * step:04}",
                    f"{2 * step + 1:04}",
                ]
    finally:
        ahead.stop()


@pytest.fixture
def closed_port() -> Iterator[str]:
    """Where connections are refused: nobody listens, and nobody else gets the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_refused_connection_is_tried_again_for_two_minutes(closed_port, monkeypatch, caplog):
    waits: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append)
    monkeypatch.setattr(source_s3, "time", clock)
    monkeypatch.setattr(source_s3, "_FIRST_WAIT", 0.1)
    origin = S3Origin(URL, options(closed_port))
    origin._answered = True  # once: a store that never did is given up sooner, see below
    with pytest.raises(UnavailableError, match="Could not connect"):
        origin.read("index.json")
    assert waits[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0])
    assert {*waits[8:]} == {10.0} and 120 < sum(waits) < 131
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert record.getMessage().endswith("it is tried again for 120 s")


@pytest.mark.parametrize(
    ("fault", "requests", "kind"),
    [
        ("503*", 2, UnavailableError),
        ("429*", 1, UnavailableError),
        ("400*", 1, UnavailableError),
        ("reset*", 2, UnavailableError),
        ("stall*", 1, UnavailableError),
        ("break*", 5, OSError),
        ("403*", 1, OSError),
        ("404*", 3, FileNotFoundError),
    ],
)
def test_what_says_nothing_of_the_file(proxy, monkeypatch, fault, requests, kind):
    if kind is UnavailableError:
        monkeypatch.setattr(source_s3, "_PATIENCE", -1.0)
    proxy.script["GET", LATE[0]] = [fault]
    with pytest.raises(kind) as caught:
        S3Origin(URL, options(proxy.url, read_timeout=0.5)).read(LATE[0])
    assert type(caught.value) is kind
    assert proxy.count("GET", LATE[0]) >= requests


def test_a_store_that_never_answered_is_given_up_sooner(proxy, monkeypatch):
    """A misspelled endpoint's error comes soon; a store that was there is waited for."""
    monkeypatch.setattr(source_s3, "_FIRST_PATIENCE", 0.1)
    monkeypatch.setattr(source_s3, "_PATIENCE", 4.0)  # boto3's own tries wait at random, a second and more
    proxy.script["GET", LATE[0]] = ["503*"]
    origin, seconds = S3Origin(URL, options(proxy.url)), []
    for first in (True, False):
        begin = time.monotonic()
        with pytest.raises(UnavailableError):
            origin.read(LATE[0])
        seconds.append(time.monotonic() - begin)
        if first:
            origin.read("index.json")
    assert seconds[0] < 4.0 <= seconds[1]


def interrupted(call: Callable[[], object], after: float = 1.5) -> float:
    """Seconds that `call` takes to end by Ctrl-C."""
    times: list[float] = []

    def strike() -> None:
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(after, strike)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    return time.monotonic() - times[0]


def test_ctrl_c_and_shutdown_end_the_wait_for_a_store_that_is_down(proxy, tmp_path, monkeypatch, closed_port):
    monkeypatch.setattr(source_s3, "_FIRST_WAIT", 5.0)
    dataset = dataset_of(proxy, tmp_path)
    goes_down(proxy, "503")
    others = {*threading.enumerate()}
    with loader_of(dataset) as loader:
        batches = iter(loader)
        assert len(samples_of(itertools.islice(batches, DOWN))) == EACH * DOWN
        assert interrupted(lambda: next(batches)) < 1
        begin = time.monotonic()
    assert time.monotonic() - begin < 1
    # Also the threads that wait: none is left to ask the store seconds later.
    fetching = [thread for thread in {*threading.enumerate()} - others if thread.name == "slipstream-fetch"]
    for thread in fetching:
        thread.join(1)
    assert not any(thread.is_alive() for thread in fetching)
    assert interrupted(lambda: dataset.source.read([EACH * DOWN])) < 1
    assert interrupted(lambda: dataset.source.read(range(EACH * DOWN, COUNT))) < 1
    assert interrupted(lambda: SlipstreamDataset(URL, storage_options=options(closed_port))) < 1
    proxy.script.clear()
    for thread in {*threading.enumerate()} - others:  # those of the reads are left behind, and end by themselves
        if thread.name.startswith("slipstream"):
            thread.join(20)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_pack_ends_with_it_and_goes_on(proxy, folder, tmp_path, monkeypatch, on_error):
    given = {"chunk_bytes": "40KB", "num_workers": 2, "progress": False, "on_error": on_error}
    pack(SlipstreamDataset(folder), tmp_path / "expected", **given)
    dataset = dataset_of(proxy, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(source_s3, "_PATIENCE", 0.1)
        proxy.script |= {("GET", LATE[-1]): ["503*"]}
        with pytest.raises(UnavailableError, match=r"chunk-0-23\.bin.*SlowDown"):
            pack(dataset, tmp_path / "new", **given)
    assert not (tmp_path / "new" / "index.json").exists()
    proxy.script.clear()
    packed = pack(dataset, tmp_path / "new", **given)
    assert packed.whole and packed.samples == COUNT and packed.skipped == ()
    assert files_in(tmp_path / "new") == files_in(tmp_path / "expected")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_source_of_ones_own_may_raise_it(policy):
    class Source(ImageSource):
        fails = 0

        def __init__(self) -> None:
            self.data = np.frombuffer(photos(1)[0]["image"], np.uint8)

        def __len__(self) -> int:
            return 20

        def read(self, ids, field="image"):
            if 8 in ids and self.fails:
                self.fails -= 1
                raise UnavailableError("the disk array does not answer")
            return [self.data for _ in ids]

    source = Source()
    source.fails = 2
    with loader_of(SlipstreamDataset(source), on_error=policy) as loader:
        batches, seen, failed = iter(loader), [], []
        while len(seen) < 20:
            try:
                seen += next(batches)["_indices"].tolist()
            except UnavailableError:
                failed += [*seen]
        assert (seen, failed) == ([*range(20)], [*range(8)] * 2)
        assert next(batches, None) is None


def test_what_opens_a_file_hands_it_on_and_folds_the_rest():
    def fails(key: type[OSError]) -> None:
        raise key("no answer")

    (kept,) = Kept().get([OSError], fails)
    assert isinstance(kept, OSError)
    with pytest.raises(UnavailableError, match="no answer"):
        Kept().get([UnavailableError], fails)
