"""From any source to LitData chunks: in parallel, on one machine or many, and on from where it was interrupted.

The samples are cut into blocks of about a chunk, each packed by one thread of one rank. How many there are follows from
the source and the arguments alone, so the files do too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import checks
from .daemon import in_threads
from .dataset import SlipstreamDataset
from .device import usable_cores
from .pack_chunks import ChunkCutter
from .pack_fields import Failure, Layout
from .pack_folder import Block, PackFolder, chunk_prefix
from .pack_format import image_encoder
from .progress import Bar
from .shares import choose_ranks, slurm_ranks
from .source import ReadError, Source
from .state import dataset_mark

_MAX_THREADS = 8
# Samples read at once: few, so that a stop or a bad sample costs little.
_READ = 64
# Where a source's mean sample size is looked for: so many runs of so many samples.
_PLACES, _RUN = 16, 16
# Of a chunk, that a block is to fill on average: a block of larger samples than most then still makes one chunk.
_FILL = 0.9
_MAX_BLOCK = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """What `pack` did, and what `folder` holds.

    whole: the folder is a finished LitData set. samples, chunks, n_bytes: what it holds of all ranks. packed,
    packed_bytes: samples that this call packed, and their bytes in chunks; seconds: how long it took. skipped: (id in
    the source, path, reason) of every sample left out of what it holds. rank, world_size: which share of the blocks
    this was; blocks_left: how many are not done, of all ranks.
    """

    folder: str
    whole: bool
    samples: int
    chunks: int
    n_bytes: int
    packed: int
    packed_bytes: int
    seconds: float
    skipped: tuple[Failure, ...]
    rank: int
    world_size: int
    blocks_left: int


def pack(
    src: Source | SlipstreamDataset | str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    chunk_bytes: int | str = "64MB",
    num_workers: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    format: str = "same",
    short_side: int | None = None,
    apply_exif: bool = False,
    field: str | None = None,
    exclude_fields: Sequence[str] = (),
    on_error: str = "raise",
    progress: bool = True,
) -> Packed:
    """Write the samples of `src` as LitData chunks into the folder `dst`, or go on with what is there of them.

    src: whatever SlipstreamDataset takes, or one (with its storage_options or indices). A set in LitData's format keeps
    its leaves as they are; other sources keep their fields: images and bytes as they are, numbers, bools, text, arrays
    and JSON, which a column of a table with missing values becomes. `exclude_fields` leaves fields out. chunk_bytes:
    the size of a chunk file, which only a single larger sample exceeds.

    format: how the images of `field` (default: the only image field) are stored: "same", as they are, or "yuv420",
    decoded, as planes that crops are cut from (yuv420.py); short_side: resized to it by Pillow's Lanczos filter, where
    they are larger; apply_exif: turned as their EXIF orientation says, which such images do not keep. An image of more
    than the dataset's max_pixels is a bad sample.

    The files depend on nothing but `src` and these arguments. `dst` is empty or new, or holds what an interrupted call
    with the same source and arguments left: finished blocks are kept. It has an index.json, and so is a set, only once
    it is whole. rank, world_size: which share of the blocks to pack into the same `dst`; None is torch.distributed's or
    torchrun's, else that of a Slurm array or of srun's tasks, else everything. Ranks need not run at once: the one that
    packs the last block writes the index. num_workers: threads (default: one a core, at most 8), each of which holds up
    to two chunks in memory; of samples of a few KB one process packs as many whatever its threads, and several
    ranks on a machine more.

    on_error: a sample that cannot be read or stored ends it ("raise", a ReadError that names it), or is left out
    ("skip") and listed in the result and in dst/skipped.json; the ids after it then are not those of `src`.

    Raises FileExistsError for a `dst` that holds anything else, saying what differs; ValueError or TypeError for
    arguments and for fields that cannot be stored; OSError and ReadError for files; UnavailableError, also under
    "skip", where the store of `src` does not answer or its cache folder cannot be written: the same call then goes on.
    """
    begin = time.perf_counter()
    skips = checks.one_of("on_error", on_error, ("raise", "skip")) == "skip"
    if num_workers is None:
        num_workers = min(_MAX_THREADS, usable_cores())
    num_workers = checks.whole("num_workers", num_workers, 1)
    # Offsets within a chunk are 32-bit; half of that leaves room for the item that crosses the mark.
    limit = checks.byte_count("chunk_bytes", chunk_bytes, most="2GB")
    found = choose_ranks(rank, world_size)
    if rank is None and found == (0, 1):
        found = slurm_ranks() or found
    folder = PackFolder(dst)
    _check_apart(src, folder.path)
    dataset = src if isinstance(src, SlipstreamDataset) else SlipstreamDataset(src)
    try:
        max_pixels = dataset.max_pixels
        encode = image_encoder(format, short_side=short_side, apply_exif=apply_exif, max_pixels=max_pixels)
        layout = Layout(dataset, encode=encode, field=field, exclude_fields=exclude_fields)
        settings = {
            "samples": len(layout),
            "source": dataset_mark(dataset),
            "fields": [[leaf.field, leaf.data_format] for leaf in layout.leaves],
            "chunk_bytes": limit,
            "format": format,
            "short_side": short_side,
            "apply_exif": apply_exif or None,
            "max_pixels": None if encode is None else max_pixels,
            "field": field,
        }
        folder.begin(settings, lambda: _count_blocks(layout, limit, skips=skips, num_workers=num_workers))
        work = _Work(folder=folder, layout=layout, limit=limit, skips=skips, begin=begin)
        try:
            work.pack_share(*found, num_workers=num_workers, progress=progress)
        except FileNotFoundError:
            # Another call with the same blocks may have finished the set, and removed what it is made in.
            if not folder.is_whole():
                raise
        return work.result(*found)
    finally:
        if dataset is not src and dataset.source is not src:
            dataset.source.close()


class _Work:
    """One call's share: the blocks that it packs, and what became of them."""

    def __init__(self, *, folder: PackFolder, layout: Layout, limit: int, skips: bool, begin: float) -> None:
        self._folder = folder
        self._layout = layout
        self._limit = limit
        self._skips = skips
        self._begin = begin
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._packed = self._packed_bytes = 0

    def pack_share(self, rank: int, world_size: int, *, num_workers: int, progress: bool) -> None:
        if self._folder.is_whole():
            return
        count = self._folder.blocks
        share = range(rank * count // world_size, (rank + 1) * count // world_size)
        left = [number for number in share if not self._is_done(self._folder.block(number))]
        total = sum(map(len, map(self._positions, share)))
        done = total - sum(map(len, map(self._positions, left)))
        name = f"rank {rank} of {world_size}" if world_size > 1 else None
        with Bar(total=total, initial=done, unit="sample", desc=name, disable=not progress) as bar:
            self._pack_all(left, num_workers, bar)

    def _is_done(self, block: Block | None) -> bool:
        # One that left samples out is packed again by a call that does not, and so names them.
        return block is not None and (self._skips or not block.skipped)

    def _pack_all(self, blocks: list[int], num_workers: int, bar: Any) -> None:
        waiting = iter(blocks)
        threads = min(num_workers, len(blocks))
        try:
            # Threads: files are read and written, and images decoded and resized, without Python's lock.
            for _ in in_threads(lambda _: self._pack_some(waiting, bar), range(threads), threads):
                pass
        finally:
            self._stop.set()

    def _pack_some(self, waiting: Iterator[int], bar: Any) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    number = next(waiting, None)
                if number is None:
                    return
                self._pack_block(number, bar)
        except BaseException:
            self._stop.set()
            raise

    def _pack_block(self, number: int, bar: Any) -> None:
        folder = self._folder
        cutter = ChunkCutter(folder.path, folder.work, chunk_prefix(number), self._limit)
        skipped: list[Failure] = []
        positions = self._positions(number)
        for first in range(0, len(positions), _READ):
            if self._stop.is_set():
                return
            some = positions[first : first + _READ]
            items, failures = self._layout.items(some)
            if failures and not self._skips:
                raise ReadError(failures)
            skipped += failures
            cutter.add(items)
            with self._lock:
                bar.update(len(some))
        cutter.finish()
        folder.put(number, Block(chunks=tuple(cutter.chunks), skipped=tuple(skipped)))
        with self._lock:
            self._packed += sum(chunk["chunk_size"] for chunk in cutter.chunks)
            self._packed_bytes += sum(chunk["chunk_bytes"] for chunk in cutter.chunks)

    def _positions(self, block: int) -> range:
        length, count = len(self._layout), self._folder.blocks
        return range(block * length // count, (block + 1) * length // count)

    def result(self, rank: int, world_size: int) -> Packed:
        config = {
            "chunk_bytes": self._limit,
            "chunk_size": None,
            "compression": None,
            "data_format": [leaf.data_format for leaf in self._layout.leaves],
            "data_spec": self._layout.spec,
            "encryption": None,
            "item_loader": "PyTreeLoader",
        }
        whole = self._folder.finish(config)
        chunks, skipped, left = self._folder.contents()
        return Packed(
            folder=self._folder.path,
            whole=whole,
            samples=sum(chunk["chunk_size"] for chunk in chunks),
            chunks=len(chunks),
            n_bytes=sum(chunk["chunk_bytes"] for chunk in chunks),
            packed=self._packed,
            packed_bytes=self._packed_bytes,
            seconds=time.perf_counter() - self._begin,
            skipped=tuple(skipped),
            rank=rank,
            world_size=world_size,
            blocks_left=left,
        )


def _count_blocks(layout: Layout, limit: int, *, skips: bool, num_workers: int) -> int:
    """How many blocks to cut a dataset into, by the mean size of some samples from all over it."""
    length = len(layout)
    firsts = [place * length // _PLACES for place in range(_PLACES)]
    runs = [range(first, min(first + _RUN, stop)) for first, stop in zip(firsts, [*firsts[1:], length], strict=True)]
    sizes, failures = [], []
    for items, failed in in_threads(layout.items, runs, num_workers):
        sizes += [sum(map(len, item)) for item in items]
        failures += failed
    if failures and not (skips and sizes):
        # Where all fail it is not the samples, but a field that cannot be stored.
        raise ReadError(failures[:_RUN])
    samples = int(_FILL * limit * len(sizes) / sum(sizes))
    return -(-length // min(max(samples, 1), _MAX_BLOCK))


def _check_apart(src: Any, folder: str) -> None:
    """Refuse to pack a folder into itself: what is written would become part of what is read."""
    if isinstance(src, (str, os.PathLike)) and os.path.isdir(os.path.expanduser(src)):
        outer = os.path.realpath(os.path.expanduser(src))
        if os.path.commonpath([outer, os.path.realpath(folder)]) == outer:
            raise ValueError(f"dst {folder!r} must not lie in src {os.fspath(src)!r}")
