"""The crop launch on the CPU: the same jobs, the same bytes, Numba instead of Triton.

The kernels release the GIL and run on the caller's threads, a share of the jobs each. Numba's own parallel layer is not
used: which one a machine has differs, and two of them fail under fork or under concurrent callers.
"""

# Numba's intrinsics and carray are untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .crop_jobs import (
    BICUBIC,
    FILTER,
    FLIP,
    FULL_H,
    FULL_W,
    HEIGHT,
    LEFT,
    PRECISION_BITS,
    TOP,
    WIDTH,
    WINDOW_LEFT,
    WINDOW_TOP,
    OutputFormat,
    box_cost,
    check_jobs,
    check_outputs,
    empty_outputs,
)
from .ragged import RaggedBatch

HALF = 1 << (PRECISION_BITS - 1)
SHARES = 4  # shares of work for each thread: enough to even out what the cost estimate misses
ROW_PADDING = 64  # bytes after a staged row that may be read and count for nothing


@intrinsic
def _pointer(typing_context, address):
    """An integer address as a pointer that numba.carray takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def _weighted_pixel(typing_context, pixels, weights, groups):
    """Four RGB pixels at a time, times their weights, summed, rounded to bytes: the horizontal pass of one pixel.

    pixels: address of 4 * groups interleaved RGB pixels (four more bytes are read). weights: address of int32
    [groups, 4, 4], each weight three times and a zero. Returns the bytes r | g << 8 | b << 16. LLVM's vectors are
    written out because its vectoriser leaves this loop scalar: three multiplies a tap where one instruction does 12.
    """

    def codegen(context, builder, signature, args):
        pixel_address, weight_address, count = args
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        bytes16, lanes16 = ir.VectorType(i8, 16), ir.VectorType(i32, 16)
        spread = [0, 1, 2, 16, 3, 4, 5, 16, 6, 7, 8, 16, 9, 10, 11, 16]  # 16 is a zero
        half = ir.Constant(lanes16, [HALF] * 3 + [0] * 13)
        total = cgutils.alloca_once_value(builder, half)
        with cgutils.for_range(builder, count) as loop:
            place = builder.add(pixel_address, builder.mul(loop.index, ir.Constant(i64, 12)))
            pixel = builder.load(builder.inttoptr(place, bytes16.as_pointer()), align=1)
            mask = ir.Constant(ir.VectorType(i32, 16), spread)
            pixel = builder.zext(builder.shuffle_vector(pixel, ir.Constant(bytes16, [0] * 16), mask), lanes16)
            place = builder.add(weight_address, builder.mul(loop.index, ir.Constant(i64, 64)))
            weight = builder.load(builder.inttoptr(place, lanes16.as_pointer()), align=4)
            builder.store(builder.add(builder.load(total), builder.mul(pixel, weight)), total)
        lanes = builder.load(total)
        for count in (8, 4):
            low = ir.Constant(ir.VectorType(i32, count), list(range(count)))
            high = ir.Constant(ir.VectorType(i32, count), list(range(count, 2 * count)))
            lanes = builder.add(builder.shuffle_vector(lanes, lanes, low), builder.shuffle_vector(lanes, lanes, high))
        four = ir.VectorType(i32, 4)
        lanes = builder.ashr(lanes, ir.Constant(four, [PRECISION_BITS] * 4))
        for limit, comparison in ((0, ">"), (255, "<")):
            bound = ir.Constant(four, [limit] * 4)
            lanes = builder.select(builder.icmp_signed(comparison, lanes, bound), lanes, bound)
        return builder.bitcast(builder.trunc(lanes, ir.VectorType(i8, 4)), i32)

    return types.int32(types.int64, types.int64, types.int64), codegen


@numba.njit(nogil=True, cache=True)
def _bytes_at(address, count):
    return numba.carray(_pointer(address), (count,), np.uint8)


@numba.njit(nogil=True, cache=True)
def _filter(x, bicubic):
    x = abs(x)
    if not bicubic:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


@numba.njit(nogil=True, cache=True)
def resize_weights(length, full, place, window, bicubic):
    """First source pixel [window], tap count [window] and 22-bit weights [window, taps] of one axis (Resample.c)."""
    scale = length / full
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    shrink = 1.0 / stretch
    taps = math.ceil(support) * 2 + 1
    first = np.empty(window, np.int32)
    count = np.empty(window, np.int32)
    weights = np.zeros((window, taps), np.int32)
    exact = np.empty(taps, np.float64)
    for pixel in range(window):
        centre = (pixel + place + 0.5) * scale
        begin = max(int(centre - support + 0.5), 0)
        number = min(int(centre + support + 0.5), length) - begin
        total = 0.0
        for tap in range(number):
            exact[tap] = _filter((tap + begin - centre + 0.5) * shrink, bicubic)
            total += exact[tap]
        for tap in range(number):
            value = exact[tap] / total * 4194304.0
            weights[pixel, tap] = int(value - 0.5) if value < 0.0 else int(value + 0.5)
        # a weight of zero adds nothing: at scale 1 all taps but one are zero
        while number > 1 and weights[pixel, number - 1] == 0:
            number -= 1
        first[pixel] = begin
        count[pixel] = number
    return first, count, weights


@numba.njit(nogil=True, cache=True)
def _spread_weights(weights):
    # int32 [window, taps] -> [window, groups, 4, 4]: what _weighted_pixel multiplies four RGB pixels by.
    window, taps = weights.shape
    spread = np.zeros((window, (taps + 3) // 4, 4, 4), np.int32)
    for x in range(window):
        for tap in range(taps):
            spread[x, tap // 4, tap % 4, :3] = weights[x, tap]
    return spread


@numba.njit(nogil=True, cache=True)
def _resize_row(row, first, count, spread, out):
    # One source row, interleaved RGB uint8 with ROW_PADDING bytes more, to one planar row uint8 [3, window].
    pixels, weights = row.ctypes.data, spread.ctypes.data
    step = spread.shape[1] * 64
    for x in range(len(first)):
        rgb = _weighted_pixel(pixels + 3 * first[x], weights + x * step, (count[x] + 3) // 4)
        out[0, x] = rgb & 255
        out[1, x] = (rgb >> 8) & 255
        out[2, x] = (rgb >> 16) & 255


@numba.njit(nogil=True, cache=True)
def _resize_columns(rows, first, count, weights, y, line, out):
    # One output row of one channel: rows uint8 [n, window] -> out uint8 [window]; line is int32 scratch [window].
    line[:] = HALF
    for tap in range(count[y]):
        weight = weights[y, tap]
        row = rows[first[y] + tap]
        for x in range(len(line)):
            line[x] += weight * np.int32(row[x])
    for x in range(len(line)):
        out[x] = min(max(line[x] >> PRECISION_BITS, 0), 255)


@numba.njit(nogil=True, cache=True)
def _store_row(row, flip, address, step, size, table):
    # One output row of one channel to its place, through its byte table (of `size`-byte values) if it has one.
    width = len(row)
    span = (width - 1) * step + 1
    if flip:
        row = row[::-1]
    if size == 4:
        wide = numba.carray(_pointer(address), (span,), np.uint32)
        entry = numba.carray(_pointer(table), (256,), np.uint32)
        for x in range(width):
            wide[x * step] = entry[row[x]]
    elif size == 2:
        half = numba.carray(_pointer(address), (span,), np.uint16)
        short = numba.carray(_pointer(table), (256,), np.uint16)
        for x in range(width):
            half[x * step] = short[row[x]]
    elif table != 0:
        narrow = _bytes_at(address, span)
        byte = _bytes_at(table, 256)
        for x in range(width):
            narrow[x * step] = byte[row[x]]
    else:
        narrow = _bytes_at(address, span)
        for x in range(width):
            narrow[x * step] = row[x]


@numba.njit(nogil=True, cache=True)
def _stage_row(address, channel_step, column_step, row):
    # One source row of the box, any strides, as interleaved RGB uint8 [3 * w] (row is longer, its tail untouched).
    width = (len(row) - ROW_PADDING) // 3
    if channel_step == 1 and column_step == 3:
        source = _bytes_at(address, 3 * width)
        for place in range(3 * width):  # a slice assignment is ten times slower
            row[place] = source[place]
        return
    for channel in range(3):
        for x in range(width):
            row[3 * x + channel] = _bytes_at(address + channel * channel_step + x * column_step, 1)[0]


@numba.njit(nogil=True, cache=True)
def _crop_job(source, job, output, image):
    window_h, window_w = output[7], output[8]
    bicubic = job[FILTER] == BICUBIC
    x_first, x_count, x_weights = resize_weights(job[WIDTH], job[FULL_W], job[WINDOW_LEFT], window_w, bicubic)
    x_spread = _spread_weights(x_weights)
    y_first, y_count, y_weights = resize_weights(job[HEIGHT], job[FULL_H], job[WINDOW_TOP], window_h, bicubic)
    begin = y_first[0]
    end = y_first[window_h - 1] + y_count[window_h - 1]
    for y in range(window_h):  # the last row's taps need not reach furthest once its zero weights are gone
        end = max(end, y_first[y] + y_count[y])
    y_first -= begin
    rows = np.empty((3, end - begin, window_w), np.uint8)
    row = np.zeros(3 * job[WIDTH] + ROW_PADDING, np.uint8)
    address, channel_step, row_step, column_step = source
    address += job[TOP] * row_step + job[LEFT] * column_step
    for y in range(begin, end):
        _stage_row(address + y * row_step, channel_step, column_step, row)
        _resize_row(row, x_first, x_count, x_spread, rows[:, y - begin])
    line = np.empty(window_w, np.int32)
    finished = np.empty(window_w, np.uint8)
    size = output[5]
    for channel in range(3):
        place = output[0] + (image * output[1] + channel * output[2]) * size
        table = output[6] + channel * 256 * size if output[6] else 0
        for y in range(window_h):
            _resize_columns(rows[channel], y_first, y_count, y_weights, y, line, finished)
            _store_row(finished, job[FLIP] != 0, place + y * output[3] * size, output[4], size, table)


@numba.njit(nogil=True, cache=True)
def _crop_jobs(work, sources, jobs, outputs):
    # work int64 [n, 2] (image, crop), sources int64 [B, 4], jobs int32 [B, C, 10], outputs int64 [C, 9]
    for index in range(len(work)):
        image, crop = work[index]
        _crop_job(sources[image], jobs[image, crop], outputs[crop], image)


def resized_crop_cpu(
    images: RaggedBatch,
    jobs: np.ndarray,
    formats: Sequence[OutputFormat],
    out: Sequence[torch.Tensor] | None = None,
    pool: Executor | None = None,
    num_threads: int = 1,
) -> list[torch.Tensor]:
    """resized_crop on CPU tensors: the same arguments, the same bytes.

    pool: an executor whose `num_threads` threads share the work; None does it on the caller's thread.
    Raises ValueError for jobs that leave their image, and for outputs or tables that do not fit.
    """
    if images.device.type != "cpu":
        raise ValueError(f"the CPU kernel takes images on the CPU, got {images.device}")
    check_jobs(images.sizes, jobs, formats)
    count, crops = jobs.shape[:2]
    if out is None:
        out = empty_outputs(count, formats, images.device)
    check_outputs(out, count, formats, images.device)
    if not count or not crops:
        return list(out)
    outputs = np.array(
        [
            (
                tensor.data_ptr(),
                *tensor.stride(),
                tensor.element_size(),
                0 if fmt.table is None else fmt.table.data_ptr(),
                *fmt.size,
            )
            for tensor, fmt in zip(out, formats, strict=True)
        ],
        np.int64,
    )
    sources = np.concatenate([images.addresses[:, None], images.strides], axis=1)
    work = np.stack(np.divmod(np.arange(count * crops), crops), axis=1)
    if pool is None:
        _crop_jobs(work, sources, jobs, outputs)
    else:
        ends = np.cumsum(box_cost(jobs))
        shares = num_threads * SHARES
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, shares) / shares)
        for future in [pool.submit(_crop_jobs, part, sources, jobs, outputs) for part in np.split(work, cuts)]:
            future.result()
    return list(out)
