"""All crops of all images through their programs of per-pixel operations, in one launch.

Each image of each crop has its own program (see pixel_ops). A pixel is read once as uint8, goes through its image's
operations in float32 registers, and is written once in the output's dtype. CONTRAST needs the mean of a whole image at
its place in the program: a reading launch for each level (the first contrast of every program, then the second, ...)
runs the operations before it and writes one sum of greys for each block; whoever needs the mean adds an image's sums in
one fixed order, so that results do not depend on timing or on the batch.

Shapes: C crops, uint8 [B, 3, h, w] in, any strides; the same shape out. It does not draw parameters, resize or blur.
"""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import TypedDict

import triton
import triton.language as tl
from triton import knobs

from . import ops
from ._math import blend, clamp_unit, grey_of, posterize, round_to_bfloat16, shift_hue, unit_to_byte

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
# Triton's interpreter cuts bfloat16 off where the hardware rounds it.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)

# int64 columns of a crop's row: rows, columns, images, first operation, operations, first sum; then input and output:
# address, image / channel / row / column stride (elements)
CROP_COLUMNS = 18  # the last two: dtype code, unused (operations, 32 bytes each, stay aligned)


class LaunchOptions(TypedDict):
    BLOCK: int
    num_warps: int
    enable_fp_fusion: bool


def launch_options() -> LaunchOptions:
    """Pixels and warps of one program, of both kernels: four pixels a thread, as many as no GPU spills."""
    return {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def image_mean(sums, num_sums, num_pixels):
    # The mean of an image from the sums of its blocks, in one fixed order.
    total = tl.zeros([], tl.float32)
    for first in range(0, num_sums, 128):
        index = first + tl.arange(0, 128)
        total += tl.sum(tl.load(sums + index, mask=index < num_sums, other=0.0), 0)
    return tl.div_rn(total, num_pixels.to(tl.float32))


@triton.jit
def run_program(r, g, b, program, count, sums, level_step, num_sums, num_pixels):
    # A block of pixels after the first `count` operations; the sums of one contrast are level_step from the next's.
    for index in range(count):
        op = program + index * 16
        code = tl.load(op).to(tl.int32)
        amount = tl.load(op + 1)
        if code == BRIGHTNESS:
            r = clamp_unit(r * amount)
            g = clamp_unit(g * amount)
            b = clamp_unit(b * amount)
        elif code == ADD_BRIGHTNESS:
            r = clamp_unit(r + amount)
            g = clamp_unit(g + amount)
            b = clamp_unit(b + amount)
        elif code == CONTRAST:
            mean = image_mean(sums, num_sums, num_pixels)
            sums += level_step
            r = blend(r, mean, amount)
            g = blend(g, mean, amount)
            b = blend(b, mean, amount)
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
            r = tl.where(r >= amount, 1.0 - r, r)
            g = tl.where(g >= amount, 1.0 - g, g)
            b = tl.where(b >= amount, 1.0 - b, b)
        elif code == POSTERIZE:
            r = posterize(r, amount)
            g = posterize(g, amount)
            b = posterize(b, amount)
        elif code == INVERT:
            r = 1.0 - r
            g = 1.0 - g
            b = 1.0 - b
        elif code == NORMALIZE:
            r = tl.div_rn(r - amount, tl.load(op + 4))
            g = tl.div_rn(g - tl.load(op + 2), tl.load(op + 5))
            b = tl.div_rn(b - tl.load(op + 3), tl.load(op + 6))
    return r, g, b


@triton.jit
def plane_offset(pixel, num_rows, num_columns, row_step, column_step):
    # Where a channel's pixels lie, in elements. Rows that follow one another at one step count as a single row.
    offset = pixel * column_step.to(tl.int32)
    if num_rows != 1:
        offset = pixel // num_columns * row_step.to(tl.int32) + pixel % num_columns * column_step.to(tl.int32)
    return offset


@triton.jit
def load_pixels(crop, image, pixel, num_rows, num_columns):
    # Red, green, blue in [0, 1] of one block of pixels.
    live = pixel < num_rows * num_columns
    address = tl.load(crop + 6) + image.to(tl.int64) * tl.load(crop + 7)
    offset = plane_offset(pixel, num_rows, num_columns, tl.load(crop + 9), tl.load(crop + 10))
    step = tl.load(crop + 8)
    place = address.to(tl.pointer_type(tl.uint8)) + offset
    r = tl.load(place, mask=live, other=0).to(tl.float32)
    g = tl.load(place + step, mask=live, other=0).to(tl.float32)
    b = tl.load(place + step * 2, mask=live, other=0).to(tl.float32)
    # torchvision multiplies by the reciprocal, rounded to float32
    return r * 0.00392156862745098, g * 0.00392156862745098, b * 0.00392156862745098


@triton.jit
def store_channel(x, address, offset, live, kind):
    # One channel's values (float32) to their place, as uint8, float16, bfloat16 or float32.
    if kind == 0:
        tl.store(address.to(tl.pointer_type(tl.uint8)) + offset, unit_to_byte(x), mask=live)
    elif kind == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offset, x.to(tl.float16), mask=live)
    elif kind == 2:
        if INTERPRETED:
            x = round_to_bfloat16(x)
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offset, x.to(tl.bfloat16), mask=live)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offset, x, mask=live)


@triton.jit
def grey_sums_kernel(crops, programs, tiles, sums, num_tiles, level, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    # One program sums the greys of one block of pixels of one image, as they are before its level-th contrast.
    image = tl.program_id(0) // num_tiles
    tile = tiles + (tl.program_id(0) % num_tiles) * 3
    crop = crops + tl.load(tile) * COLUMNS
    num_images = tl.load(crop + 2).to(tl.int32)
    count = tl.load(crop + 4).to(tl.int32)
    program = programs + (tl.load(crop + 3) + image.to(tl.int64) * count) * 16

    place = count  # where the contrast stands; past the end where the program has none
    seen = 0
    if image < num_images:
        for index in range(count):
            is_contrast = tl.load(program + index * 16) == CONTRAST
            place = tl.where(is_contrast & (seen == level), index, place)
            seen += is_contrast.to(tl.int32)
    if place < count:
        first = tl.load(tile + 2)
        pixel = first + tl.arange(0, BLOCK)
        num_rows = tl.load(crop).to(tl.int32)
        num_columns = tl.load(crop + 1).to(tl.int32)
        num_pixels = num_rows * num_columns
        num_sums = tl.cdiv(num_pixels, BLOCK)
        level_step = num_images.to(tl.int64) * num_sums
        image_sums = sums + tl.load(crop + 5) + image.to(tl.int64) * num_sums
        r, g, b = load_pixels(crop, image, pixel, num_rows, num_columns)
        r, g, b = run_program(r, g, b, program, place, image_sums, level_step, num_sums, num_pixels)
        total = tl.sum(tl.where(pixel < num_pixels, grey_of(r, g, b), 0.0), 0)
        tl.store(image_sums + level * level_step + first // BLOCK, total)


@triton.jit
def pixel_ops_kernel(crops, programs, tiles, sums, num_tiles, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    # One program computes one block of pixels, all three channels, of one image of one crop.
    image = tl.program_id(0) // num_tiles
    tile = tiles + (tl.program_id(0) % num_tiles) * 3
    crop = crops + tl.load(tile) * COLUMNS
    num_images = tl.load(crop + 2).to(tl.int32)
    if image < num_images:
        pixel = tl.load(tile + 2) + tl.arange(0, BLOCK)
        num_rows = tl.load(crop).to(tl.int32)
        num_columns = tl.load(crop + 1).to(tl.int32)
        num_pixels = num_rows * num_columns
        num_sums = tl.cdiv(num_pixels, BLOCK)
        level_step = num_images.to(tl.int64) * num_sums
        image_sums = sums + tl.load(crop + 5) + image.to(tl.int64) * num_sums
        count = tl.load(crop + 4).to(tl.int32)
        program = programs + (tl.load(crop + 3) + image.to(tl.int64) * count) * 16
        r, g, b = load_pixels(crop, image, pixel, num_rows, num_columns)
        r, g, b = run_program(r, g, b, program, count, image_sums, level_step, num_sums, num_pixels)

        kind = tl.load(crop + 16)
        size = tl.where(kind == 0, 1, tl.where(kind == 3, 4, 2))
        address = tl.load(crop + 11) + image.to(tl.int64) * tl.load(crop + 12) * size
        step = tl.load(crop + 13) * size
        offset = plane_offset(pixel, num_rows, num_columns, tl.load(crop + 14), tl.load(crop + 15))
        live = pixel < num_pixels
        store_channel(r, address, offset, live, kind)
        store_channel(g, address + step, offset, live, kind)
        store_channel(b, address + step * 2, offset, live, kind)
