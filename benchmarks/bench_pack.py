"""MB of images a second from a folder into LitData chunks: slipstream's pack beside litdata's writer.

Pack has 1, 2 and 4 threads. Three works: a folder in RAM into RAM; the same with every image stored as yuv420 with a
short side of 256, which is work for the CPU; and a folder on disk that nothing has read before, onto the disk. The peer
is litdata's BinaryWriter behind threads that read ahead, which is what pack was. Rounds are interleaved, and every set
written is compared with the folder before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import record

from slipstream.dataset import SlipstreamDataset
from slipstream.pack import pack
from slipstream.source_folder import FolderSource
from slipstream.yuv420 import encode_image

CHUNK = 16_000_000
SHORT_SIDE = 256
_BLOCK = 32


class Reencoded(FolderSource):
    """A folder whose images are given as `pack` stores them with format="yuv420", short_side=256."""

    def values(self, ids: Sequence[int] | np.ndarray, field: str) -> list[Any]:
        values = super().values(ids, field)
        if field != "image":
            return values
        return [encode_image(np.frombuffer(data, np.uint8), short_side=SHORT_SIDE) for data in values]


def slipstream_pack(source: FolderSource, dst: Path, threads: int) -> None:
    """Slipstream's, as it is."""
    pack(source, dst, chunk_bytes=CHUNK, num_workers=threads, progress=False)


def binary_writer(source: FolderSource, dst: Path, threads: int) -> None:
    """One thread that writes, and others that read ahead."""
    from litdata.streaming.writer import BinaryWriter
    from litdata.types import Text

    writer = BinaryWriter(str(dst), chunk_bytes=CHUNK)
    position = 0
    for samples in _read_ahead(source, threads):
        for sample in samples:
            writer[position] = {**sample, "path": Text(text=sample["path"])}
            position += 1
    writer.done()
    writer.merge()


def _read_ahead(source: FolderSource, threads: int) -> Iterator[list[dict[str, Any]]]:
    def read(first: int) -> list[dict[str, Any]]:
        ids = range(first, min(first + _BLOCK, len(source)))
        columns = {field: source.values(ids, field) for field in source.fields if field != "image"}
        # Of files as they are, through maps, as the folder gave their bytes then.
        mapped = type(source) is FolderSource
        images = [view.tobytes() for view in source.read(ids)] if mapped else source.values(ids, "image")
        columns = {"image": images, **columns}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Any] = deque()
        for first in range(0, len(source), _BLOCK):
            pending.append(pool.submit(read, first))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


PROVIDERS: dict[str, Callable[[FolderSource, Path, int], None]] = {
    "slipstream": slipstream_pack,
    "BinaryWriter": binary_writer,
}
PEERS = [("slipstream", 1), ("slipstream", 2), ("slipstream", 4), ("BinaryWriter", 2)]


def make_folder(photos: Path, folder: Path, count: int, *, links: bool) -> None:
    """`count` files in folders of 50: links to the photographs, or copies of them on the disk."""
    files = photographs.paths(photos)
    for number in range(count):
        path = folder / f"{number // 50:04d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = files[number % len(files)]
        path.symlink_to(photo) if links else shutil.copyfile(photo, path)
    if not links:
        os.sync()


def forget(source: FolderSource) -> None:
    """Have the system drop what it holds of the files in memory."""
    os.sync()
    for number in range(len(source)):
        descriptor = os.open(source.describe(number), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def check(source: FolderSource, dst: Path) -> None:
    """Every tenth sample is the folder's, in any order. Raises AssertionError."""
    packed = SlipstreamDataset(dst)
    assert len(packed) == len(source)
    ids = {path: number for number, path in enumerate(source.values(range(len(source)), "path"))}
    for number in range(0, len(packed), 10):
        sample = packed[number]
        sample_id = ids[sample["path"]]
        assert sample["image"] == source.values([sample_id], "image")[0]
        assert sample["label"] == source.values([sample_id], "label")[0]


def measure(works: dict[str, tuple[FolderSource, Path, bool]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by work and peer, one number for each of the interleaved rounds, after one that is checked."""
    seconds: dict[str, dict[str, list[float]]] = {work: {} for work in works}
    for turn in range(rounds + 1):
        for work, (source, home, cold) in works.items():
            for provider, workers in PEERS:
                dst = home / "packed"
                if cold:
                    forget(source)
                begin = time.perf_counter()
                PROVIDERS[provider](source, dst, workers)
                took = time.perf_counter() - begin
                if turn:
                    seconds[work].setdefault(f"{provider} x{workers}", []).append(took)
                else:
                    check(source, dst)
                shutil.rmtree(dst)
        print(f"round {turn} of {rounds}" if turn else "checked", flush=True)
    return seconds


def main() -> None:
    """Measure, print, and save where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with one folder of JPEGs for each class")
    parser.add_argument("--disk", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--images", type=int, default=5000, help="images in a folder (5000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", metavar="NAME", help="save as benchmarks/results/NAME.json")
    given = parser.parse_args()
    with (
        photographs.in_memory(given.data) as photos,
        tempfile.TemporaryDirectory(prefix="slipstream-bench-", dir=given.disk) as disk,
    ):
        result = {"benchmark": "pack", **record.circumstances()}
        make_folder(photos, photos.parent / "links", given.images, links=True)
        make_folder(photos, Path(disk) / "files", given.images, links=False)
        links, few = FolderSource(photos.parent / "links"), given.images // 5
        shutil.copytree(photos.parent / "links", photos.parent / "few", symlinks=True)
        for path in sorted((photos.parent / "few").iterdir())[few // 50 :]:
            shutil.rmtree(path)
        works = {
            "as they are, in RAM": (links, photos.parent, False),
            "yuv420, in RAM": (Reencoded(photos.parent / "few"), photos.parent, False),
            "as they are, cold disk to disk": (FolderSource(Path(disk) / "files"), Path(disk), True),
        }
        n_bytes = {
            work: sum(os.stat(source.describe(number)).st_size for number in range(len(source)))
            for work, (source, _, _) in works.items()
        }
        counts = {work: len(source) for work, (source, _, _) in works.items()}
        seconds = measure(works, given.rounds)
    samples = {
        work: {peer: [n_bytes[work] / took / 1e6 for took in values] for peer, values in peers.items()}
        for work, peers in seconds.items()
    }
    result |= {"unit": "MB/s of images read", "settings": {"images": counts, "bytes": n_bytes}, "samples": samples}
    for work, peers in samples.items():
        print(f"\n{work}: MB/s of images read, median (min - max) of {given.rounds}; images/s")
        for peer, values in peers.items():
            s = record.summary(values)
            rate = s["median"] * 1e6 / n_bytes[work] * counts[work]
            print(f"{peer:20} {s['median']:8.0f} ({s['min']:.0f} - {s['max']:.0f}) {rate:8.0f}")
    if given.out:
        print(record.write(given.out, record.RESULTS, result))


if __name__ == "__main__":
    main()
