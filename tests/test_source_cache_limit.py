"""The limit on a cache folder: least recently used files go first, what is in use stays, over threads and processes."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cache_files import SIZE, Files, listed, text, used

from slipstream import source_cache, source_cache_limit, source_locks
from slipstream.source_cache_limit import CacheLimitError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _touch_each_time(monkeypatch):
    monkeypatch.setattr(source_cache, "_TOUCH_AFTER", 0.0)


def numbers_in(files: Files) -> list[int]:
    return [int(name) for name in listed(Path(str(files.folder)))]


def read(files: Files, *numbers: int) -> None:
    for number in numbers:
        assert files.open(number, text) == f"{number:04}"


def read_slowly(files: Files, *numbers: int) -> None:
    for number in numbers:
        read(files, number)
        time.sleep(0.015)  # a file's times are as coarse as the kernel's ticks


def test_what_was_used_last_stays(tmp_path):
    files = Files(tmp_path, limit=3 * SIZE)
    read_slowly(files, 0, 1, 2, 0, 3)
    assert numbers_in(files) == [0, 2, 3]
    read_slowly(files, 2, 4)
    assert numbers_in(files) == [2, 3, 4]
    read_slowly(files, 2, 0)
    assert files.made == [0, 1, 2, 3, 4, 0] and numbers_in(files) == [0, 2, 4]
    files.close()
    assert listed(tmp_path) == [".limit", "0" * 32]


def test_the_limit_is_of_the_whole_cache_folder_and_holds_when_it_is_opened(tmp_path):
    read(Files(tmp_path, "a" * 32), *range(5))
    (tmp_path / "tar-index").mkdir()
    (tmp_path / "tar-index" / "x.npz").write_bytes(b"i" * (SIZE // 2))
    (tmp_path / "somebody's").write_bytes(b"not ours" * SIZE)
    other = Files(tmp_path, "b" * 32, limit=4 * SIZE)
    assert [len(listed(tmp_path / name)) for name in ("a" * 32, "tar-index")] == [3, 1]
    read(other, 0, 1)
    assert listed(tmp_path / ("a" * 32)) == ["0004"] and numbers_in(other) == [0, 1]
    assert (tmp_path / "tar-index" / "x.npz").exists() and (tmp_path / "somebody's").exists()


def test_files_that_are_held_stay_and_all_of_a_hold_come_or_none(tmp_path):
    files, other = Files(tmp_path, limit=3 * SIZE), Files(tmp_path, "1" * 32, limit=3 * SIZE)
    assert files.hold([0, 1]) == [0, 1]
    for number in (0, 1):
        files.fetch(number, has_room=True)
    assert other.hold([5, 6], wait=False) is None
    assert other.hold([5], wait=False) == [5]
    other.fetch(5, has_room=True)
    assert files.hold([0, 2], wait=False) is None
    assert numbers_in(files) == [0, 1]  # in vain nothing was removed
    files.release([0])
    assert other.hold([6], wait=False) == [6] and numbers_in(files) == [1]
    other.forgo([6])
    other.release([5, 6])
    assert files.hold([0, 2], wait=False) == [0, 2] and numbers_in(other) == []


def test_an_unpacked_file_in_use_stays_too(tmp_path):
    limit = Files(tmp_path, limit=3 * SIZE).limit
    path = tmp_path / ("1" * 32) / "x"
    path.parent.mkdir()
    path.with_name("x.unpacked").write_bytes(bytes(2 * SIZE))
    assert limit is not None and limit.use([str(path)], SIZE, lambda: 0)
    assert not limit.trim(2 * SIZE) and path.with_name("x.unpacked").exists()
    limit.unlock(limit.end_use([str(path)]))
    assert limit.trim(2 * SIZE) and not path.with_name("x.unpacked").exists()


def test_what_can_never_fit_is_refused_with_the_least_that_would(tmp_path):
    with pytest.raises(ValueError, match=rf"max_cache_size must be at least the {SIZE} bytes of store/0, got 999"):
        Files(tmp_path, limit=999)
    files = Files(tmp_path, limit=3 * SIZE)
    with (
        pytest.raises(CacheLimitError, match="max_cache_size is 3 KB and must be at least 4000 bytes"),
        files.held([0, 1, 2, 3]),
    ):
        pass
    with files.held([0, 1, 2]):
        assert numbers_in(files) == [0, 1, 2]
    assert files.hold([1, 2, 3]) == [3]


def test_a_reader_waits_for_room_and_says_so(tmp_path, monkeypatch):
    files, other = Files(tmp_path, limit=2 * SIZE), Files(tmp_path, "1" * 32, limit=2 * SIZE)
    assert files.limit is not None and other.limit is not None
    files.hold([0, 1])
    assert not files.limit.is_asked()
    reader = threading.Thread(target=read, args=(other, 7))
    reader.start()
    limit = time.monotonic() + 10
    while not files.limit.is_asked() and time.monotonic() < limit:
        time.sleep(0.01)
    assert reader.is_alive() and other.made == []
    files.forgo([0])
    files.release([0])
    reader.join(10)
    assert other.made == [7] and not files.limit.is_asked()
    files.hold([0])
    monkeypatch.setattr(source_cache_limit, "_PATIENCE", 0.1)
    with pytest.raises(CacheLimitError, match=r"no room below .* for 0 s: other readers use .* max_cache_size=2000"):
        read(other, 8)

    def give_up() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        other.hold([8], check=give_up)


def test_holds_ahead_set_a_little_more_aside_and_give_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(source_cache_limit, "SPARE", 4)
    files, other = Files(tmp_path, limit=8 * SIZE), Files(tmp_path, "1" * 32, limit=8 * SIZE)
    assert files.limit is not None
    counted = []
    count = files.limit._files
    monkeypatch.setattr(files.limit, "_files", lambda: counted.append(1) or count())
    for number in range(6):
        assert files.hold([number], ahead=True, wait=False) == [number]
        files.fetch(number, has_room=True)
    assert len(counted) == 2 and files.limit._spare == 0
    assert files.hold([6, 7], ahead=True, wait=False) == [6, 7]  # there is no room for more
    files.forgo([6, 7])
    files.release(range(8))
    assert files.hold([8], ahead=True, wait=False) == [8] and files.limit._spare == 2 * SIZE
    files.forgo([8])
    files.release([8])
    assert other.hold(range(8), wait=False) is None
    files.end_ahead()
    assert other.hold(range(8), wait=False) == [*range(8)]


def _hold_until_killed(cache: Path, held) -> None:
    files = Files(cache, limit=3 * SIZE)
    assert files.hold([0, 1]) == [0, 1]
    files.fetch(0, has_room=True)
    held.set()
    time.sleep(60)


def test_another_process_keeps_what_it_uses_until_it_is_killed(tmp_path):
    held = FORK.Event()
    child = FORK.Process(target=_hold_until_killed, args=(tmp_path, held))
    child.start()
    assert held.wait(20)
    files = Files(tmp_path, limit=3 * SIZE)
    assert files.hold([5, 6], wait=False) is None
    read_slowly(files, 5, 6, 7)
    assert numbers_in(files) == [0, 7]
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    assert files.hold([5, 6, 8], wait=False) == [5, 6, 8] and numbers_in(files) == []
    files.forgo([5, 6, 8])
    files.release([5, 6, 8])
    files.close()
    assert [name for name in listed(tmp_path) if name.endswith(".room")] == []


def test_a_forked_child_and_a_pickled_copy_hold_for_themselves(tmp_path):
    files = Files(tmp_path, limit=2 * SIZE)
    with files.held([0, 1]):
        copied = pickle.loads(pickle.dumps(files.limit))
        assert not copied.use_again([files._target(0)])

        def work() -> None:
            assert files.hold([2], wait=False) is None
            assert files.hold([1], wait=False) == []

        child = FORK.Process(target=work)
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert files.hold([2], wait=False) is None
    assert files.hold([2], wait=False) == [2]


def _read_at_random(cache: Path, seed: int, queue) -> None:
    files = Files(cache, limit=10 * SIZE)
    files.before = lambda: time.sleep(0.001)
    for numbers in np.random.default_rng(seed).integers(0, 100, (150, 3)).tolist():
        with files.held(numbers):
            read(files, *numbers)
    queue.put(len(files.made))


def test_two_processes_never_use_more_than_the_limit(tmp_path):
    queue = FORK.Queue()
    children = [FORK.Process(target=_read_at_random, args=(tmp_path, seed, queue)) for seed in range(2)]
    for child in children:
        child.start()
    most = 0
    while any(child.is_alive() for child in children):
        most = max(most, used(tmp_path))
    made = [queue.get(timeout=10) for _ in children]
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert min(made) > 100
    # a file may be counted twice here, as it is renamed between two looks: two processes, three at a time
    assert 9 * SIZE <= most <= 10 * SIZE + 6 * SIZE
    assert used(tmp_path) <= 10 * SIZE


def test_threads_never_use_more_than_the_limit(tmp_path):
    files = [Files(tmp_path, str(set_) * 32, limit=8 * SIZE) for set_ in range(2)]
    asides = []
    for each in files:
        each.before = lambda: asides.append(used(tmp_path))

    def work(seed: int) -> None:
        for numbers in np.random.default_rng(seed).integers(0, 30, (60, 3)).tolist():
            with files[seed % 2].held(numbers):
                read(files[seed % 2], *numbers)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(asides) <= 16 * SIZE and used(tmp_path) <= 8 * SIZE
    for each in files:
        assert each.limit is not None and not each.limit._users and each.limit._aside == 0


def test_a_full_disk_is_named_and_with_a_limit_makes_room(tmp_path):
    def full() -> None:
        if tries.pop() == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = Files(tmp_path)
    files.before, tries = full, ["full"]
    with pytest.raises(OSError, match=r"No space left on device in .*0000 for store/3: free some, or give max_cache"):
        files.fetch(3)
    assert numbers_in(files) == []
    limited = Files(tmp_path, limit=50 * SIZE)
    read_slowly(limited, 0, 1)
    limited.before, tries = full, ["", "full"]
    read(limited, 4)
    assert numbers_in(limited) == [1, 4]
    tries = ["full", "full", "full"]
    with pytest.raises(OSError, match=r"No space left on device in .* give a smaller max_cache_size") as caught:
        read(limited, 5)
    assert caught.value.errno == errno.ENOSPC
    assert limited.limit is not None and limited.limit._aside == 0


def test_a_disk_without_room_for_a_lock_makes_room_too(tmp_path, monkeypatch):
    """As one with room for bytes but none for another file, whose inodes are used up."""
    limited = Files(tmp_path, limit=50 * SIZE)
    read_slowly(limited, 0, 1, 2)
    tries, try_lock = ["", "full"], source_locks._try_lock

    def full(path: str, **options) -> int | None:
        if path.endswith("0004") and tries.pop() == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path + ".lock")
        return try_lock(path, **options)

    monkeypatch.setattr(source_locks, "_try_lock", full)
    read(limited, 4)
    assert numbers_in(limited) == [1, 2, 4] and tries == []
    tries, unlimited = ["full"], Files(tmp_path, "1" * 32)
    with pytest.raises(OSError, match=r"No space left on device in .*1111 for store/4: free some, or give max_cache"):
        read(unlimited, 4)


def test_nothing_stays_open(tmp_path):
    def use() -> None:
        files = Files(tmp_path, limit=3 * SIZE)
        with contextlib.suppress(CacheLimitError), files.held([0, 1, 2, 3]):
            pass
        read(files, *range(5))

    use()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        use()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert [name for name in listed(tmp_path) if name.endswith(".room")] == []
