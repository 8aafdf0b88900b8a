"""LitData's chunk files, written so that none is ever seen in part, and where a run of samples is cut into chunks."""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .pack_fields import Item

_U32 = struct.Struct("<I")
# What a chunk takes beside its items: their number and the first offset; each item one more offset.
_HEAD, _OFFSET = 8, 4


@contextlib.contextmanager
def published(path: str, aside: str) -> Iterator[BinaryIO]:
    """Give a file in the folder `aside`, which is on disk and at `path` once the block has ended; else it is removed.

    `aside` must be on the same file system. What was at `path` before is replaced.
    """
    part = os.path.join(aside, f"{os.path.basename(path)}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def sync_folder(folder: str) -> None:
    """Have the names in a folder on disk, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ChunkCutter:
    """Writes items, in order, into chunks of at most `limit` bytes: `prefix`0.bin, `prefix`1.bin, ... in `folder`.

    Where the chunks end follows from the items' sizes alone. Two limits of items at most are held; what is left in the
    end makes one chunk, or two halves where one cannot hold it. A single item may make a chunk that is larger. `chunks`
    has the index's entry of each chunk written.
    """

    def __init__(self, folder: str, aside: str, prefix: str, limit: int) -> None:
        self._folder, self._aside, self._prefix = folder, aside, prefix
        self._room = limit - _HEAD
        self._items: list[Item] = []
        self._sizes: list[int] = []
        self._held = 0
        self.chunks: list[dict[str, Any]] = []

    def add(self, items: list[Item]) -> None:
        """Take the next items, and write the chunks that they fill. Raises OSError."""
        self._items += items
        sizes = [sum(map(len, item)) for item in items]
        self._sizes += sizes
        self._held += sum(sizes) + _OFFSET * len(sizes)
        while self._held > 2 * self._room:
            self._write(self._fitting(self._room))

    def finish(self) -> None:
        """Write what is left. Raises OSError."""
        while self._items:
            self._write(self._fitting(self._held if self._held <= self._room else -(-self._held // 2)))

    def _fitting(self, room: int) -> int:
        count = total = 0
        for size in self._sizes:
            total += size + _OFFSET
            if total > room:
                break
            count += 1
        return max(count, 1)

    def _write(self, count: int) -> None:
        items, self._items = self._items[:count], self._items[count:]
        sizes, self._sizes = self._sizes[:count], self._sizes[count:]
        self._held -= sum(sizes) + _OFFSET * count
        offsets = np.cumsum([_HEAD + _OFFSET * count, *sizes], dtype=np.int64)
        name = f"{self._prefix}{len(self.chunks)}.bin"
        with published(os.path.join(self._folder, name), self._aside) as file:
            file.write(_U32.pack(count))
            file.write(offsets.astype("<u4").tobytes())
            for item in items:
                file.writelines(item)
        self.chunks.append({"chunk_bytes": int(offsets[-1]), "chunk_size": count, "dim": None, "filename": name})
