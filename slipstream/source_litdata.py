"""Samples in LitData chunks, as views over memory-mapped chunk files.

A chunk is u32 count, u32 offsets [count + 1] into the file, then the items; an item is a u32 size per leaf, then the
leaves.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .header import is_image
from .source import Kept, ProcessLock, ReadError, as_ids, check_field, map_file
from .source_cache import CachedFiles
from .source_chunks import ChunkStore, LocalOrigin, Origin, offsets_fault
from .source_fields import PickleRefusedError, declared_kind, decoder_of
from .source_index import Index
from .source_s3 import S3Origin

_PAIR = struct.Struct("<II")
# Samples that tell whether a field of bytes holds images.
_LOOKED_AT = 4

# A chunk's map, as an array to slice and as a buffer to unpack numbers from.
_Opened = tuple[np.ndarray, memoryview]


class _Kinds(Mapping[str, str]):
    """Field name -> kind; one that only the bytes can tell is looked up in the first samples when it is asked for."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._kinds = {name: declared_kind(data_format) for name, data_format in store.index.leaves}
        self._lock = ProcessLock()

    def __getitem__(self, field: str) -> str:
        kind = self._kinds[field]
        if kind is not None:
            return kind
        with self._lock:
            if self._kinds[field] is None:
                self._look()
        return str(self._kinds[field])

    def _look(self) -> None:
        leaves = self._store.index.leaves
        header = 4 * len(leaves)
        formats = {name: data_format for name, data_format in leaves if self._kinds[name] is None}
        left = set(formats)
        # More than one, as the image of one may be damaged; of those, few are read where there is no image at all.
        for number in range(min(_LOOKED_AT, self._store.index.chunks[0].samples)):
            item = self._store.early_item(number)
            if len(item) < header:
                raise _too_short(self._store.place(0), number)
            ends = np.cumsum(np.frombuffer(item, "<u4", len(leaves)), dtype=np.int64) + header
            for (name, _), start, stop in zip(leaves, [header, *ends[:-1]], ends, strict=True):
                if name in left and is_image(item[start:stop]):
                    left.remove(name)
            if not left:
                break
        others = {name: "pil" if data_format == "pil" else "bytes" for name, data_format in formats.items()}
        self._kinds |= {name: others[name] if name in left else "image" for name in formats}

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def __repr__(self) -> str:
        return repr({name: kind or "not yet looked at" for name, kind in self._kinds.items()})


def _too_short(place: str, number: int = 0) -> ValueError:
    return ValueError(
        f"chunk {place} cannot be read: its item {number} is too short for the fields that the index names"
    )


class LitDataSource:
    """A LitData set as a Source, from `open_litdata`.

    Pickled fields are read only as far as they hold plain values, unless `allow_pickle`. A pickled or forked copy opens
    its own maps.
    """

    def __init__(self, store: ChunkStore, *, allow_pickle: bool = False) -> None:
        self._store = store
        self._allow_pickle = allow_pickle
        self._leaf_of = {name: number for number, (name, _) in enumerate(self._index.leaves)}
        self._ends = np.cumsum([chunk.samples for chunk in self._index.chunks], dtype=np.int64)
        self._begins = np.concatenate(([0], self._ends[:-1]))
        self._opened: Kept[int, _Opened] = Kept()
        # A map that stays would keep what it maps on the disk, whoever removes the file.
        store.on_release = self._opened.drop
        self.fields: Mapping[str, str] = _Kinds(store)
        if store.is_ready(0):
            self._open(0)
            dict(self.fields)

    @property
    def _index(self) -> Index:
        return self._store.index

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, ids: Sequence[int] | np.ndarray, field: str = "image") -> list[np.ndarray]:
        """Give the field's bytes as read-only uint8 views [n_bytes]; see Source.read. Missing chunks are fetched."""
        check_field(field, self._leaf_of)
        leaf = self._leaf_of[field]
        header = 4 * len(self._index.leaves)
        sizes_of = struct.Struct(f"<{len(self._index.leaves)}I").unpack_from
        views: list[Any] = [None] * len(ids)
        failures: list[tuple[int, str, str]] = []
        for chunk, opened, positions, numbers in self._by_chunk(as_ids(ids, len(self))):
            if isinstance(opened, Exception):
                failures += [self._failure(chunk, number, str(opened)) for number in numbers]
                continue
            data, buffer = opened
            n_bytes = len(buffer)
            for position, number in zip(positions, numbers, strict=True):
                start, stop = _PAIR.unpack_from(buffer, 4 + 4 * number)
                if start + header > stop or stop > n_bytes:
                    failures.append(self._failure(chunk, number, f"its item [{start}, {stop}) is no part of the chunk"))
                    continue
                sizes = sizes_of(buffer, start)
                size = sizes[leaf]
                first = start + header + sum(sizes[:leaf])
                last = first + size
                if last > stop:
                    failures.append(self._failure(chunk, number, f"{field!r} goes beyond its item by {last - stop}"))
                    continue
                # Else an offset or a size that is damaged gives a part of the sample, or of another.
                if header + sum(sizes) != stop - start:
                    reason = f"its fields have {sum(sizes)} bytes, the item has {stop - start - header} for them"
                    failures.append(self._failure(chunk, number, reason))
                    continue
                if size:
                    # The pages are read here, in the background, and not under whoever decodes.
                    _ = buffer[first], buffer[last - 1]
                views[position] = data[first:last]
        if failures:
            raise ReadError(failures)
        return views

    def values(self, ids: Sequence[int] | np.ndarray, field: str) -> list[Any]:
        """Give the field as Python values; see Source.values. Raises PickleRefusedError for other pickles."""
        views = self.read(ids, field)
        decode = decoder_of(self._index.leaves[self._leaf_of[field]][1], field=field, allow_pickle=self._allow_pickle)
        values = []
        for sample_id, view in zip(ids, views, strict=True):
            try:
                values.append(decode(view))
            except PickleRefusedError:
                raise
            except Exception as error:
                chunk = int(np.searchsorted(self._ends, sample_id, side="right"))
                number = int(sample_id - self._begins[chunk])
                raise ReadError([self._failure(chunk, number, f"field {field!r}: {error}")]) from error
        return values

    def prefetch(self, ids: Sequence[int] | np.ndarray, *, progress: bool = True) -> None:
        """Fetch the chunks of `ids` that are not on this machine, several at once, with a bar where they are many.

        Returns when they are there. Raises OSError or ValueError if one cannot be fetched or is too short.
        """
        chunks = np.unique(np.searchsorted(self._ends, as_ids(ids, len(self)), side="right"))
        self._store.prefetch(chunks.tolist(), progress=progress)

    def _by_chunk(self, ids: np.ndarray) -> Iterator[tuple[int, _Opened | Exception, list[int], list[int]]]:
        """Group ids: (chunk, the chunk or why it cannot be read, positions in `ids`, the samples' numbers in it)."""
        if not len(ids):
            return
        chunks = np.searchsorted(self._ends, ids, side="right")
        order = np.argsort(chunks, kind="stable")
        chunks = chunks[order]
        numbers = (ids[order] - self._begins[chunks]).tolist()
        positions = order.tolist()
        edges = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(ids)]
        groups = chunks[edges[:-1]].tolist()
        limited = self._store.limit is not None
        with self._store.held([chunk for chunk in groups if limited or chunk not in self._opened]):
            opened = self._opened.get(groups, self._open)
        for chunk, one, a, b in zip(groups, opened, edges[:-1], edges[1:], strict=True):
            yield chunk, one, positions[a:b], numbers[a:b]

    def _open(self, chunk: int) -> _Opened:
        data = self._store.open(chunk, map_file)
        if self._store.folder is None:
            self._store.check_unchanged(chunk)
        samples, place = self._index.chunks[chunk].samples, self._store.place(chunk)
        if len(data) < 4 * (samples + 2):
            raise ValueError(f"chunk {place} has {len(data)} bytes: too short for {samples} samples")
        count, first, second = struct.unpack_from("<III", data.data)
        if count != samples:
            raise ValueError(f"chunk {place} holds {count} samples, its index says {samples}")
        if second < first + 4 * len(self._leaf_of):
            raise _too_short(place)
        fault = offsets_fault(data[4 : 4 * (samples + 2)].view("<u4"))
        if fault is not None:
            raise ValueError(f"chunk {place} {fault}")
        return data, data.data

    def _failure(self, chunk: int, number: int, reason: str) -> tuple[int, str, str]:
        return int(self._begins[chunk]) + number, self._place(chunk, number), reason

    def _place(self, chunk: int, number: int) -> str:
        return f"{self._store.place(chunk)} item {number}"

    def describe(self, sample_id: int) -> str:
        """Name the sample's chunk, its number there, and its `path` field if it has one; never raises."""
        if not 0 <= sample_id < len(self):
            return f"no sample {sample_id} in {self._store.origin.name}"
        chunk = int(np.searchsorted(self._ends, sample_id, side="right"))
        place = self._place(chunk, sample_id - int(self._begins[chunk]))
        # A message is no reason to fetch a chunk, nor to fail.
        with contextlib.suppress(Exception):
            if self._store.is_ready(chunk):
                place += f", path {self.values([sample_id], 'path')[0]!r}"
        return place

    @property
    def files(self) -> CachedFiles | None:
        """The chunks as files that are fetched; None where they are read in place."""
        return self._store if self._store.folder is not None else None

    @property
    def formats(self) -> Mapping[str, str]:
        """Each field's format by litdata's name: what `read` gives the bytes of."""
        return dict(self._index.leaves)

    @property
    def spec(self) -> str | None:
        """The tree that a sample's fields make, as litdata writes it; None where the index has none."""
        return self._index.spec

    @property
    def chunk_ends(self) -> np.ndarray:
        """Samples up to and with each chunk, int64 [C]: what a windowed order needs."""
        return self._ends

    def fingerprint(self) -> str:
        """The same for the same chunks, wherever they are."""
        return repr([(chunk.name, chunk.samples, chunk.n_bytes) for chunk in self._index.chunks])

    def close(self) -> None:
        """Forget the maps and connections; see Source.close."""
        self._opened.close()
        self._store.close()

    def __repr__(self) -> str:
        return f"LitDataSource({self._store.origin.name!r}, {len(self)} samples, fields={list(self.fields)})"


def open_litdata(
    place: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    in_place: bool = False,
    max_cache_size: int | str | None = None,
) -> LitDataSource:
    """Open a LitData set in a folder or under an s3:// URL.

    Chunks are kept in `cache_dir` (default: `source_cache.default_cache_dir`), except where `in_place` reads a local
    folder's own files; compressed ones are always unpacked into the cache. `max_cache_size`: as of SlipstreamDataset.
    Raises FileNotFoundError, OSError or ValueError if the set or its index is not there, not LitData's, encrypted, or
    shorter than it says.
    """
    place = os.fspath(place)
    if place.startswith("s3://"):
        origin: Origin = S3Origin(place, storage_options)
        in_place = False
    elif "://" in place:
        raise ValueError(f"{place.split('://')[0]}:// is not supported; allowed are s3:// and folders of this machine")
    else:
        origin = LocalOrigin(place)
    store = ChunkStore(origin, cache_dir=cache_dir, in_place=in_place, max_cache_size=max_cache_size)
    return LitDataSource(store, allow_pickle=allow_pickle)
