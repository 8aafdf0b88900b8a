"""FetchAhead by itself: how far it goes, what it gives up, and what its reader meets."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from cache_files import SIZE, Files, listed, text

from slipstream import fetch_ahead
from slipstream.daemon import PARALLEL
from slipstream.fetch_ahead import FetchAhead
from slipstream.source_cache import StoppedError


def wait_for(condition) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_it_stays_some_files_and_steps_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    files = Files(tmp_path)
    files.before = lambda: go.wait(10)
    ahead = FetchAhead(files, lambda step: [step], 100)
    wait_for(lambda: len(files.made) == PARALLEL)
    time.sleep(0.1)
    assert sorted(files.made) == list(range(PARALLEL)) and len(ahead._coming) == 2 * PARALLEL
    monkeypatch.setattr(fetch_ahead, "STEPS", 30)
    go.set()
    wait_for(lambda: len(files.made) == 30)
    for step in range(60):
        with ahead.reading():
            assert files.open(step, text) == f"{step:04}"
    assert 60 <= len(files.made) <= 90 and len({*files.made}) == len(files.made)
    ahead.stop()


def test_stop_gives_up_what_is_being_fetched(tmp_path: Path) -> None:
    files = Files(tmp_path, limit=50 * SIZE)
    files.blocks = 1000
    ahead = FetchAhead(files, lambda step: [step], 20)
    wait_for(lambda: len(files.made) == PARALLEL)
    stopped = []

    def read() -> None:
        try:
            with ahead.reading():
                pass
        except StoppedError:
            stopped.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    begin = time.monotonic()
    ahead.stop()
    reader.join(5)
    assert time.monotonic() - begin < 0.9 and stopped == [True]
    assert not any(thread.is_alive() for thread in ahead._threads)
    assert listed(Path(str(files.folder))) == [] and len(files.made) == PARALLEL
    assert files.limit is not None and not files.limit._users and files.limit._aside == 0


def test_an_error_of_a_step_is_met_by_its_reader(tmp_path: Path) -> None:
    def numbers_of(step: int) -> list[int]:
        if step == 3:
            raise KeyError(step)
        return [step, step + 1]

    files = Files(tmp_path, limit=50 * SIZE)
    files.lost = {1}
    ahead = FetchAhead(files, numbers_of, 10)
    wait_for(lambda: ahead._error is not None)
    for step in range(3):
        with ahead.reading():
            if step < 2:
                with pytest.raises(OSError, match="no route"):
                    files.open(1, text)
            else:
                assert files.open(step, text) == "0002"
    with pytest.raises(KeyError, match="3"), ahead.reading():
        pass
    assert files.made.count(1) == 1
    ahead.stop()


def test_a_bar_while_several_files_are_to_come(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for progress in (False, True):
        files = Files(tmp_path, f"{progress:032}")
        files.blocks = 20
        ahead = FetchAhead(files, lambda step: [2 * step, 2 * step + 1], 10, progress=progress)
        for _ in range(10):
            with ahead.reading():
                pass
        ahead.stop()
        assert ("fetching files" in capsys.readouterr().err) is progress
        assert ahead._bar is None
