"""Fetching the files that an epoch's steps read, ahead of who reads them.

One thread walks the steps and holds their files, a few fetch what is missing. With a limit on the cache the walk goes
as far as there is room, and gives back what is far ahead while another reader waits for room.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .checks import byte_text
from .daemon import PARALLEL
from .dataset import SlipstreamDataset
from .decode import WrongPixelsError
from .progress import Bar
from .sampler_windowed import Order, WindowedSampler
from .source import UnavailableError
from .source_cache import BAR_FROM, CachedFiles, StoppedError
from .source_cache_limit import SPARE

STEPS = 1024
# Errors that say nothing of the step in which they come: it is read again.
NOT_THE_STEPS = (UnavailableError, WrongPixelsError)
# Files to come, beyond which the walk waits: enough that the threads never run dry.
_TO_COME = 2 * PARALLEL
_TICK = 0.02
# Until a step that the cache folder had no way to hold is tried again.
_PAUSE = 1.0
# A download is given up at its next block. One that stalls ends by itself, and nobody waits for it.
_PATIENCE = 0.3


class FetchAhead:
    """Holds and fetches the files of steps 0, 1, ... ahead of their reader, who calls `reading` for each in turn.

    numbers_of: step -> the numbers of its files. progress: a bar while there are several files to come. What cannot be
    fetched is left to the reader, who meets the reason when the file is opened. While nothing can be fetched, as the
    store or this machine fails, only the step that is read is held.
    """

    def __init__(
        self, files: CachedFiles, numbers_of: Callable[[int], Sequence[int]], steps: int, *, progress: bool = False
    ) -> None:
        self._files, self._numbers_of, self._steps, self._progress = files, numbers_of, steps, progress
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._read = 0
        self._held: deque[Sequence[int]] = deque()  # of the steps from _read on
        self._queue: deque[int] = deque()
        self._coming: set[int] = set()  # in the queue, or being fetched
        self._also: Sequence[int] = ()  # of reading_also
        self._bar: Bar | None = None
        self._try_again = 0.0
        self._freed = 0  # bytes, since there was no room
        self._enough = 0 if files.limit is None else files.limit.max_bytes // SPARE
        self._outage = False
        self._far = STEPS  # how many to hold, at most STEPS
        self._threads: list[threading.Thread] = []
        self._start("slipstream-ahead", self._walk)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Wait for the files of the next step, and hold them for the while. Raises StoppedError once stopped.

        After one of NOT_THE_STEPS, of its own or of the caller's, it stays the next step.
        """
        with self._changed:
            if isinstance(self._error, UnavailableError):  # it may be over: the walk tries again
                self._error = None
                self._changed.notify_all()
            self._wait_for(lambda: self._coming.isdisjoint(self._held[0]) if self._held else self._error)
            if not self._held and self._error is not None:
                raise self._error
        try:
            yield
        except NOT_THE_STEPS:
            raise
        except BaseException:
            self._go_on()
            raise
        else:
            self._go_on()

    def _go_on(self) -> None:
        with self._changed:
            numbers = self._held.popleft() if self._held else ()
            self._read += 1
            self._far += 1
            self._changed.notify_all()
        self._freed += self._files.release(numbers)

    @contextlib.contextmanager
    def reading_also(self, numbers: Sequence[int]) -> Iterator[None]:
        """Wait for other files, and hold them for the while. Raises StoppedError once stopped."""
        with self._changed:
            beside = self._held[0] if self._held else ()
        missing = self._hold(numbers, wait=True, beside=beside)
        try:
            with self._changed:
                self._also = numbers
                self._fetch_soon(missing or (), first=True)
                self._wait_for(lambda: self._coming.isdisjoint(numbers))
            yield
        finally:
            self._also = ()
            self._files.release(numbers)

    def stop(self) -> None:
        """End the threads, and what they fetch, and let go of everything."""
        with self._changed:
            first, self._stopped = not self._stopped, True
            held, queue = [*self._held], [*self._queue]
            self._held.clear()
            self._queue.clear()
            self._changed.notify_all()
        if first:
            # Not in this thread: it may have a lock that letting go takes, if the collector runs this in the midst of
            # other work; and the lock of the maps is had by whoever opens a file, for as long as that takes.
            try:
                self._start("slipstream-ahead", lambda: self._let_go(held, queue))
            except RuntimeError:  # a process that ends starts no threads
                self._let_go(held, queue)
        limit = time.monotonic() + _PATIENCE if first else 0.0
        for thread in self._threads:
            thread.join(max(limit - time.monotonic(), 0))
        self._show()
        self._numbers_of = _none  # it knows its reader

    def _let_go(self, held: Sequence[Sequence[int]], queue: Sequence[int]) -> None:
        # Not under our lock: a map that is dropped may wait for one that is being opened.
        self._files.forgo(queue)
        self._files.end_ahead()
        for numbers in held:
            self._files.release(numbers)

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _wait_for(self, condition: Callable[[], object]) -> None:
        self._changed.wait_for(lambda: self._stopped or condition())
        self._check()

    def _check(self) -> None:
        if self._stopped:
            raise StoppedError

    def _hold(self, numbers: Sequence[int], *, wait: bool, beside: Sequence[int] = ()) -> list[int] | None:
        with self._changed:
            coming = frozenset(self._coming)
        return self._files.hold(numbers, coming=coming, ahead=True, wait=wait, beside=beside, check=self._check)

    def _walk(self) -> None:
        try:
            while self._read + len(self._held) < self._steps or self._held:
                try:
                    self._walk_on()
                except UnavailableError as error:
                    self._leave_to_reader(error)
        except StoppedError:
            pass
        except BaseException as error:  # whatever it is, the reader waits for this step
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._files.end_ahead()

    def _leave_to_reader(self, error: UnavailableError) -> None:
        with self._changed:
            if self._held:  # by the time that this step is read it may be over
                self._changed.wait(_PAUSE)
            else:
                self._error = error
                self._changed.notify_all()
                self._wait_for(lambda: self._error is None)

    def _walk_on(self) -> None:
        if self._outage:
            self._outage = False
            self._give_back(1)
        if self._files.limit is not None and len(self._held) > 0 and self._files.limit.is_asked():
            self._give_back(len(self._held) * 3 // 4)
            time.sleep(_TICK)
            return
        with self._changed:
            self._check()
            step, is_next = self._read + len(self._held), not self._held
            if step == self._steps or len(self._held) >= min(self._far, STEPS) or len(self._coming) >= _TO_COME:
                self._changed.wait(None if self._files.limit is None else _TICK)
                return
            pause = self._try_again - time.monotonic()
            if not is_next and pause > 0 and self._freed <= self._enough:
                self._changed.wait(min(pause, _TICK))
                return
        numbers = self._numbers_of(step)
        begin, self._freed = time.monotonic(), 0
        missing = self._hold(numbers, wait=is_next)
        if missing is None:
            # In vain: with very many files the look for room is not for nothing.
            self._try_again = time.monotonic() + max(_TICK, 20 * (time.monotonic() - begin))
            return
        with self._changed:
            self._fetch_soon(missing)
            if not self._stopped:
                self._held.append(numbers)
                return
        self._files.release(numbers)

    def _give_back(self, keep: int) -> None:
        # The farthest, in the end all but the step that is being read or waited for, and go as far by and by only: all
        # at once, and others would remove what is wanted next, to fetch what they want later.
        with self._changed:
            self._far = max(keep, 1)
            held = [self._held.pop() for _ in range(len(self._held) - self._far)]
            wanted = {number for numbers in (*self._held, self._also) for number in numbers}
            dropped = [number for number in self._queue if number not in wanted]
            self._queue = deque(number for number in self._queue if number in wanted)
            self._coming.difference_update(dropped)
        self._let_go(held, dropped)

    def _fetch_soon(self, numbers: Sequence[int], *, first: bool = False) -> None:
        if self._stopped:
            self._files.forgo(numbers)
            return
        if first:
            self._queue.extendleft(numbers)
        else:
            self._queue.extend(numbers)
        self._coming.update(numbers)
        while len(self._threads) <= min(PARALLEL, len(self._coming)):  # the walk is one of them
            self._start("slipstream-fetch", self._fetch)
        self._changed.notify_all()

    def _fetch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._queue)
                if self._stopped:
                    return
                number = self._queue.popleft()
            try:
                self._files.fetch(number, self._on_bytes, has_room=True)
            except StoppedError:
                return
            except UnavailableError:
                # Not remembered: when the file is read it may be over, and a disk that is full of what was fetched
                # ahead has room.
                self._drop_queue()
            except Exception as error:  # whatever it is, who opens the file meets it
                self._files.remember(number, error)
            with self._changed:
                self._coming.discard(number)
                self._changed.notify_all()

    def _drop_queue(self) -> None:
        # Each would take as long to fail, and the reader waits for some of them.
        with self._changed:
            dropped = [*self._queue]
            self._queue.clear()
            self._coming.difference_update(dropped)
            self._outage = True
            self._changed.notify_all()
        self._files.forgo(dropped)

    def _on_bytes(self, count: int) -> None:
        self._check()
        if self._progress and count:
            with self._changed:
                self._show(count)

    def _show(self, count: int = 0) -> None:
        if self._bar is None and len(self._coming) >= BAR_FROM and not self._stopped:
            self._bar = Bar(unit="B", unit_scale=True, desc=f"fetching {self._files.noun}", leave=False)
        if self._bar is not None:
            self._bar.update(count)
            if self._stopped or len(self._coming) < BAR_FROM:
                self._bar.close()
                self._bar = None


def _none(_: int) -> Sequence[int]:
    return ()


def fetch_ahead(
    dataset: SlipstreamDataset, ids_of: Callable[[int], np.ndarray], steps: int, *, progress: bool
) -> FetchAhead | None:
    """What fetches the files of the samples ids_of(step), step by step; None for a source that fetches none."""
    files = files_of(dataset)
    if files is None:
        return None
    return FetchAhead(files, lambda step: numbers_of(dataset, ids_of(step)), steps, progress=progress)


def files_of(dataset: SlipstreamDataset) -> CachedFiles | None:
    """The files that a dataset's source fetches; None if it fetches none."""
    files = getattr(dataset.source, "files", None)
    return files if isinstance(files, CachedFiles) else None


def numbers_of(dataset: SlipstreamDataset, ids: np.ndarray) -> list[int]:
    """The files that hold these samples, in the order of their first."""
    ends: Any = dataset.source.chunk_ends  # pyright: ignore[reportAttributeAccessIssue]
    return list(dict.fromkeys(np.searchsorted(ends, ids, side="right").tolist()))


def check_fits(dataset: SlipstreamDataset, order: Order, world_size: int, batch_size: int) -> None:
    """Raise ValueError, saying what would do, for an order that would fetch files again and again under the limit."""
    files = files_of(dataset)
    if files is None or files.limit is None:
        return
    most, numbers = files.limit.max_bytes, range(len(files.sizes))
    total = sum(
        files.sizes[number]
        for number in (numbers if dataset.sample_ids is None else numbers_of(dataset, dataset.sample_ids))
    )
    if total <= most:
        return
    if isinstance(order, WindowedSampler):
        step, count = batch_size * world_size, len(numbers)
        need = min(_read_at_once(order, order.lanes, world_size, step) * total // count, total)
        if need > most:
            smaller = (1 << bits for bits in reversed(range((order.lanes - 1).bit_length())))
            fewer = (
                lanes for lanes in smaller if _read_at_once(order, lanes, world_size, step) * total <= most * count
            )
            advice = "".join(f', or fewer lanes: shuffle="windowed:{lanes}"' for lanes in itertools.islice(fewer, 1))
            raise ValueError(
                f"max_cache_size is {byte_text(most)}, and {order.lanes} lanes of {order.window + 1} {files.noun} that "
                f"are read at a time take {byte_text(need)} on this machine: give {need} bytes or more{advice}"
            )
    elif order.shuffle:
        raise ValueError(
            f"shuffle=True reads samples from all of {byte_text(total)}, and max_cache_size is {byte_text(most)}: "
            f'nearly each sample would fetch a file of its own; use shuffle="windowed", or give {total} bytes or more'
        )


def _read_at_once(order: WindowedSampler, lanes: int, world_size: int, step: int) -> int:
    """Files of the mean size that this machine's ranks read at a time, of a windowed order with so many lanes."""
    # A window reaches into one file more, where they are unequal into two; one that ends within a step of so many
    # samples is followed by a new one.
    groups = math.gcd(lanes, world_size)  # a rank has one of these groups of lanes
    ours = min(int(os.environ.get("LOCAL_WORLD_SIZE") or 1), groups)  # as torchrun tells the number of ranks
    ending = min(-(-step // order.window_size), -(-step // (groups * order.window_size)) * ours)
    return (lanes // groups * ours + ending) * (order.window + 1) + 1
