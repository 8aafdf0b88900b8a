"""Chunk files on this machine's disk: read in place, or fetched and unpacked into a cache when first needed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from .daemon import in_threads
from .source_cache import CachedFiles, made_again
from .source_cache_limit import UNPACKED
from .source_index import Chunk, Index, parse_index
from .source_unpack import has_rows_only, unpack

_PARALLEL_STATS = 16
_STATS = 64  # files that one thread asks for in a row
_COPY_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class Origin(Protocol):
    """A folder that chunks are fetched from. `name` says where it is, without credentials."""

    name: str

    def identity(self) -> str:
        """Tell sets apart whose index.json (read before) and `name` are equal; for the cache folder's hash."""
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
            while block := source.read(_COPY_BYTES):
                target.write(block)
                if on_bytes is not None:
                    on_bytes(len(block))

    def close(self) -> None:
        pass


class ChunkStore(CachedFiles):
    """A LitData set's chunks as plain files, whatever way they come; thread-safe, and shared between processes.

    `in_place` reads the origin's own files (a local folder's) where they need no unpacking. Everything else is kept in
    `cache_dir`/<hash of origin and index.json>, so a set that was written anew never meets old chunks. Raises OSError
    and ValueError, when made, for an index or (in a local folder) chunks that are missing, foreign or too short.
    """

    noun = "chunks"

    def __init__(
        self,
        origin: Origin,
        *,
        cache_dir: str | os.PathLike[str] | None,
        in_place: bool,
        max_cache_size: int | str | None = None,
    ) -> None:
        self.origin = origin
        place = f"{origin.name.rstrip('/')}/index.json"
        text = origin.read("index.json")
        self.index: Index = parse_index(text, place)
        if isinstance(origin, LocalOrigin):
            self._check_sizes(origin.folder)
        home = None
        if not (in_place and self._is_plain()):
            mark = "\0".join((origin.name, origin.identity())).encode() + b"\0" + text
            home = hashlib.blake2b(mark, digest_size=16).hexdigest()
        sizes = [chunk.n_bytes for chunk in self.index.chunks]
        super().__init__(home, sizes, cache_dir=cache_dir, max_cache_size=max_cache_size)
        self._ready: dict[int, str] = {}

    def _check_sizes(self, folder: str) -> None:
        def check(first: int) -> None:
            for chunk in chunks[first : first + _STATS]:
                path = os.path.join(folder, chunk.name)
                status = os.stat(path)
                size = status.st_size
                # A wholly compressed file is judged when it is unpacked: the index gives its size before compression.
                least = 1 if self.index.compression == "chunk" else chunk.n_bytes
                if size < least:
                    raise ValueError(f"chunk {path} has {size} bytes, its index says {chunk.n_bytes}: it is cut off")
                written.append((chunk.name, status.st_mtime_ns))

        chunks = self.index.chunks
        written: list[tuple[str, int]] = []
        # Thousands of chunks on a network's disk, each a question of a millisecond, must not be asked one by one.
        list(in_threads(check, range(0, len(chunks), _STATS), _PARALLEL_STATS))
        times = dict(written)
        self._written = np.array([times[chunk.name] for chunk in chunks], np.int64)

    def check_unchanged(self, number: int) -> None:
        """Raise ValueError for a chunk of a local folder that was written anew since: its samples may be others."""
        if isinstance(self.origin, LocalOrigin):
            path = os.path.join(self.origin.folder, self.index.chunks[number].name)
            if os.stat(path).st_mtime_ns != self._written[number]:
                raise ValueError(f"chunk {path} has changed since the set was opened: open it again")

    def _is_plain(self) -> bool:
        if self.index.compression is not None:
            return False
        chunk = self.index.chunks[0]
        head = self.origin.read(chunk.name, 0, 12)
        tail = self.origin.read(chunk.name, max(0, chunk.n_bytes - 8), chunk.n_bytes)
        return not has_rows_only(head, tail)

    def _target(self, number: int) -> str:
        assert self.folder is not None
        return os.path.join(self.folder, self.index.chunks[number].name)

    def _find(self, number: int) -> str | None:
        if self.folder is None:
            return os.path.join(self.origin.name, self.index.chunks[number].name)
        # In the cache its size and count are checked when it is first met.
        known = self._ready.get(number)
        if known is not None:
            if os.path.exists(known):
                return known
            self._ready.pop(number, None)
        entry, path = self.index.chunks[number], self._target(number)
        # What a chunk unpacks to is not known beforehand; there its own offsets tell.
        for candidate, least in ((path, entry.n_bytes), (path + UNPACKED, None)):
            with contextlib.suppress(FileNotFoundError):
                fault = _fault(candidate, entry, least)
                if fault is None:
                    self._ready[number] = candidate
                    return candidate
                _log.warning("cached chunk %s %s; it is fetched again", candidate, fault)
        return None

    def _total(self, numbers: Sequence[int]) -> int | None:
        # Of a wholly compressed chunk the index gives the size that it unpacks to.
        return super()._total(numbers) if self.index.compression != "chunk" else None

    def early_item(self, number: int) -> bytes:
        """The bytes of an item of the first chunk, without fetching all of it where it is stored as it is."""
        name = self.index.chunks[0].name
        if self.index.compression is None and not self.is_ready(0):
            item = _item(self.origin, name, number)
            if item:
                return item
        return self.open(0, lambda path: _item(LocalOrigin(os.path.dirname(path)), os.path.basename(path), number))

    def _make(self, number: int, part: str, on_bytes: Callable[[int], object] | None) -> tuple[str, str]:
        return made_again(lambda: self._make_once(number, part, on_bytes), part)

    def _make_once(self, number: int, part: str, on_bytes: Callable[[int], object] | None) -> tuple[str, str]:
        """Fetch and unpack the chunk, as `_make`. ValueError if it is not as its index says."""
        entry, path = self.index.chunks[number], self._target(number)
        self.origin.fetch(entry.name, part, on_bytes)
        self.check_unchanged(number)
        size = os.stat(part).st_size
        # The index gives a wholly compressed file's size before compression, which unpacking checks.
        if self.index.compression != "chunk" and size < entry.n_bytes:
            raise ValueError(f"{self.place(number)} has {size} bytes, its index says {entry.n_bytes}: it is cut off")
        if unpack(part, part + UNPACKED, leaves=self.index.leaves, n_bytes=entry.n_bytes):
            whole, path, least = part + UNPACKED, path + UNPACKED, None
        elif size < entry.n_bytes:
            raise ValueError(f"{self.place(number)} is damaged: it is not compressed as its index says")
        else:
            whole, least = part, entry.n_bytes
        fault = _fault(whole, entry, least)
        if fault is not None:
            raise ValueError(f"chunk {self.place(number)} {fault}")
        return whole, path

    def place(self, number: int) -> str:
        """Where the chunk comes from, for people."""
        return f"{self.origin.name.rstrip('/')}/{self.index.chunks[number].name}"

    def close(self) -> None:
        super().close()
        self.origin.close()


def _item(origin: Origin, name: str, number: int) -> bytes:
    at = 4 + 4 * number
    ends = origin.read(name, at, at + 8)
    if len(ends) < 8:
        raise ValueError(f"chunk {name!r} has {at + len(ends)} bytes: too short for a chunk")
    start, stop = struct.unpack("<II", ends)
    return origin.read(name, start, stop) if stop > start else b""


def _fault(path: str, chunk: Chunk, least: int | None) -> str | None:
    """Say what is wrong with a chunk file in the plain layout: its size, count or offsets; None if they are right.

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
        offsets = np.frombuffer(file.read(4 * (samples + 1)), "<u4")
        if least is None and size < offsets[-1]:
            return f"has {size} bytes, its samples end at {offsets[-1]}: it is cut off"
    return offsets_fault(offsets)


def offsets_fault(offsets: np.ndarray) -> str | None:
    """Say which item of a chunk ends before it begins, uint32 [samples + 1]: then no item can be told from another."""
    backwards = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if not len(backwards):
        return None
    item = int(backwards[0])
    return f"has damaged offsets: item {item} lies at [{offsets[item]}, {offsets[item + 1]})"
