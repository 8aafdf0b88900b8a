"""Mutated chunks, indexes and tars: what is read is what was written there, or its sample is named; nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from fuzz_mutations import mutate, mutate_in_place
from litdata_samples import photos, plain
from litdata_samples import write as write_chunks
from tar_samples import sample
from tar_samples import write as write_tar

from slipstream import source_cache
from slipstream.source import ReadError
from slipstream.source_fields import PickleRefusedError
from slipstream.source_litdata import LitDataSource, open_litdata
from slipstream.source_tar import TarSource, open_tar

COUNT = 11


def ids_of(source: LitDataSource | TarSource) -> list[int]:
    """All of them, unless a damaged index speaks of millions."""
    return [*range(min(len(source), 40)), *range(max(40, len(source) - 2), len(source))]


def each(source: LitDataSource | TarSource, field: str) -> dict[int, bytes | None]:
    """The bytes of each sample, None for one that is refused by name; alone as together with all others."""
    ids = ids_of(source)
    alone = {number: _read(source, [number], field) for number in ids}
    bad = {number for number in ids if alone[number] is None}
    good = [number for number in ids if number not in bad]
    together = _read(source, good, field)
    assert together == [(alone[number] or [])[0] for number in good], "read together, samples are others than alone"
    if bad:
        assert _read(source, ids, field) is None
    for number in ids:
        assert source.describe(number)
    return {number: found and found[0] for number, found in alone.items()}


def _read(source: LitDataSource | TarSource, ids: list[int], field: str) -> list[bytes] | None:
    failures = ()
    try:
        return [view.tobytes() for view in source.read(ids, field)]
    except ReadError as error:
        failures = error.failures
    assert failures, "a ReadError that names nobody"
    for number, path, reason in failures:
        assert number in ids and path and reason, failures
    return None


def opened(open_one: Callable[[], Any], name: str) -> Any:
    """The source, None where opening refuses it by a message that has this name."""
    try:
        return open_one()
    except (ValueError, OSError) as error:
        refusal = error
    assert name in str(refusal), f"refused without saying which file: {refusal!r}"
    return None


def values_are_bounded(source: LitDataSource | TarSource) -> None:
    """Values of every field are read, or their samples named."""
    for field in list(source.fields):
        for ids in (ids_of(source), [len(source) - 1]):
            with contextlib.suppress(ReadError, PickleRefusedError):
                source.values(ids, field)


class Chunks:
    """One chunk file of a LitData set, damaged; the other one and the index are whole."""

    compression: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = plain(photos(COUNT))
        self.set = write_chunks(folder / "set", self.samples, chunk_size=6)
        self.names = sorted(path.name for path in self.set.glob("chunk*"))
        self.files = {name: (self.set / name).read_bytes() for name in self.names}
        # Where each sample's image lies.
        self.places: list[tuple[str, int, int]] = []
        for name in self.names:
            data = self.files[name]
            (count,) = struct.unpack_from("<I", data)
            for start in struct.unpack_from(f"<{count}I", data, 4):
                (size,) = struct.unpack_from("<I", data, start)
                first = start + 4 * len(self.samples[0])
                self.places.append((name, first, first + size))
        assert [self.files[name][a:b] for name, a, b in self.places] == [each["image"] for each in self.samples]
        self.turn = itertools.count()

    def check(self, rng: np.random.Generator) -> int:
        torn = self.names[int(rng.integers(len(self.names)))]
        whole = self.files[torn]
        in_place = rng.random() < 0.7
        if in_place:
            data = mutate_in_place(whole, rng, head=4 * (len(self.samples) + 2) + 40)
        else:
            data = mutate(whole, rng, head=100, others=list(self.files.values()))
        self.read({**self.files, torn: data}, torn, in_place)
        return 1

    def read(self, files: dict[str, bytes], torn: str, in_place: bool) -> None:
        folder = self.folder / str(next(self.turn))  # a map of the one before may still be held
        folder.mkdir(parents=True)
        try:
            shutil.copy(self.set / "index.json", folder)
            for name, data in files.items():
                (folder / name).write_bytes(data)
            source = opened(lambda: open_litdata(folder, in_place=True), torn)
            if source is None:
                return
            for number, got in each(source, "image").items():
                name, first, last = self.places[number]
                if name != torn:
                    assert got == self.samples[number]["image"], f"sample {number} of another chunk changed"
                elif got is not None:
                    # Damaged or not, it is what lies where it lay; where bytes were added or lost, of its own size.
                    here = files[name][first:last] if in_place else got
                    assert got == here, f"sample {number} is {len(got)} bytes from another place"
                    assert in_place or got not in self.others(number), f"sample {number} is another's"
            values_are_bounded(source)
            source.close()
        finally:
            shutil.rmtree(folder)

    def others(self, number: int) -> list[bytes]:
        return [each["image"] for i, each in enumerate(self.samples) if i != number]


class PackedChunks:
    """One zstd-compressed chunk, damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = plain(photos(COUNT))
        self.set = write_chunks(folder / "set", self.samples, chunk_size=COUNT)
        index = json.loads((self.set / "index.json").read_text())
        index["config"]["compression"] = "zstd"
        self.index = json.dumps(index)
        (path,) = self.set.glob("chunk*")
        self.name = path.name
        source_cache._FIRST_WAIT = 0.0  # between tries of a file that came whole and yet does not fit
        self.packed = zstandard.ZstdCompressor(write_checksum=True).compress(path.read_bytes())
        self.turn = itertools.count()

    def check(self, rng: np.random.Generator) -> int:
        folder = self.folder / str(next(self.turn))
        folder.mkdir(parents=True)
        try:
            (folder / "index.json").write_text(self.index)
            (folder / self.name).write_bytes(mutate(self.packed, rng, head=20))
            source = opened(lambda: open_litdata(folder, in_place=True, cache_dir=folder / "cache"), self.name)
            if source is None:
                return 1
            for number, data in each(source, "image").items():
                assert data is None or data == self.samples[number]["image"], f"sample {number} changed"
            left = [path.name for path in (folder / "cache").rglob("*") if path.is_file() and path.suffix == ".part"]
            assert not left, f"half a file stays in the cache: {left}"
            source.close()
        finally:
            shutil.rmtree(folder)
        return 1


class Indexes(Chunks):
    """The index.json of a LitData set, damaged as text or as JSON; its chunks are whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.text = (self.set / "index.json").read_bytes()

    def check(self, rng: np.random.Generator) -> int:
        if rng.random() < 0.5:
            text = mutate(self.text, rng)
        else:
            index = json.loads(self.text)
            for _ in range(int(rng.integers(1, 4))):
                _change(index, rng)
            text = json.dumps(index).encode()
        folder = self.folder / str(next(self.turn))
        folder.mkdir(parents=True)
        try:
            (folder / "index.json").write_bytes(text)
            for name, data in self.files.items():
                (folder / name).write_bytes(data)
            source = opened(lambda: open_litdata(folder, in_place=True, cache_dir=folder / "cache"), str(folder))
            if source is None:
                return 1
            self.compare(source)
            source.close()
        finally:
            shutil.rmtree(folder)
        return 1

    def compare(self, source: LitDataSource) -> None:
        # It may name fields or chunks otherwise, or fewer of them; no sample may come twice, nor one that is none.
        names = list(source.fields)
        values_are_bounded(source)
        whole = [sample["image"] for sample in self.samples]
        for field in names:
            images = [data for data in each(source, field).values() if data in whole]
            assert len(set(images)) == len(images), f"{field!r}: one image under two ids"


def _change(node: Any, rng: np.random.Generator) -> None:
    # One value somewhere in it.
    while True:
        keys: Sequence[Any] = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        child = node[key]
        if isinstance(child, (dict, list)) and child and rng.random() < 0.85:
            node = child
            continue
        odd = [None, True, -1, 0, 1, 2**31, 2**63, 1e300, "", "..", "../x", "a/b", "\0", [], {}, [[]], "x" * 300]
        what = rng.random()
        if what < 0.2:
            del node[key]
        elif what < 0.3 and isinstance(node, list):
            node.append(child)
        elif what < 0.5 and isinstance(child, int) and not isinstance(child, bool):
            node[key] = child + int(rng.integers(-3, 4))
        else:
            node[key] = odd[int(rng.integers(len(odd)))]
        return


class Tars:
    """One tar of two, damaged; half the time with a checksum that fits its header."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        formats = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
        self.tars = []
        for kind in formats:
            path = write_tar(folder / f"seed-{kind}.tar", [m for n in range(4) for m in sample(n)], tar_format=kind)
            self.tars.append(path.read_bytes())
        long = [("d/" * 80 + name, data) for name, data in sample(9)]  # headers before the header
        self.tars += [
            write_tar(folder / f"long-{kind}.tar", long, tar_format=kind).read_bytes() for kind in formats[1:]
        ]
        self.other = write_tar(folder / "other.tar", [m for n in range(20, 23) for m in sample(n)]).read_bytes()
        self.images = {f"train/{n:05d}": dict(sample(n))[f"train/{n:05d}.jpg"] for n in range(40)}
        self.turn = itertools.count()

    def check(self, rng: np.random.Generator) -> int:
        whole = self.tars[int(rng.integers(len(self.tars)))]
        fits = rng.random() < 0.4
        data = mutate_in_place(whole, rng, head=512) if fits else mutate(whole, rng, head=600, others=self.tars)
        if fits:
            block = bytearray(data[:512])
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            data = bytes(block) + data[512:]
        folder = self.folder / str(next(self.turn))
        folder.mkdir()
        try:
            (folder / "a.tar").write_bytes(data)
            (folder / "b.tar").write_bytes(self.other)
            source = opened(lambda: open_tar(folder, cache_dir=folder / "cache"), str(folder))
            if source is None:
                return 1
            self.compare(source, None if fits else data)
            source.close()
        finally:
            shutil.rmtree(folder)
        return 1

    def compare(self, source: TarSource, data: bytes | None) -> None:
        values_are_bounded(source)
        assert len(source) >= 3
        assert source.values(range(len(source) - 3, len(source)), "key") == [f"train/{n:05d}" for n in (20, 21, 22)]
        if "image" not in source.fields:
            return
        got = each(source, "image")
        for number, n in zip(range(len(source) - 3, len(source)), (20, 21, 22), strict=True):
            assert got[number] == self.images[f"train/{n:05d}"], f"sample {number} of the whole tar changed"
        if data is None:  # its names and sizes are what the header says
            return
        keys = [source.values([number], "key")[0] for number in range(len(source))]
        for key, image in zip(keys, got.values(), strict=True):
            if image is None or key not in self.images:
                continue
            others = [each for name, each in self.images.items() if name != key]
            assert image not in others, f"{key} is another's"
            assert image in data or key >= "train/00020", f"{key} is nowhere in the tar"


class TarIndexes:
    """The cached index of a tar, damaged: it is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tar = write_tar(folder / "set" / "a.tar", [m for n in range(5) for m in sample(n)])
        self.images = [dict(sample(n))[f"train/{n:05d}.jpg"] for n in range(5)]
        self.cache = folder / "cache"
        open_tar(self.tar.parent, cache_dir=self.cache).close()
        self.files = {path: path.read_bytes() for path in sorted(self.cache.rglob("*.npz"))}
        assert len(self.files) == 2

    def check(self, rng: np.random.Generator) -> int:
        for path, data in self.files.items():
            path.write_bytes(mutate(data, rng, head=100))
        source = open_tar(self.tar.parent, cache_dir=self.cache)
        assert [view.tobytes() for view in source.read(range(5))] == self.images
        source.close()
        return 1
