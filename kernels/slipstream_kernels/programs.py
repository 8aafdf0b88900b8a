"""All crops of all images through their programs of operations, in as few launches as their passes allow."""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from . import schedule
from .blur import blur_options, box_blur_kernel, box_line_kernel, box_options, box_reach, gaussian_blur_kernel
from .color import equalize_kernel, launch_options, pixels_kernel, readings_kernel
from .launch import check_device, launching_on
from .ops import (
    DTYPES,
    SHARPNESS,
    STATISTICS,
    WARP,
    ProgramFormat,
    check_pixels,
    check_programs,
    empty_pixels,
)
from .program_checks import check_neighbours
from .schedule import Launch, Schedule, join_programs, plan_launches
from .schedule import count_launches as count_launches
from .task_rows import BETWEEN_LAYOUT, CROP_COLUMNS, INPUT_LAYOUT, OUTPUT_LAYOUT

MOST_WIDTH = 2**18


def check_spans(images: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Raise ValueError for a plane too large for the kernels' int32 offsets, or too wide for their float32 division."""
    for index, (image, tensor) in enumerate(zip(images, out, strict=True)):
        height, width = image.shape[2:]
        span = max(height * width, *(t.stride(2) * (height - 1) + t.stride(3) * (width - 1) for t in (image, tensor)))
        if span >= 2**30:
            raise ValueError(f"images[{index}] or its output spans {span} elements, allowed is less than 2**30")
        if width >= MOST_WIDTH:
            raise ValueError(f"images[{index}] is {width} pixels wide, allowed is less than {MOST_WIDTH}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Where each pass of each image reads and writes, and where its reading lies, as addresses: int64 [N, P] each.

    source_layouts, target_layouts: in the image's crop row. lines: int64 [N, 2], what is between the lines of a box.
    owners: what must outlive the launches.
    """

    sources: np.ndarray
    source_layouts: np.ndarray
    targets: np.ndarray
    target_layouts: np.ndarray
    readings: np.ndarray
    lines: np.ndarray
    owners: tuple[torch.Tensor, ...]


def lay_out(
    images: Sequence[torch.Tensor], out: Sequence[torch.Tensor], crop_of: np.ndarray, plan: Schedule, block: int
) -> Memory:
    """Addresses for a schedule: an image's first pass reads its input, its last writes its output, and what is between
    lies in float32 planes. crop_of: int64 [N], each image's crop. block: pixels of one reading's program."""
    device = images[0].device
    image_of = np.arange(len(crop_of)) - np.searchsorted(crop_of, crop_of)
    pixels = np.array([image.shape[2] * image.shape[3] for image in images], np.int64)[crop_of]

    def addresses(tensors: Sequence[torch.Tensor]) -> np.ndarray:
        base = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        step = np.array([tensor.stride(0) * tensor.element_size() for tensor in tensors], np.int64)
        return (base[crop_of] + step[crop_of] * image_of)[:, None]

    live = plan.passes[..., 1] > plan.passes[..., 0]
    before = live.cumsum(1) - live  # how many passes of the image come before
    total = live.sum(1, keepdims=True)
    # two planes take turns: an image of two passes needs one, of more both
    planes = pixels * 3 * np.minimum(total[:, 0] - 1, 2)
    between = torch.empty(int(planes.sum()), dtype=torch.float32, device=device)
    turn_0 = (between.data_ptr() + (planes.cumsum() - planes) * 4)[:, None]
    turn_1 = turn_0 + (pixels * 12)[:, None]
    is_first, is_last = before == 0, before == total - 1

    wide = np.zeros(len(crop_of), bool)
    for launch in plan.launches:
        wide[launch.images] |= launch.kind == schedule.BOX_LINE
    line_planes = pixels * 6 * wide
    lines = torch.empty(int(line_planes.sum()), dtype=torch.float32, device=device)
    line_0 = lines.data_ptr() + (line_planes.cumsum() - line_planes) * 4

    blocks = -(-pixels // block)[:, None]
    lengths = np.select([plan.reads == code for code in STATISTICS], [blocks, 6 * blocks, np.int64(3 * 256)], 0)
    ends = lengths.cumsum().reshape(lengths.shape)
    readings = torch.empty(int(lengths.sum()), dtype=torch.float32, device=device)
    return Memory(
        sources=np.where(is_first, addresses(images), np.where(before % 2 == 1, turn_0, turn_1)),
        source_layouts=np.where(is_first, INPUT_LAYOUT, BETWEEN_LAYOUT),
        targets=np.where(is_last, addresses(out), np.where(before % 2 == 1, turn_1, turn_0)),
        target_layouts=np.where(is_last, OUTPUT_LAYOUT, BETWEEN_LAYOUT),
        readings=readings.data_ptr() + (ends - lengths) * 4,
        lines=np.stack([line_0, line_0 + pixels * 12], axis=1),
        owners=(between, readings, lines),
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
    """int64 [n, 8]: the tasks of one launch. length: operations of each image in the table."""
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
    row = launch.images * length
    columns = (source, crop + source_layout, target, crop + target_layout, crop, row + first, row + end)
    return np.stack([*columns, memory.readings[chosen]], axis=1)


def group_rows(shares: np.ndarray) -> np.ndarray:
    """int64 [G, 4]: the runs of tasks that take equally many programs. shares: int64 [n], ascending."""
    share, first, count = np.unique(shares, return_index=True, return_counts=True)
    programs = share * count
    return np.stack([programs.cumsum() - programs, first, share, 0 * share], axis=1)


def run_programs(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    formats: Sequence[ProgramFormat],
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Every crop of every image through its program, in the launches that count_launches tells.

    images: C crops, uint8 or float32 [B, 3, h, w] each (B, h, w may differ), any strides, on one device. programs: C of
    float32 [B, K, 16] (see ops). formats: C. Returns C tensors of the images' shapes; `out` gives them instead. Raises
    ValueError or TypeError for what does not fit together, and for a blur that its crop cannot hold; RuntimeError for
    CPU tensors outside Triton's interpreter. Reference: run_programs_reference.
    """
    check_programs(images, programs, formats)
    check_neighbours(images, programs)
    for image in images:
        check_device(image.device, pixels_kernel)
    if out is None:
        out = empty_pixels(images, formats)
    check_pixels(images, out, formats)
    check_spans(images, out)
    some = [index for index, image in enumerate(images) if image.numel()]
    if some:
        launch_all([images[i] for i in some], [programs[i] for i in some], [out[i] for i in some])
    return list(out)


def choose_kernel(
    launch: Launch, plan: Schedule, programs: np.ndarray, sizes: np.ndarray
) -> tuple[Any, Mapping[str, Any], np.ndarray]:
    """A launch's kernel, its options, and how many programs an image of each crop takes (int64 [C]).

    programs: float32 [N, K, 16]. sizes: int64 [C, 2] (h, w).
    """

    first = programs[launch.images, plan.passes[launch.images, launch.number, 0]]

    def tiles(height: int, width: int) -> np.ndarray:
        return (-(-sizes // np.array([height, width]))).prod(1)

    if launch.kind == schedule.BLUR:
        blur = blur_options()
        return gaussian_blur_kernel, blur, tiles(blur["BLOCK_H"], blur["BLOCK_W"])
    if launch.kind == schedule.BOX:
        reach = box_reach(first[:, 1].max())
        box = box_options()
        step = box["WINDOW_H"] - 2 * reach
        return box_blur_kernel, {"step": step, **box}, tiles(step, box["TILE_W"])
    options = launch_options()
    blocks = -(-sizes.prod(1) // options["BLOCK"])
    if launch.kind == schedule.EQUALIZE_TABLES:
        return equalize_kernel, options, np.full(len(sizes), 3)
    if launch.kind == schedule.READINGS:
        return readings_kernel, options, blocks
    if launch.kind == schedule.BOX_LINE:
        return box_line_kernel, {"down": int(launch.line >= schedule.BOX_LINES // 2), **options}, blocks
    gathers = bool(((first[:, 0] == SHARPNESS) | (first[:, 0] == WARP)).any())
    return pixels_kernel, {"GATHERS": gathers, **launch_options(gathers)}, blocks


def launch_all(images: Sequence[torch.Tensor], programs: Sequence[np.ndarray], out: Sequence[torch.Tensor]) -> None:
    """run_programs on crops that were checked and have pixels: everything in one table and one copy, then launches."""
    device = images[0].device
    joined = join_programs(programs)
    plan = plan_launches(joined)
    crop_of = np.repeat(np.arange(len(images)), [len(image) for image in images])
    memory = lay_out(images, out, crop_of, plan, launch_options()["BLOCK"])
    crops = crop_rows(images, out)
    parts = [crops, joined.view(np.int64)]
    calls = []
    for launch in plan.launches:
        kernel, options, shares = choose_kernel(launch, plan, joined, crops[:, :2])
        order = shares[crop_of[launch.images]].argsort(kind="stable")
        launch = replace(launch, images=launch.images[order])
        groups = group_rows(shares[crop_of[launch.images]])
        parts += [task_rows(launch, plan, memory, crop_of, joined.shape[1]), groups]
        calls.append((kernel, options, int(shares[crop_of[launch.images]].sum()), len(groups)))

    count = sum(part.size for part in parts)
    table = torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    np.concatenate([part.reshape(-1) for part in parts], out=table.numpy())
    crop_table, operations, *rest = table.to(device, non_blocking=True).split([part.size for part in parts])
    operations = operations.view(torch.float32)
    with launching_on(device):
        for (kernel, options, blocks, num_groups), tasks, groups in zip(calls, rest[::2], rest[1::2], strict=True):
            # grid: the blocks, tiles or channels of each image that has this pass
            kernel[(blocks,)](tasks, groups, num_groups, crop_table, operations, **options)
