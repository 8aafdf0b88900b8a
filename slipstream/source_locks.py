"""Locks of files in a cache folder, against threads and other processes, and what killed processes left there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# What is being written: the file it becomes, its writer's process and thread, and whatever boto3 and unpack append.
_PART = re.compile(r"(.+)\.\d+-\d+\.part(\..*)?")
_LONGEST_POLL = 0.05

# Descriptors that hold locks. A forked child shares them and would keep the locks when its parent is killed.
HELD: set[int] = set()


def _let_go_in_child() -> None:
    for descriptor in HELD:
        os.close(descriptor)
    HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def only_one(path: str, check: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock of a file in the cache against other threads and processes; look again for the file inside.

    `check` is called while others hold it, and may raise to give up. What was half written by who had it is removed.
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
        # Had by a killed process, its parts are there: a sweep leaves those of a file that is locked.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # again: OSError where there are no locks
            folder, name = os.path.split(path)
            for entry in os.listdir(folder):
                part = _PART.fullmatch(entry) if entry.startswith(name) else None
                if part and part[1] == name:
                    os.unlink(os.path.join(folder, entry))
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
    HELD.add(descriptor)
    return descriptor


def _unlock(path: str, descriptor: int) -> None:
    Path(path + ".lock").unlink(missing_ok=True)
    if descriptor in HELD:  # else this is a child, forked meanwhile, which has closed it
        HELD.discard(descriptor)
        # A child forked just now shares the descriptor and would hold the lock on.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def sweep(folder: str) -> None:
    """Remove what killed processes left half written in a folder of the cache, and their locks."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
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


def remove_parts(part: str) -> None:
    """Remove a file that was written aside, and what was written beside it."""
    folder, name = os.path.split(part)
    with contextlib.suppress(FileNotFoundError):  # the whole folder may be gone
        for entry in os.listdir(folder):
            if entry.startswith(name):
                Path(folder, entry).unlink(missing_ok=True)
