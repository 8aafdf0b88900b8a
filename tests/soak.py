"""Run the loader for long and watch it: memory, threads, descriptors and maps must stay as they are (`make soak`).

Two parts, on small images that the script makes itself, some of them damaged: epochs in both shuffled orders through
crops and a chain of stages, and loaders made and ended in every way. Fails if resident memory grows by more than 2 %
between the first tenth of a part and its end, or if anything is left when a loader is gone. Memory is read twice at
each point, after gc.collect(): as it is ("RSS"), and after malloc_trim(0) ("trimmed"), for what the allocator keeps
comes and goes by 2 % itself; so medians are compared, of what lies between 10 and 30 % and of the last fifth.
`--device cuda` watches the GPU's memory too; `--minutes 10` runs for a time instead of a number of samples.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import io
import itertools
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from litdata_samples import plain, write
from PIL import Image

from slipstream import (
    ColorJitter,
    GaussianBlur,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    RandomHorizontalFlip,
    SlipstreamDataset,
    SlipstreamLoader,
)

BATCH = 256
GROWTH = 0.02
SLACK = 8  # threads, descriptors or maps that a library may still open by itself, once
# Every so many samples one is bad: text, cut off in its header (which DALI must not meet), or in its pixels (which
# fails DALI's batch: then each of its images is decoded alone).
TEXT, NO_HEADER, NO_PIXELS = 1999, 4999, 20011
MB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Census:
    """What the process holds. Bytes, but for the counts; the gpu's are 0 without one."""

    part: str
    done: float  # share of the part
    samples: int
    seconds: float
    resident: int
    trimmed: int
    anonymous: int
    threads: int
    ours: int
    descriptors: int
    maps: int
    sockets: int
    gpu_allocated: int
    gpu_used: int


def census(part: str, done: float, samples: int, begin: float) -> Census:
    """Count what the process holds now, after a collection."""
    gc.collect()
    allocated = used = 0
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        allocated, used = torch.cuda.memory_allocated(), total - free
    resident, _ = _memory()
    ctypes.CDLL(None).malloc_trim(0)
    trimmed, anonymous = _memory()
    open_files = [_target(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return Census(
        part=part,
        done=done,
        samples=samples,
        seconds=time.monotonic() - begin,
        resident=resident,
        trimmed=trimmed,
        anonymous=anonymous,
        threads=len(os.listdir("/proc/self/task")),
        ours=len(ours()),
        descriptors=len(open_files),
        maps=len(Path("/proc/self/maps").read_text().splitlines()),
        sockets=sum(target.startswith("socket:") for target in open_files),
        gpu_allocated=allocated,
        gpu_used=used,
    )


def ours() -> list[str]:
    """The names of Slipstream's threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("slipstream")]


def _memory() -> tuple[int, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmRSS"].split()[0]), 1024 * int(status["RssAnon"].split()[0])


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # the descriptor of the listing itself
        return ""


def complaints(points: list[Census], growth: float = GROWTH) -> list[str]:
    """What grew in a part after its first tenth, in words: nothing, if all is well."""
    rest = [point for point in points if point.done >= 0.1]
    first, found = rest[0], []
    early = [point for point in rest if point.done <= 0.3] or rest[:1]
    late = [point for point in rest if point.done >= 0.8]
    for name in ("resident", "trimmed", "gpu_used"):
        before, after = (median(getattr(point, name) for point in points) for points in (early, late))
        if after > before * (1 + growth):
            found.append(f"{first.part}: {name} grew from {before / MB:.1f} to {after / MB:.1f} MiB")
    for name in ("threads", "descriptors", "sockets", "maps"):
        before, after = getattr(first, name), rest[-1]
        slack = 10 * SLACK if name == "maps" else SLACK  # the allocator maps and joins its own memory as it likes
        if getattr(after, name) > before + slack:
            found.append(f"{first.part}: {name} grew from {before} to {getattr(after, name)}")
    # An epoch's last batch may still be read when its end is counted: what its bad samples' stand-ins take.
    if rest[-1].gpu_allocated > first.gpu_allocated + MB:
        found.append(f"{first.part}: gpu_allocated grew from {first.gpu_allocated} to {rest[-1].gpu_allocated} bytes")
    return found


def leftovers(before: Census, after: Census) -> list[str]:
    """What a part left behind when its loaders were gone, in words."""
    found = []
    if after.ours:
        found.append(f"{after.part}: threads are left: {ours()}")
    for name in ("threads", "descriptors", "sockets"):
        if getattr(after, name) > getattr(before, name) + SLACK:
            found.append(f"{after.part}: {name} were {getattr(before, name)} before and are {getattr(after, name)}")
    if after.gpu_allocated > before.gpu_allocated:
        found.append(f"{after.part}: torch still holds {after.gpu_allocated} bytes on the GPU")
    return found


def make_set(folder: Path, count: int) -> Path:
    """LitData chunks of `count` JPEGs of 32 to 64 pixels with labels, a few of them damaged."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        height, width = rng.integers(32, 65, 2)
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        stream = io.BytesIO()
        Image.fromarray(pixels[:height, :width]).save(stream, "JPEG")
        data = stream.getvalue()
        if number % TEXT == 7:
            data = b"no image at all"
        elif number % NO_HEADER == 77:
            data = data[: data.index(b"\xff\xda")]
        elif number % NO_PIXELS == 177:
            data = data[:-100]
        samples.append({"image": data, "label": number % 1000, "path": f"{number}.jpg"})
    return write(folder, plain(samples), chunk_size=250)


def loader_of(folder: Path, shuffle: bool | str, device: str) -> SlipstreamLoader:
    pipeline = [
        MultiRandomResizedCrop({"a": dict(size=32), "b": dict(size=16, scale=(0.05, 0.4), interpolation="bicubic")}),
        MultiCropPipeline(
            {
                "a": [RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1), GaussianBlur(3), Normalize()],
                "b": [RandomHorizontalFlip()],
            }
        ),
    ]
    return SlipstreamLoader(
        SlipstreamDataset(local_dir=folder),
        BATCH,
        shuffle=shuffle,
        pipelines={"image": pipeline},
        on_error="replace",
        device=device,
        verbose=False,
    )


class Goal:
    """A number of samples, or of seconds: how far a part has come."""

    def __init__(self, samples: int, seconds: float | None) -> None:
        self.samples, self.seconds, self.begin = samples, seconds, time.monotonic()

    def share(self, samples: int) -> float:
        passed = samples / self.samples if self.seconds is None else (time.monotonic() - self.begin) / self.seconds
        return min(passed, 1.0)


def epochs(folder: Path, shuffle: bool | str, device: str, goal: Goal) -> Iterator[Census]:
    """Epoch after epoch of one loader; a census at each end, the last one when the goal is reached."""
    part, samples, replaced = f"shuffle={shuffle}", 0, 0
    with loader_of(folder, shuffle, device) as loader:
        while goal.share(samples) < 1:
            for batch in loader:
                samples += len(batch["_indices"])
                replaced += int((~batch["_valid"]).sum())
            del batch
            yield census(part, goal.share(samples), samples, goal.begin)
        report = loader.report()
        if not (report.replaced == replaced and replaced >= len(report.bad) > 0):
            raise AssertionError(f"{part}: {replaced} samples came as not valid, the report has {report}")


def _finished(loader: SlipstreamLoader) -> None:
    for _ in loader:
        pass
    loader.shutdown()


def _shut_down(loader: SlipstreamLoader) -> None:
    next(iter(loader))
    loader.shutdown()


def _finished_and_dropped(loader: SlipstreamLoader) -> None:
    for _ in loader:
        pass


def _dropped(loader: SlipstreamLoader) -> None:
    next(iter(loader))


def _dropped_in_a_cycle(loader: SlipstreamLoader) -> None:
    cycle: list[object] = [loader, iter(loader)]
    cycle.append(cycle)


def _never_used(loader: SlipstreamLoader) -> None:
    pass


ENDINGS: tuple[Callable[[SlipstreamLoader], None], ...] = (
    _finished,
    _shut_down,
    _finished_and_dropped,
    _dropped,
    _dropped_in_a_cycle,
    _never_used,
)


def _settle() -> None:
    # What the collector ends on a thread of ours is ended by another one, a moment later.
    gc.collect()
    limit = time.monotonic() + 10
    while ours() and time.monotonic() < limit:
        time.sleep(0.01)


def loaders(folder: Path, count: int, device: str, goal: Goal) -> Iterator[Census]:
    """Loaders made and ended in turn by each of ENDINGS; a census after each round of them."""
    for number, end in zip(itertools.count(1), itertools.cycle(ENDINGS)):
        end(loader_of(folder, True, device))
        share = number / count if goal.seconds is None else goal.share(0)
        if number % len(ENDINGS) == 0 or share >= 1:
            _settle()
            yield census("loaders", min(share, 1.0), number, goal.begin)
        if share >= 1:
            return


_COLUMNS = {
    "RSS MiB": lambda point: f"{point.resident / MB:9.1f}",
    "trimmed": lambda point: f"{point.trimmed / MB:9.1f}",
    "anonymous": lambda point: f"{point.anonymous / MB:9.1f}",
    "threads": lambda point: f"{point.threads:9}",
    "of ours": lambda point: f"{point.ours:9}",
    "fds": lambda point: f"{point.descriptors:9}",
    "sockets": lambda point: f"{point.sockets:9}",
    "maps": lambda point: f"{point.maps:9}",
    "torch gpu": lambda point: f"{point.gpu_allocated / MB:9.1f}",
    "gpu used": lambda point: f"{point.gpu_used / MB:9.1f}",
}
HEAD = " ".join([f"{'part':16} {'done':>5} {'samples':>10} {'seconds':>8}", *(f"{name:>9}" for name in _COLUMNS)])


def _row(point: Census) -> str:
    head = f"{point.part:16} {point.done:5.0%} {point.samples:>10,} {point.seconds:8.0f}"
    return " ".join([head, *(column(point) for column in _COLUMNS.values())])


def watch(points: Iterator[Census], growth: float) -> tuple[list[Census], list[str]]:
    """Print a part's points, some twenty of them; gives all, and what went wrong."""
    taken, shown = [], -1.0
    for point in points:
        taken.append(point)
        if point.done >= min(shown + 0.05, 1.0):
            shown = point.done
            print(_row(point), flush=True)
    return taken, complaints(taken, growth)


def _hush() -> None:
    # Each bad sample is a line, of ours and of DALI's own, which knows no other way than the descriptor.
    logging.getLogger("slipstream").setLevel(logging.ERROR)
    sys.stderr = os.fdopen(os.dup(2), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    faulthandler.enable(sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="in both orders together (default: a million)")
    parser.add_argument("--loaders", type=int, default=200, help="made and ended (default: 200)")
    parser.add_argument("--minutes", type=float, help="in place of numbers: how long, a third for each part")
    parser.add_argument("--growth", type=float, default=GROWTH, help="of memory that is no failure (default: 0.02)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    _hush()
    growth = arguments.growth
    seconds = None if arguments.minutes is None else 60 * arguments.minutes / 3

    wrong: list[str] = []
    figures: list[Census] = []
    with tempfile.TemporaryDirectory(prefix="slipstream-soak-") as folder:
        # An epoch is a twentieth of a part at most, so that the first tenth has touched every page of the chunks.
        whole = make_set(Path(folder) / "set", max(min(arguments.samples // 40, 50_000), 500))
        few = make_set(Path(folder) / "few", 1000)
        print(HEAD)
        for end in ENDINGS:
            end(loader_of(few, True, arguments.device))  # what a process makes once
        _settle()
        for shuffle in (True, "windowed"):
            before = census("before", 0.0, 0, time.monotonic())
            points, found = watch(
                epochs(whole, shuffle, arguments.device, Goal(arguments.samples // 2, seconds)), growth
            )
            after = census(f"shuffle={shuffle}", 1.0, points[-1].samples, time.monotonic() - points[-1].seconds)
            figures += [*points, after]
            wrong += found + leftovers(before, after)
        before = census("before", 0.0, 0, time.monotonic())
        points, found = watch(loaders(few, arguments.loaders, arguments.device, Goal(0, seconds)), growth)
        figures += points
        wrong += found + leftovers(before, points[-1])
    for line in wrong:
        print(f"FAILED {line}")
    if arguments.json:
        record = {
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if arguments.device != "cpu" else None,
            "failed": wrong,
            "points": [asdict(point) for point in figures],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if not wrong:
        print("nothing grew, nothing is left")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
