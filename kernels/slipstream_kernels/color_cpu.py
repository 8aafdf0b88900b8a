"""Operations that take a pixel by itself, on the CPU, and what an image is read for before some of them.

A band is a few rows of an image, float32 [3, at least count]: planar, small enough to stay in the first cache.
The operations are loops over it that LLVM makes vectors of.
Arithmetic is float32 with no fast-math flags, and each loop's constants are float32, for a Python number would make it
float64.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import math

import numba
import numpy as np

from .ops import (
    ADD_BRIGHTNESS,
    AUTOCONTRAST,
    BRIGHTNESS,
    CONTRAST,
    EQUALIZE,
    ERASE,
    GREY,
    HUE,
    INVERT,
    NORMALIZE,
    NOTHING,
    POSTERIZE,
    SATURATION,
    SOLARIZE,
    SOLARIZE_ADD,
)
from .philox import philox4x32

F = np.float32
ZERO, HALF, ONE, TWO, FOUR, SIX, TOP = F(0), F(0.5), F(1), F(2), F(4), F(6), F(255)
BYTE = F(1 / 255)  # torchvision multiplies where it might divide
SIXTH = F(1 / 6)
RED, GREEN, BLUE = F(0.2989), F(0.587), F(0.114)
BIN = F(255.999)  # a value times this, cut off, is its byte where torchvision equalizes
WORD = F(2.0**-32)
TURN = F(2.0 * math.pi)


@numba.njit(nogil=True, cache=True)
def _clamp(x):
    return min(max(x, ZERO), ONE)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _turn_hue(red, green, blue, count, shift):
    # With h in sixths of a turn, a channel is max - (max - min) * clamp(min(k, 4 - k)), k = (n + h) mod 6 and n = 5, 3
    # and 1: what HSV and its six cases come to, with one division and no table.
    for x in range(count):
        r, g, b = red[x], green[x], blue[x]
        high, low = max(max(r, g), b), min(min(r, g), b)
        span = high - low
        beyond = r - g
        start = FOUR
        beyond, start = (b - r, TWO) if high == g else (beyond, start)
        beyond, start = (g - b, ZERO) if high == r else (beyond, start)
        turn = (beyond / (span if span > ZERO else ONE) + start) * SIXTH + shift
        sixths = (turn - np.floor(turn)) * SIX
        k = sixths + F(5)
        k = k - SIX if k >= SIX else k
        red[x] = high - span * _clamp(min(k, FOUR - k))
        k = sixths + F(3)
        k = k - SIX if k >= SIX else k
        green[x] = high - span * _clamp(min(k, FOUR - k))
        k = sixths + ONE
        k = k - SIX if k >= SIX else k
        blue[x] = high - span * _clamp(min(k, FOUR - k))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _each_value(code, values, count, a, b):
    # An operation that treats the three channels alike and apart.
    if code == BRIGHTNESS:
        for x in range(count):
            values[x] = _clamp(values[x] * a)
    elif code == ADD_BRIGHTNESS:
        for x in range(count):
            values[x] = _clamp(values[x] + a)
    elif code == CONTRAST:
        for x in range(count):
            values[x] = _clamp(values[x] * a + b)
    elif code == SOLARIZE:
        for x in range(count):
            value = values[x]
            values[x] = ONE - value if value >= a else value
    elif code == POSTERIZE:
        inverse, most = ONE / a, a - ONE  # exact: a power of two
        for x in range(count):
            values[x] = min(max(np.floor(values[x] * a), ZERO), most) * inverse
    elif code == SOLARIZE_ADD:
        for x in range(count):
            value = values[x]
            values[x] = _clamp(value + b) if value < a else value
    elif code == AUTOCONTRAST:
        for x in range(count):
            values[x] = _clamp((values[x] - a) / b)
    elif code == INVERT:
        for x in range(count):
            values[x] = ONE - values[x]
    elif code == NORMALIZE:
        for x in range(count):
            values[x] = (values[x] - a) / b


@numba.njit(nogil=True, cache=True)
def _look_up(values, count, table):
    for x in range(count):
        values[x] = table[np.uint8(values[x] * BIN)]


@numba.njit(nogil=True, cache=True)
def _erase(op, values, channel, top, shape):
    # The part of one channel's box that lies in a band; parameters as in ops.
    width = shape[1]
    left, right = max(int(op[2]), 0), min(int(op[2]) + int(op[4]), width)
    for y in range(max(int(op[1]) - top, 0), min(int(op[1]) + int(op[3]) - top, shape[0])):
        if op[8] != ZERO:
            row = values[y * width :]
            key = int(op[9]) | int(op[10]) << 16, int(op[11]) | int(op[12]) << 16
            _draw_normals(row, left, right, key, (top + y) * width, channel)
        else:
            value = op[5 + channel]
            for x in range(left, right):
                values[y * width + x] = value


@numba.njit(nogil=True, cache=True)
def _draw_normals(row, begin, end, key, first, channel):
    # Box and Muller's, for the pixels first + begin ... of an image. The blocks are vectors, the logarithms are not.
    k0, k1, c1, none = np.uint32(key[0]), np.uint32(key[1]), np.uint32(channel), np.uint32(0)
    angles = np.empty(max(end - begin, 0), np.float32)
    for x in range(end - begin):
        w0, w1, _, _ = philox4x32(k0, k1, np.uint32(first + begin + x), c1, none, none)
        row[begin + x] = (F(w0) + HALF) * WORD
        angles[x] = F(w1) * WORD * TURN
    for x in range(end - begin):
        row[begin + x] = math.sqrt(F(-2) * math.log(row[begin + x])) * math.cos(angles[x])


@numba.njit(nogil=True, cache=True)
def run_band(program, begin, end, readings, tables, band, top, shape):
    """Operations begin ... end - 1 of a program, float32 [K, 16], on a band of `rows` rows from row `top` on.

    readings: float32 [K, 3, 2], what finish_reading found for each operation; tables: float32 [n, 3, 256], those of the
    equalizing ones. shape: (rows, width).
    """
    red, green, blue = band[0], band[1], band[2]
    count = shape[0] * shape[1]
    for index in range(begin, end):
        op = program[index]
        code, amount, rest = int(op[0]), op[1], ONE - op[1]
        if code == NOTHING:
            continue
        if code == HUE:
            _turn_hue(red, green, blue, count, amount)
        elif code == GREY:
            for x in range(count):
                grey = red[x] * RED + green[x] * GREEN + blue[x] * BLUE
                red[x] = grey
                green[x] = grey
                blue[x] = grey
        elif code == SATURATION:
            for x in range(count):
                grey = (red[x] * RED + green[x] * GREEN + blue[x] * BLUE) * rest
                red[x] = _clamp(red[x] * amount + grey)
                green[x] = _clamp(green[x] * amount + grey)
                blue[x] = _clamp(blue[x] * amount + grey)
        elif code == EQUALIZE:
            for channel in range(3):
                _look_up(band[channel], count, tables[int(readings[index, 0, 0]), channel])
        elif code == ERASE:
            for channel in range(3):
                _erase(op, band[channel], channel, top, shape)
        else:
            for channel in range(3):
                a, b = amount, op[2]
                if code == NORMALIZE:
                    a, b = op[1 + channel], op[4 + channel]
                elif code == CONTRAST:
                    b = rest * readings[index, 0, 0]
                elif code == AUTOCONTRAST:
                    a, b = readings[index, channel, 0], readings[index, channel, 1]
                _each_value(code, band[channel], count, a, b)


@numba.njit(nogil=True, cache=True)
def start_reading(count):
    """What a reading of an image in bands of at most `count` pixels gathers: for read_band and finish_reading.

    Returns the sum of its grey, float64 [1]; least and greatest of each channel, float32 [2, 3, count], at each place
    of the bands; histograms, int64 [3, 256].
    """
    extremes = np.empty((2, 3, count), np.float32)
    for channel in range(3):
        for x in range(count):
            extremes[0, channel, x] = np.inf
            extremes[1, channel, x] = -np.inf
    return np.zeros(1, np.float64), extremes, np.zeros((3, 256), np.int64)


@numba.njit(nogil=True, cache=True)
def read_band(code, band, count, total, extremes, histograms):
    """Gather from a band what an operation needs of the whole image; the band is used up."""
    if code == CONTRAST:
        total[0] += _sum_of_grey(band, count)
        return
    for channel in range(3):
        values = band[channel]
        if code == AUTOCONTRAST:
            least, greatest = extremes[0, channel], extremes[1, channel]
            for x in range(count):
                least[x] = min(least[x], values[x])
                greatest[x] = max(greatest[x], values[x])
        else:
            histogram = histograms[channel]
            for x in range(count):
                histogram[np.uint8(values[x] * BIN)] += 1


@numba.njit(nogil=True, cache=True)
def finish_reading(code, pixels, gathered, reading, tables, number):
    """From what was gathered of an image to its operation's row of readings, float32 [3, 2], or table `number`."""
    total, extremes, histograms = gathered
    if code == CONTRAST:
        reading[0, 0] = total[0] / pixels
    elif code == AUTOCONTRAST:
        for channel in range(3):
            least, greatest = extremes[0, channel, 0], extremes[1, channel, 0]
            for x in range(1, extremes.shape[2]):
                least = min(least, extremes[0, channel, x])
                greatest = max(greatest, extremes[1, channel, x])
            reading[channel, 0] = least if greatest > least else ZERO
            reading[channel, 1] = greatest - least if greatest > least else ONE
    else:
        reading[0, 0] = number
        for channel in range(3):
            _equalizing_table(histograms[channel], pixels, tables[number, channel])


@numba.njit(nogil=True, cache=True)
def _equalizing_table(histogram, pixels, table):
    # Pillow's law (ImageOps.equalize), which torchvision follows; the table gives values in [0, 1].
    brightest = 255
    while brightest > 0 and histogram[brightest] == 0:
        brightest -= 1
    step = (pixels - histogram[brightest]) // 255
    below = step // 2
    for level in range(256):
        table[level] = F(min(below // step, 255) if step > 0 else level) * BYTE
        below += histogram[level]


@numba.njit(nogil=True, cache=True)
def _sum_of_grey(band, count):
    # Halves added to halves: LLVM makes vectors of that, and the error grows with the logarithm of the count only.
    red, green, blue = band[0], band[1], band[2]
    for x in range(count):
        red[x] = red[x] * RED + green[x] * GREEN + blue[x] * BLUE
    while count > 1:
        half = count // 2
        for x in range(half):
            red[x] += red[count - half + x]
        count -= half
    return np.float64(red[0])
