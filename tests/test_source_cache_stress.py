"""Processes and threads over one small cache, at random: failures, abandoned epochs, forks, kill -9."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import threading
import time
import traceback
from pathlib import Path

from cache_files import SIZE, Files, text

from slipstream.fetch_ahead import FetchAhead
from slipstream.source import UnavailableError
from slipstream.source_cache import StoppedError

FORK = multiprocessing.get_context("fork")
COUNT, LIMIT, SECONDS = 40, 16, 5.0


class Failing(Files):
    """Files of which some cannot be fetched, now and then."""

    def __init__(self, cache: Path, seed: int) -> None:
        super().__init__(cache, limit=LIMIT * SIZE, count=COUNT)
        self.random = random.Random(seed)

    def _make(self, number, part, on_bytes):
        failure = self.random.choice([OSError("no route"), ValueError("damaged"), OSError(errno.ENOSPC, "full")])
        if self.random.random() < 0.07:
            raise failure
        made = super()._make(number, part, on_bytes)
        for _ in range(self.random.randrange(4)):
            time.sleep(0.002)
            if on_bytes is not None:
                on_bytes(1)
        return made


def read(files: Files, numbers: list[int]) -> list[int]:
    """Open files that are held; gives those that could be."""
    opened = []
    for number in numbers:
        with contextlib.suppress(OSError, ValueError):
            assert files.open(number, text) == f"{number:04}"
            opened.append(number)
    return opened


def check_there(files: Files, numbers: list[int]) -> None:
    assert all(os.path.exists(files._target(number)) for number in numbers), "what is held was removed"


def read_at_random(files: Files, seed: int, end: float) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end:
        numbers = rng.sample(range(COUNT), rng.randint(1, 3))
        with contextlib.suppress(UnavailableError), files.held(numbers):  # of the disk that is full
            opened = read(files, numbers)
            time.sleep(rng.random() * 0.004)
            check_there(files, opened)


def run_epochs(files: Files, seed: int, end: float) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end:
        steps = [rng.sample(range(COUNT), rng.randint(1, 4)) for _ in range(rng.randint(1, 60))]
        ahead = FetchAhead(files, steps.__getitem__, len(steps))
        stopping = threading.Timer(rng.random() * 0.3, ahead.stop)
        if rng.random() < 0.3:
            stopping.start()
        with contextlib.suppress(StoppedError):
            for numbers in steps[: rng.choice([len(steps), rng.randint(0, len(steps))])]:
                with ahead.reading():
                    opened = read(files, numbers)
                    if rng.random() < 0.1:
                        with ahead.reading_also(also := rng.sample(range(COUNT), 2)):
                            read(files, also)
                    if not ahead._stopped:
                        there = [os.path.exists(files._target(number)) for number in opened]
                        assert all(there) or ahead._stopped, "what is held was removed"
        ahead.stop()
        stopping.cancel()
        for thread in ahead._threads:
            thread.join(20)
            assert not thread.is_alive()


def fork_at_random(files: Files, seed: int, end: float) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end:
        time.sleep(rng.random())
        child = FORK.Process(target=lambda: [files.hold([1], coming=[1]), files.release([1])])
        child.start()
        child.join(20)
        assert child.exitcode == 0


def use(cache: Path, seed: int, end: float, problems) -> None:
    files = [Failing(cache, seed + number) for number in range(2)]
    found = []

    def work(task, each: Files, seed: int) -> None:
        try:
            task(each, seed, end)
        except BaseException:
            found.append(traceback.format_exc())

    tasks = [(run_epochs, 0), (run_epochs, seed % 2), (read_at_random, 0), (read_at_random, 1), (fork_at_random, 0)]
    threads = [
        threading.Thread(target=work, args=(task, files[which], seed + number), daemon=True)
        for number, (task, which) in enumerate(tasks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 60)
    found += [f"{thread.name} hangs" for thread in threads if thread.is_alive()]
    for each in files:
        limit = each.limit
        assert limit is not None
        if limit._users or limit._aside or limit._spare or limit._waiting:
            found.append(f"left: {limit._users} {limit._aside} {limit._spare} {limit._waiting}")
        each.close()
    problems.put(found)


def on_disk(cache: Path) -> int:
    sizes = {}
    for path in cache.glob("0*/*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()  # what is renamed between two looks has one number
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_nothing_is_lost_or_left_and_the_limit_holds(tmp_path):
    rng, end, problems = random.Random(0), time.monotonic() + SECONDS, FORK.Queue()
    children = []

    def start() -> None:
        children.append(FORK.Process(target=use, args=(tmp_path, rng.randrange(1 << 30), end, problems)))
        children[-1].start()

    for _ in range(2):
        start()
    over = 0
    while time.monotonic() < end:
        if rng.random() < 0.005:
            killed = children.pop(rng.randrange(len(children)))
            killed.kill()
            killed.join()
            start()
        # one look may take the file that went for the one that came in its place
        over = over + 1 if on_disk(tmp_path) > LIMIT * SIZE else 0
        assert over < 5
        time.sleep(0.003)
    for _ in children:
        assert problems.get(timeout=90) == []
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    Failing(tmp_path, 0).close()
    assert {path.name for path in tmp_path.iterdir()} == {".limit", "0" * 32}
    assert {len(path.name) for path in tmp_path.glob("0*/*")} <= {4}  # neither locks nor parts
    assert on_disk(tmp_path) <= LIMIT * SIZE
