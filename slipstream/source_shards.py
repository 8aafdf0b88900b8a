"""The files of a set that is spread over shards: found by folder, glob or brace list, here or under an s3:// prefix.

A shard in S3 is fetched whole when it is first needed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .source_cache import CachedFiles, made_again
from .source_s3 import S3Origin

T = TypeVar("T")

_PACKED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst|lz4|Z))$", re.IGNORECASE)
_RANGE = re.compile(r"(\d+)\.\.(\d+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file: where it is, its size, and a stamp that is another once it was written anew (its mtime or ETag)."""

    name: str
    n_bytes: int
    stamp: str


class Shards(Protocol):
    """A set's shards in their order. `name` says where they are, without credentials."""

    name: str
    shards: tuple[Shard, ...]

    def path(self, number: int) -> str:
        """The shard's file on this machine, fetched first if need be. Raises OSError, ValueError if it changed."""
        ...

    def open(self, number: int, use: Callable[[str], T]) -> T:
        """use(path), again if the file has gone before it was opened. Raises as `path` and `use` do."""
        ...

    def place(self, number: int) -> str:
        """Where the shard comes from, for people."""
        ...

    def is_ready(self, number: int) -> bool:
        """Tell whether the shard can be mapped without a fetch."""
        ...

    def held(self, numbers: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Keep shards on this machine for the while, fetched if need be; what cannot be fetched is met by `open`."""
        ...

    def prefetch(self, numbers: Sequence[int], *, progress: bool) -> None:
        """Fetch those that are not on this machine, several at once; a bar where they are many."""
        ...

    def close(self) -> None: ...


def marks_of(shards: Iterable[Shard]) -> list[tuple[str, int]]:
    """Each shard's name below the folder that all are in, and its size: the same wherever the set lies."""
    found = [(shard.name, shard.n_bytes) for shard in shards]
    folder = os.path.commonpath([os.path.dirname(name) for name, _ in found])
    return [(name.removeprefix(folder).lstrip("/"), n_bytes) for name, n_bytes in found]


class LocalShards:
    """Files of this machine, as `find_files` gives them."""

    def __init__(self, name: str, paths: Sequence[str]) -> None:
        self.name = name
        self.shards = tuple(_local_shard(path) for path in paths)

    def path(self, number: int) -> str:
        shard = self.shards[number]
        if _local_shard(shard.name) != shard:
            raise ValueError(f"{shard.name} has changed since the set was opened: open it again")
        return shard.name

    def open(self, number: int, use: Callable[[str], T]) -> T:
        return use(self.path(number))

    def place(self, number: int) -> str:
        return self.shards[number].name

    def is_ready(self, number: int) -> bool:
        return True

    def held(self, numbers: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prefetch(self, numbers: Sequence[int], *, progress: bool) -> None:
        pass

    def close(self) -> None:
        pass


def _local_shard(path: str) -> Shard:
    status = os.stat(path)
    return Shard(name=path, n_bytes=status.st_size, stamp=str(status.st_mtime_ns))


class S3Shards(CachedFiles):
    """The objects under an s3:// URL whose names end in `extension`, kept in the cache folder once fetched.

    The URL is a prefix, an object, or a glob or brace list in its last part. Raises FileNotFoundError where nothing
    matches, OSError if the store cannot be read, ValueError for compressed shards.
    """

    noun = "shards"

    def __init__(
        self,
        url: str,
        extension: str,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        max_cache_size: int | str | None = None,
    ) -> None:
        self.name = url
        folder, _, last = url.rpartition("/")
        patterns = expand_braces(last) if is_pattern(last) or last.endswith(extension) else None
        self._origin = _Bucket(url if patterns is None else folder, storage_options)  # refuses credentials unseen
        if is_pattern(folder):
            raise ValueError(f"{url}: a pattern may stand after the last '/' only")
        self.shards = _matching(self._origin.list(), patterns, extension, url)
        home = hashlib.blake2b("\0".join((self._origin.name, self._origin.identity())).encode(), digest_size=16)
        sizes = [shard.n_bytes for shard in self.shards]
        super().__init__(home.hexdigest(), sizes, cache_dir=cache_dir, max_cache_size=max_cache_size)

    def _target(self, number: int) -> str:
        assert self.folder is not None
        shard = self.shards[number]
        mark = hashlib.blake2b(f"{shard.n_bytes}\0{shard.stamp}".encode(), digest_size=4).hexdigest()
        return os.path.join(self.folder, f"{mark}-{shard.name}")

    def place(self, number: int) -> str:
        return self._origin.name + self.shards[number].name

    def _find(self, number: int) -> str | None:
        path = self._target(number)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size == self.shards[number].n_bytes:
                return path
        return None

    def _make(self, number: int, part: str, on_bytes: Callable[[int], object] | None) -> tuple[str, str]:
        shard = self.shards[number]

        def fetch() -> None:
            self._origin.fetch(shard.name, part, on_bytes)
            size = os.stat(part).st_size
            if size != shard.n_bytes:
                raise ValueError(f"{self.place(number)} gave {size} bytes of {shard.n_bytes}")

        made_again(fetch, part)
        # Written anew between the listing and now, it may be a mixture of two.
        if self._origin.stamp(shard.name) != shard.stamp:
            raise ValueError(f"{self.place(number)} has changed since the set was opened: open it again")
        return part, self._target(number)

    def close(self) -> None:
        super().close()
        self._origin.close()


class _Bucket(S3Origin):
    """An S3Origin that can list the objects right below its prefix."""

    def list(self) -> list[Shard]:
        def ask() -> list[Shard]:
            pages = self._connect().get_paginator("list_objects_v2")
            return [
                Shard(name=item["Key"][len(self._prefix) :], n_bytes=item["Size"], stamp=item["ETag"])
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix, Delimiter="/")
                for item in page.get("Contents", ())
            ]

        return self._persistently("", ask)

    def stamp(self, name: str) -> str:
        return self._persistently(
            name, lambda: self._connect().head_object(Bucket=self._bucket, Key=self._prefix + name)["ETag"]
        )


def _matching(found: list[Shard], patterns: list[str] | None, extension: str, place: str) -> tuple[Shard, ...]:
    # As in a shell, hidden files are no part of it (nor, here, the empty name that marks a folder).
    by_name = {shard.name: shard for shard in found if shard.name and shard.name[0] != "."}
    names: list[str] = []
    for pattern in patterns or ["*" + extension]:
        matched = [pattern] if pattern in by_name else sorted(fnmatch.filter(by_name, pattern))
        if not matched:
            refuse_packed(by_name, place)
            raise FileNotFoundError(f"{place}: there is no {pattern}")
        names += matched
    if patterns is None:
        refuse_packed(by_name, place)
    _check_names(names, extension, place)
    return tuple(by_name[name] for name in dict.fromkeys(names))


def find_files(place: str, extension: str) -> list[str]:
    """Give the files of this machine that `place` names and that end in `extension`, as absolute paths.

    place: a folder (its files by name; those in folders below it are not part of the set), a file, a glob, or a brace
    list such as train-{0000..0146}.tar, in the order written. Raises FileNotFoundError where nothing matches,
    ValueError for other files and for compressed tars.
    """
    whole = os.path.abspath(os.path.expanduser(place))
    if os.path.isdir(whole):
        # Hidden files are left out, as a glob does it.
        names = sorted(entry.name for entry in os.scandir(whole) if entry.is_file() and entry.name[0] != ".")
        refuse_packed(names, whole)
        paths = [os.path.join(whole, name) for name in names if name.endswith(extension)]
        if not paths:
            raise FileNotFoundError(f"{whole} holds no {extension} file")
        return paths
    patterns = [whole] if os.path.exists(whole) else expand_braces(whole)
    paths = []
    for pattern in patterns:
        matched = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matched:
            raise FileNotFoundError(f"{place}: there is no {pattern}")
        paths += matched
    refuse_packed(paths, place)
    _check_names(paths, extension, place)
    return list(dict.fromkeys(paths))


def _check_names(names: Iterable[str], extension: str, place: str) -> None:
    for name in names:
        if not name.endswith(extension):
            raise ValueError(f"{place} takes in {name}, which is no {extension} file")


def refuse_packed(names: Iterable[str], place: str) -> None:
    """Raise ValueError, naming the first, if there is a compressed tar among `names`."""
    packed = next((name for name in names if _PACKED.search(name)), None)
    if packed is not None:
        raise ValueError(
            f"{place}: {packed} is a compressed tar, where a sample is reached only by unpacking all before it; "
            "unpack it to a plain .tar (JPEGs hardly shrink)"
        )


def is_pattern(text: str) -> bool:
    """Tell whether a path holds a glob or a brace list."""
    return any(letter in text for letter in "*?[{")


def expand_braces(text: str) -> list[str]:
    """Write out {a,b} and {000..146} as a shell does, nested too; a brace that is neither stays as it is."""
    for start in (found.start() for found in re.finditer(r"\{", text)):
        depth, commas, stop = 0, [start], None
        for position in range(start, len(text)):
            letter = text[position]
            depth += (letter == "{") - (letter == "}")
            if letter == "," and depth == 1:
                commas.append(position)
            if depth == 0:
                stop = position
                break
        if stop is None:
            continue
        before, inside, after = text[:start], text[start + 1 : stop], expand_braces(text[stop + 1 :])
        numbers = _RANGE.match(inside)
        if numbers:
            first, last = numbers.groups()
            width = len(first) if first[0] == "0" else 0
            step = 1 if int(first) <= int(last) else -1
            options = [f"{value:0{width}}" for value in range(int(first), int(last) + step, step)]
        elif len(commas) > 1:
            edges = [*commas, stop]
            options = [option for a, b in itertools.pairwise(edges) for option in expand_braces(text[a + 1 : b])]
        else:
            continue
        return [before + option + rest for option in options for rest in after]
    return [text]
