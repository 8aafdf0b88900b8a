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
from .blur import STRIP, blur_options, box_blur_kernel, box_line_kernel, box_options, box_reach, gaussian_blur_kernel
from .color import equalize_kernel, launch_options, pixels_kernel, readings_kernel
from .launch import check_device, launching_on
from .ops import GAUSSIAN_BLUR, SHARPNESS, WARP, ProgramFormat, check_pixels, check_programs, empty_pixels
from .program_checks import check_neighbours
from .program_tables import PLACE_COLUMNS, addresses_of, crop_rows, group_rows, lay_out, task_rows
from .schedule import Launch, Schedule, join_programs, plan_launches
from .schedule import count_launches as count_launches
from .task_rows import TASK_COLUMNS

MOST_WIDTH = 2**18
MOST_HEIGHT = 2**22


def check_spans(images: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Raise ValueError for a plane too large or high for the kernels' int32 offsets, or too wide for their float32
    division."""
    for index, (image, tensor) in enumerate(zip(images, out, strict=True)):
        height, width = image.shape[2:]
        span = max(height * width, *(t.stride(2) * (height - 1) + t.stride(3) * (width - 1) for t in (image, tensor)))
        if span >= 2**30:
            raise ValueError(f"images[{index}] or its output spans {span} elements, allowed is less than 2**30")
        if width >= MOST_WIDTH:
            raise ValueError(f"images[{index}] is {width} pixels wide, allowed is less than {MOST_WIDTH}")
        if height >= MOST_HEIGHT:
            raise ValueError(f"images[{index}] is {height} pixels high, allowed is less than {MOST_HEIGHT}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One launch: a kernel, its options, and how many programs, tasks and groups of tasks it has."""

    kernel: Any
    options: Mapping[str, Any]
    blocks: int
    tasks: int
    groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramTables:
    """One batch's programs, ready to be launched.

    table: int64, crops, programs and each launch's groups behind one another, of these `lengths`. tasks: int64 [T, 8],
    launch by launch, with places for addresses. crops: those that have pixels. layouts: what images and outputs it is
    for. sizes: float32 values of the planes between passes, the lines of boxes, and the readings.
    """

    table: torch.Tensor
    lengths: tuple[int, ...]
    tasks: np.ndarray
    crops: tuple[int, ...]
    layouts: tuple[tuple[Any, ...], ...]
    sizes: tuple[int, int, int]
    calls: tuple[Call, ...]


def layouts_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], ...]:
    """What tables rely on of images and outputs: shapes, strides and dtypes."""
    return tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors)


def without_memory(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the same layouts on torch's "meta" device."""
    return [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta") for each in tensors]


def pack_programs(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    formats: Sequence[ProgramFormat],
    out: Sequence[torch.Tensor] | None = None,
    *,
    pin_memory: bool = False,
) -> ProgramTables:
    """Check programs and make their tables: the host work of run_programs, which can be done ahead.

    The arguments are run_programs', which also says what it raises; of images and out only shapes, strides and dtypes
    count, so they may be on torch's "meta" device. pin_memory: whether the launch will be on CUDA.
    """
    check_programs(images, programs, formats)
    check_neighbours(images, programs)
    images = without_memory(images)
    out = empty_pixels(images, formats) if out is None else without_memory(out)
    check_pixels(images, out, formats)
    check_spans(images, out)
    some = tuple(index for index, image in enumerate(images) if image.numel())
    layouts = layouts_of([*images, *out])
    images, out = [images[index] for index in some], [out[index] for index in some]
    joined = join_programs([programs[index] for index in some])
    plan = plan_launches(joined)
    crop_of = np.repeat(np.arange(len(images)), [len(image) for image in images])
    reach = np.where(joined[..., 0] == GAUSSIAN_BLUR, joined[..., 2], 0).max(1, initial=0).astype(np.int64) // 2
    memory = lay_out(images, out, crop_of, plan, reach, block=launch_options()["BLOCK"], strip=STRIP)
    crops = crop_rows(images, out)
    all_tasks, all_groups, calls = [np.zeros((0, TASK_COLUMNS), np.int64)], [], []
    for launch in plan.launches:
        kernel, options, shares = choose_kernel(launch, plan, joined, crops[:, :2])
        order = shares[crop_of[launch.images]].argsort(kind="stable")
        launch = replace(launch, images=launch.images[order])
        share = shares[crop_of[launch.images]]
        groups = group_rows(share)
        all_tasks.append(task_rows(launch, plan, memory, crop_of, joined.shape[1]))
        all_groups.append(groups)
        calls.append(
            Call(kernel=kernel, options=options, blocks=int(share.sum()), tasks=len(launch.images), groups=len(groups))
        )
    parts = [crops, joined.view(np.int64), *all_groups]
    lengths = tuple(part.size for part in parts)
    table = torch.empty(sum(lengths), dtype=torch.int64, device="cpu", pin_memory=pin_memory)
    np.concatenate([part.reshape(-1) for part in parts], out=table.numpy())
    return ProgramTables(
        table=table,
        lengths=lengths,
        tasks=np.concatenate(all_tasks),
        crops=some,
        layouts=layouts,
        sizes=memory.sizes,
        calls=tuple(calls),
    )


def run_programs(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray] | ProgramTables,
    formats: Sequence[ProgramFormat],
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Every crop of every image through its program, in the launches that count_launches tells.

    images: C crops, uint8 or float32 [B, 3, h, w] each (B, h, w may differ), any strides, on one device. programs: C of
    float32 [B, K, 16] (see ops), or what pack_programs made of them. formats: C. Returns C tensors of the images'
    shapes; `out` gives them instead. Raises ValueError or TypeError for what does not fit together, and for a blur that
    its crop cannot hold; RuntimeError for CPU tensors outside Triton's interpreter. Reference: run_programs_reference.
    """
    for image in images:
        check_device(image.device, pixels_kernel)
    on_cuda = any(image.device.type == "cuda" for image in images)
    if isinstance(programs, ProgramTables):
        tables = programs
    else:
        tables = pack_programs(images, programs, formats, out, pin_memory=on_cuda)
    if out is None:
        out = empty_pixels(images, formats)
    check_pixels(images, out, formats)
    if layouts_of([*images, *out]) != tables.layouts:
        raise ValueError("images and out must be of the shapes, strides and dtypes that the programs were packed for")
    if tables.crops:
        launch_all([images[index] for index in tables.crops], [out[index] for index in tables.crops], tables)
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
        return gaussian_blur_kernel, blur_options(), -(-sizes[:, 1] // STRIP)
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


def launch_all(images: Sequence[torch.Tensor], out: Sequence[torch.Tensor], tables: ProgramTables) -> None:
    """The launches of crops that have pixels; what they read and write must outlive them on torch's current stream."""
    device = images[0].device
    between = [torch.empty(size, dtype=torch.float32, device=device) for size in tables.sizes]
    regions = np.array([tensor.data_ptr() for tensor in (*images, *out, *between)], np.int64)
    # New memory each time: the device may not have read that of the call before.
    all_tasks = torch.empty(tables.tasks.shape, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    numbers = all_tasks.numpy()
    numbers[:] = tables.tasks
    numbers[:, PLACE_COLUMNS] = addresses_of(tables.tasks[:, PLACE_COLUMNS], regions)
    crop_table, operations, *all_groups = tables.table.to(device, non_blocking=True).split(tables.lengths)
    operations = operations.view(torch.float32)
    by_call = all_tasks.to(device, non_blocking=True).split([call.tasks for call in tables.calls])
    with launching_on(device):
        for call, tasks, groups in zip(tables.calls, by_call, all_groups, strict=True):
            # grid: the blocks, tiles or channels of each image that has this pass
            call.kernel[(call.blocks,)](tasks, groups, call.groups, crop_table, operations, **call.options)
