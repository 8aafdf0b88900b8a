"""One pass over images through their programs, a pixel at a time, and the readings of whole images before it.

A pass (ops.split_passes) of an image is loaded once, as it is, sharpened or warped, goes through its operations in
float32 registers, and is written once. CONTRAST, AUTOCONTRAST and EQUALIZE need a reading of the whole image as it is
just before them: a launch that runs the operations up to there and writes what it found in each block, or in each
channel; whoever needs the reading combines an image's blocks in one fixed order, so that results do not depend on
timing or on the batch.

It does not draw parameters, resize or blur.
"""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import TypedDict

import triton
import triton.language as tl

from . import ops
from ._math import (
    blend,
    byte_to_unit,
    clamp_unit,
    divide_many,
    equalize_bin,
    equalize_table,
    grey_of,
    philox4x32,
    posterize,
    reciprocal_of,
    shift_hue,
    solarize,
    solarize_add,
    standard_normal,
)
from .task_rows import find_task, load_pixels, rows_and_columns, store_pixels
from .warp import sharpen, warp

BRIGHTNESS = tl.constexpr(ops.BRIGHTNESS)
ADD_BRIGHTNESS = tl.constexpr(ops.ADD_BRIGHTNESS)
CONTRAST = tl.constexpr(ops.CONTRAST)
SATURATION = tl.constexpr(ops.SATURATION)
HUE = tl.constexpr(ops.HUE)
GREY = tl.constexpr(ops.GREY)
SOLARIZE = tl.constexpr(ops.SOLARIZE)
POSTERIZE = tl.constexpr(ops.POSTERIZE)
INVERT = tl.constexpr(ops.INVERT)
NORMALIZE = tl.constexpr(ops.NORMALIZE)
AUTOCONTRAST = tl.constexpr(ops.AUTOCONTRAST)
EQUALIZE = tl.constexpr(ops.EQUALIZE)
SHARPNESS = tl.constexpr(ops.SHARPNESS)
WARP = tl.constexpr(ops.WARP)
ERASE = tl.constexpr(ops.ERASE)
SOLARIZE_ADD = tl.constexpr(ops.SOLARIZE_ADD)


class LaunchOptions(TypedDict):
    BLOCK: int
    num_warps: int
    maxnreg: int
    enable_fp_fusion: bool


def launch_options(gathers: bool = False) -> LaunchOptions:
    """Pixels and warps of one program, of all three kernels: four pixels a thread. gathers: for sharpening and warps.

    Left to itself the assembler takes fewer registers, and spills, so that more programs fit.
    """
    return {"BLOCK": 512, "num_warps": 4, "maxnreg": 128 if gathers else 96, "enable_fp_fusion": False}


@triton.jit
def image_mean(sums, num_sums, num_pixels):
    # The mean of an image from the sums of its blocks, in one fixed order.
    total = tl.zeros([], tl.float32)
    for first in range(0, num_sums, 128):
        index = first + tl.arange(0, 128)
        total += tl.sum(tl.load(sums + index, mask=index < num_sums, other=0.0), 0)
    return total / num_pixels.to(tl.float32)


@triton.jit
def least_of(values, count):
    # The least of an image's blocks' least.
    least = tl.full([], float("inf"), tl.float32)
    for first in range(0, count, 128):
        index = first + tl.arange(0, 128)
        least = tl.minimum(least, tl.min(tl.load(values + index, mask=index < count, other=float("inf")), 0))
    return least


@triton.jit
def low_and_spread(values, count):
    # A channel's least, how far above it its greatest is, and 1 by that, from its blocks' least values and least
    # negatives, `count` of each; 0 and 1 where it is no distance, which changes nothing (`autocontrast_image`).
    low = least_of(values, count)
    spread = -least_of(values + count, count) - low
    low = tl.where(spread == 0.0, 0.0, low)
    spread = tl.where(spread == 0.0, 1.0, spread)
    return low, spread, reciprocal_of(spread)


@triton.jit
def normalize(x, row):
    # One channel, whose mean is at `row`, its deviation 3 further, and 1 / deviation, from the host, 6.
    return divide_many(x - tl.load(row), tl.load(row + 3), tl.load(row + 6))


@triton.jit
def autocontrast(x, values, count):
    # One channel, whose blocks' least values and least negatives are `values`, `count` of each.
    low, spread, share = low_and_spread(values, count)
    return clamp_unit(divide_many(x - low, spread, share))


@triton.jit
def erase(r, g, b, y, pixel, size, op):
    # Pixels of an image, by rows and numbers, size (h, w, 3), with a box at a value or normals of (number, channel).
    x = pixel - y * size[1]
    down = y - tl.load(op + 1).to(tl.int32)
    across = x - tl.load(op + 2).to(tl.int32)
    inside = (down >= 0) & (down < tl.load(op + 3).to(tl.int32))
    inside &= (across >= 0) & (across < tl.load(op + 4).to(tl.int32))
    k0 = tl.load(op + 9).to(tl.uint32) | (tl.load(op + 10).to(tl.uint32) << 16)
    k1 = tl.load(op + 11).to(tl.uint32) | (tl.load(op + 12).to(tl.uint32) << 16)
    counter = pixel.to(tl.uint32)
    # size[2] and not 3, here and in other loops: the compiler would unroll it, for thrice the code and more registers
    for channel in range(size[2]):
        value = tl.zeros_like(r) + tl.load(op + 5 + channel)
        if tl.load(op + 8) != 0:
            w0, w1 = philox4x32(k0, k1, counter, tl.zeros_like(counter) + channel)
            value = standard_normal(w0, w1)
        r = tl.where(inside & (channel == 0), value, r)
        g = tl.where(inside & (channel == 1), value, g)
        b = tl.where(inside & (channel == 2), value, b)
    return r, g, b


@triton.jit
def run_program(r, g, b, y, pixel, size, program, count, task, READINGS: tl.constexpr):
    # Pixels of an image, by rows and numbers, size (h, w, 3), after `count` operations, of which one may use a reading.
    for _ in range(count):
        code = tl.load(program).to(tl.int32)
        amount = tl.load(program + 1)
        if code == BRIGHTNESS:
            r = clamp_unit(r * amount)
            g = clamp_unit(g * amount)
            b = clamp_unit(b * amount)
        elif code == ADD_BRIGHTNESS:
            r = clamp_unit(r + amount)
            g = clamp_unit(g + amount)
            b = clamp_unit(b + amount)
        elif code == SATURATION:
            grey = grey_of(r, g, b)
            r = blend(r, grey, amount)
            g = blend(g, grey, amount)
            b = blend(b, grey, amount)
        elif code == HUE:
            r, g, b = shift_hue(r, g, b, amount)
        elif code == GREY:
            r = grey_of(r, g, b)
            g = r
            b = r
        elif code == SOLARIZE:
            r = solarize(r, amount)
            g = solarize(g, amount)
            b = solarize(b, amount)
        elif code == SOLARIZE_ADD:
            addend = tl.load(program + 2)
            r = solarize_add(r, amount, addend)
            g = solarize_add(g, amount, addend)
            b = solarize_add(b, amount, addend)
        elif code == POSTERIZE:
            r = posterize(r, amount)
            g = posterize(g, amount)
            b = posterize(b, amount)
        elif code == INVERT:
            r = 1.0 - r
            g = 1.0 - g
            b = 1.0 - b
        elif code == NORMALIZE:
            r = normalize(r, program + 1)
            g = normalize(g, program + 2)
            b = normalize(b, program + 3)
        elif code == ERASE:
            r, g, b = erase(r, g, b, y, pixel, size, program)
        elif READINGS:
            # loaded where it is used: it would take registers from the operations before
            reading = tl.load(task + 7).to(tl.pointer_type(tl.float32))
            num_pixels = size[0] * size[1]
            num_blocks = tl.cdiv(num_pixels, r.shape[0])
            if code == CONTRAST:
                mean = image_mean(reading, num_blocks, num_pixels)
                r = blend(r, mean, amount)
                g = blend(g, mean, amount)
                b = blend(b, mean, amount)
            elif code == AUTOCONTRAST:
                r = autocontrast(r, reading, num_blocks)
                g = autocontrast(g, reading + 2 * num_blocks, num_blocks)
                b = autocontrast(b, reading + 4 * num_blocks, num_blocks)
            elif code == EQUALIZE:
                r = tl.load(reading + equalize_bin(r))
                g = tl.load(reading + 256 + equalize_bin(g))
                b = tl.load(reading + 512 + equalize_bin(b))
        program += 16
    return r, g, b


@triton.jit
def load_and_run(task, crops, programs, y, x, size, live):
    # The pixels (y, x) as they are in the source, through a task's operations from the first on.
    first = tl.load(task + 5)
    count = (tl.load(task + 6) - first).to(tl.int32)
    r, g, b = load_pixels(tl.load(task), crops + tl.load(task + 1), y, x, live)
    return run_program(r, g, b, y, y * size[1] + x, size, programs + first * 16, count, task, READINGS=False)


@triton.jit
def size_of(task, crops):
    # Height, width and channels (3) of a task's image.
    crop = crops + tl.load(task + 4)
    return tl.load(crop).to(tl.int32), tl.load(crop + 1).to(tl.int32), tl.load(crop + 2).to(tl.int32)


@triton.jit(do_not_specialize=["num_groups"])
def readings_kernel(tasks, groups, num_groups, crops, programs, BLOCK: tl.constexpr):
    # One program reads one block of pixels of one image, as they are before operation `end`: the sum of their greys for
    # CONTRAST, for AUTOCONTRAST the least of each channel and of its negative.
    task, block = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    y, x = rows_and_columns(block * BLOCK, size[1], BLOCK)
    live = y < size[0]
    r, g, b = load_and_run(task, crops, programs, y, x, size, live)
    reading = tl.load(task + 7).to(tl.pointer_type(tl.float32)) + block
    if tl.load(programs + tl.load(task + 6) * 16).to(tl.int32) == CONTRAST:
        tl.store(reading, tl.sum(tl.where(live, grey_of(r, g, b), 0.0), 0))
    else:
        step = tl.cdiv(size[0] * size[1], BLOCK)
        nothing = float("inf")
        tl.store(reading, tl.min(tl.where(live, r, nothing), 0))
        tl.store(reading + step, tl.min(tl.where(live, -r, nothing), 0))
        tl.store(reading + 2 * step, tl.min(tl.where(live, g, nothing), 0))
        tl.store(reading + 3 * step, tl.min(tl.where(live, -g, nothing), 0))
        tl.store(reading + 4 * step, tl.min(tl.where(live, b, nothing), 0))
        tl.store(reading + 5 * step, tl.min(tl.where(live, -b, nothing), 0))


@triton.jit(do_not_specialize=["num_groups"])
def equalize_kernel(tasks, groups, num_groups, crops, programs, BLOCK: tl.constexpr):
    # One program makes the table, of float32, that equalizes one channel of one image, as it is before operation `end`.
    task, channel = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    histogram = tl.zeros([256], tl.int32)
    for first in range(0, size[0] * size[1], BLOCK):
        y, x = rows_and_columns(first, size[1], BLOCK)
        live = y < size[0]
        r, g, b = load_and_run(task, crops, programs, y, x, size, live)
        value = tl.where(channel == 0, r, tl.where(channel == 1, g, b))
        histogram += tl.histogram(equalize_bin(value), 256, mask=live)
    entry = equalize_table(histogram, size[0] * size[1])
    reading = tl.load(task + 7).to(tl.pointer_type(tl.float32)) + channel * 256
    tl.store(reading + tl.arange(0, 256), byte_to_unit(entry))


@triton.jit(do_not_specialize=["num_groups"])
def pixels_kernel(tasks, groups, num_groups, crops, programs, BLOCK: tl.constexpr, GATHERS: tl.constexpr):
    # One program runs one pass of one image on one block of pixels, all three channels.
    task, block = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    y, x = rows_and_columns(block * BLOCK, size[1], BLOCK)
    live = y < size[0]
    source = tl.load(task)
    layout = crops + tl.load(task + 1)
    first = tl.load(task + 5)
    count = (tl.load(task + 6) - first).to(tl.int32)
    program = programs + first * 16

    code = tl.load(program).to(tl.int32)
    if GATHERS and code == SHARPNESS:
        r, g, b = sharpen(source, layout, y, x, size, live, tl.load(program + 1))
    elif GATHERS and code == WARP:
        r, g, b = warp(source, layout, y, x, size, live, program)
    else:
        r, g, b = load_pixels(source, layout, y, x, live)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    r, g, b = run_program(r, g, b, y, pixel, size, program, count, task, READINGS=True)
    x = pixel - y * size[1]  # again: while the operations run it would take registers
    store_pixels(r, g, b, tl.load(task + 2), crops + tl.load(task + 3), y, x, live)
