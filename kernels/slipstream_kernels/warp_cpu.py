"""Warps on the CPU: each output pixel of a band looks up its place in a whole image, float32 and planar.

The place of pixel (x, y), with px = x + 0.5 and py = y + 0.5, is ((a px + b py + c) / u - 0.5, (d px + e py + f) / u
- 0.5), u = g px + h py + 1; what lies outside the image is zero, or blended with a fill as torchvision blends it.
"""

# Numba's carray is untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import numba
import numpy as np

from .color_cpu import HALF, ONE, ZERO, F
from .ops import NEAREST
from .source_rows_cpu import _pointer


@numba.njit(nogil=True, cache=True, error_model="numpy")  # a division by zero raises nothing
def _places(op, y, columns, rows):
    # Where the pixels of row y come from: float32 [width] each.
    py = F(y) + HALF
    x_start, y_start, under_start = op[2] * py, op[5] * py, op[8] * py
    if op[7] == ZERO and op[8] == ZERO:  # a division by 1
        for x in range(len(columns)):
            px = F(x) + HALF
            columns[x] = op[1] * px + x_start + op[3] - HALF
            rows[x] = op[4] * px + y_start + op[6] - HALF
        return
    for x in range(len(columns)):
        px = F(x) + HALF
        under = op[7] * px + under_start + ONE
        columns[x] = (op[1] * px + x_start + op[3]) / under - HALF
        rows[x] = (op[4] * px + y_start + op[6]) / under - HALF


@numba.njit(nogil=True, cache=True)
def start_warp(width):
    """Room for where a row's pixels come from: columns and rows, float32 [width]."""
    return np.empty(width, np.float32), np.empty(width, np.float32)


@numba.njit(nogil=True, cache=True)
def warp_band(op, places, whole, pitch, size, top, rows, band):
    """Rows top ... top + rows - 1 of a warped image into a band.

    op: WARP's row of a program. places: start_warp's. whole: address of the image, float32 [3, h, pitch]. size: (h, w).
    """
    height, width = size
    plane = height * pitch
    values = numba.carray(_pointer(whole), (3 * plane,), np.float32)
    for y in range(rows):
        _places(op, top + y, places[0], places[1])
        if op[9] == F(NEAREST):
            _nearest(op, places, values, plane, pitch, size, band, y * width)
        else:
            _bilinear(op, places, values, plane, pitch, size, band, y * width)


@numba.njit(nogil=True, cache=True)
def _fill(op):
    return op[10] * op[13], op[11] * op[13], op[12] * op[13]


@numba.njit(nogil=True, cache=True)
def _nearest(op, places, values, plane, pitch, size, band, begin):
    height, width = F(size[0]), F(size[1])
    fill = _fill(op)
    columns, rows = places
    red, green, blue = band[0, begin:], band[1, begin:], band[2, begin:]
    for x in range(size[1]):
        column, row = np.rint(columns[x]), np.rint(rows[x])  # halves to even
        if row >= ZERO and row < height and column >= ZERO and column < width:
            place = int(row) * pitch + int(column)
            red[x] = values[place]
            green[x] = values[place + plane]
            blue[x] = values[place + 2 * plane]
        else:
            red[x] = fill[0]
            green[x] = fill[1]
            blue[x] = fill[2]


@numba.njit(nogil=True, cache=True)
def _bilinear(op, places, values, plane, pitch, size, band, begin):
    height, width = F(size[0]), F(size[1])
    fill = _fill(op)
    columns, rows = places
    for x in range(size[1]):
        column, row = columns[x], rows[x]
        left, top = np.floor(column), np.floor(row)
        if not (top >= F(-1) and top < height and left >= F(-1) and left < width):  # nor where it is no number
            for channel in range(3):
                band[channel, begin + x] = fill[channel]
            continue
        right, down = column - left, row - top
        weights = (ONE - down) * (ONE - right), (ONE - down) * right, down * (ONE - right), down * right
        place = int(top) * pitch + int(left)
        if top >= ZERO and top < height - ONE and left >= ZERO and left < width - ONE:
            for channel in range(3):
                value = values[place] * weights[0] + values[place + 1] * weights[1]
                value += values[place + pitch] * weights[2] + values[place + pitch + 1] * weights[3]
                band[channel, begin + x] = value
                place += plane
            continue
        # at the border: a tap outside is zero, and the mask what the taps inside weigh together
        for channel in range(3):
            value, mask = ZERO, ZERO
            for tap in range(4):
                i, j = top + F(tap // 2), left + F(tap % 2)
                if i >= ZERO and i < height and j >= ZERO and j < width:
                    value += values[int(i) * pitch + int(j) + channel * plane] * weights[tap]
                    mask += weights[tap]
            if op[13] != ZERO:
                value = (value - fill[channel]) * mask + fill[channel]
            band[channel, begin + x] = value
