"""The numbers that travel to the device with a batch's programs: where every pass of every image reads and writes.

They are laid out before there is any memory: a place is a region's number and an offset in bytes in it, and becomes an
address when the launches are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import schedule
from .ops import DTYPES, STATISTICS
from .schedule import Launch, Schedule
from .task_rows import BETWEEN_LAYOUT, CROP_COLUMNS, INPUT_LAYOUT, OUTPUT_LAYOUT

# A place: its region's number from this bit on, its offset in bytes below. The regions are the C inputs, the C outputs,
# and the planes between passes, the lines of boxes, and the readings, in this order.
REGION_BIT = 48
PLACE_COLUMNS = (0, 2, 7)  # of a task


def place(region: int | np.ndarray, offset: int | np.ndarray) -> np.ndarray:
    """Places in a region: int64."""
    return (np.asarray(region, np.int64) << REGION_BIT) + offset


def addresses_of(places: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The places' addresses, where each region begins at `regions`: int64 [R]."""
    return regions[places >> REGION_BIT] + (places & ((1 << REGION_BIT) - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Where each pass of each image reads and writes, and where its reading lies, as places: int64 [N, P] each.

    source_layouts, target_layouts: in the image's crop row. lines: int64 [N, 2], what is between the lines of a box;
    the first is also where a Gaussian blur's sums across lie.
    sizes: float32 values of the last three regions.
    """

    sources: np.ndarray
    source_layouts: np.ndarray
    targets: np.ndarray
    target_layouts: np.ndarray
    readings: np.ndarray
    lines: np.ndarray
    sizes: tuple[int, int, int]


def lay_out(
    images: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    crop_of: np.ndarray,
    plan: Schedule,
    reach: np.ndarray,
    *,
    block: int,
    strip: int,
) -> Memory:
    """Places for a schedule: an image's first pass reads its input, its last writes its output, and what is between
    lies in float32 planes. crop_of: int64 [N], each image's crop. reach: int64 [N], how many rows its Gaussian blurs
    reach up and down. block: pixels of one reading's program. strip: columns of a Gaussian blur's."""
    image_of = np.arange(len(crop_of)) - np.searchsorted(crop_of, crop_of)
    height, width = np.array([image.shape[2:] for image in images], np.int64).reshape(-1, 2)[crop_of].T
    pixels = height * width

    def places(tensors: Sequence[torch.Tensor], first: int) -> np.ndarray:
        step = np.array([tensor.stride(0) * tensor.element_size() for tensor in tensors], np.int64)
        return place(first + crop_of, step[crop_of] * image_of)[:, None]

    live = plan.passes[..., 1] > plan.passes[..., 0]
    before = live.cumsum(1) - live  # how many passes of the image come before
    total = live.sum(1, keepdims=True)
    # two planes take turns: an image of two passes needs one, of more both
    planes = pixels * 3 * np.minimum(total[:, 0] - 1, 2)
    between, line, reading = 2 * len(images), 2 * len(images) + 1, 2 * len(images) + 2
    turn_0 = place(between, (planes.cumsum() - planes) * 4)[:, None]
    turn_1 = turn_0 + (pixels * 12)[:, None]
    is_first, is_last = before == 0, before == total - 1

    blurred = (height + 2 * reach) * (-(-width // strip) * strip)
    lines = {schedule.BOX_LINE: pixels * 6, schedule.BLUR: blurred * 3}
    line_planes = np.zeros(len(crop_of), np.int64)
    for launch in plan.launches:
        if launch.kind in lines:
            line_planes[launch.images] = np.maximum(line_planes, lines[launch.kind])[launch.images]
    line_0 = place(line, (line_planes.cumsum() - line_planes) * 4)

    blocks = -(-pixels // block)[:, None]
    lengths = np.select([plan.reads == code for code in STATISTICS], [blocks, 6 * blocks, np.int64(3 * 256)], 0)
    ends = lengths.cumsum().reshape(lengths.shape)
    return Memory(
        sources=np.where(is_first, places(images, 0), np.where(before % 2 == 1, turn_0, turn_1)),
        source_layouts=np.where(is_first, INPUT_LAYOUT, BETWEEN_LAYOUT),
        targets=np.where(is_last, places(out, len(images)), np.where(before % 2 == 1, turn_1, turn_0)),
        target_layouts=np.where(is_last, OUTPUT_LAYOUT, BETWEEN_LAYOUT),
        readings=place(reading, (ends - lengths) * 4),
        lines=np.stack([line_0, line_0 + pixels * 12], axis=1),
        sizes=(int(planes.sum()), int(line_planes.sum()), int(lengths.sum())),
    )


def crop_rows(images: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> np.ndarray:
    """int64 [C, 16]: each crop's size and the layouts of its input, its output and the planes between."""
    rows = np.zeros((len(images), CROP_COLUMNS), np.int64)
    for row, image, tensor in zip(rows, images, out, strict=True):
        height, width = image.shape[2:]
        row[:3] = height, width, 3
        row[INPUT_LAYOUT:OUTPUT_LAYOUT] = (*image.stride()[1:], DTYPES.index(image.dtype))
        row[OUTPUT_LAYOUT:BETWEEN_LAYOUT] = (*tensor.stride()[1:], DTYPES.index(tensor.dtype))
        row[BETWEEN_LAYOUT:] = height * width, width, 1, DTYPES.index(torch.float32)
    return rows


def task_rows(launch: Launch, plan: Schedule, memory: Memory, crop_of: np.ndarray, length: int) -> np.ndarray:
    """int64 [n, 8]: the tasks of one launch, with places. length: operations of each image in the table."""
    chosen = (launch.images, launch.number)
    crop = crop_of[launch.images] * CROP_COLUMNS
    source, source_layout = memory.sources[chosen], memory.source_layouts[chosen]
    target, target_layout = memory.targets[chosen], memory.target_layouts[chosen]
    first, end = plan.passes[chosen].T
    if launch.kind in (schedule.READINGS, schedule.EQUALIZE_TABLES):
        end = plan.read_at[chosen]
    if launch.line > 0:
        source, source_layout = memory.lines[launch.images, 1 - launch.line % 2], np.full_like(crop, BETWEEN_LAYOUT)
    if launch.kind == schedule.BOX_LINE and launch.line < schedule.BOX_LINES - 1:
        target, target_layout = memory.lines[launch.images, launch.line % 2], np.full_like(crop, BETWEEN_LAYOUT)
        end = first
    beside = memory.lines[launch.images, 0] if launch.kind == schedule.BLUR else memory.readings[chosen]
    row = launch.images * length
    columns = (source, crop + source_layout, target, crop + target_layout, crop, row + first, row + end)
    return np.stack([*columns, beside], axis=1)


def group_rows(shares: np.ndarray) -> np.ndarray:
    """int64 [G, 4]: the runs of tasks that take equally many programs. shares: int64 [n], ascending."""
    share, first, count = np.unique(shares, return_index=True, return_counts=True)
    programs = share * count
    return np.stack([programs.cumsum() - programs, first, share, 0 * share], axis=1)
