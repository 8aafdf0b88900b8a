"""Pixels between memory of any strides and bands: a few rows of an image, float32 and planar, small enough for the
first cache.

A band is float32 [3, at least rows * width]. Steps are in bytes (channel, row, column); rows are sliced outside the
loops and constant steps spelled out, so that LLVM's loads and stores become vectors.
"""

# Numba's carray is untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import numba
import numpy as np

from .color_cpu import BYTE, HALF, TOP, ZERO, F
from .source_rows_cpu import _pointer

IN_BYTES, IN_HALVES, IN_BFLOATS, IN_FLOATS = 0, 1, 2, 3  # how values lie in memory

WHOLE = F(2**23)  # added and taken away again, it leaves a positive float rounded half to even
HALF_BITS = np.uint32(0x3F000000)  # 0.5 as bits
MAGNITUDE = np.uint32(0x7FFFFFFF)
NORMAL16 = np.uint32((127 - 14) << 23)  # 2**-14, the least normal float16
PAST16 = np.uint32(0x477FF000)  # 65520: from here on a float16 is infinite
INFINITE = np.uint32(0x7F800000)


@numba.njit(nogil=True, cache=True)
def _load_bytes(source, channel_step, column_step, band, begin, width):
    # One row of bytes, any steps, scaled to [0, 1] into the band from `begin` on.
    if column_step == 1:  # known here, so that LLVM loads vectors
        for channel in range(3):
            row = numba.carray(_pointer(source + channel * channel_step), (width,), np.uint8)
            out = band[channel, begin : begin + width]
            for x in range(width):
                out[x] = F(row[x]) * BYTE
        return
    red, green, blue = band[0, begin:], band[1, begin:], band[2, begin:]
    row = numba.carray(_pointer(source), (2 * channel_step + (width - 1) * column_step + 1,), np.uint8)
    if column_step == 3 and channel_step == 1:
        for x in range(width):
            red[x] = F(row[3 * x]) * BYTE
            green[x] = F(row[3 * x + 1]) * BYTE
            blue[x] = F(row[3 * x + 2]) * BYTE
    else:
        for x in range(width):
            place = x * column_step
            red[x] = F(row[place]) * BYTE
            green[x] = F(row[place + channel_step]) * BYTE
            blue[x] = F(row[place + 2 * channel_step]) * BYTE


@numba.njit(nogil=True, cache=True)
def _load_floats(source, channel_step, column_step, band, begin, width):
    # The same of float32 values in [0, 1].
    if column_step == 4:
        for channel in range(3):
            row = numba.carray(_pointer(source + channel * channel_step), (width,), np.float32)
            out = band[channel, begin : begin + width]
            for x in range(width):
                out[x] = row[x]
        return
    step = column_step // 4
    for channel in range(3):
        row = numba.carray(_pointer(source + channel * channel_step), ((width - 1) * step + 1,), np.float32)
        out = band[channel, begin : begin + width]
        for x in range(width):
            out[x] = row[x * step]


@numba.njit(nogil=True, cache=True)
def load_band(source, steps, kind, band, rows, width):
    """Rows from the address `source` on into a band: IN_BYTES scaled to [0, 1], IN_FLOATS as they are."""
    for y in range(rows):
        place = source + y * steps[2]
        if kind == IN_BYTES:
            _load_bytes(place, steps[1], steps[3], band, y * width, width)
        else:
            _load_floats(place, steps[1], steps[3], band, y * width, width)


@numba.njit(nogil=True, cache=True)
def _to_bytes(values, cells, count):
    for x in range(count):
        cells[x] = np.uint8((min(max(values[x] * TOP, ZERO), TOP) + WHOLE) - WHOLE)


@numba.njit(nogil=True, cache=True)
def _to_bfloat16(values, cells, count):
    for x in range(count):
        bits = np.float32(values[x]).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (bits & MAGNITUDE) > INFINITE  # rounding could carry it into the sign
        cells[x] = np.uint16(np.uint32(0x7FC0) if nan else rounded)


@numba.njit(nogil=True, cache=True)
def _to_float16(values, cells, count):
    for x in range(count):
        bits = np.float32(values[x]).view(np.uint32)
        size = bits & MAGNITUDE
        rounded = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        normal = rounded - np.uint32(112 << 10)
        # the last bit of a float32 in [0.5, 1) is worth the least float16, so the addition rounds as needed
        small = np.float32(abs(values[x]) + HALF).view(np.uint32) - HALF_BITS
        half = small if size < NORMAL16 else normal
        half = np.uint32(0x7C00) if size >= PAST16 else half
        half = np.uint32(0x7E00) if size > INFINITE else half
        cells[x] = np.uint16(half | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@numba.njit(nogil=True, cache=True)
def _store(cells, target, steps, rows, width):
    # Finished values [3, rows * width] to their places; steps as in the table.
    size = cells.itemsize
    channel_step, column_step = steps[1] // size, steps[3] // size
    for y in range(rows):
        place = target + y * steps[2]
        if column_step == 1:
            for channel in range(3):
                out = numba.carray(_pointer(place + channel * steps[1]), (width,), cells.dtype)
                values = cells[channel, y * width : (y + 1) * width]
                for x in range(width):
                    out[x] = values[x]
            continue
        red, green, blue = cells[0, y * width :], cells[1, y * width :], cells[2, y * width :]
        out = numba.carray(_pointer(place), (2 * channel_step + (width - 1) * column_step + 1,), cells.dtype)
        if column_step == 3 and channel_step == 1:
            for x in range(width):
                out[3 * x] = red[x]
                out[3 * x + 1] = green[x]
                out[3 * x + 2] = blue[x]
        else:
            for x in range(width):
                out[x * column_step] = red[x]
                out[x * column_step + channel_step] = green[x]
                out[x * column_step + 2 * channel_step] = blue[x]


@numba.njit(nogil=True, cache=True)
def start_cells(count):
    """Room for a band's pixels on their way out: uint8 and uint16 [3, count]."""
    return np.empty((3, count), np.uint8), np.empty((3, count), np.uint16)


@numba.njit(nogil=True, cache=True)
def store_band(band, cells, target, steps, kind, rows, width):
    """A band to the address `target` as `kind` of values: bytes are x * 255 rounded half to even, halves casts."""
    count = rows * width
    small, short = cells
    if kind == IN_FLOATS:
        _store(band, target, steps, rows, width)
    elif kind == IN_BYTES:
        for channel in range(3):
            _to_bytes(band[channel], small[channel], count)
        _store(small, target, steps, rows, width)
    else:
        for channel in range(3):
            if kind == IN_HALVES:
                _to_float16(band[channel], short[channel], count)
            else:
                _to_bfloat16(band[channel], short[channel], count)
        _store(short, target, steps, rows, width)
