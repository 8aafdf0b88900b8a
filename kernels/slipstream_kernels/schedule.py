"""Which launches a batch of programs takes, and which images are in each: host work on numbers, no pixels.

Every launch is for one pass (ops.split_passes) of all the crops' images that have it. An image is a number here: its
place among the images of all crops, crop by crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ops import BOX_BLUR, EQUALIZE, GAUSSIAN_BLUR, NORMALIZE, NOTHING, NUM_OPS, OP_WIDTH, STATISTICS, split_passes

READINGS, EQUALIZE_TABLES, PIXELS, BLUR = "readings", "equalize", "pixels", "blur"
BOX, BOX_LINE = "box blur", "box blur line"
WIDE_BOX = 2  # a box radius from here on, whose reach no tile holds, takes BOX_LINES launches, three across, three down
BOX_LINES = 6
# For each operation itself where it needs a reading, else NOTHING: far faster to look up than np.isin.
READING_OF = np.array([code if code in STATISTICS else NOTHING for code in range(NUM_OPS)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch: its kind, its pass, its images (their numbers, int64 [n]), and which line of a wide box it is."""

    kind: str
    number: int
    images: np.ndarray
    line: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The launches of a batch, in order.

    passes: int64 [N, P, 2], the rows (first, end) of each image's passes. reads, read_at: int64 [N, P], the pass's
    operation that needs a reading, NOTHING for none, and its row.
    """

    launches: list[Launch]
    passes: np.ndarray
    reads: np.ndarray
    read_at: np.ndarray


def join_programs(programs: Sequence[np.ndarray]) -> np.ndarray:
    """The programs of all crops, C of float32 [B, K, 16], under one another: [N, largest K, 16], shorter ones last.

    So a crop that begins with a blur shares its launch with those that do something before. Beside, what a kernel would
    take long to work out stands in columns that are free: NORMALIZE's 1 / std (7 to 9), and the weight of one byte in
    BOX_BLUR's box in units of 2**-24 (2), rounded as Pillow does.
    """
    rows = max((program.shape[1] for program in programs), default=1)
    joined = np.zeros((sum(map(len, programs)), rows, OP_WIDTH), np.float32)
    first = 0
    for program in programs:
        joined[first : first + len(program), rows - program.shape[1] :] = program
        first += len(program)
    normalize, box = joined[..., 0] == NORMALIZE, joined[..., 0] == BOX_BLUR
    joined[normalize, 7:10] = np.float32(1) / joined[normalize, 4:7]
    joined[box, 2] = np.floor(np.float32(2**24) / (joined[box, 1] * np.float32(2) + np.float32(1)))
    return joined


def plan_launches(programs: np.ndarray) -> Schedule:
    """The launches for programs float32 [N, K, 16], of all crops together."""
    passes = split_passes(programs).astype(np.int64)
    codes = programs[..., 0].astype(np.int64)
    row = np.arange(codes.shape[1])
    launches = []
    reads = np.zeros(passes.shape[:2], np.int64)
    read_at = np.zeros(passes.shape[:2], np.int64)
    statistics = READING_OF[codes]
    for number in range(passes.shape[1]):
        first, end = passes[:, number].T
        begins_with = np.take_along_axis(codes, first[:, None], 1)[:, 0]
        inside = (row >= first[:, None]) & (row < end[:, None])
        statistic = np.where(inside, statistics, NOTHING)  # one at the most
        reads[:, number] = statistic.max(1)
        read_at[:, number] = statistic.argmax(1)
        reading, equalize = reads[:, number] != NOTHING, reads[:, number] == EQUALIZE
        live = end > first
        gaussian, box = begins_with == GAUSSIAN_BLUR, begins_with == BOX_BLUR
        wide = box & (programs[np.arange(len(programs)), first, 1] >= WIDE_BOX)
        for kind, chosen in (
            (READINGS, reading & ~equalize),
            (EQUALIZE_TABLES, equalize),
            (PIXELS, live & ~gaussian & ~box),
            (BLUR, live & gaussian),
            (BOX, live & box & ~wide),
            (BOX_LINE, live & wide),
        ):
            if chosen.any():
                images = np.flatnonzero(chosen)
                lines = BOX_LINES if kind == BOX_LINE else 1
                launches += [Launch(kind=kind, number=number, images=images, line=line) for line in range(lines)]
    return Schedule(launches=launches, passes=passes, reads=reads, read_at=read_at)


def count_launches(programs: Sequence[np.ndarray]) -> list[str]:
    """The launches that run_programs makes for these programs, C of float32 [B, K, 16], in order, each by its kind.

    "readings" and "equalize" read whole images before a pass that needs it; "pixels", "blur" (Gaussian) and "box blur"
    are passes by what they begin with; a box of a radius from 2 on takes six of "box blur line". Crops and images share
    them.
    """
    return [launch.kind for launch in plan_launches(join_programs(programs)).launches]
