"""All crops of all images, in one launch, to the byte what Pillow gives.

A crop is box -> resize -> window -> flip, bilinear or bicubic, antialiased or not: a horizontal pass over the box's
rows, rounded to 8 bits, then a vertical pass over that, both with 22-bit fixed-point weights computed in float64
(Pillow's Resample.c). A small launch before it computes the weights of every job.

A program does both passes for some columns of a crop. What is between them it writes to memory and reads back, three
bytes in a word: it needs no other program's, so a barrier of its own threads is all that stands between.

An image of YUV 4:2:0 planes becomes RGB bytes, by the law of yuv420.py, as its pixels are loaded.

Shapes: B images (ragged), C crops, outputs [B, 3, h, w]. It does not sample boxes, blur, or know a crop's name.
"""

# A jit function is typed as its Python source, and what one constexpr branch sets another reads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs

from ._math import byte_of_planes, chroma_of_four, filter_weight, round_to_byte
from .crop_jobs import JOB_COLUMNS, OutputFormat, check_outputs, empty_outputs
from .crop_tables import IMAGE_COLUMNS, OUTPUT_COLUMNS, PLANES_COLUMNS, CropTables, pack_tables
from .launch import check_device, launching_on
from .ragged import RaggedBatch

WARPS = 4
THREADS = tl.constexpr(32 * WARPS)


class LaunchOptions(TypedDict):
    BLOCK_W: int
    BLOCK_H: int
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool


def launch_options() -> LaunchOptions:
    """The crop kernel's columns a program, rows a step, and warps.

    Columns are a warp's lanes, so that what it loads lies in few cache lines, and rows four a thread. In Triton's
    interpreter each step costs the same whatever its rows.
    """
    return {
        "BLOCK_W": 32,
        "BLOCK_H": 64 if knobs.runtime.interpret else 16,
        "num_warps": WARPS,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


WEIGHT_OPTIONS = {"BLOCK": 64, "num_warps": 2, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["num_crops"])
def resize_weights_kernel(tasks, outputs, weights, num_crops, BLOCK: tl.constexpr, JOB: tl.constexpr):
    # One program computes the weights of BLOCK output pixels along one axis of one job.
    job = tl.program_id(0) // 2
    axis = tl.program_id(0) % 2  # 0 vertical, 1 horizontal
    task = tasks + job.to(tl.int64) * (JOB + 6)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    window = tl.load(outputs + (job % num_crops) * 9 + 7 + axis).to(tl.int32)
    live = pixel < window

    box = tl.load(task + 2 + axis).to(tl.int32)
    full = tl.load(task + 4 + axis).to(tl.int32)
    place = tl.load(task + 6 + axis).to(tl.int32)
    kind = tl.load(task + 8)
    bicubic = (kind & 1) != 0
    table = weights + tl.load(task + JOB + axis)
    taps = tl.load(task + JOB + 2 + axis).to(tl.int32)

    scale = box.to(tl.float64) / full.to(tl.float64)
    stretch = tl.where((kind & 2) != 0, 1.0, tl.maximum(scale, 1.0))
    support = tl.where(bicubic, 2.0, 1.0).to(tl.float64) * stretch
    shrink = 1.0 / stretch
    centre = ((pixel + place).to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + support + 0.5).to(tl.int32), box)
    begin = tl.minimum(first, box - taps)  # of the taps, all of which lie in the box

    total = tl.zeros([BLOCK], tl.float64)
    for tap in range(taps):
        source = begin + tap
        value = filter_weight((source.to(tl.float64) - centre + 0.5) * shrink, bicubic)
        total += tl.where((source >= first) & (source < end), value, 0.0)
    total = tl.where(live, total, 1.0)

    column = table + pixel
    tl.store(column, begin, mask=live)
    for tap in range(taps):
        source = begin + tap
        value = filter_weight((source.to(tl.float64) - centre + 0.5) * shrink, bicubic)
        value = tl.where((source >= first) & (source < end), value / total * 4194304.0, 0.0)
        fixed = (value + tl.where(value < 0.0, -0.5, 0.5)).to(tl.int32)
        column += window
        tl.store(column, fixed, mask=live)


@triton.jit
def nearest_two(place, last):
    # The nearer and the farther of the chroma rows (or columns) around these of the image, inside the plane.
    near = tl.minimum(place >> 1, last)
    return near, tl.minimum(tl.maximum((place >> 1) + (place & 1) * 2 - 1, 0), last)


@triton.jit
def load_bytes(pixel, channel_step):
    # The three channels of pixels (int32).
    r = tl.load(pixel).to(tl.int32)
    g = tl.load(pixel + channel_step).to(tl.int32)
    return r, g, tl.load(pixel + 2 * channel_step).to(tl.int32)


@triton.jit
def load_chroma(plane, near_row, far_row, near, far, odd):
    # A plane of chroma between its samples, less 128 (int32), from four bytes of it. Neighbours find them in the cache.
    beside = tl.load(plane + (near_row + far)).to(tl.int32)
    across = tl.load(plane + (far_row + far)).to(tl.int32)
    below = tl.load(plane + (far_row + near)).to(tl.int32)
    return chroma_of_four(tl.load(plane + (near_row + near)).to(tl.int32), below, beside, across, odd)


@triton.jit
def store_bytes(value, address, offset, mask, size, table):
    # One channel's bytes (int32 values) to their place, through the channel's table of 1-, 2- or 4-byte values if any.
    if size == 4:
        entry = tl.load(table.to(tl.pointer_type(tl.int32)) + value, mask=mask)
        tl.store(address.to(tl.pointer_type(tl.int32)) + offset, entry, mask=mask)
    elif size == 2:
        entry = tl.load(table.to(tl.pointer_type(tl.int16)) + value, mask=mask)
        tl.store(address.to(tl.pointer_type(tl.int16)) + offset, entry, mask=mask)
    else:
        if table != 0:
            value = tl.load(table.to(tl.pointer_type(tl.uint8)) + value, mask=mask).to(tl.int32)
        tl.store(address.to(tl.pointer_type(tl.uint8)) + offset, value.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["num_crops", "num_strips"])
def resized_crop_kernel(
    images,
    tasks,
    outputs,
    strips,
    weights,
    between,
    num_crops,
    num_strips,
    JOB: tl.constexpr,
    PLANES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # One program computes BLOCK_W columns, all rows and channels, of one crop of one image, BLOCK_H rows a step. With
    # PLANES an image may be YUV 4:2:0, without none is. With INTERLEAVED all are [H, W, 3] in memory, but for what lies
    # between rows. Blocks are flat: of two axes the compiler may give a warp's lanes to the rows.
    image = tl.program_id(0) // num_strips
    strip = strips + (tl.program_id(0) % num_strips) * 2
    crop = tl.load(strip)
    x = tl.load(strip + 1) + tl.arange(0, BLOCK_H * BLOCK_W) % BLOCK_W
    step_row = tl.arange(0, BLOCK_H * BLOCK_W) // BLOCK_W

    task = tasks + (image * num_crops + crop).to(tl.int64) * (JOB + 6)
    output = outputs + crop * 9
    height = tl.load(output + 7).to(tl.int32)
    width = tl.load(output + 8).to(tl.int32)
    y_table = weights + tl.load(task + JOB)
    x_table = weights + tl.load(task + JOB + 1)
    y_taps = tl.load(task + JOB + 2).to(tl.int32)
    x_taps = tl.load(task + JOB + 3).to(tl.int32)
    row_begin = tl.load(y_table)
    row_end = tl.load(y_table + (height - 1)) + y_taps

    source = images + image.to(tl.int64) * (10 if PLANES else 4)
    channel_step = 1 if INTERLEAVED else tl.load(source + 1)
    row_step = tl.load(source + 2).to(tl.int32)  # pack_tables made sure that an image spans less than 2 GiB
    column_step = 3 if INTERLEAVED else tl.load(source + 3).to(tl.int32)
    corner = tl.load(source) + tl.load(task) * row_step + tl.load(task + 1) * column_step
    corner = corner.to(tl.pointer_type(tl.uint8))
    if PLANES:
        blue_plane = tl.load(source + 4).to(tl.pointer_type(tl.uint8))
        red_plane = tl.load(source + 5).to(tl.pointer_type(tl.uint8))
        chroma_step = tl.load(source + 6).to(tl.int32)
        last_row = tl.load(source + 7).to(tl.int32) - 1
        last_column = tl.load(source + 8).to(tl.int32) - 1
        is_planes = tl.load(source + 4) != 0
        top = tl.load(task).to(tl.int32)
        left = tl.load(task + 1).to(tl.int32)

    # across: a row or column past the last one does the last one's work, which nobody stores
    held_x = tl.minimum(x, width - 1)
    words = between + tl.load(task + JOB + 4) + held_x
    x_first = tl.load(x_table + held_x)
    x_weights = x_table + tl.minimum(tl.load(strip + 1) + tl.arange(0, THREADS) % BLOCK_W, width - 1)
    for row in range(row_begin, row_end, BLOCK_H):
        rows = row + step_row
        source_rows = tl.minimum(rows, row_end - 1)
        pixel = corner + (source_rows * row_step + x_first * column_step)
        weights_of_tap = x_weights
        if PLANES:
            near_row, far_row = nearest_two(top + source_rows, last_row)
            near_row *= chroma_step
            far_row *= chroma_step
        red = tl.full([BLOCK_H * BLOCK_W], 1 << 21, tl.int32)
        green = red
        blue = red
        for tap in range(x_taps):
            weights_of_tap += width
            weight = tl.load(weights_of_tap)  # one for all of a thread's rows
            weight = weight[None, :].broadcast_to(BLOCK_H * BLOCK_W // THREADS, THREADS).reshape(BLOCK_H * BLOCK_W)
            if not PLANES:
                r, g, b = load_bytes(pixel, channel_step)
            elif is_planes:
                column = left + tap + x_first
                near, far = nearest_two(column, last_column)
                odd = column & 1
                cb = load_chroma(blue_plane, near_row, far_row, near, far, odd)
                cr = load_chroma(red_plane, near_row, far_row, near, far, odd)
                luma = tl.load(pixel).to(tl.int32)
                r = byte_of_planes(luma, cr * 91881 + 32768)
                g = byte_of_planes(luma, cb * -22554 + cr * -46802 + 32768)
                b = byte_of_planes(luma, cb * 116130 + 32768)
            else:
                r, g, b = load_bytes(pixel, channel_step)
            red += weight * r
            green += weight * g
            blue += weight * b
            pixel += column_step
        word = round_to_byte(red) | (round_to_byte(green) << 8) | (round_to_byte(blue) << 16)
        tl.store(words + rows * width, word, mask=(rows < row_end) & (x < width))
    tl.debug_barrier()  # a barrier orders what a program's threads wrote and read

    # down
    flip = tl.load(task + 9)
    size = tl.load(output + 5)
    channel = tl.load(output + 2) * size
    address = tl.load(output) + image.to(tl.int64) * tl.load(output + 1) * size
    y_step = tl.load(output + 3).to(tl.int32)
    place_x = tl.where((flip & 1) != 0, width - 1 - x, x) * tl.load(output + 4).to(tl.int32)
    byte_table = tl.load(output + 6)
    next_table = tl.where(byte_table != 0, 256 * size, 0)
    for row in range(0, height, BLOCK_H):
        y = row + step_row
        weights_of_tap = y_table + tl.minimum(y, height - 1)
        y_first = tl.load(weights_of_tap)
        red = tl.full([BLOCK_H * BLOCK_W], 1 << 21, tl.int32)
        green = red
        blue = red
        words_of_tap = words + y_first * width
        for _ in range(y_taps):
            weights_of_tap += height
            weight = tl.load(weights_of_tap)
            word = tl.load(words_of_tap)
            red += weight * (word & 255)
            green += weight * ((word >> 8) & 255)
            blue += weight * (word >> 16)
            words_of_tap += width
        live = (y < height) & (x < width)
        place = tl.where((flip & 2) != 0, height - 1 - y, y) * y_step + place_x
        store_bytes(round_to_byte(red), address, place, live, size, byte_table)
        store_bytes(round_to_byte(green), address + channel, place, live, size, byte_table + next_table)
        store_bytes(round_to_byte(blue), address + 2 * channel, place, live, size, byte_table + 2 * next_table)


@functools.lru_cache(maxsize=256)
def strip_table(sizes: tuple[tuple[int, int], ...], block_w: int, device: torch.device) -> torch.Tensor:
    """Each strip of one image's crops: int32 [S, 2] (crop, first column)."""
    strips = [(crop, x) for crop, (_, width) in enumerate(sizes) for x in range(0, width, block_w)]
    return torch.tensor(strips, dtype=torch.int32, device=device)


def resized_crop(
    images: RaggedBatch,
    jobs: np.ndarray | CropTables,
    formats: Sequence[OutputFormat],
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Every crop of every image: one launch for the weights, one for all pixels.

    images: B ragged uint8 images. jobs: int32 [B, C, 10] (see crop_jobs), or what pack_tables made of them. formats: C,
    their tables on the images' device. Returns C tensors [B, 3, h, w] on that device; `out` gives them instead. Runs on
    torch's current stream, once the images are ready there; their owners must outlive it. While it runs it takes four
    bytes for each row of a job's box and column of its window. Raises ValueError for jobs that leave their image,
    outputs or tables that do not fit; RuntimeError for CPU tensors outside Triton's interpreter. Reference:
    resized_crop_reference.
    """
    check_device(images.device, resized_crop_kernel)
    tables = jobs if isinstance(jobs, CropTables) else pack_tables(images, jobs, formats)
    count, crops = tables.num_images, len(formats)
    if out is None:
        out = empty_outputs(count, formats, images.device)
    check_outputs(out, count, formats, images.device)
    if not count or not crops:
        return list(out)
    images.wait_on_current_stream()
    numbers = tables.table.numpy()
    for row, tensor, fmt in zip(numbers[-crops * OUTPUT_COLUMNS :].reshape(crops, -1), out, formats, strict=True):
        byte_table = 0 if fmt.table is None else fmt.table.data_ptr()
        row[:] = (tensor.data_ptr(), *tensor.stride(), tensor.element_size(), byte_table, *fmt.size)
    on_device = tables.table.to(images.device, non_blocking=True)
    task_table = on_device[count * (PLANES_COLUMNS if tables.planes else IMAGE_COLUMNS) :]
    output_table = on_device[len(on_device) - crops * OUTPUT_COLUMNS :]
    weights = torch.empty(tables.num_weights, dtype=torch.int32, device=images.device)
    between = torch.empty(tables.num_words, dtype=torch.int32, device=images.device)
    blocks = triton.cdiv(max(max(fmt.size) for fmt in formats), WEIGHT_OPTIONS["BLOCK"])
    options = launch_options()
    strips = strip_table(tuple(fmt.size for fmt in formats), options["BLOCK_W"], images.device)
    with launching_on(images.device):
        # grid: each axis of each job, by blocks of output pixels
        resize_weights_kernel[(count * crops * 2, blocks)](
            task_table, output_table, weights, crops, JOB=JOB_COLUMNS, **WEIGHT_OPTIONS
        )
        # grid: each strip of each crop, image by image, so that an image's strips run while it is in the cache
        resized_crop_kernel[(count * len(strips),)](
            on_device,
            task_table,
            output_table,
            strips,
            weights,
            between,
            crops,
            len(strips),
            JOB=JOB_COLUMNS,
            PLANES=tables.planes,
            INTERLEAVED=tables.interleaved,
            **options,
        )
    return list(out)
