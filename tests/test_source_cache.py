"""The cache folder: what a killed process leaves, who fetches while others do, and what became of a file meanwhile."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from cache_files import Files, listed, text

from slipstream.source_locks import only_one, sweep


def test_a_file_is_made_once_and_nothing_stays_beside_it(tmp_path):
    files = Files(tmp_path, "set")
    assert not files.is_ready(3)
    assert files.open(3, text) == "0003"
    assert files.open(3, text) == "0003"
    assert files.made == [3] and listed(tmp_path / "set") == ["0003"]


def test_what_fails_leaves_nothing_and_does_not_stop_the_others(tmp_path):
    files = Files(tmp_path, "set")

    files.lost = {1}
    with pytest.raises(OSError, match="no route"):
        files.prefetch([0, 1, 2], progress=False)
    assert listed(tmp_path / "set") == ["0000", "0002"]


def test_a_file_that_goes_before_it_is_opened_is_made_again(tmp_path):
    files, lost = Files(tmp_path, "set"), []

    def use(path: str) -> str:
        if not lost:
            lost.append(path)
            os.unlink(path)  # as another process may, to make room
        return text(path)

    assert files.open(5, use) == "0005"
    assert files.made == [5, 5]


def _fetch_slowly(files: Files, started, go) -> None:
    def wait() -> None:
        started.set()
        go.wait(30)

    files.before = wait
    files.fetch(7)


def test_a_killed_process_leaves_no_lock_and_its_parts_are_swept(tmp_path):
    context = multiprocessing.get_context("fork")
    started, go = context.Event(), context.Event()
    child = context.Process(target=_fetch_slowly, args=(Files(tmp_path, "set"), started, go))
    child.start()
    assert started.wait(20)
    left = listed(tmp_path / "set")
    assert [name.partition(".")[0] for name in left] == ["0007"] * 3 and "0007.lock" in left
    sweep(str(tmp_path / "set"))
    assert listed(tmp_path / "set") == left  # its writer lives
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    files = Files(tmp_path, "set")
    files.fetch(1)
    assert listed(tmp_path / "set") == ["0001"]
    files.fetch(7)
    assert listed(tmp_path / "set") == ["0001", "0007"] and files.made == [1, 7]


def test_who_takes_over_a_file_removes_what_was_half_written(tmp_path):
    files = Files(tmp_path, "set")
    files.fetch(1)
    for name in ("0007.99999-1.part", "0007.99999-1.part.x", "00071.99999-1.part", "0008.99999-1.part"):
        (tmp_path / "set" / name).touch()
    files.fetch(7)
    assert listed(tmp_path / "set") == ["0001", "0007", "00071.99999-1.part", "0008.99999-1.part"]


def test_threads_and_processes_wait_for_who_fetches(tmp_path):
    context = multiprocessing.get_context("fork")
    started, go = context.Event(), context.Event()
    child = context.Process(target=_fetch_slowly, args=(Files(tmp_path, "set"), started, go))
    child.start()
    assert started.wait(20)
    files = Files(tmp_path, "set")
    threads = [threading.Thread(target=files.fetch, args=(7,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert all(thread.is_alive() for thread in threads)
    go.set()
    for thread in [*threads, child]:
        thread.join(20)
    assert files.made == [] and listed(tmp_path / "set") == ["0007"]


def test_who_waits_for_a_lock_may_give_up(tmp_path):
    def check() -> None:
        raise InterruptedError

    path = str(tmp_path / "x")
    with only_one(path):
        with pytest.raises(InterruptedError), only_one(path, check):
            pass
        assert listed(tmp_path) == ["x.lock"]
    assert listed(tmp_path) == []


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, flock, removed = str(tmp_path / "x"), fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(os.unlink(path + ".lock"))  # by whoever had the lock
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_one(path):
        assert removed and listed(tmp_path) == ["x.lock"]


PARENT = """
import os, sys, time
from slipstream.source_cache import only_one
with only_one(sys.argv[1]):
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(30)
"""


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    path = str(tmp_path / "x")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, path], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "locked\n"
        time.sleep(0.2)  # the child's first steps
        parent.kill()
        parent.wait(20)
        begin = time.monotonic()
        with only_one(path):
            assert time.monotonic() - begin < 10
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
