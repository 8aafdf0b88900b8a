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
from typing import Any

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
    FLIP_HORIZONTAL,
    FLIP_VERTICAL,
    FULL_H,
    FULL_W,
    HEIGHT,
    LEFT,
    NO_ANTIALIAS,
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
from .source_rows_cpu import (
    ADDRESS,
    BLUE,
    CHANNEL_STEP,
    COLUMN_STEP,
    ROW_STEP,
    _bytes_at,
    _pointer,
    _shuffle,
    chroma_columns,
    scratch_bytes,
    stage_planes,
    stage_row,
)

HALF = 1 << (PRECISION_BITS - 1)
SHARES = 4  # shares of work for each thread: enough to even out what the cost estimate misses
LANES = 32  # pixels of the vertical pass at a time


def _rounded_bytes(builder: Any, sums: Any, lanes: int) -> Any:
    # 22-bit fixed-point sums, their rounding half already added, as bytes.
    vector = ir.VectorType(ir.IntType(32), lanes)
    sums = builder.ashr(sums, ir.Constant(vector, [PRECISION_BITS] * lanes))
    for limit, comparison in ((0, ">"), (255, "<")):
        bound = ir.Constant(vector, [limit] * lanes)
        sums = builder.select(builder.icmp_signed(comparison, sums, bound), sums, bound)
    return builder.trunc(sums, ir.VectorType(ir.IntType(8), lanes))


# The two passes are LLVM vectors written out, because LLVM's vectoriser leaves the first loop scalar (three multiplies
# a tap where one instruction does twelve) and keeps the second one's sums in memory.


def _weighted_pixels(fixed_groups: int | None):
    """The horizontal pass of four output pixels: sums over 4 * groups taps each, rounded to bytes, planar.

    The intrinsic's arguments, all int64. pixels: address of a row of interleaved RGB bytes. firsts: address of the four
    outputs' first source pixels, int32. weights: address of int32 [4, groups, 4, 4], each weight three times and a
    zero. out: address of four red bytes; green and blue go one and two `plane` bytes further. Reads four bytes past the
    last tap. With the groups fixed there is no loop: for one to three of them it would cost more than the work.
    """

    @intrinsic
    def weighted_pixels(typing_context, pixels, firsts, weights, groups, out, plane):
        def codegen(context, builder, signature, args):
            pixel_row, first_table, weight_table, count, place, plane_step = args
            i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
            bytes16, lanes16 = ir.VectorType(i8, 16), ir.VectorType(i32, 16)
            spread = [0, 1, 2, 16, 3, 4, 5, 16, 6, 7, 8, 16, 9, 10, 11, 16]  # 16 is a zero

            def at(address, kind, align):
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

            def number(value):
                return ir.Constant(i64, value)

            def add_group(total, source, table, index):
                pixel = at(builder.add(source, builder.mul(index, number(12))), bytes16, 1)
                pixel = _shuffle(builder, pixel, ir.Constant(bytes16, [0] * 16), spread)
                weight = at(builder.add(table, builder.mul(index, number(64))), lanes16, 4)
                return builder.add(total, builder.mul(builder.zext(pixel, lanes16), weight))

            outputs = []
            for output in range(4):
                first = builder.sext(at(builder.add(first_table, number(4 * output)), i32, 4), i64)
                source = builder.add(pixel_row, builder.mul(first, number(3)))
                table = builder.add(weight_table, builder.mul(count, number(64 * output)))
                lanes = ir.Constant(lanes16, [HALF] * 3 + [0] * 13)
                if fixed_groups is None:
                    total = cgutils.alloca_once_value(builder, lanes)
                    with cgutils.for_range(builder, count) as loop:
                        builder.store(add_group(builder.load(total), source, table, loop.index), total)
                    lanes = builder.load(total)
                else:
                    for index in range(fixed_groups):
                        lanes = add_group(lanes, source, table, number(index))
                for half in (8, 4):
                    low = _shuffle(builder, lanes, lanes, range(half))
                    lanes = builder.add(low, _shuffle(builder, lanes, lanes, range(half, 2 * half)))
                outputs.append(lanes)
            pairs = [_shuffle(builder, outputs[i], outputs[i + 1], range(8)) for i in (0, 2)]
            rgb = _rounded_bytes(builder, _shuffle(builder, *pairs, range(16)), 16)
            planar = _shuffle(builder, rgb, rgb, [4 * output + channel for channel in range(4) for output in range(4)])
            planar = builder.bitcast(planar, ir.VectorType(i32, 4))
            for channel in range(3):
                four = builder.extract_element(planar, ir.Constant(i32, channel))
                builder.store(four, builder.inttoptr(place, i32.as_pointer()), align=1)
                place = builder.add(place, plane_step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return weighted_pixels


_one_group, _two_groups, _three_groups, _any_groups = map(_weighted_pixels, (1, 2, 3, None))


@intrinsic
def _weighted_rows(typing_context, rows, step, weights, count, out):
    """The vertical pass of LANES neighbouring pixels of one channel: a sum over `count` rows, rounded to bytes.

    rows: address of the first row's pixels, the others `step` bytes apart. weights: address of int32 [count]. out:
    address of LANES bytes.
    """

    def codegen(context, builder, signature, args):
        row_address, row_step, weight_address, taps, place = args
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        byte_row, lanes = ir.VectorType(i8, LANES), ir.VectorType(i32, LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(lanes, [HALF] * LANES))
        with cgutils.for_range(builder, taps) as loop:
            row = builder.add(row_address, builder.mul(loop.index, row_step))
            pixel = builder.zext(builder.load(builder.inttoptr(row, byte_row.as_pointer()), align=1), lanes)
            weight = builder.add(weight_address, builder.mul(loop.index, ir.Constant(i64, 4)))
            weight = builder.load(builder.inttoptr(weight, i32.as_pointer()), align=4)
            single = builder.insert_element(ir.Constant(lanes, ir.Undefined), weight, ir.Constant(i32, 0))
            product = builder.mul(pixel, _shuffle(builder, single, single, [0] * LANES))
            builder.store(builder.add(builder.load(total), product), total)
        result = _rounded_bytes(builder, builder.load(total), LANES)
        builder.store(result, builder.inttoptr(place, byte_row.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@numba.njit(nogil=True, cache=True)
def _filter(x, bicubic):
    x = abs(x)
    if not bicubic:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


@numba.njit(nogil=True, cache=True)
def resize_weights(length, full, place, window, kind):
    """First source pixel [window], tap count [window] and 22-bit weights [window, taps] of one axis (Resample.c)."""
    scale = length / full
    bicubic = bool(kind & BICUBIC)
    stretch = 1.0 if kind & NO_ANTIALIAS else max(scale, 1.0)
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
def _spread_weights(weights, taps):
    # int32 [window, at least taps] -> [window to a multiple of 4, groups, 4, 4]: what _weighted_pixels multiplies by.
    window = len(weights)
    spread = np.zeros(((window + 3) // 4 * 4, (taps + 3) // 4, 4, 4), np.int32)
    for x in range(window):
        for tap in range(taps):
            spread[x, tap // 4, tap % 4, :3] = weights[x, tap]
    return spread


@numba.njit(nogil=True, cache=True)
def _resize_row(row, starts, weights, shape, out, plane):
    # One source row, interleaved RGB bytes (readable past its taps), to planar bytes, 4 a step; all by addresses, for
    # an array's reference count is an atomic number, and costs more than a short row.
    groups = shape[1]
    step = groups * 64
    if groups == 1:
        for x in range(0, shape[0], 4):
            _one_group(row, starts + 4 * x, weights + x * step, groups, out + x, plane)
    elif groups == 2:
        for x in range(0, shape[0], 4):
            _two_groups(row, starts + 4 * x, weights + x * step, groups, out + x, plane)
    elif groups == 3:
        for x in range(0, shape[0], 4):
            _three_groups(row, starts + 4 * x, weights + x * step, groups, out + x, plane)
    else:
        for x in range(0, shape[0], 4):
            _any_groups(row, starts + 4 * x, weights + x * step, groups, out + x, plane)


@numba.njit(nogil=True, cache=True)
def _store_row(source, width, address, step, size, table):
    # One output row of one channel to its place, through its byte table (of `size`-byte values) if it has one.
    span = (width - 1) * step + 1
    row = _bytes_at(source, width)
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
    elif step == 1:  # known here, so that LLVM copies vectors
        narrow = _bytes_at(address, span)
        for x in range(width):
            narrow[x] = row[x]
    else:
        narrow = _bytes_at(address, span)
        for x in range(width):
            narrow[x * step] = row[x]


@numba.njit(nogil=True, cache=True)
def _horizontal(source, job, begin, end, x_first, x_taps, x_weights, rows):
    # Rows begin ... end - 1 of the box, resized across into rows: uint8 [3, end - begin, width], width over the window.
    spread = _spread_weights(x_weights, x_taps)
    firsts = np.zeros(len(spread), np.int32)
    firsts[: len(x_first)] = x_first
    left, width, is_planes = job[LEFT], job[WIDTH], source[BLUE] != 0
    pixels = 2 * chroma_columns(left, width) if is_planes else width
    row = np.zeros(3 * pixels + 12 * spread.shape[1] + 4, np.uint8)
    scratch = np.empty(scratch_bytes(left, width) if is_planes else 0, np.uint8)
    staged, starts, weights, out = row.ctypes.data, firsts.ctypes.data, spread.ctypes.data, rows.ctypes.data
    address = source[ADDRESS] + (job[TOP] + begin) * source[ROW_STEP] + left * source[COLUMN_STEP]
    for y in range(job[TOP] + begin, job[TOP] + end):
        if is_planes:
            stage_planes(source, y, left, width, scratch.ctypes.data, staged)
        else:
            stage_row(address, source[CHANNEL_STEP], source[COLUMN_STEP], width, staged)
            address += source[ROW_STEP]
        first = staged + 3 * (left % 2) if is_planes else staged
        _resize_row(first, starts, weights, spread.shape, out, rows.shape[1] * rows.shape[2])
        out += rows.shape[2]
    return (
        len(row) + len(firsts) + len(spread) + len(scratch)
    )  # so that they live until here: Numba counts no addresses


@numba.njit(nogil=True, cache=True)
def _vertical(rows, channel, first, count, weights, output, place, table):
    # One channel's rows, uint8 [3, n, width], resized down and stored.
    finished = np.empty(rows.shape[2], np.uint8)
    line, top_row, taps = finished.ctypes.data, rows[channel].ctypes.data, weights.ctypes.data
    size, row_step, column_step = output[5], output[3] * output[5], output[4]
    for y in range(output[7]):
        top = top_row + first[y] * rows.shape[2]
        for x in range(0, rows.shape[2], LANES):
            _weighted_rows(top + x, rows.shape[2], taps, count[y], line + x)
        _store_row(line, output[8], place, column_step, size, table)
        place += row_step
        taps += 4 * weights.shape[1]
    return len(finished)  # as above


@numba.njit(nogil=True, cache=True)
def _crop_job(source, job, output, image):
    window_h, window_w = output[7], output[8]
    x_first, x_count, x_weights = resize_weights(job[WIDTH], job[FULL_W], job[WINDOW_LEFT], window_w, job[FILTER])
    y_first, y_count, y_weights = resize_weights(job[HEIGHT], job[FULL_H], job[WINDOW_TOP], window_h, job[FILTER])
    begin, end = y_first[0], (y_first + y_count).max()
    # a flipped crop is the same sums in the other order
    if job[FLIP] & FLIP_HORIZONTAL:
        x_first, x_weights = x_first[::-1].copy(), x_weights[::-1].copy()
    if job[FLIP] & FLIP_VERTICAL:
        y_first, y_count, y_weights = y_first[::-1].copy(), y_count[::-1].copy(), y_weights[::-1].copy()
    rows = np.empty((3, end - begin, (window_w + LANES - 1) // LANES * LANES), np.uint8)
    _horizontal(source, job, begin, end, x_first, x_count.max(), x_weights, rows)
    for channel in range(3):
        place = output[0] + (image * output[1] + channel * output[2]) * output[5]
        table = output[6] + channel * 256 * output[5] if output[6] else 0
        _vertical(rows, channel, y_first - begin, y_count, y_weights, output, place, table)


@numba.njit(nogil=True, cache=True)
def _crop_jobs(work, sources, jobs, outputs):
    # work int64 [n, 2] (image, crop), sources int64 [B, 9], jobs int32 [B, C, 10], outputs int64 [C, 9]
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
    tables = [0 if fmt.table is None else fmt.table.data_ptr() for fmt in formats]
    rows = [
        (tensor.data_ptr(), *tensor.stride(), tensor.element_size(), table, *fmt.size)
        for tensor, table, fmt in zip(out, tables, formats, strict=True)
    ]
    outputs = np.array(rows, np.int64)
    sources = images.table()
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
