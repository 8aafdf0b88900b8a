"""Passes that begin with a blur: a tile's blur as products with banded matrices, then the pass's other operations.

The Gaussian blur is torchvision's: a kernel of the given size, the image reflected at its borders. The box blur is
Pillow's GaussianBlur to the byte: three box blurs an axis on bytes, the edges repeated. README.md derives the products.

Shapes: any image; a Gaussian kernel of any size, a box radius under 16. A pass that begins with a blur holds no
operation that needs a reading.
"""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import TypedDict

import triton
import triton.language as tl

from ._math import byte_to_unit, reflect, unit_to_byte
from .color import run_program, size_of
from .task_rows import find_task, load_channel, load_pixels, rows_and_columns, store_pixels


class BlurOptions(TypedDict):
    BLOCK_H: int
    BLOCK_W: int
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    maxnreg: int
    enable_fp_fusion: bool


class BoxOptions(TypedDict):
    WINDOW_H: int
    WINDOW_W: int
    TILE_W: int
    num_warps: int
    num_stages: int
    maxnreg: int
    enable_fp_fusion: bool


def blur_options() -> BlurOptions:
    """Tile and warps of the Gaussian kernel: output rows and columns, source rows and columns a step."""
    return {
        "BLOCK_H": 64,
        "BLOCK_W": 16,
        "BLOCK_R": 32,
        "BLOCK_C": 32,
        "num_warps": 4,
        "num_stages": 1,
        "maxnreg": 255,
        "enable_fp_fusion": False,
    }


def box_reach(radius: float) -> int:
    """How far a box blur of this radius, under MOST_BOX_RADIUS, reaches along an axis: three boxes and ends."""
    return 3 * (int(radius) + 1)


def box_options() -> BoxOptions:
    """Window of source pixels and width of the results of the box kernel, for a reach of 8 at the most.

    Wider windows spill on one GPU or another; wider boxes are not in any published recipe, and take box_line_kernel.
    """
    return {
        "WINDOW_H": 64,
        "WINDOW_W": 32,
        "TILE_W": 16,
        "num_warps": 4,
        "num_stages": 1,
        "maxnreg": 255,
        "enable_fp_fusion": False,
    }


@triton.jit
def gaussian_exponent(sigma):
    # c with exp(-d**2 / (2 sigma**2)) = exp2(c * d**2)
    return -0.7213475204444817 / (sigma * sigma)


@triton.jit
def gaussian_weight(distance, radius, exponent):
    # The weight, not yet normalized, of a pixel at this distance (int32).
    d = distance.to(tl.float32)
    return tl.where(tl.abs(distance) <= radius, tl.exp2(d * d * exponent), 0.0)


@triton.jit
def gaussian_total(radius, exponent):
    # The sum of the weights along one axis.
    total = tl.zeros([], tl.float32)
    for first in range(-radius, radius + 1, 64):
        total += tl.sum(gaussian_weight(first + tl.arange(0, 64), radius, exponent), 0)
    return total


@triton.jit(do_not_specialize=["num_groups"])
def gaussian_blur_kernel(
    tasks,
    groups,
    num_groups,
    crops,
    programs,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program blurs a BLOCK_H x BLOCK_W tile of one image, all three channels, and runs the rest of the pass on it.
    task, tile = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    across = tl.cdiv(size[1], BLOCK_W)
    top = tile // across * BLOCK_H
    left = tile % across * BLOCK_W
    y = top + tl.arange(0, BLOCK_H)
    x = left + tl.arange(0, BLOCK_W)

    first = tl.load(task + 5)
    program = programs + first * 16
    radius_x = tl.load(program + 1).to(tl.int32) // 2
    radius_y = tl.load(program + 2).to(tl.int32) // 2
    exponent_x = gaussian_exponent(tl.load(program + 3))
    exponent_y = gaussian_exponent(tl.load(program + 4))
    share = 1.0 / (gaussian_total(radius_x, exponent_x) * gaussian_total(radius_y, exponent_y))
    row_end = tl.minimum(top + BLOCK_H, size[0]) + radius_y
    column_end = tl.minimum(left + BLOCK_W, size[1]) + radius_x

    address = tl.load(task)
    layout = crops + tl.load(task + 1)
    kind = tl.load(layout + 3)
    channel_step = tl.load(layout) * tl.where(kind == 0, 1, 4)
    row_step = tl.load(layout + 1).to(tl.int32)
    column_step = tl.load(layout + 2).to(tl.int32)
    r = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    g = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    b = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    for channel in range(size[2]):
        total = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
        for column in range(left - radius_x, column_end, BLOCK_C):
            columns = column + tl.arange(0, BLOCK_C)
            column_place = reflect(columns, size[1]) * column_step
            line = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
            for row in range(top - radius_y, row_end, BLOCK_R):
                rows = row + tl.arange(0, BLOCK_R)
                place = (reflect(rows, size[0]) * row_step)[:, None] + column_place[None, :]
                live = (rows < row_end)[:, None] & (columns < column_end)[None, :]
                pixel = load_channel(address, kind, place, live)
                weight = gaussian_weight(rows[None, :] - y[:, None], radius_y, exponent_y)
                line = tl.dot(weight, pixel, acc=line, input_precision="tf32x3")
            weight = gaussian_weight(columns[:, None] - x[None, :], radius_x, exponent_x)
            total = tl.dot(line, weight, acc=total, input_precision="tf32x3")
        total *= share
        r = tl.where(channel == 0, total, r)
        g = tl.where(channel == 1, total, g)
        b = tl.where(channel == 2, total, b)
        address += channel_step
    pixel = y[:, None] * size[1] + x[None, :]
    count = (tl.load(task + 6) - first).to(tl.int32)
    r, g, b = run_program(r, g, b, pixel, size, program, count, programs, 0, READINGS=False)
    live = (y < size[0])[:, None] & (x < size[1])[None, :]
    store_pixels(r, g, b, tl.load(task + 2), crops + tl.load(task + 3), y[:, None], x[None, :], live)


@triton.jit
def box_counts(source, result, length, box):
    # How often a result's box (box pixels to each side) holds each source pixel: an edge's stands for all past it, and
    # one outside the image for none.
    first = tl.where(source <= 0, -(1 << 24), source)
    last = tl.where(source >= length - 1, 1 << 24, source)
    last = tl.where((source >= 0) & (source < length), last, -(1 << 24))
    farthest = tl.minimum(last - result, box)
    nearest = tl.maximum(first - result, -box)
    return tl.maximum(farthest - nearest + 1, 0).to(tl.int8)


@triton.jit
def box_ends(source, result, length, box):
    # How often a source pixel is one of the two just beyond a result's box.
    before = tl.maximum(result - box - 1, 0)
    after = tl.minimum(result + box + 1, length - 1)
    return ((source == before).to(tl.int32) + (source == after).to(tl.int32)).to(tl.int8)


@triton.jit
def box_round(inner, ends, inner_weight, end_weight, bias):
    # The byte, less 128, of a box's two weighted sums of bytes less 128: BoxBlur.c's, in uint32.
    total = inner.to(tl.uint32) * inner_weight + ends.to(tl.uint32) * end_weight + bias
    return ((total >> 24).to(tl.int32) - 128).to(tl.int8)


@triton.jit
def box_across(pixels, counts, ends, inner_weight, end_weight, bias):
    inner = tl.dot(pixels, counts, out_dtype=tl.int32)
    return box_round(inner, tl.dot(pixels, ends, out_dtype=tl.int32), inner_weight, end_weight, bias)


@triton.jit
def box_down(pixels, counts, ends, inner_weight, end_weight, bias):
    inner = tl.dot(counts, pixels, out_dtype=tl.int32)
    return box_round(inner, tl.dot(ends, pixels, out_dtype=tl.int32), inner_weight, end_weight, bias)


@triton.jit(do_not_specialize=["num_groups", "step"])
def box_blur_kernel(
    tasks,
    groups,
    num_groups,
    crops,
    programs,
    step,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    TILE_W: tl.constexpr,
):
    # One program blurs a tile of `step` x TILE_W results of one image, and runs the rest of the pass on it.
    task, tile = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    tiles_across = tl.cdiv(size[1], TILE_W)
    top = tile // tiles_across * step
    left = tile % tiles_across * TILE_W
    # the results are amid the window's rows, and x amid its columns
    rows = top - (WINDOW_H - step) // 2 + tl.arange(0, WINDOW_H)
    columns = left - (WINDOW_W - TILE_W) // 2 + tl.arange(0, WINDOW_W)
    x = left + tl.arange(0, TILE_W)

    first = tl.load(task + 5)
    program = programs + first * 16
    box = tl.load(program + 1).to(tl.int32)
    inner_weight = tl.load(program + 2).to(tl.int32)  # 2**24 / (2 radius + 1), from the host
    end_weight = (16777216 - (2 * box + 1) * inner_weight) // 2
    # half a byte's step, and what subtracting 128 from each byte took away
    bias = ((2 * box + 1) * inner_weight + 2 * end_weight).to(tl.uint32) * 128 + 8388608
    inner_weight = inner_weight.to(tl.uint32)
    end_weight = end_weight.to(tl.uint32)
    # rows outside the image count nothing, so any may stand for them: no mask but the columns' to keep in registers
    near_rows = tl.minimum(tl.maximum(rows, 0), size[0] - 1)
    live = ((columns >= 0) & (columns < size[1]))[None, :]
    # every pass but the last across is from the window to itself
    counts_across = tl.trans(box_counts(columns[None, :], columns[:, None], size[1], box))
    ends_across = tl.trans(box_ends(columns[None, :], columns[:, None], size[1], box))
    counts_last = tl.trans(box_counts(columns[None, :], x[:, None], size[1], box))
    ends_last = tl.trans(box_ends(columns[None, :], x[:, None], size[1], box))
    counts_down = box_counts(rows[None, :], rows[:, None], size[0], box)
    ends_down = box_ends(rows[None, :], rows[:, None], size[0], box)

    address = tl.load(task)
    layout = crops + tl.load(task + 1)
    kind = tl.load(layout + 3)
    channel_step = tl.load(layout) * tl.where(kind == 0, 1, 4)
    place_down = near_rows * tl.load(layout + 1).to(tl.int32)
    place = place_down[:, None] + (columns * tl.load(layout + 2).to(tl.int32))[None, :]
    r = tl.zeros([WINDOW_H, TILE_W], tl.float32)
    g = tl.zeros([WINDOW_H, TILE_W], tl.float32)
    b = tl.zeros([WINDOW_H, TILE_W], tl.float32)
    for channel in range(size[2]):
        pixels = (unit_to_byte(load_channel(address, kind, place, live)).to(tl.int32) - 128).to(tl.int8)
        pixels = box_across(pixels, counts_across, ends_across, inner_weight, end_weight, bias)
        pixels = box_across(pixels, counts_across, ends_across, inner_weight, end_weight, bias)
        pixels = box_across(pixels, counts_last, ends_last, inner_weight, end_weight, bias)
        pixels = box_down(pixels, counts_down, ends_down, inner_weight, end_weight, bias)
        pixels = box_down(pixels, counts_down, ends_down, inner_weight, end_weight, bias)
        pixels = box_down(pixels, counts_down, ends_down, inner_weight, end_weight, bias)
        value = byte_to_unit(pixels.to(tl.int32) + 128)
        r = tl.where(channel == 0, value, r)
        g = tl.where(channel == 1, value, g)
        b = tl.where(channel == 2, value, b)
        address += channel_step
    pixel = rows[:, None] * size[1] + x[None, :]
    count = (tl.load(task + 6) - first).to(tl.int32)
    r, g, b = run_program(r, g, b, pixel, size, program, count, programs, 0, READINGS=False)
    live = (rows >= top) & (rows < tl.minimum(top + step, size[0]))
    live = live[:, None] & (x < size[1])[None, :]
    store_pixels(r, g, b, tl.load(task + 2), crops + tl.load(task + 3), rows[:, None], x[None, :], live)


@triton.jit(do_not_specialize=["num_groups", "down"])
def box_line_kernel(tasks, groups, num_groups, crops, programs, down, BLOCK: tl.constexpr):
    # One program makes one of a box blur's six passes, across or down, on one block of pixels of one image, and runs
    # the rest of the task's operations on them.
    task, block = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    y, x = rows_and_columns(block * BLOCK, size[1], BLOCK)
    live = y < size[0]
    source = tl.load(task)
    layout = crops + tl.load(task + 1)
    first = tl.load(task + 5)
    program = programs + first * 16
    box = tl.load(program + 1).to(tl.int32)
    inner_weight = tl.load(program + 2).to(tl.int32)
    end_weight = (16777216 - (2 * box + 1) * inner_weight) // 2
    r = tl.full([BLOCK], 8388608, tl.uint32)
    g = r
    b = r
    for distance in range(-box - 1, box + 2):
        weight = tl.where(tl.abs(distance) <= box, inner_weight, end_weight).to(tl.uint32)
        ys = tl.minimum(tl.maximum(y + distance * down, 0), size[0] - 1)
        xs = tl.minimum(tl.maximum(x + distance * (1 - down), 0), size[1] - 1)
        near_r, near_g, near_b = load_pixels(source, layout, ys, xs, live)
        r += unit_to_byte(near_r).to(tl.uint32) * weight
        g += unit_to_byte(near_g).to(tl.uint32) * weight
        b += unit_to_byte(near_b).to(tl.uint32) * weight
    r = byte_to_unit(r >> 24)
    g = byte_to_unit(g >> 24)
    b = byte_to_unit(b >> 24)
    count = (tl.load(task + 6) - first).to(tl.int32)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    r, g, b = run_program(r, g, b, pixel, size, program, count, programs, 0, READINGS=False)
    store_pixels(r, g, b, tl.load(task + 2), crops + tl.load(task + 3), y, x, live)
