"""Source rows on the CPU as interleaved RGB bytes: of pixels of any strides, or of YUV 4:2:0 planes by their law.

Rows come one at a time into memory that stays in the first cache; whatever reads them need not know what they were.
"""

# Numba's intrinsics and carray are untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
from __future__ import annotations

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

from .ragged import RaggedBatch
from .yuv420 import HALF, OF_CB, OF_CR

# Columns of a source, int64 (RaggedBatch.table). BLUE is 0 in an RGB image.
ADDRESS, CHANNEL_STEP, ROW_STEP, COLUMN_STEP, BLUE, RED, CHROMA_STEP, CHROMA_H, CHROMA_W = range(9)

COLUMNS = 16  # chroma columns that become pixels at a time, two each


@intrinsic
def _pointer(typing_context, address):
    """An integer address as a pointer that numba.carray takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@numba.njit(nogil=True, cache=True)
def _bytes_at(address, count):
    return numba.carray(_pointer(address), (count,), np.uint8)


def _shuffle(builder: Any, first: Any, second: Any, order: Sequence[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order)))


@intrinsic
def _pixels_of_planes(typing_context, luma, blue, red, out):
    """2 * COLUMNS neighbouring pixels, from an even one on, as interleaved RGB bytes (rgb_of_planes's second half).

    luma: address of their Y. blue, red: addresses of int16 sums of two rows, 3 of the nearer and 1 of the farther, from
    the chroma column before theirs to the one behind. out: address of 6 * COLUMNS bytes.
    """

    def codegen(context, builder, signature, args):
        luma_at, blue_at, red_at, place = args
        i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
        lanes = 2 * COLUMNS

        def at(address, offset, kind):
            address = builder.add(address, ir.Constant(i64, offset))
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

        def splat(kind, value, count=lanes):
            return ir.Constant(ir.VectorType(kind, count), [value] * count)

        def chroma(address):
            # 3 of the nearer column, 1 of the farther, less 128: the left pixel of each column, then the right one
            before, middle, behind = (at(address, 2 * step, ir.VectorType(i16, COLUMNS)) for step in range(3))
            near = builder.mul(middle, splat(i16, 3, COLUMNS))
            pair = [
                builder.lshr(builder.add(builder.add(near, far), splat(i16, rounding, COLUMNS)), splat(i16, 4, COLUMNS))
                for far, rounding in ((before, 8), (behind, 7))
            ]
            order = [column + side * COLUMNS for column in range(COLUMNS) for side in range(2)]
            return builder.sub(_shuffle(builder, *pair, order), splat(i16, 128))

        def product(plane, share):
            # plane * share, |share| < 2**15, as the upper and the lower 16 bits
            wide = builder.mul(builder.sext(plane, ir.VectorType(i32, lanes)), splat(i32, share))
            upper = builder.trunc(builder.lshr(wide, splat(i32, 16)), ir.VectorType(i16, lanes))
            return upper, builder.mul(plane, splat(i16, share))

        def rounded(terms):
            # (the terms' sum + HALF) >> 16, each a plane and its share: whole multiples of the plane apart, what is
            # left of a share fits 16 bits, and so do all results
            total, below = splat(i16, 0), splat(i16, HALF)
            for plane, share in terms:
                whole = (share + HALF) >> 16
                total = builder.add(total, builder.mul(plane, splat(i16, whole)))
                upper, lower = product(plane, share - (whole << 16))
                below = builder.add(below, lower)
                carry = builder.zext(builder.icmp_unsigned("<", below, lower), ir.VectorType(i16, lanes))
                total = builder.add(total, builder.add(upper, carry))
            return total

        y = builder.zext(at(luma_at, 0, ir.VectorType(i8, lanes)), ir.VectorType(i16, lanes))
        cb, cr = chroma(blue_at), chroma(red_at)
        channels = []
        for of_cb, of_cr in zip(OF_CB, OF_CR, strict=True):
            terms = [(plane, share) for plane, share in ((cb, of_cb), (cr, of_cr)) if share]
            value = builder.add(y, rounded(terms))
            for limit, comparison in ((0, ">"), (255, "<")):
                bound = splat(i16, limit)
                value = builder.select(builder.icmp_signed(comparison, value, bound), value, bound)
            channels.append(builder.trunc(value, ir.VectorType(i8, lanes)))
        red_green = _shuffle(builder, channels[0], channels[1], range(2 * lanes))
        none = ir.Constant(ir.VectorType(i8, lanes), ir.Undefined)
        blue_wide = _shuffle(builder, channels[2], none, [*range(lanes), *[lanes] * lanes])
        order = [channel * lanes + pixel for pixel in range(lanes) for channel in range(3)]
        result = _shuffle(builder, red_green, blue_wide, order)
        builder.store(result, builder.inttoptr(place, ir.VectorType(i8, 3 * lanes).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@numba.njit(nogil=True, cache=True)
def stage_row(address, channel_step, column_step, width, staged):
    # One source row of the box, any strides, as interleaved RGB uint8 [3 * width] at the address `staged`.
    row = _bytes_at(staged, 3 * width)
    if channel_step == 1 and column_step == 3:
        source = _bytes_at(address, 3 * width)
        for place in range(3 * width):  # a slice assignment is ten times slower
            row[place] = source[place]
        return
    for channel in range(3):
        for x in range(width):
            row[3 * x + channel] = _bytes_at(address + channel * channel_step + x * column_step, 1)[0]


@numba.njit(nogil=True, cache=True)
def _sum_two_rows(near, far, first, count, last, sums):
    # int16 [count + 2] at `sums`: three of the nearer row and one of the farther, in chroma columns first - 1 ... first
    # + count; what is beyond the plane, whose last column is `last`, is its edge's.
    begin, end = max(first - 1, 0), min(first + count, last)
    length = end - begin + 1
    a, b = _bytes_at(near + begin, length), _bytes_at(far + begin, length)
    out = numba.carray(_pointer(sums), (count + 2,), np.int16)
    shift = begin - (first - 1)
    inner = out[shift : shift + length]
    for column in range(length):
        inner[column] = np.int16(3) * a[column] + b[column]
    if shift:
        out[0] = out[1]
    if shift + length < count + 2:
        out[count + 1] = out[count]


@numba.njit(nogil=True, cache=True)
def chroma_columns(left, width):
    """How many chroma columns the pixels left ... left + width - 1 lie in, to a multiple of what is made at a time."""
    return ((left + width - 1) // 2 - left // 2 + COLUMNS) // COLUMNS * COLUMNS


@numba.njit(nogil=True, cache=True)
def scratch_bytes(left, width):
    """The memory that `stage_planes` works in: a row of Y, and the sums of two rows of Cb and of Cr."""
    columns = chroma_columns(left, width)
    return 2 * columns + 2 * 2 * (columns + 2)


@numba.njit(nogil=True, cache=True)
def stage_planes(source, y, left, width, scratch, out):
    """Pixels left ... left + width - 1 of row y as interleaved RGB, from the even pixel at or before `left` on.

    source: int64 [9] of planes. scratch: address of scratch_bytes. out: address of 6 * chroma_columns
    bytes.
    """
    first, count = left // 2, (left + width - 1) // 2 - left // 2 + 1
    columns = chroma_columns(left, width)
    pixels = left + width - 2 * first
    luma = _bytes_at(source[ADDRESS] + y * source[ROW_STEP] + 2 * first, pixels)
    row = _bytes_at(scratch, pixels)
    for x in range(pixels):
        row[x] = luma[x]
    blue = scratch + 2 * columns
    red = blue + 2 * (columns + 2)
    near = y // 2
    far = min(max(near + y % 2 * 2 - 1, 0), source[CHROMA_H] - 1)
    near, far, last = near * source[CHROMA_STEP], far * source[CHROMA_STEP], source[CHROMA_W] - 1
    _sum_two_rows(source[BLUE] + near, source[BLUE] + far, first, count, last, blue)
    _sum_two_rows(source[RED] + near, source[RED] + far, first, count, last, red)
    for column in range(0, count, COLUMNS):
        step = 2 * column
        _pixels_of_planes(scratch + step, blue + step, red + step, out + 3 * step)


@numba.njit(nogil=True, cache=True)
def _images_of_planes(sources, outputs):
    # sources int64 [n, 9] of planes with (h, w) in two more columns, outputs int64 [n]: addresses of [H, W, 3] bytes
    for index in range(len(sources)):
        source, out = sources[index], outputs[index]
        height, width = source[9], source[10]
        scratch = np.empty(scratch_bytes(0, width), np.uint8)
        made = np.empty(6 * chroma_columns(0, width), np.uint8)
        for y in range(height):
            stage_planes(source, y, 0, width, scratch.ctypes.data, made.ctypes.data)
            row = _bytes_at(out + 3 * width * y, 3 * width)
            for place in range(3 * width):
                row[place] = made[place]


def images_as_rgb(images: RaggedBatch, pool: Executor | None = None, num_threads: int = 1) -> list[torch.Tensor]:
    """Every image of a batch on the CPU as RaggedBatch.image gives it, YUV made RGB by the pool's threads."""
    if images.chroma is None:
        return [images.image(index) for index in range(len(images))]
    rows = np.flatnonzero(images.chroma[:, 0])
    made = {int(row): np.empty((*images.sizes[row], 3), np.uint8) for row in rows}
    sources = np.concatenate([images.table(), images.sizes], axis=1)[rows]
    outputs = np.array([array.ctypes.data for array in made.values()], np.int64)
    parts = zip(np.array_split(sources, num_threads), np.array_split(outputs, num_threads), strict=True)
    if pool is None:
        _images_of_planes(sources, outputs)
    else:
        for future in [pool.submit(_images_of_planes, *part) for part in parts]:
            future.result()
    return [
        torch.from_numpy(made[index]).permute(2, 0, 1) if index in made else images.image(index)
        for index in range(len(images))
    ]
