"""What threads, other processes and file systems do to a limited cache at the worst moment."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import pickle
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from cache_files import SIZE, Files, listed, text, used

from slipstream import source_cache_limit
from slipstream.daemon import in_threads
from slipstream.fetch_ahead import FetchAhead
from slipstream.source_cache_limit import CacheLimitError


def test_of_two_that_let_go_at_once_one_is_the_last(tmp_path: Path) -> None:
    """Or what is mapped would stay on the disk after others have removed it."""
    files, mapped, left = Files(tmp_path, limit=3 * SIZE), set(), []
    files.on_release = mapped.discard
    together = threading.Barrier(2, timeout=30)

    def work() -> None:
        for _ in range(2000):
            files.hold([0], coming=[0])
            mapped.add(0)
            together.wait()
            files.release([0])
            if together.wait() == 0:
                left.extend(mapped)
            together.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert left == []


def test_a_file_that_comes_while_files_are_counted_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, other = Files(tmp_path, limit=3 * SIZE), Files(tmp_path, limit=3 * SIZE)
    assert files.limit is not None and other.hold([5]) == [5]
    os.makedirs(str(files.folder))
    entries = source_cache_limit._entries

    def slowly(folder: str) -> list[os.DirEntry[str]]:
        found = sorted(entries(folder), key=lambda entry: entry.name)
        if folder == files.folder and not other.made:
            other.fetch(5, has_room=True)
        return found

    monkeypatch.setattr(source_cache_limit, "_entries", slowly)
    found, aside, _ = files.limit._files()
    assert other.made == [5] and len(found) * SIZE + aside == SIZE


def test_a_start_that_fails_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def few(path, *more):
        if str(path).endswith(".room"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really(path, *more)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "open", few)
    with pytest.raises(OSError, match="Too many open files"):
        Files(tmp_path, limit=3 * SIZE)
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before
    opening = threading.Thread(target=Files, args=(tmp_path,), kwargs={"limit": 3 * SIZE}, daemon=True)
    opening.start()
    opening.join(10)
    assert not opening.is_alive()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process keeps to the limit there, and removes nothing that it uses."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", none)
    monkeypatch.setattr(fcntl, "flock", none)
    files = Files(tmp_path, limit=6 * SIZE)
    files.before = lambda: time.sleep(0.002)
    ahead = FetchAhead(files, lambda step: [step, step + 1], 40)
    for step in range(40):
        with ahead.reading():
            assert files.open(step, text) == f"{step:04}" and used(tmp_path) <= 6 * SIZE
            time.sleep(0.002)
    ahead.stop()
    assert sorted(files.made) == list(range(41))


@pytest.mark.parametrize("limit", [None, 9 * SIZE])
def test_a_folder_that_is_removed_meanwhile(tmp_path: Path, limit: int | None) -> None:
    files, calls = Files(tmp_path, limit=limit), itertools.count()

    def remove() -> None:
        if next(calls) == 5:
            shutil.rmtree(tmp_path, ignore_errors=True)

    files.before = remove
    ahead = FetchAhead(files, lambda step: [step], 20)
    for step in range(20):
        with ahead.reading():
            assert files.open(step, text) == f"{step:04}"
    ahead.stop()
    if files.limit is not None:
        assert not files.limit._users and files.limit._aside == 0


def test_what_a_killed_process_has_half_written_does_not_stay(tmp_path: Path) -> None:
    folder = tmp_path / ("1" * 32)
    folder.mkdir()
    (folder / "0003.99999-1.part").write_bytes(bytes(5 * SIZE))
    (folder / "0003.lock").touch()
    other = Files(tmp_path, limit=3 * SIZE)  # of another set
    assert listed(folder) == []
    (folder / "0004.99999-1.part").write_bytes(bytes(5 * SIZE))
    (tmp_path / "99999-ab.room").touch()  # of a process that was killed after that
    assert other.hold([1], wait=False) == [1] and listed(folder) == []


def test_what_cannot_be_fetched_is_tried_once_a_read(tmp_path: Path) -> None:
    files = Files(tmp_path, limit=3 * SIZE)
    files.lost = {1}
    for times in (1, 2):
        with files.held([0, 1]):
            assert files.open(0, text) == "0000"
            with pytest.raises(OSError, match="no route"):
                files.open(1, text)
        assert files.made.count(1) == times
    files.lost.clear()
    assert files.open(1, text) == "0001"


def test_a_copy_does_not_know_what_failed(tmp_path: Path) -> None:
    class OwnError(OSError):  # which pickle cannot find
        pass

    files = Files(tmp_path)
    files.remember(3, OwnError())
    files.remember(4, FileNotFoundError(errno.ENOENT, "No such file", "/store/4"))
    with pytest.raises(FileNotFoundError, match="/store/4"):
        files.open(4, text)
    with pytest.raises(OwnError):
        files.open(3, text)
    files.before = int
    assert pickle.loads(pickle.dumps(files)).open(3, text) == "0003"


def test_stop_does_not_wait_for_whoever_opens_files(tmp_path: Path) -> None:
    files, gate = Files(tmp_path, limit=9 * SIZE), threading.Event()
    files.on_release = lambda _: gate.wait(20)  # as for the lock of the maps, while one is fetched under it
    ahead = FetchAhead(files, lambda step: [step], 5)
    with ahead.reading():
        stopping = threading.Thread(target=ahead.stop)
        begin = time.monotonic()
        stopping.start()
        stopping.join(10)
        assert time.monotonic() - begin < 5
        gate.set()
    for thread in ahead._threads:
        thread.join(10)
    assert files.limit is not None and not files.limit._users and files.limit._aside == 0


def test_stop_in_a_process_that_starts_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    files = Files(tmp_path, limit=9 * SIZE)
    ahead = FetchAhead(files, lambda step: [step], 5)
    with ahead.reading():
        pass
    monkeypatch.setattr(threading.Thread, "start", refuse)
    ahead.stop()
    assert files.limit is not None and not files.limit._users and files.limit._aside == 0


def test_more_than_fits_beside_the_step_is_refused_at_once(tmp_path: Path) -> None:
    ahead = FetchAhead(Files(tmp_path, limit=3 * SIZE), lambda step: [0, 1, 2], 5)
    with ahead.reading():
        begin = time.monotonic()
        with pytest.raises(CacheLimitError, match="must be at least 4000 bytes"), ahead.reading_also([2, 7]):
            pass
        assert time.monotonic() - begin < 5
    ahead.stop()


def test_threads_that_share_little_room_all_come_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_cache_limit, "_PATIENCE", 2.0)
    files = Files(tmp_path, limit=3 * SIZE, count=200)
    files.before = lambda: time.sleep(0.03)
    assert list(in_threads(lambda number: files.open(number, text), range(200))) == [f"{n:04}" for n in range(200)]
