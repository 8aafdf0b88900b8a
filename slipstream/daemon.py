"""Work on threads that do not keep the process from ending.

A store may let a request wait for a minute. Python ends only when the threads of concurrent.futures' pools have ended,
and a wait for one of them cannot be left without waiting for the others: Ctrl-C would take that minute.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")

PARALLEL = 8


class DaemonExecutor(Executor):
    """concurrent.futures' ThreadPoolExecutor, on daemon threads: at the end of the process their work is dropped."""

    def __init__(self, max_workers: int, thread_name_prefix: str = "slipstream-fetch") -> None:
        self._max_workers = max_workers
        self._name = thread_name_prefix
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._tasks.put((future, lambda: fn(*args, **kwargs)))
            if len(self._threads) < self._max_workers:
                name = f"{self._name}_{len(self._threads)}"
                thread = threading.Thread(target=_serve, args=(self._tasks,), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._closed = True
            if cancel_futures:
                # Never waiting: a thread may take the last one meanwhile.
                with contextlib.suppress(queue.Empty):
                    while True:
                        task = self._tasks.get_nowait()
                        if task is not None:
                            task[0].cancel()
            for _ in self._threads:
                self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _serve(tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (task := tasks.get()) is not None:
        future, call = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # whatever it is, somebody waits for this future
                future.set_exception(error)
        del task, future, call  # the next wait may be long


def in_threads(work: Callable[[U], T], items: Sequence[U], parallel: int = PARALLEL) -> Iterator[T]:
    """Give work(item) for each item in order, several at once; the first error ends the rest.

    An error waits for what has begun; KeyboardInterrupt, SystemExit and a caller that goes away leave it behind.
    """
    if len(items) < 2:
        yield from map(work, items)
        return
    pool = DaemonExecutor(min(parallel, len(items)))
    try:
        yield from pool.map(work, items)
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def interruptibly(work: Callable[[], T]) -> T:
    """work(), waited for in such a way that Ctrl-C ends the wait at once."""
    pool = DaemonExecutor(1)
    future = pool.submit(work)
    try:
        return future.result()
    finally:
        pool.shutdown(wait=future.done())
