"""Blurs and sharpness on the CPU: rows of a whole image, float32 or bytes and planar, into a band.

A Gaussian blur goes down first, then across the one row that gives, which stays in the first cache; its sums are LLVM
vectors written out, for LLVM's vectoriser keeps them in memory between two taps. A box blur works in bytes on the whole
image. Row loops pass addresses, not arrays, whose reference counts are atomic.
"""

# Numba's intrinsics and carray are untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .color_cpu import ONE, F
from .source_rows_cpu import _pointer

LANES = 32  # float32 values summed at a time: a row's memory is a multiple of this
ROUND = np.uint32(1 << 23)  # half of a box blur's 24-bit one
SHIFT = np.uint32(24)


@intrinsic
def _weighted_sum(typing_context, rows, offset, weights, taps, out):
    """LANES sums over taps of float32 values: rows is the address of `taps` addresses (int64), each plus `offset`;
    weights that of float32 [taps], out that of the sums."""

    def codegen(context, builder, signature, args):
        row_table, place, weight_table, count, target = args
        real, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        lanes = ir.VectorType(real, LANES)

        def at(address, kind, align):
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

        total = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * LANES))
        with cgutils.for_range(builder, count) as loop:
            row = at(builder.add(row_table, builder.mul(loop.index, ir.Constant(i64, 8))), i64, 8)
            values = at(builder.add(row, place), lanes, 4)
            weight = at(builder.add(weight_table, builder.mul(loop.index, ir.Constant(i64, 4))), real, 4)
            single = builder.insert_element(ir.Constant(lanes, ir.Undefined), weight, ir.Constant(i32, 0))
            zeros = ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)
            product = builder.fmul(values, builder.shuffle_vector(single, single, zeros))
            builder.store(builder.fadd(builder.load(total), product), total)
        builder.store(builder.load(total), builder.inttoptr(target, lanes.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@numba.njit(nogil=True, cache=True)
def blur_weights(taps, sigma):
    """A Gaussian's weights, float32 [taps], as torchvision has them: a softmax over -(distance / sigma)**2 / 2."""
    weights = np.empty(taps, np.float32)
    total = 0.0
    for tap in range(taps):
        weights[tap] = math.exp(-0.5 * ((tap - taps // 2) / sigma) ** 2)
        total += weights[tap]
    for tap in range(taps):
        weights[tap] /= total
    return weights


@numba.njit(nogil=True, cache=True)
def start_blur(op, rows, width):
    """What blur_band needs of one image: weights across and down, room for their taps' addresses, and the rows between
    the two, float32 [rows, at least width + a kernel less one]."""
    across, down = int(op[1]), int(op[2])
    between = np.empty((rows, (width + LANES - 1) // LANES * LANES + across + LANES), np.float32)
    return blur_weights(across, op[3]), blur_weights(down, op[4]), np.empty(max(across, down), np.int64), between


@numba.njit(nogil=True, cache=True)
def blur_band(blur, whole, pitch, size, top, rows, band):
    """Rows top ... top + rows - 1 of a Gaussian blur of an image into a band (which needs LANES values beyond them).

    blur: start_blur's. whole: address of the image, float32 [3, h, pitch], pitch a multiple of LANES. size: (h, w).
    """
    across, down, taps, between = blur
    height, width = size
    reach_x, reach_y = len(across) // 2, len(down) // 2
    weights_x, weights_y, addresses = across.ctypes.data, down.ctypes.data, taps.ctypes.data
    first, step = between.ctypes.data, 4 * between.shape[1]
    for channel in range(3):
        plane = whole + 4 * channel * height * pitch
        target = band[channel].ctypes.data
        for y in range(rows):
            for tap in range(len(down)):
                row = abs(top + y + tap - reach_y)
                row = row if row < height else 2 * (height - 1) - row
                taps[tap] = plane + 4 * row * pitch
            for x in range(0, width, LANES):
                _weighted_sum(addresses, 4 * x, weights_y, len(down), first + y * step + 4 * (reach_x + x))
            for x in range(reach_x):
                between[y, reach_x - 1 - x] = between[y, reach_x + 1 + x]
                between[y, reach_x + width + x] = between[y, reach_x + width - 2 - x]
        # values just written are slow to read at other places: all rows down, then all across
        for y in range(rows):
            for tap in range(len(across)):
                taps[tap] = first + y * step + 4 * tap
            for x in range(0, width, LANES):
                _weighted_sum(addresses, 4 * x, weights_x, len(across), target + 4 * (y * width + x))


@numba.njit(nogil=True, cache=True)
def _sharpen_row(above, row, below, factor, width, out):
    # One row inside an image; all four are addresses of float32 [width].
    a, b = numba.carray(_pointer(above), (width,), np.float32), numba.carray(_pointer(row), (width,), np.float32)
    c, values = numba.carray(_pointer(below), (width,), np.float32), numba.carray(_pointer(out), (width,), np.float32)
    rest = (ONE - factor) / F(13)
    for x in range(1, width - 1):
        around = (a[x - 1] + a[x] + a[x + 1]) + (c[x - 1] + c[x] + c[x + 1]) + (b[x - 1] + b[x + 1])
        values[x] = min(max(b[x] * factor + (around + b[x] * F(5)) * rest, F(0)), ONE)


@numba.njit(nogil=True, cache=True)
def sharpen_band(factor, whole, pitch, size, top, rows, band):
    """Rows top ... top + rows - 1 of an image sharpened into a band; arguments as blur_band's."""
    height, width = size
    for channel in range(3):
        plane = whole + 4 * channel * height * pitch
        for y in range(top, top + rows):
            row = plane + 4 * y * pitch
            values = numba.carray(_pointer(row), (width,), np.float32)
            out = band[channel, (y - top) * width : (y - top + 1) * width]
            if 0 < y < height - 1:
                _sharpen_row(row - 4 * pitch, row, row + 4 * pitch, factor, width, out.ctypes.data)
                out[0] = values[0]
                out[width - 1] = values[width - 1]
            else:
                for x in range(width):
                    out[x] = values[x]


@numba.njit(nogil=True, cache=True)
def _bytes_at(address, count):
    return numba.carray(_pointer(address), (count,), np.uint8)


@numba.njit(nogil=True, cache=True)
def _box_row(taps, inner, outer, sums, count, target):
    # `count` neighbouring bytes of a box blur at the address `target`. taps: addresses of the bytes that each of the
    # 2 * reach + 3 taps reads, int64; the outermost two weigh `outer`, those between `inner`, in 24-bit fixed point.
    out, last = _bytes_at(target, count), len(taps) - 1
    first, end = _bytes_at(taps[0], count), _bytes_at(taps[last], count)
    if last == 2:  # radius below 1
        middle = _bytes_at(taps[1], count)
        for x in range(count):
            total = inner * np.uint32(middle[x]) + outer * (np.uint32(first[x]) + np.uint32(end[x])) + ROUND
            out[x] = np.uint8(np.uint32(total) >> SHIFT)
        return
    a, b, c = _bytes_at(taps[1], count), _bytes_at(taps[2], count), _bytes_at(taps[3], count)
    if last == 4:  # below 2
        for x in range(count):
            total = inner * (np.uint32(a[x]) + np.uint32(b[x]) + np.uint32(c[x]))
            total += outer * (np.uint32(first[x]) + np.uint32(end[x])) + ROUND
            out[x] = np.uint8(np.uint32(total) >> SHIFT)
        return
    for x in range(count):
        sums[x] = np.uint16(a[x]) + np.uint16(b[x]) + np.uint16(c[x])
    for tap in range(4, last, 2):
        a, b = _bytes_at(taps[tap], count), _bytes_at(taps[tap + 1], count)
        for x in range(count):
            sums[x] += np.uint16(a[x]) + np.uint16(b[x])
    for x in range(count):
        total = inner * np.uint32(sums[x]) + outer * (np.uint32(first[x]) + np.uint32(end[x])) + ROUND
        out[x] = np.uint8(np.uint32(total) >> SHIFT)


@numba.njit(nogil=True, cache=True)
def _repeat_ends(row, edge, width):
    # The ends of the row of bytes at an address, repeated `edge` times beside it.
    values = _bytes_at(row - edge, width + 2 * edge)
    left, right = values[edge], values[edge + width - 1]
    for x in range(edge):
        values[x] = left
        values[edge + width + x] = right


@numba.njit(nogil=True, cache=True)
def box_edge(radius):
    """How many bytes a row of box_blur's images needs beyond its width on either side."""
    return int(radius) + 1


@numba.njit(nogil=True, cache=True)
def box_blur(radius, whole, other, height, width):
    """Three box blurs an axis, across first, each rounded to bytes as in Pillow's BoxBlur.c, its ends repeated.

    whole, other: addresses of the first pixel of two images, uint8 [3, h, w + 2 * box_edge] in memory; the first is
    blurred in place, by way of the second. A pass takes a plane at a time, for bytes just written are slow to read.
    """
    reach, edge = int(radius), box_edge(radius)
    inner = np.uint32(F(1 << 24) / (F(radius) * F(2) + ONE))
    outer = np.uint32(((1 << 24) - (2 * reach + 1) * np.int64(inner)) // 2)
    taps = np.empty(2 * reach + 3, np.int64)
    sums = np.empty(width, np.uint16)
    pitch = width + 2 * edge
    for channel in range(3):
        here, there = whole + channel * height * pitch, other + channel * height * pitch
        for turn in range(6):
            for y in range(height):
                if turn < 3:
                    _repeat_ends(here + y * pitch, edge, width)
                for tap in range(len(taps)):
                    if turn < 3:
                        taps[tap] = here + y * pitch + tap - edge
                    else:
                        taps[tap] = here + min(max(y + tap - edge, 0), height - 1) * pitch
                _box_row(taps, inner, outer, sums, width, there + y * pitch)
            here, there = there, here
