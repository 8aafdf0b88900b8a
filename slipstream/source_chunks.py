"""Chunk files on this machine's disk: read in place, or fetched and unpacked into a cache when they are first needed.

A cached file is written beside its final name, checked and renamed, so that no reader, in this process or another, sees
part of one, and a map of an older file stays whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from .daemon import in_threads
from .progress import Bar
from .source import ProcessLock
from .source_index import Chunk, Index, parse_index
from .source_unpack import has_rows_only, unpack

_PARALLEL_FETCHES = 8
_PARALLEL_STATS = 16
_STATS = 64  # files that one thread asks for in a row
# Below this many chunks a fetch shows no bar: a batch that meets one new chunk is no event.
_BAR_FROM = 4
_COPY_BYTES = 1 << 20
_UNPACKED = ".unpacked"
# Of a chunk that came whole, by what the origin said, and yet does not fit the index.
_FETCH_TRIES = 3
_FIRST_WAIT = 0.1

_log = logging.getLogger(__name__)


class Origin(Protocol):
    """A folder that chunks are fetched from. `name` says where it is, without credentials."""

    name: str

    def identity(self) -> str:
        """Tell sets apart whose index.json and `name` are equal; enters the cache folder's hash only."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Give the bytes [start, stop) of a file. Raises FileNotFoundError or another OSError."""
        ...

    def fetch(self, name: str, path: str, on_bytes: Callable[[int], object] | None = None) -> None:
        """Write a file to `path`, telling `on_bytes` how many more bytes came. Raises as `read` does."""
        ...

    def close(self) -> None: ...


class LocalOrigin:
    """A folder on a disk of this machine, or one mounted as such."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self.name = self.folder

    def identity(self) -> str:
        return str(os.stat(os.path.join(self.folder, "index.json")).st_mtime_ns)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(os.path.join(self.folder, name), "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    def fetch(self, name: str, path: str, on_bytes: Callable[[int], object] | None = None) -> None:
        with open(os.path.join(self.folder, name), "rb") as source, open(path, "xb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
            if on_bytes is not None:
                on_bytes(target.tell())

    def close(self) -> None:
        pass


def default_cache_dir() -> str:
    """$SLIPSTREAM_CACHE, or slipstream in $XDG_CACHE_HOME, or ~/.cache/slipstream."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(os.environ.get("SLIPSTREAM_CACHE") or os.path.join(home, "slipstream"))


class ChunkStore:
    """A LitData set's chunks as plain files, whatever way they come; thread-safe, and shared between processes.

    `in_place` reads the origin's own files (a local folder's) where they need no unpacking. Everything else is kept in
    `cache_dir`/<hash of origin and index.json>, so a set that was written anew never meets old chunks. Raises OSError
    and ValueError, when made, for an index or (in a local folder) chunks that are missing, foreign or too short.
    """

    def __init__(self, origin: Origin, *, cache_dir: str | os.PathLike[str] | None, in_place: bool) -> None:
        self.origin = origin
        place = f"{origin.name.rstrip('/')}/index.json"
        text = origin.read("index.json")
        self.index: Index = parse_index(text, place)
        if isinstance(origin, LocalOrigin):
            self._check_sizes(origin.folder)
        self.folder: str | None = None
        if not (in_place and self._is_plain()):
            mark = hashlib.blake2b("\0".join((origin.name, origin.identity())).encode() + b"\0" + text, digest_size=16)
            root = os.path.abspath(os.path.expanduser(cache_dir)) if cache_dir is not None else default_cache_dir()
            self.folder = os.path.join(root, mark.hexdigest())
        self._ready: dict[int, str] = {}
        self._guard = ProcessLock()
        self._chunk_locks: dict[tuple[int, int], threading.Lock] = {}

    def _check_sizes(self, folder: str) -> None:
        def check(first: int) -> None:
            for chunk in chunks[first : first + _STATS]:
                path = os.path.join(folder, chunk.name)
                size = os.stat(path).st_size
                # A wholly compressed file is judged when it is unpacked: the index gives its size before compression.
                least = 1 if self.index.compression == "chunk" else chunk.n_bytes
                if size < least:
                    raise ValueError(f"chunk {path} has {size} bytes, its index says {chunk.n_bytes}: it is cut off")

        chunks = self.index.chunks
        # Thousands of chunks on a network's disk, each a question of a millisecond, must not be asked one by one.
        list(in_threads(check, range(0, len(chunks), _STATS), _PARALLEL_STATS))

    def _is_plain(self) -> bool:
        if self.index.compression is not None:
            return False
        chunk = self.index.chunks[0]
        head = self.origin.read(chunk.name, 0, 12)
        tail = self.origin.read(chunk.name, max(0, chunk.n_bytes - 8), chunk.n_bytes)
        return not has_rows_only(head, tail)

    def path(self, chunk: int) -> str:
        """The chunk's file, ready to be mapped; fetched and unpacked first if need be. Raises OSError, ValueError."""
        if self.folder is None:
            return os.path.join(self.origin.name, self.index.chunks[chunk].name)
        if not self.is_ready(chunk):
            self._fetch(chunk)
        return self._ready[chunk]

    def is_ready(self, chunk: int) -> bool:
        """Tell whether the chunk can be mapped without a fetch."""
        if self.folder is None or chunk in self._ready:
            return True
        entry = self.index.chunks[chunk]
        path = os.path.join(self.folder, entry.name)
        # What a chunk unpacks to is not known beforehand; there its own offsets tell.
        for candidate, least in ((path, entry.n_bytes), (path + _UNPACKED, None)):
            with contextlib.suppress(FileNotFoundError):
                fault = _fault(candidate, entry, least)
                if fault is None:
                    self._ready[chunk] = candidate
                    return True
                _log.warning("cached chunk %s %s; it is fetched again", candidate, fault)
        return False

    def prefetch(self, chunks: Sequence[int], *, progress: bool) -> None:
        """Fetch those of `chunks` that are not ready, several at once; a bar in bytes where they are many.

        All are tried; then raises the first one's OSError or ValueError.
        """
        missing = [chunk for chunk in dict.fromkeys(chunks) if not self.is_ready(chunk)]
        if not missing:
            return
        known = self.index.compression != "chunk"
        total = sum(self.index.chunks[chunk].n_bytes for chunk in missing) if known else None
        shown = progress and len(missing) >= _BAR_FROM
        lock = threading.Lock()
        with Bar(
            total=total, unit="B", unit_scale=True, desc=f"{len(missing)} chunks", leave=False, disable=not shown
        ) as bar:

            def on_bytes(count: int) -> None:
                with lock:
                    bar.update(count)

            def attempt(chunk: int) -> Exception | None:
                try:
                    self._fetch(chunk, on_bytes)
                except (OSError, ValueError) as error:
                    return error
                return None

            failed = [error for error in in_threads(attempt, missing, _PARALLEL_FETCHES) if error is not None]
            if failed:
                raise failed[0]

    def first_item(self) -> bytes:
        """The bytes of sample 0, without fetching its whole chunk where it is stored as it is."""
        name = self.index.chunks[0].name
        if self.index.compression is None and not self.is_ready(0):
            item = _first_item(self.origin, name)
            if item:
                return item
        folder, name = os.path.split(self.path(0))
        return _first_item(LocalOrigin(folder), name)

    def _fetch(self, chunk: int, on_bytes: Callable[[int], object] | None = None) -> None:
        assert self.folder is not None
        entry = self.index.chunks[chunk]
        path = os.path.join(self.folder, entry.name)
        with self._only_one(chunk, path):
            if self.is_ready(chunk):
                return
            for number in range(1, _FETCH_TRIES + 1):
                try:
                    self._ready[chunk] = self._fetch_once(chunk, path, on_bytes)
                    return
                except ValueError as error:
                    if number == _FETCH_TRIES:
                        raise
                    _log.info("%s; try %d of %d follows", error, number + 1, _FETCH_TRIES)
                time.sleep(_FIRST_WAIT * 2 ** (number - 1))

    def _fetch_once(self, chunk: int, path: str, on_bytes: Callable[[int], object] | None) -> str:
        """Put the chunk in place, at `path` or beside it; gives where. ValueError if it does not fit the index."""
        entry = self.index.chunks[chunk]
        part = f"{path}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            self.origin.fetch(entry.name, part, on_bytes)
            size = os.stat(part).st_size
            # The index gives a wholly compressed file's size before compression, which unpacking checks.
            if self.index.compression != "chunk" and size < entry.n_bytes:
                raise ValueError(f"{self.place(chunk)} has {size} bytes, its index says {entry.n_bytes}: it is cut off")
            if unpack(part, part + _UNPACKED, leaves=self.index.leaves, n_bytes=entry.n_bytes):
                whole, path, least = part + _UNPACKED, path + _UNPACKED, None
            elif size < entry.n_bytes:
                raise ValueError(f"{self.place(chunk)} is damaged: it is not compressed as its index says")
            else:
                whole, least = part, entry.n_bytes
            fault = _fault(whole, entry, least)
            if fault is not None:
                raise ValueError(f"chunk {self.place(chunk)} {fault}")
            os.replace(whole, path)
            return path
        finally:
            for leftover in (part, part + _UNPACKED):
                Path(leftover).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _only_one(self, chunk: int, path: str) -> Iterator[None]:
        """Hold the chunk's lock against the threads of this process and the other processes on the cache."""
        with self._guard:
            lock = self._chunk_locks.setdefault((os.getpid(), chunk), threading.Lock())
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with lock, open(path + ".lock", "ab") as file:
            # Some network file systems have no flock: two processes may then fetch twice, which the rename keeps safe.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Whoever waits on the removed file finds the chunk in place, or fetches it beside another: both safe.
                Path(path + ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)

    def place(self, chunk: int) -> str:
        """Where the chunk comes from, for people."""
        return f"{self.origin.name.rstrip('/')}/{self.index.chunks[chunk].name}"

    def close(self) -> None:
        self.origin.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunk_locks": {}}


def _first_item(origin: Origin, name: str) -> bytes:
    head = origin.read(name, 0, 12)
    if len(head) < 12:
        raise ValueError(f"chunk {name!r} has {len(head)} bytes: too short for a chunk")
    start, stop = struct.unpack_from("<II", head, 4)
    return origin.read(name, start, stop) if stop > start else b""


def _fault(path: str, chunk: Chunk, least: int | None) -> str | None:
    """Say what is wrong with a chunk file in the plain layout: its size or its count; None if both are right.

    `least` is the size that it must have; None takes the end of the last item for it.
    """
    samples = chunk.samples
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if least is not None and size < least:
            return f"has {size} bytes, its index says {least}: it is cut off"
        if size < 4 * (samples + 2):
            return f"has {size} bytes: too short for {samples} samples"
        (count,) = struct.unpack("<I", file.read(4))
        if count != samples:
            return f"holds {count} samples, its index says {samples}"
        file.seek(4 * (samples + 1))
        (end,) = struct.unpack("<I", file.read(4))
        if least is None and size < end:
            return f"has {size} bytes, its samples end at {end}: it is cut off"
    return None
