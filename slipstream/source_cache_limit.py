"""A limit on what a cache folder holds, kept by all processes that give it one; least recently used files go first.

Everything rests on locks of the kernel's, so that a killed process leaves nothing that holds: at the folder's root lies
`.limit`, of which byte 0 is locked while files are counted and removed, byte 1 by whoever waits for room, and a byte of
each file, by its name, by those that use the file. What a process is about to write it has set aside before, as the
length of a sparse file `<pid>-<mark>.room` that is locked while the process lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import struct
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from .checks import byte_text
from .source import ProcessLock
from .source_locks import HELD, sweep

_COUNTING, _WAITING, _FILES = 0, 1, 2
_FLOCK = struct.Struct("hhqqi4x")  # of 64-bit Linux
_SET = re.compile(r"[0-9a-f]{32}")
_ROOM = re.compile(r"\d+-[0-9a-f]+\.room")
_LONGEST_POLL = 0.05
# For other processes' reads, which end by themselves: of a network that fails they are patient for two minutes.
_PATIENCE = 300.0
# Of the limit: room for so much more is looked for at a time.
SPARE = 128
# Ends the name of a file that was not kept as it came; in use it goes by the name without.
UNPACKED = ".unpacked"


class CacheLimitError(RuntimeError):
    """What has to be in the cache folder at one time is more than `max_cache_size`; says the least that would do."""


class _Descriptors:
    """The open files of one process: locks, a second one to look at the locks, and the room that is set aside."""

    def __init__(self, root: str) -> None:
        self.pid = os.getpid()
        os.makedirs(root, exist_ok=True)
        path = os.path.join(root, ".limit")
        self.room_path = os.path.join(root, f"{self.pid}-{secrets.token_hex(4)}.room")
        with contextlib.ExitStack() as failed:

            def opened(path: str) -> int:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                failed.callback(os.close, descriptor)  # and with it the lock
                return descriptor

            self.locks, self.probe = opened(path), opened(path)
            # Counted and removed by name under this lock: a new one is locked before anyone looks at it.
            _lock(self.locks, fcntl.F_WRLCK, _COUNTING, wait=True)
            self.room = opened(self.room_path)
            with contextlib.suppress(OSError):
                fcntl.flock(self.room, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock(self.locks, fcntl.F_UNLCK, _COUNTING)
            failed.pop_all()
        HELD.update((self.locks, self.probe, self.room))

    def close(self) -> None:
        if self.pid != os.getpid() or self.locks not in HELD:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.room_path)
        descriptors = self.locks, self.probe, self.room
        # A thread that is left at the end of the process must not come upon another file under the same number.
        self.locks = self.probe = self.room = -1
        for descriptor in descriptors:
            HELD.discard(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, kind: int, byte: int, *, wait: bool = False) -> None:
    # Of the open file and not of the process, as POSIX locks are: two readers in one process are two.
    if descriptor < 0:
        return
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        # A file system without locks: others may then remove what is in use, which is fetched again.
        if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _is_locked(descriptor: int, byte: int) -> bool:
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except (OSError, ValueError):  # without locks; or closed
        return False
    return _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK


class CacheLimit:
    """At most `max_bytes` of files below `root`, by what all who give it a limit fetch; thread-safe.

    Files in use stay. A pickled or forked copy uses none.
    """

    def __init__(self, root: str, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        # Taken one after the other: counting may take a while, and whoever lets go of files does not wait for that.
        self._counts, self._mutex = ProcessLock(), ProcessLock()
        self._start()

    def _start(self) -> None:
        self._opened: _Descriptors | None = None
        self._users: Counter[str] = Counter()
        self._waiting = self._aside = self._spare = 0

    def _open(self) -> _Descriptors:
        # Under the mutex.
        if self._opened is None or self._opened.pid != os.getpid():
            self._start()
            self._opened = _Descriptors(self.root)
            weakref.finalize(self, self._opened.close)
        return self._opened

    @contextlib.contextmanager
    def _counting(self) -> Iterator[_Descriptors]:
        with self._counts:
            with self._mutex:
                opened = self._open()
            try:
                _lock(opened.locks, fcntl.F_WRLCK, _COUNTING, wait=True)
                yield opened
            finally:
                _lock(opened.locks, fcntl.F_UNLCK, _COUNTING)

    def _byte(self, path: str) -> int:
        name = path.removeprefix(self.root).lstrip("/").removesuffix(UNPACKED).encode(errors="surrogateescape")
        return _FILES + (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 2)

    def use_again(self, paths: Sequence[str]) -> bool:
        """Use files once more that are all in use here already; False if one is not."""
        with self._mutex:
            self._open()
            if not all(self._users[path] for path in paths):
                return False
            self._users.update(paths)
            return True

    def use(self, paths: Sequence[str], together: int, missing: Callable[[], int], *, ahead: bool = False) -> bool:
        """Keep these files from being removed, and set missing() bytes aside for those that are not there.

        False, and nothing is kept or removed, while others' files in use leave no room. `ahead`: set a little more
        aside, where there is room, so that not every time all files have to be counted; `end_ahead` gives it back.
        Raises CacheLimitError if `together`, the bytes of all of them, can never fit.
        """
        with self._counting() as opened:
            with self._mutex:
                for path in paths:
                    if not self._users[path]:
                        _lock(opened.locks, fcntl.F_RDLCK, self._byte(path))
                self._users.update(paths)
                spare, self._spare = self._spare, 0
            short, fits = 0, None
            try:
                short = missing() - spare
                more = self.max_bytes // SPARE if ahead else 0
                fits = self._make_room(opened, short, together, more) if short > 0 else 0
            finally:
                with self._mutex:
                    if fits is None:
                        self._spare += spare
                        self._unlock(opened, self._end_use(paths))
                    else:
                        self._spare += fits - short
                        self._set_aside(opened, fits)
            return fits is not None

    def end_ahead(self) -> None:
        """Give back what was set aside for fetches to come."""
        with self._mutex:
            self._set_aside(self._open(), -self._spare)
            self._spare = 0

    def end_use(self, paths: Iterable[str]) -> list[str]:
        """Let go of files; gives those that are in use no more here, which stay until `unlock`."""
        with self._mutex:
            self._open()
            return self._end_use(paths)

    def unlock(self, paths: Iterable[str]) -> None:
        """Let others remove those of these files that are not in use here."""
        with self._mutex:
            self._unlock(self._open(), paths)

    def _end_use(self, paths: Iterable[str]) -> list[str]:
        ended = []
        for path in paths:
            if self._users[path]:  # a forked child knows none of its parent's
                self._users[path] -= 1
                if not self._users[path]:
                    del self._users[path]
                    ended.append(path)
        return ended

    def _unlock(self, opened: _Descriptors, paths: Iterable[str]) -> None:
        for path in paths:
            if not self._users[path]:
                _lock(opened.locks, fcntl.F_UNLCK, self._byte(path))

    def give_back(self, count: int) -> None:
        """What was set aside has been written, or will not be."""
        with self._mutex:
            self._set_aside(self._open(), -count)

    def _set_aside(self, opened: _Descriptors, count: int) -> None:
        self._aside = max(self._aside + count, 0)
        if opened.room >= 0:
            os.ftruncate(opened.room, self._aside)

    def wait(self, attempt: Callable[[], bool], check: Callable[[], object] | None = None) -> None:
        """Try until `attempt` is true, while others are asked for room; `check` may raise to give up."""
        # Who comes while others wait here goes not before them: it would have the room that it let go of just now.
        late = self._waiting > 0
        if not late and attempt():
            return
        begin, poll = time.monotonic(), 0.01 if late else 0.002
        self._ask(1)
        try:
            while True:
                if check is not None:
                    check()
                if time.monotonic() - begin > _PATIENCE:
                    raise CacheLimitError(
                        f"there has been no room below {self.root} for {_PATIENCE:.0f} s: other readers use all of "
                        f"max_cache_size={self.max_bytes} ({byte_text(self.max_bytes)}); give more"
                    )
                time.sleep(poll)
                tried = time.monotonic()
                if attempt():
                    return
                # With very many files the look for room takes a while, and others wait for it.
                poll = min(2 * poll, max(_LONGEST_POLL, 5 * (time.monotonic() - tried)))
        finally:
            self._ask(-1)

    def _ask(self, change: int) -> None:
        with self._mutex:
            opened = self._open()
            self._waiting = max(self._waiting + change, 0)
            _lock(opened.locks, fcntl.F_RDLCK if self._waiting else fcntl.F_UNLCK, _WAITING)

    def is_asked(self) -> bool:
        """Tell whether someone waits for room, here or in another process: files fetched far ahead should go."""
        with self._mutex:
            return _is_locked(self._open().probe, _WAITING)

    def trim(self, count: int = 0) -> bool:
        """Remove what is over the limit, and what `count` bytes more need; tell whether that was possible."""
        _sweep_all(_entries(self.root))
        with self._counting() as opened:
            return self._make_room(opened, count, 0) is not None

    def evict(self, count: int) -> bool:
        """Remove files of `count` bytes whatever the limit, as the disk is full; tell whether there were such."""
        with self._counting() as opened:
            files, _, _ = self._files()
            return self._remove(opened, files, count)

    def _make_room(self, opened: _Descriptors, need: int, together: int, more: int = 0) -> int | None:
        # Bytes that there is room for now: `need`, and `more` if that can be; None if there is not even the first.
        files, aside, kept = self._files()
        if together + kept > self.max_bytes:
            least = together + kept
            raise CacheLimitError(
                f"what is read at once takes {byte_text(together)} of the cache {self.root}; max_cache_size is "
                f"{byte_text(self.max_bytes)} and must be at least {least} bytes ({byte_text(least)})"
            )
        over = sum(size for _, size, _ in files) + aside + kept - self.max_bytes
        for count in (need + more, need):
            if over + count <= 0 or self._remove(opened, files, over + count):
                return count
        return None

    def _files(self) -> tuple[list[tuple[int, int, str]], int, int]:
        """(time of last use, size, path) of the files; bytes set aside; bytes that are always kept, as indexes.

        Some 10 us a file: 30 ms for the 3,000 chunks of 64 MB in 200 GB.
        """
        files, aside, kept = [], 0, 0
        entries = _entries(self.root)
        # Room first: what is written meanwhile counts twice, and not never.
        dead = False
        for entry in entries:
            if _ROOM.fullmatch(entry.name):
                ours = self._opened is not None and entry.path == self._opened.room_path
                room = self._aside if ours else _live_room(entry.path)
                aside += room or 0
                dead |= room is None
        if dead:
            _sweep_all(entries)
        for entry in entries:
            if _SET.fullmatch(entry.name):
                for file in _entries(entry.path):
                    # Locks; and what is being written counts as set aside, by its writer.
                    if file.name.endswith(".lock") or ".part" in file.name:
                        continue
                    try:
                        status = file.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    files.append((status.st_mtime_ns, status.st_size, file.path))
            elif entry.name == "tar-index":
                kept += sum(file.stat().st_size for file in _entries(entry.path) if file.name.endswith(".npz"))
        return files, aside, kept

    def _remove(self, opened: _Descriptors, files: list[tuple[int, int, str]], count: int) -> bool:
        """Remove the oldest files that nobody uses, `count` bytes or more; none where there are not enough."""
        chosen = []
        for _, size, path in sorted(files):
            if count <= 0:
                break
            if not self._users[path.removesuffix(UNPACKED)] and not _is_locked(opened.probe, self._byte(path)):
                chosen.append(path)
                count -= size
        if count > 0:
            return False
        for path in chosen:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return True

    def close(self) -> None:
        """Close the files, if nothing here is in use."""
        with self._counts, self._mutex:
            if self._opened is not None and not self._users and not self._aside and not self._waiting:
                self._opened.close()
                self._opened = None

    def __reduce__(self) -> tuple[type[CacheLimit], tuple[str, int]]:
        return CacheLimit, (self.root, self.max_bytes)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sweep_all(entries: Iterable[os.DirEntry[str]]) -> None:
    # Nobody counts what a killed process has half written.
    for entry in entries:
        if _SET.fullmatch(entry.name):
            sweep(entry.path)


def _live_room(path: str) -> int | None:
    """Bytes that a process has set aside; None for a dead one, whose file is removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.fstat(descriptor).st_size
    except OSError:
        return 0
    else:
        os.unlink(path)
        return None
    finally:
        os.close(descriptor)
