"""Daemon threads in place of concurrent.futures': order, errors, and what is left behind when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from slipstream.daemon import DaemonExecutor, in_threads, interruptibly


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("slipstream-fetch")]


def test_results_come_in_order_and_from_several_threads() -> None:
    together = threading.Barrier(4, timeout=20)

    def work(number: int) -> int:
        if number < 4:
            together.wait()
        return number * number

    assert list(in_threads(work, range(50), 4)) == [number * number for number in range(50)]
    assert list(in_threads(work, [7])) == [49] and list(in_threads(work, [])) == []
    assert ours() == []


def test_the_first_error_ends_the_rest_and_waits_for_what_has_begun() -> None:
    begun, finished = [], []

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise OSError("of item 1")
        time.sleep(0.2)
        finished.append(number)

    with pytest.raises(OSError, match="of item 1"):
        list(in_threads(work, range(100), 3))
    assert ours() == [] and len(begun) < 20 and {*begun} == {1, *finished}


def test_what_is_no_error_is_an_answer_too() -> None:
    def work(number: int) -> None:
        raise SystemExit(number)

    with pytest.raises(SystemExit):
        interruptibly(lambda: work(3))
    assert interruptibly(lambda: 5) == 5


def test_a_caller_that_goes_away_leaves_the_work() -> None:
    gate = threading.Event()
    results = in_threads(lambda number: number == 0 or gate.wait(20), range(9), 3)
    assert next(results)
    begin = time.monotonic()
    results.close()
    assert time.monotonic() - begin < 5
    gate.set()
    limit = time.monotonic() + 20
    while ours() and time.monotonic() < limit:
        time.sleep(0.01)
    assert ours() == []


def test_it_takes_no_work_after_its_end() -> None:
    pool = DaemonExecutor(2)
    gate = threading.Event()
    futures = [pool.submit(gate.wait, 20) for _ in range(5)]
    pool.shutdown(wait=False, cancel_futures=True)
    gate.set()
    pool.shutdown()
    assert [future.cancelled() for future in futures].count(True) >= 3 and ours() == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(print)


def test_an_end_while_threads_take_the_last_of_the_work() -> None:
    def end_many() -> None:
        for _ in range(3000):
            pool = DaemonExecutor(3)
            for _ in range(6):
                pool.submit(int)
            pool.shutdown(cancel_futures=True)

    before = sys.getswitchinterval()
    ending = threading.Thread(target=end_many, daemon=True)
    try:
        sys.setswitchinterval(1e-6)
        ending.start()
        ending.join(60)
        assert not ending.is_alive()
    finally:
        sys.setswitchinterval(before)


def test_they_do_not_keep_a_process_from_ending() -> None:
    script = "import time; from slipstream.daemon import DaemonExecutor; DaemonExecutor(2).submit(time.sleep, 60)"
    assert subprocess.run([sys.executable, "-c", script], timeout=40, check=False).returncode == 0


def test_ctrl_c_ends_the_wait() -> None:
    gate = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for wait in (lambda: interruptibly(lambda: gate.wait(20)), lambda: list(in_threads(gate.wait, [20] * 9, 3))):
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            begin = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                wait()
            assert time.monotonic() - begin < 5
    finally:
        signal.signal(signal.SIGINT, before)
        gate.set()
