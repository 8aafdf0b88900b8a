"""The programs launch on the CPU: the same programs, Numba instead of Triton.

An image is worked on in bands of a few rows, float32 and planar, small enough to stay in the first cache; an operation
is a loop over the band that LLVM makes vectors of. A contrast needs the mean of the whole image, hence a reading of it
through the operations before. Arithmetic is float32 with no fast-math flags, and each loop's constants are float32, for
a Python number would make it float64.
"""

# Numba's carray is untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numba
import numpy as np
import torch

from .ops import (
    ADD_BRIGHTNESS,
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    INVERT,
    NORMALIZE,
    NOTHING,
    OP_WIDTH,
    POSTERIZE,
    SATURATION,
    SOLARIZE,
    ProgramFormat,
    check_pixels,
    check_programs,
    empty_pixels,
)
from .resized_crop_cpu import SHARES, _pointer

BAND = 1024  # pixels of a band, 4 KB a channel: whole rows, one at the least
STORES = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}

# Columns of a crop's row in the table that the kernel reads, int64; steps in bytes, (image, channel, row, column).
SOURCE, SOURCE_STEPS, TARGET, TARGET_STEPS, STORE, HEIGHT, WIDTH, PROGRAMS, LENGTH = 0, 1, 5, 6, 10, 11, 12, 13, 14

F = np.float32
ZERO, HALF, ONE, TWO, FOUR, SIX, TOP = F(0), F(0.5), F(1), F(2), F(4), F(6), F(255)
BYTE = F(1 / 255)  # torchvision multiplies where it might divide
SIXTH = F(1 / 6)
RED, GREEN, BLUE = F(0.2989), F(0.587), F(0.114)
WHOLE = F(2**23)  # added and taken away again, it leaves a positive float rounded half to even
HALF_BITS = np.uint32(0x3F000000)  # 0.5 as bits
MAGNITUDE = np.uint32(0x7FFFFFFF)
NORMAL16 = np.uint32((127 - 14) << 23)  # 2**-14, the least normal float16
PAST16 = np.uint32(0x477FF000)  # 65520: from here on a float16 is infinite
INFINITE = np.uint32(0x7F800000)


@numba.njit(nogil=True, cache=True)
def _clamp(x):
    return min(max(x, ZERO), ONE)


@numba.njit(nogil=True, cache=True)
def _load_row(source, channel_step, column_step, band, begin, width):
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


@numba.njit(nogil=True, cache=True)
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
    elif code == INVERT:
        for x in range(count):
            values[x] = ONE - values[x]
    elif code == NORMALIZE:
        for x in range(count):
            values[x] = (values[x] - a) / b


@numba.njit(nogil=True, cache=True)
def _run(program, end, means, band, count):
    # The first `end` operations of a program on a band. means: of the grey image before each contrast.
    red, green, blue = band[0], band[1], band[2]
    for index in range(end):
        op = program[index]
        code, amount, rest = int(op[0]), op[1], ONE - op[1]
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
        elif code != NOTHING:
            for channel in range(3):
                if code == NORMALIZE:
                    _each_value(code, band[channel], count, op[1 + channel], op[4 + channel])
                else:
                    _each_value(code, band[channel], count, amount, rest * means[index])


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
def _load_band(source, steps, band, rows, width):
    for y in range(rows):
        _load_row(source + y * steps[2], steps[1], steps[3], band, y * width, width)


@numba.njit(nogil=True, cache=True)
def _image(source, target, crop, program):
    # One image of one crop: addresses of its first pixel and of its output's, its program float32 [K, 16].
    height, width = crop[HEIGHT], crop[WIDTH]
    steps, out_steps = crop[SOURCE_STEPS:TARGET], crop[TARGET_STEPS:STORE]
    rows = min(max(BAND // width, 1), height)
    band = np.empty((3, rows * width), np.float32)
    small = np.empty((3, rows * width), np.uint8)
    short = np.empty((3, rows * width), np.uint16)
    means = np.zeros(len(program), np.float32)
    for end in range(len(program) + 1):
        finished = end == len(program)
        if not finished and program[end, 0] != CONTRAST:
            continue
        total = 0.0
        for top in range(0, height, rows):
            number = min(rows, height - top)
            count = number * width
            _load_band(source + top * steps[2], steps, band, number, width)
            _run(program, end, means, band, count)
            if not finished:
                total += _sum_of_grey(band, count)
                continue
            place = target + top * out_steps[2]
            if crop[STORE] == 3:
                _store(band, place, out_steps, number, width)
            elif crop[STORE] == 0:
                for channel in range(3):
                    _to_bytes(band[channel], small[channel], count)
                _store(small, place, out_steps, number, width)
            else:
                for channel in range(3):
                    if crop[STORE] == 1:
                        _to_float16(band[channel], short[channel], count)
                    else:
                        _to_bfloat16(band[channel], short[channel], count)
                _store(short, place, out_steps, number, width)
        if not finished:
            means[end] = total / (height * width)


@numba.njit(nogil=True, cache=True)
def _images(work, crops):
    # work int64 [n, 2] (crop, image), crops int64 [C, 15]
    for index in range(len(work)):
        crop, image = crops[work[index, 0]], work[index, 1]
        source = crop[SOURCE] + image * crop[SOURCE_STEPS]
        target = crop[TARGET] + image * crop[TARGET_STEPS]
        length = crop[LENGTH]
        program = numba.carray(_pointer(crop[PROGRAMS] + image * length * OP_WIDTH * 4), (length, OP_WIDTH), np.float32)
        _image(source, target, crop, program)


def run_programs_cpu(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    formats: Sequence[ProgramFormat],
    out: Sequence[torch.Tensor] | None = None,
    pool: Executor | None = None,
    num_threads: int = 1,
) -> list[torch.Tensor]:
    """run_programs on CPU tensors: C crops through their programs, one output tensor each.

    images: uint8 [B, 3, h, w] each, any strides (B, h and w may differ between crops). programs: float32 [B, K, 16]
    each. pool: an executor whose `num_threads` threads share the work; None does it on the caller's thread.
    Raises ValueError or TypeError for what does not fit together.
    """
    check_programs(images, programs, formats)
    for index, image in enumerate(images):
        if image.device.type != "cpu":
            raise ValueError(f"the CPU kernel takes images on the CPU, got images[{index}] on {image.device}")
        if formats[index].dtype not in STORES:
            allowed = ", ".join(str(dtype) for dtype in STORES)
            raise TypeError(f"formats[{index}].dtype must be one of {allowed}, got {formats[index].dtype}")
    if out is None:
        out = empty_pixels(images, formats)
    check_pixels(images, out, formats)
    kept = [np.ascontiguousarray(program) for program in programs]
    busy = [crop for crop, image in enumerate(images) if image.numel()]
    if not busy:
        return list(out)
    crops = np.zeros((len(images), LENGTH + 1), np.int64)
    for crop, (image, target, program) in enumerate(zip(images, out, kept, strict=True)):
        size = target.element_size()
        crops[crop, SOURCE : SOURCE_STEPS + 4] = image.data_ptr(), *image.stride()
        crops[crop, TARGET : TARGET_STEPS + 4] = target.data_ptr(), *(step * size for step in target.stride())
        crops[crop, STORE:] = STORES[target.dtype], *image.shape[2:], program.ctypes.data, program.shape[1]
    work = np.concatenate(
        [np.stack([np.full(len(images[crop]), crop), np.arange(len(images[crop]))], 1) for crop in busy]
    )
    if pool is None:
        _images(work, crops)
    else:
        ends = np.cumsum(np.concatenate([_cost(images[crop], kept[crop]) for crop in busy]))
        shares = num_threads * SHARES
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, shares) / shares)
        for future in [pool.submit(_images, part, crops) for part in np.split(work, cuts)]:
            future.result()
    del kept  # its addresses are in use until here
    return list(out)


def _cost(images: torch.Tensor, programs: np.ndarray) -> np.ndarray:
    # Rough, float64 [B]: passes over each image times operations in a pass, which balances work between threads.
    codes = programs[..., 0]
    passes = 1 + (codes == CONTRAST).sum(1)
    return images[0].numel() * passes * (2.0 + (codes != NOTHING).sum(1) + 2 * (codes == HUE).sum(1))
