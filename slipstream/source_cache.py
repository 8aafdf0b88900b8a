"""Files fetched into a cache folder when they are first needed, once for all threads and processes that share it.

A file is written beside its final name, checked and renamed, so that no reader, in this process or another, sees part
of one, and a map of an older file stays whole.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from . import checks
from .daemon import in_threads
from .progress import Bar
from .source import UnavailableError
from .source_cache_limit import CacheLimit
from .source_faults import DISK_FULL, tells_cache_faults
from .source_locks import only_one, remove_parts, sweep

T = TypeVar("T")

# Below this many files a fetch shows no bar: a batch that meets one new file is no event.
BAR_FROM = 4
_OPEN_TRIES = 3
# Where a disk has no room, or no number, for one file more: its lock and the file itself may each need one removed.
_FULL_TRIES = 3
_REMEMBERED = 60.0
_TOUCH_AFTER = 2.0
# Of a file that came whole, by what its origin said, and yet is not as it should be.
_FETCH_TRIES = 3
_FIRST_WAIT = 0.1

_log = logging.getLogger(__name__)


def default_cache_dir() -> str:
    """$SLIPSTREAM_CACHE, or slipstream in $XDG_CACHE_HOME, or ~/.cache/slipstream."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    place = os.environ.get("SLIPSTREAM_CACHE") or os.path.join(home, "slipstream")
    return os.path.abspath(os.path.expanduser(place))


def cache_root(cache_dir: str | os.PathLike[str] | None) -> str:
    """The folder that fetched files and indexes are kept in: `cache_dir`, or default_cache_dir()."""
    return os.path.abspath(os.path.expanduser(cache_dir)) if cache_dir is not None else default_cache_dir()


class StoppedError(Exception):
    """A fetch was given up because nobody wants it any more."""


class CachedFiles(ABC):
    """The files of a set, by number, each fetched into `folder` when it is first needed; thread-safe.

    A subclass says where a file is kept, whether it is there, and how it is made. With a `limit` files stay only while
    they are held, or as long as there is room. What is no fault of the file, but of the cache folder or of the store,
    is an UnavailableError, which is an OSError.
    """

    noun = "files"

    def __init__(
        self,
        home: str | None,
        sizes: Sequence[int],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        max_cache_size: int | str | None = None,
    ) -> None:
        """home: the set's folder below `cache_dir`; None for files that are read where they are. sizes: their bytes.

        Raises ValueError for a `max_cache_size` that is none, or less than one of the files.
        """
        root = cache_root(cache_dir)
        most = None if max_cache_size is None else checks.byte_count("max_cache_size", max_cache_size)
        self.sizes = sizes
        self.folder = home and os.path.join(root, home)
        self.limit = CacheLimit(root, most) if home is not None and most is not None else None
        self.on_release: Callable[[int], object] = _nothing
        self._swept = False
        self._failures: dict[int, tuple[float, Exception]] = {}
        self._touched: dict[int, float] = {}
        if self.limit is not None:
            largest = max(range(len(sizes)), key=sizes.__getitem__)
            if sizes[largest] > self.limit.max_bytes:
                raise ValueError(
                    f"max_cache_size must be at least the {sizes[largest]} bytes of {self.place(largest)}, "
                    f"got {max_cache_size!r}"
                )
            self.limit.trim()

    @abstractmethod
    def place(self, number: int) -> str:
        """Where the file comes from, for people."""
        ...

    @abstractmethod
    def _find(self, number: int) -> str | None:
        """Where the whole file lies, ready to be mapped; None if it has to be fetched."""
        ...

    @abstractmethod
    def _target(self, number: int) -> str:
        """The path that stands for the file in the cache: of its lock, and of what is written aside."""
        ...

    @abstractmethod
    def _make(self, number: int, part: str, on_bytes: Callable[[int], object] | None) -> tuple[str, str]:
        """Write the file to `part`, or that and more, and check it; gives where it is and where it belongs.

        What it leaves at `part` and `part`.* is removed. Raises OSError, ValueError.
        """
        ...

    def is_ready(self, number: int) -> bool:
        """Tell whether the file can be mapped without a fetch."""
        return self._find(number) is not None

    @tells_cache_faults
    def path(self, number: int) -> str:
        """The file, ready to be mapped; fetched first if need be. Raises OSError, ValueError.

        Another process may remove it before it is opened: `open` is safe from that.
        """
        found = self._find(number)
        if found is None:
            failure = self._failure(number)
            if failure is not None:
                raise copy.copy(failure)
            self.fetch(number)
            found = self._find(number) or self._target(number)
        return found

    @tells_cache_faults
    def open(self, number: int, use: Callable[[str], T]) -> T:
        """use(path) of a file that is there, fetched if need be. Raises OSError, ValueError, and what `use` raises."""
        for left in reversed(range(_OPEN_TRIES)):
            missing = self.hold([number]) if self.limit is not None else ()
            try:
                if missing:
                    self.fetch(number, has_room=True)
                path = self.path(number)
                try:
                    return use(path)
                except FileNotFoundError:
                    if self.folder is None or not left:
                        raise
            finally:
                self.release([number])
        raise AssertionError("the last try raises")

    @tells_cache_faults
    def hold(
        self,
        numbers: Sequence[int],
        *,
        coming: Collection[int] = (),
        ahead: bool = False,
        wait: bool = True,
        beside: Collection[int] = (),
        check: Callable[[], object] | None = None,
    ) -> list[int] | None:
        """Keep these files in the cache until `release`, all at once; gives those that have to be fetched.

        There is room for them, which `fetch(..., has_room=True)` or `forgo` of each gives back. `coming`: what will be
        there without. `ahead`: more such holds follow, until `end_ahead`. None if there is no room and `wait` is False;
        otherwise waits for other readers, and `check` may raise to give up. `beside`: what the caller goes on holding.
        Raises CacheLimitError for more than the limit.
        """
        missing: list[int] = []

        def look() -> int:
            missing[:] = [
                number
                for number in dict.fromkeys(numbers)
                if number not in coming and not self.is_ready(number) and self._failure(number) is None
            ]
            return self._bytes_of(missing)

        limit = self.limit
        if limit is None:
            look()
            return missing
        paths = [self._target(number) for number in numbers]
        if limit.use_again(paths):
            if not look():
                return missing
            self.release(numbers)
        together = self._bytes_of({*numbers, *beside})

        def attempt() -> bool:
            return limit.use(paths, together, look, ahead=ahead)

        if wait:
            limit.wait(attempt, check)
        elif not attempt():
            return None
        return missing

    def release(self, numbers: Sequence[int]) -> int:
        """Let files go that `hold` kept; gives the bytes of those that others may remove now."""
        if self.limit is None:
            return 0
        paths = [self._target(number) for number in numbers]
        ended = self.limit.end_use(paths)
        number_of = dict(zip(paths, numbers, strict=True))
        last = [number_of[path] for path in ended]
        # Before others may remove it: what is mapped stays on the disk. Whoever uses it again maps it again.
        for number in last:
            self.on_release(number)
        self.limit.unlock(ended)
        now = time.monotonic()
        for number in last:
            # Those used last are removed last.
            if now - self._touched.get(number, -_TOUCH_AFTER) >= _TOUCH_AFTER:
                self._touched[number] = now
                with contextlib.suppress(OSError):
                    os.utime(self._find(number) or self._target(number))
        return self._bytes_of(last)

    def end_ahead(self) -> None:
        """No hold `ahead` follows, or others wait for room."""
        if self.limit is not None:
            self.limit.end_ahead()

    def forgo(self, numbers: Iterable[int]) -> None:
        """Give back the room of files that will not be fetched after all."""
        if self.limit is not None:
            self.limit.give_back(self._bytes_of(numbers))

    @contextlib.contextmanager
    def held(self, numbers: Sequence[int]) -> Iterator[None]:
        """Hold files and fetch those that are missing, several at once; what cannot be fetched is met by `open`.

        Raises UnavailableError at once.
        """
        left = {*(self.hold(numbers) or ())}
        failed: list[int] = []

        def attempt(number: int) -> None:
            left.discard(number)
            try:
                self.fetch(number, has_room=True)
            except UnavailableError:
                raise  # the others would wait for the same in vain
            except (OSError, ValueError) as error:
                # In place of a second fetch there: others may wait for whoever opens files.
                self.remember(number, error)
                failed.append(number)

        try:
            for _ in in_threads(attempt, sorted(left)):
                pass
            yield
        finally:
            for number in failed:
                self._failures.pop(number, None)
            self.forgo(sorted(left))
            self.release(numbers)

    def prefetch(self, numbers: Sequence[int], *, progress: bool) -> None:
        """Fetch those of `numbers` that are not ready, several at once; a bar in bytes where they are many.

        All are tried; raises the first's OSError or ValueError that could not be fetched. ValueError for more than the
        limit, which may also remove some before they are read.
        """
        if self.limit is not None and self._bytes_of({*numbers}) > self.limit.max_bytes:
            raise ValueError(
                f"{len(numbers)} {self.noun} of {self._bytes_of({*numbers})} bytes do not fit "
                f"max_cache_size={self.limit.max_bytes}"
            )
        missing = [number for number in dict.fromkeys(numbers) if not self.is_ready(number)]
        total = self._total(missing)
        shown = progress and len(missing) >= BAR_FROM
        description = f"{len(missing)} {self.noun}"
        lock = threading.Lock()
        with Bar(total=total, unit="B", unit_scale=True, desc=description, leave=False, disable=not shown) as bar:

            def on_bytes(count: int) -> None:
                with lock:
                    bar.update(count)

            def attempt(number: int) -> Exception | None:
                try:
                    self.fetch(number, on_bytes)
                except (OSError, ValueError) as error:
                    return error
                return None

            for error in list(in_threads(attempt, missing)):
                if error is not None:
                    raise error

    def _bytes_of(self, numbers: Iterable[int]) -> int:
        return sum(map(self.sizes.__getitem__, numbers))

    def _total(self, numbers: Sequence[int]) -> int | None:
        """Bytes that fetching these will take; None if that is not known."""
        return self._bytes_of(numbers)

    @tells_cache_faults
    def fetch(self, number: int, on_bytes: Callable[[int], object] | None = None, *, has_room: bool = False) -> None:
        """Put the file in place, unless it is there. Raises OSError, ValueError.

        `on_bytes` hears of progress, now and then of 0 bytes, and may raise to give up. `has_room`: hold() has made it.
        """
        if self.limit is not None and not has_room:
            missing = self.hold([number])
            try:
                if missing:
                    self.fetch(number, on_bytes, has_room=True)
            finally:
                self.release([number])
            return
        try:
            self._fetch(number, on_bytes)
        finally:
            self.forgo([number])

    def _fetch(self, number: int, on_bytes: Callable[[int], object] | None) -> None:
        target = self._target(number)
        if not self._swept:
            self._swept = True
            sweep(os.path.dirname(target))
        full: OSError | None = None
        for left in reversed(range(_FULL_TRIES)):
            try:
                with only_one(target, on_bytes and (lambda: on_bytes(0))):
                    if not self.is_ready(number):
                        self._write(number, on_bytes)
                return
            except OSError as error:
                if error.errno == errno.ENOENT and left:  # somebody has removed the folder
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    continue
                if error.errno not in DISK_FULL:
                    raise
                full = error
            if not left or self.limit is None or not self.limit.evict(self.sizes[number]):
                break
        assert full is not None
        less = "a smaller " if self.limit is not None else ""
        raise UnavailableError(
            full.errno,
            f"{full.strerror} in {self.folder} for {self.place(number)}: free some, or give {less}max_cache_size",
        )

    def _write(self, number: int, on_bytes: Callable[[int], object] | None) -> None:
        part = f"{self._target(number)}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            os.replace(*self._make(number, part, on_bytes))
        finally:
            remove_parts(part)
        self._failures.pop(number, None)

    def remember(self, number: int, failure: Exception) -> None:
        """Let who opens the file in the next minute meet this failure, in place of fetching it again."""
        self._failures[number] = time.monotonic(), failure

    def _failure(self, number: int) -> Exception | None:
        when, failure = self._failures.get(number, (0.0, None))
        return failure if failure is not None and time.monotonic() - when < _REMEMBERED else None

    def close(self) -> None:
        """Forget what is not in use; the next read opens anew."""
        if self.limit is not None:
            self.limit.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy, perhaps on another machine, meets failures of its own.
        return {**self.__dict__, "_failures": {}, "_touched": {}, "_swept": False}


def made_again(make: Callable[[], T], part: str) -> T:
    """make(), which writes to `part`, and again, with back-off, where what came is wrong (ValueError)."""
    for attempt in range(1, _FETCH_TRIES):
        try:
            return make()
        except ValueError as error:
            _log.info("%s; try %d of %d follows", error, attempt + 1, _FETCH_TRIES)
        remove_parts(part)
        time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
    return make()


def _nothing(_: int) -> None:
    pass
