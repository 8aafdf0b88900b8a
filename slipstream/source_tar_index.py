"""Where each sample of WebDataset tar shards lies: found by one scan of the tars' headers, and kept in the cache.

Bodies in a tar begin at multiples of 512, so four bytes hold an offset of up to 2 TiB and a sample takes eight bytes a
field and four for its key, which stays in the tar.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tarfile
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .daemon import in_threads
from .progress import Bar
from .source_locks import only_one, sweep
from .source_shards import Shards

BLOCK = tarfile.BLOCKSIZE
_LAYOUT = b"slipstream tar index 1"
_MAX_FIELDS = 64
# WebDataset's rule: the key ends at the first dot of the file name; a name with nothing before or after it has none.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_BAR_FROM = 4
_REST_BYTES = 1 << 20
# gzip, bzip2, xz, zstd.
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TarIndex:
    """The samples of some shards in their order.

    counts: samples of each shard, int64 [S]. bodies: for each extension where its member's bytes begin in the shard,
    uint32 [n] in blocks of 512, 0 where a sample has none; sizes: their number, uint32 [n]. heads: where the first
    header of a sample begins, uint32 [n] in blocks.
    """

    counts: np.ndarray
    bodies: Mapping[str, np.ndarray]
    sizes: Mapping[str, np.ndarray]
    heads: np.ndarray

    def save(self, path: str) -> None:
        """Write it aside and rename it; without pickle. Raises OSError."""
        part = f"{path}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            with open(part, "xb") as file:
                np.savez(
                    file,
                    counts=self.counts,
                    heads=self.heads,
                    extensions=np.array(list(self.bodies), np.str_),
                    bodies=_stacked(self.bodies, len(self.heads)),
                    sizes=_stacked(self.sizes, len(self.heads)),
                )
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)


def _stacked(columns: Mapping[str, np.ndarray], length: int) -> np.ndarray:
    return np.stack(list(columns.values())) if columns else np.empty((0, length), np.uint32)


def _load(path: str) -> TarIndex | None:
    """Read an index; None if there is none, or one that is damaged, which is then made again."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            extensions = arrays["extensions"].tolist()
            counts, heads, bodies, sizes = (arrays[name] for name in ("counts", "heads", "bodies", "sizes"))
        if counts.sum() != len(heads) or not bodies.shape == sizes.shape == (len(extensions), len(heads)):
            raise ValueError("its arrays do not fit together")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever it is: zip files say that they are encrypted, or packed in unknown ways
        _log.warning("the index %s is damaged (%s) and is made again", path, error)
        return None
    return TarIndex(
        counts=counts,
        bodies=dict(zip(extensions, bodies, strict=True)),
        sizes=dict(zip(extensions, sizes, strict=True)),
        heads=heads,
    )


def index_shards(shards: Shards, folder: str) -> TarIndex:
    """Give the index of `shards`, kept in `folder`; shards that are new or changed there are scanned, with a bar.

    Raises OSError or ValueError, naming the shard, for one that cannot be read or is no whole tar.
    """
    marks = [_mark((shard.name, str(shard.n_bytes), shard.stamp)) for shard in shards.shards]
    whole = os.path.join(folder, _mark((shards.name, *marks)) + ".npz")
    sweep(folder)
    with contextlib.ExitStack() as stack:
        keeps = True
        try:
            stack.enter_context(only_one(whole))
        except OSError as error:
            _log.warning("the index of %s cannot be kept, so each start scans the shards: %s", shards.name, error)
            keeps = False
        index = _load(whole)
        if index is not None:
            return index

        def of_shard(number: int) -> TarIndex:
            # Kept for each shard too: an interrupted scan goes on, and a changed shard is scanned alone.
            path = os.path.join(folder, marks[number] + ".npz")
            found = _load(path)
            if found is None:
                place = shards.place(number)
                found = shards.open(number, lambda path: scan(path, place))
                if keeps:
                    with only_one(path):  # or who opens another set, and sweeps, takes it for a killed process's
                        found.save(path)
            return found

        found = []
        shown = len(marks) >= _BAR_FROM
        with Bar(total=len(marks), unit=" shards", desc="indexing", leave=False, disable=not shown) as bar:
            for one in in_threads(of_shard, range(len(marks))):
                found.append(one)
                bar.update(1)
        index = _joined(found)
        if keeps:
            index.save(whole)
        return index


def _mark(parts: Sequence[str]) -> str:
    text = "\0".join(parts).encode(errors="surrogateescape")
    return hashlib.blake2b(_LAYOUT + b"\0" + text, digest_size=16).hexdigest()


def _joined(indexes: list[TarIndex]) -> TarIndex:
    extensions = list(dict.fromkeys(extension for index in indexes for extension in index.bodies))

    def column(of: Callable[[TarIndex], Mapping[str, np.ndarray]], extension: str) -> np.ndarray:
        return np.concatenate(
            [of(index).get(extension, np.zeros(len(index.heads), np.uint32)) for index in indexes], dtype=np.uint32
        )

    return TarIndex(
        counts=np.concatenate([index.counts for index in indexes]),
        bodies={extension: column(lambda index: index.bodies, extension) for extension in extensions},
        sizes={extension: column(lambda index: index.sizes, extension) for extension in extensions},
        heads=np.concatenate([index.heads for index in indexes]),
    )


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and its extension, in lower case; None for one that WebDataset leaves out."""
    matched = _KEY.fullmatch(name)
    return matched and (matched[1], matched[2].lower())


def scan(path: str, place: str) -> TarIndex:
    """Read a tar's headers, and none of its bodies; `place` names it in errors.

    Raises ValueError for a tar that is cut off or damaged, compressed, holds links or sparse members, or has one key or
    one member of a sample twice.
    """
    columns: dict[str, int] = {}
    # One entry a member: its extension's number, its sample's, where it begins, its size.
    extensions, samples, bodies, sizes = array("B"), array("I"), array("I"), array("I")
    heads = array("I")
    keys: set[str] = set()
    last, of_last = None, set()
    with open(path, "rb") as file, _opened(file, place) as tar:
        n_bytes = os.fstat(file.fileno()).st_size
        while (member := _next(tar, n_bytes, place)) is not None:
            names = split_name(member.name)
            if member.isdir() or names is None:
                continue
            _check(member, place)
            key, extension = names
            if key != last:
                if key in keys:
                    raise ValueError(
                        f"{place}: key {key!r} at offset {member.offset} was met before: a sample's members must lie "
                        "side by side, and no two samples may have one key (tar --sort=name)"
                    )
                keys.add(key)
                last, of_last = key, set()
                heads.append(member.offset // BLOCK)
            if extension in of_last:
                raise ValueError(f"{place}: key {key!r} has two members {extension!r}")
            of_last.add(extension)
            extensions.append(columns.setdefault(extension, len(columns)))
            if len(columns) > _MAX_FIELDS:
                raise ValueError(
                    f"{place}: more than {_MAX_FIELDS} fields, such as {extension!r} of {member.name!r}: "
                    "a file name's first dot must end the sample's key"
                )
            samples.append(len(heads) - 1)
            bodies.append(member.offset_data // BLOCK)
            sizes.append(member.size)
        _check_end(file, tar.offset, place)
    return _dense(columns, (extensions, samples, bodies, sizes), heads)


def _opened(file: BinaryIO, place: str) -> tarfile.TarFile:
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(_PACKED):
        raise ValueError(f"{place} is a compressed tar under the name of a plain one: unpack it")
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
    except Exception as error:
        raise ValueError(f"{place} is no tar: {error} at offset 0") from None


def _next(tar: tarfile.TarFile, n_bytes: int, place: str) -> tarfile.TarInfo | None:
    begin = tar.offset
    try:
        member = tar.next()
    # Whatever it is: hostile headers make tarfile raise more than its own errors.
    except Exception as error:
        raise ValueError(f"{place} is damaged or cut off at offset {begin}: {error}") from None
    if member is None:
        return None
    # Otherwise tarfile keeps them all.
    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
    if member.offset_data + member.size > n_bytes:
        raise ValueError(
            f"{place} is cut off: {member.name!r} at offset {member.offset} has {member.size} bytes, "
            f"the shard ends at {n_bytes}"
        )
    # A negative size would lead back, and round for ever.
    if member.size < 0 or tar.offset < member.offset_data:
        raise ValueError(f"{place} is damaged at offset {member.offset}: {member.name!r} has {member.size} bytes")
    return member


def _check(member: tarfile.TarInfo, place: str) -> None:
    what = f"{place}: {member.name!r} at offset {member.offset}"
    if not member.isreg():
        raise ValueError(f"{what} is a link or a device; only files can be read (tar --dereference --hard-dereference)")
    if member.issparse():
        raise ValueError(f"{what} is sparse; write the tar without --sparse")
    if member.size >= 2**32 or member.offset_data // BLOCK >= 2**32:
        raise ValueError(f"{what} is too large: at most 4 GiB a member and 2 TiB a shard")


def _check_end(file: BinaryIO, offset: int, place: str) -> None:
    """Check that zeros and nothing else follow the last member: tarfile takes a broken header for the end."""
    file.seek(offset)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise ValueError(f"{place} is cut off at offset {offset}: the zeros that end a tar are missing")
    if any(mark):
        raise ValueError(f"{place} is damaged at offset {offset}: there is no valid header")
    while rest := file.read(_REST_BYTES):
        if rest.count(0) != len(rest):
            raise ValueError(f"{place} goes on after its end at offset {offset}: tars joined to one cannot be read")


def _dense(columns: dict[str, int], members: tuple[array, array, array, array], heads: array) -> TarIndex:
    numbers, samples, bodies, sizes = map(np.asarray, members)

    def column(values: np.ndarray, number: int) -> np.ndarray:
        filled = np.zeros(len(heads), np.uint32)
        chosen = numbers == number
        filled[samples[chosen]] = values[chosen]
        return filled

    return TarIndex(
        counts=np.array([len(heads)], np.int64),
        bodies={extension: column(bodies, number) for extension, number in columns.items()},
        sizes={extension: column(sizes, number) for extension, number in columns.items()},
        heads=np.array(heads, np.uint32),
    )
