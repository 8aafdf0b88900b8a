"""Samples in WebDataset tar shards, as views over memory-mapped tars."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from .source import Kept, ReadError, as_ids, check_field, map_file
from .source_cache import CachedFiles, cache_root
from .source_shards import LocalShards, S3Shards, Shards, find_files, marks_of
from .source_tar_index import BLOCK, TarIndex, index_shards, split_name

EXTENSION = ".tar"
_IMAGES = ("jpg", "jpeg", "png", "webp")
_KINDS = {**dict.fromkeys(_IMAGES, "image"), "cls": "int", "txt": "str", "json": "json"}
_KEY = "key"

_Column = tuple[np.ndarray, np.ndarray]


class TarSource:
    """WebDataset's tar shards as a Source, from `open_tar`.

    Fields: `image` (jpg, jpeg, png or webp), `label` (cls: int), `key` (str), and under its extension every other
    member: kinds "str" (txt), "json" and "bytes"; of an extension with dots its last part gives the kind (`seg.png` is
    an image). If one sample has several plain images (x.jpg and x.png) all keep their extensions as names.
    `scan_seconds` is how long it took to list the shards and to scan, or to load, their index.
    """

    def __init__(self, shards: Shards, index: TarIndex, *, scan_seconds: float = 0.0) -> None:
        if not len(index.heads):
            raise ValueError(f"{shards.name}: the tars hold no sample (files named key.extension)")
        self._shards = shards
        self._ends = np.cumsum(index.counts)
        self._heads = index.heads
        self._columns = _columns(index, shards.name)
        kinds = {name: kind for name, (kind, _) in self._columns.items()}
        self.fields: Mapping[str, str] = {**kinds, _KEY: "str"}
        self._opened: Kept[int, np.ndarray] = Kept()
        self.scan_seconds = scan_seconds
        self.files: CachedFiles | None = shards if isinstance(shards, CachedFiles) else None
        if self.files is not None:
            # A map that stays would keep what it maps on the disk, whoever removes the file.
            self.files.on_release = self._opened.drop

    def __len__(self) -> int:
        return len(self._heads)

    def fingerprint(self) -> str:
        """The same for the same tars, wherever they are."""
        return repr(marks_of(self._shards.shards))

    @property
    def chunk_ends(self) -> np.ndarray:
        """Samples up to and with each shard, int64 [C]: what a windowed order needs."""
        return self._ends

    def read(self, ids: Sequence[int] | np.ndarray, field: str = "image") -> list[np.ndarray]:
        """Give the members' bytes as read-only uint8 views [n_bytes]; see Source.read. Missing shards are fetched."""
        check_field(field, self.fields)
        if field == _KEY:
            raise ValueError(f"field {_KEY!r} has no bytes of its own; values() gives it")
        _, (bodies, sizes) = self._columns[field]

        def view(data: np.ndarray, sample_id: int) -> np.ndarray:
            start, size = BLOCK * int(bodies[sample_id]), int(sizes[sample_id])
            if not start:
                raise ValueError(f"it has no {field!r} member")
            if size:
                # The pages are read here, in the background, and not under whoever decodes.
                _ = data[start], data[start + size - 1]
            return data[start : start + size]

        return self._each(as_ids(ids, len(self)), view)

    def values(self, ids: Sequence[int] | np.ndarray, field: str) -> list[Any]:
        """Give labels as ints, txt and keys as str, JSON as it says, the rest as bytes; see Source.values."""
        check_field(field, self.fields)
        checked = as_ids(ids, len(self))
        if field == _KEY:
            return self._each(checked, self._key)
        decode = _DECODERS.get(self.fields[field], np.ndarray.tobytes)
        values, failures = [], []
        for sample_id, data in zip(checked.tolist(), self.read(checked, field), strict=True):
            try:
                values.append(decode(data))
            except (ValueError, RecursionError) as error:
                failures.append((sample_id, self.describe(sample_id), f"field {field!r}: {error}"))
        if failures:
            raise ReadError(failures)
        return values

    def prefetch(self, ids: Sequence[int] | np.ndarray, *, progress: bool = True) -> None:
        """Fetch the shards of `ids` that are not on this machine, several at once, with a bar where they are many.

        Returns when they are there. Raises OSError or ValueError if one cannot be fetched or has changed.
        """
        numbers = np.unique(np.searchsorted(self._ends, as_ids(ids, len(self)), side="right"))
        self._shards.prefetch(numbers.tolist(), progress=progress)

    def _each(self, ids: np.ndarray, use: Callable[[np.ndarray, int], Any]) -> list[Any]:
        """Give use(shard, sample_id) for each id; ReadError for those whose shard or use raises."""
        numbers = np.searchsorted(self._ends, ids, side="right").tolist()
        opened = self._open_all(list(dict.fromkeys(numbers)))
        values, failures = [], []
        for sample_id, number in zip(ids.tolist(), numbers, strict=True):
            data = opened[number]
            if isinstance(data, Exception):
                failures.append((sample_id, self._place(number, sample_id), str(data)))
                continue
            try:
                values.append(use(data, sample_id))
            except ValueError as error:
                failures.append((sample_id, self.describe(sample_id), str(error)))
        if failures:
            raise ReadError(failures)
        return values

    def _open_all(self, numbers: list[int]) -> dict[int, np.ndarray | OSError | ValueError]:
        limited = self.files is not None and self.files.limit is not None
        with self._shards.held([number for number in numbers if limited or number not in self._opened]):
            return dict(zip(numbers, self._opened.get(numbers, self._open), strict=True))

    def _open(self, number: int) -> np.ndarray:
        data = self._shards.open(number, map_file)
        if len(data) != self._shards.shards[number].n_bytes:
            raise ValueError(f"{self._shards.place(number)} has changed since the set was opened: open it again")
        return data

    def _key(self, data: np.ndarray, sample_id: int) -> str:
        start = BLOCK * int(self._heads[sample_id])
        header = data[start : start + BLOCK].tobytes()
        if header[156:157] in (tarfile.REGTYPE, tarfile.AREGTYPE):
            # What tarfile makes of an ordinary header, in a tenth of its time.
            prefix, name = _text(header[345:500]), _text(header[:100])
            name = f"{prefix}/{name}" if prefix else name
        else:
            bodies = [int(column[sample_id]) for _, (column, _) in self._columns.values()]
            headers = data[start : BLOCK * min(body for body in bodies if body)].tobytes()
            with tarfile.open(fileobj=BytesIO(headers), mode="r:", encoding="utf-8") as tar:
                member = tar.next()
            assert member is not None
            name = member.name
        key, _ = split_name(name) or (name, "")
        return key

    def _place(self, number: int, sample_id: int) -> str:
        begin = int(self._ends[number - 1]) if number else 0
        return f"{self._shards.place(number)} sample {sample_id - begin}"

    def describe(self, sample_id: int) -> str:
        """Name the sample's shard and its key, or its number there while the shard is elsewhere; never raises."""
        if not 0 <= sample_id < len(self):
            return f"no sample {sample_id} in {self._shards.name}"
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        # A message is no reason to fetch a shard, nor to fail.
        with contextlib.suppress(Exception):
            if self._shards.is_ready(number):
                data = self._open_all([number])[number]
                if not isinstance(data, Exception):
                    return f"{self._shards.place(number)} key {self._key(data, sample_id)!r}"
        return self._place(number, sample_id)

    def close(self) -> None:
        """Forget the maps and connections; see Source.close."""
        self._opened.close()
        self._shards.close()

    def __repr__(self) -> str:
        return f"TarSource({self._shards.name!r}, {len(self)} samples, fields={list(self.fields)})"


_DECODERS: dict[str, Callable[[np.ndarray], Any]] = {
    "int": lambda data: int(data.tobytes()),
    "str": lambda data: data.tobytes().decode(),
    "json": lambda data: json.loads(data.tobytes()),
}


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _columns(index: TarIndex, place: str) -> dict[str, tuple[str, _Column]]:
    """Name the index's columns: (kind, (bodies, sizes)) for each field, plain images as one where they can be."""
    plain = [extension for extension in index.bodies if extension in _IMAGES]
    together = sum((index.bodies[extension] != 0).astype(np.uint8) for extension in plain)
    one_image = bool(plain) and int(np.max(together)) == 1
    columns: dict[str, tuple[str, _Column]] = {}
    if one_image:
        # Where a sample has no such member both numbers are 0, so the greatest is that of the one it has.
        bodies, sizes = (
            np.maximum.reduce([of[extension] for extension in plain]) for of in (index.bodies, index.sizes)
        )
        columns["image"] = "image", (bodies, sizes)
    for extension in index.bodies:
        if one_image and extension in plain:
            continue
        name = "label" if extension == "cls" else extension
        if name in columns or name == _KEY:
            raise ValueError(f"{place}: members .{extension} would be a second field {name!r}; rename them")
        kind = _KINDS.get(extension.rpartition(".")[2], "bytes")
        columns[name] = kind, (index.bodies[extension], index.sizes[extension])
    return columns


def open_tar(
    place: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    max_cache_size: int | str | None = None,
) -> TarSource:
    """Open WebDataset shards: a folder, a .tar, a glob or a brace list, on this machine or under s3://.

    Local tars are read in place; those in S3 are fetched whole into `cache_dir` (default:
    `source_cache.default_cache_dir`) when they are first needed, which making the index is. The index is kept there
    too, so that only shards that are new or changed are scanned. `max_cache_size`: as of SlipstreamDataset. Raises
    FileNotFoundError, OSError or ValueError, naming the shard, for tars that are not there, compressed, cut off or
    damaged, or that hold a key twice.
    """
    begin = time.monotonic()
    place = os.fspath(place)
    if place.startswith("s3://"):
        shards: Shards = S3Shards(
            place, EXTENSION, cache_dir=cache_dir, storage_options=storage_options, max_cache_size=max_cache_size
        )
    elif "://" in place:
        raise ValueError(f"{place.split('://')[0]}:// is not supported; allowed are s3:// and this machine's files")
    else:
        shards = LocalShards(os.path.abspath(os.path.expanduser(place)), find_files(place, EXTENSION))
    index = index_shards(shards, os.path.join(cache_root(cache_dir), "tar-index"))
    return TarSource(shards, index, scan_seconds=time.monotonic() - begin)
