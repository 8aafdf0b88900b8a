"""Files fetched into a cache folder when they are first needed, once for all threads and processes that share it.

A file is written beside its final name, checked and renamed, so that no reader, in this process or another, sees part
of one, and a map of an older file stays whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from .progress import Bar

T = TypeVar("T")
U = TypeVar("U")

PARALLEL = 8
# Below this many files a fetch shows no bar: a batch that meets one new file is no event.
_BAR_FROM = 4
_OPEN_TRIES = 3
# What is being written: the file it becomes, its writer's process and thread, and whatever boto3 and unpack append.
_PART = re.compile(r"(.+)\.\d+-\d+\.part(\..*)?")
_LONGEST_POLL = 0.05

# Descriptors that hold locks. A forked child shares them and would keep the locks when its parent is killed.
_held: set[int] = set()


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def default_cache_dir() -> str:
    """$SLIPSTREAM_CACHE, or slipstream in $XDG_CACHE_HOME, or ~/.cache/slipstream."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(os.environ.get("SLIPSTREAM_CACHE") or os.path.join(home, "slipstream"))


def cache_root(cache_dir: str | os.PathLike[str] | None) -> str:
    """The folder that fetched files and indexes are kept in: `cache_dir`, or default_cache_dir()."""
    return os.path.abspath(os.path.expanduser(cache_dir)) if cache_dir is not None else default_cache_dir()


@contextlib.contextmanager
def only_one(path: str, check: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock of a file in the cache against other threads and processes; look again for the file inside.

    `check` is called while others hold it, and may raise to give up.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor, poll = _try_lock(path), 0.001
    while descriptor is None:
        if check is not None:
            check()
        time.sleep(poll)
        poll = min(2 * poll, _LONGEST_POLL)
        descriptor = _try_lock(path)
    try:
        yield
    finally:
        _unlock(path, descriptor)


def _try_lock(path: str, *, surely: bool = False) -> int | None:
    """A descriptor that holds the lock of `path`; None while another has it, or `surely` where there are no locks."""
    descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock has removed its file: another may hold that of a new one.
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            return None
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        # Some network file systems have no flock: two may then do the work twice, which the rename keeps safe.
        if surely:
            os.close(descriptor)
            return None
    _held.add(descriptor)
    return descriptor


def _unlock(path: str, descriptor: int) -> None:
    Path(path + ".lock").unlink(missing_ok=True)
    if descriptor in _held:  # else this is a child, forked meanwhile, which has closed it
        _held.discard(descriptor)
        # A child forked just now shares the descriptor and would hold the lock on.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def sweep(folder: str) -> None:
    """Remove what killed processes left half written in a folder of the cache, and their locks."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        left = {}
        for entry in entries:
            part = _PART.fullmatch(entry.name)
            if part or entry.name.endswith(".lock"):
                left.setdefault(part[1] if part else entry.name[: -len(".lock")], []).append(entry.path)
        for name, paths in left.items():
            path = os.path.join(folder, name)
            descriptor = _try_lock(path, surely=True)
            if descriptor is not None:
                for each in paths:
                    Path(each).unlink(missing_ok=True)
                _unlock(path, descriptor)


class CachedFiles(ABC):
    """The files of a set, by number, each fetched into `folder` when it is first needed; thread-safe.

    A subclass says where a file is kept, whether it is there, and how it is made.
    """

    noun = "files"

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._swept = False

    @abstractmethod
    def place(self, number: int) -> str:
        """Where the file comes from, for people."""
        ...

    @abstractmethod
    def n_bytes(self, number: int) -> int:
        """Bytes of the file in the cache."""
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

    def path(self, number: int) -> str:
        """The file, ready to be mapped; fetched first if need be. Raises OSError, ValueError.

        Another process may remove it before it is opened: `open` is safe from that.
        """
        found = self._find(number)
        if found is None:
            self.fetch(number)
            found = self._find(number) or self._target(number)
        return found

    def open(self, number: int, use: Callable[[str], T]) -> T:
        """use(path) of a file that is there, fetched if need be. Raises OSError, ValueError, and what `use` raises."""
        for left in reversed(range(_OPEN_TRIES)):
            path = self.path(number)
            try:
                return use(path)
            except FileNotFoundError:
                if self.folder is None or not left:
                    raise
        raise AssertionError("the last try raises")

    def prefetch(self, numbers: Sequence[int], *, progress: bool) -> None:
        """Fetch those of `numbers` that are not ready, several at once; a bar in bytes where they are many.

        All are tried; raises the first's OSError or ValueError that could not be fetched.
        """
        missing = [number for number in dict.fromkeys(numbers) if not self.is_ready(number)]
        total = self._total(missing)
        shown = progress and len(missing) >= _BAR_FROM
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

    def _total(self, numbers: Sequence[int]) -> int | None:
        """Bytes that fetching these will take; None if that is not known."""
        return sum(map(self.n_bytes, numbers))

    def fetch(self, number: int, on_bytes: Callable[[int], object] | None = None) -> None:
        """Put the file in place, unless it is there; `on_bytes` hears of progress. Raises OSError, ValueError."""
        target = self._target(number)
        if not self._swept:
            self._swept = True
            sweep(os.path.dirname(target))
        with only_one(target):
            if self.is_ready(number):
                return
            part = f"{target}.{os.getpid()}-{threading.get_ident()}.part"
            try:
                os.replace(*self._make(number, part, on_bytes))
            finally:
                remove_parts(part)

    @abstractmethod
    def close(self) -> None: ...


def remove_parts(part: str) -> None:
    """Remove a file that was written aside, and what was written beside it."""
    folder, name = os.path.split(part)
    with contextlib.suppress(FileNotFoundError):  # the whole folder may be gone
        for entry in os.listdir(folder):
            if entry.startswith(name):
                Path(folder, entry).unlink(missing_ok=True)


def in_threads(work: Callable[[U], T], items: Sequence[U]) -> Iterator[T]:
    """Give work(item) for each item in order, several at once; the first error ends the rest."""
    if len(items) < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(min(PARALLEL, len(items)), "slipstream-fetch")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
