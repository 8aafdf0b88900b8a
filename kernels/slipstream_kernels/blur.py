"""Passes that begin with a blur: the blur, then the pass's other operations.

The Gaussian blur is torchvision's: a kernel of the given size, the image reflected at its borders. A program sums
across, writes that to memory of its own, and sums it down. The box blur is Pillow's GaussianBlur to the byte: three box
blurs an axis on bytes, the edges repeated, as products with banded matrices, which README.md derives.

Shapes: any image; a Gaussian kernel of any size, a box radius under 16. A pass that begins with a blur holds no
operation that needs a reading.
"""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import TypedDict

import triton
import triton.language as tl
from triton import knobs

from ._math import BYTE_STEP, byte_to_unit, reflect, unit_to_byte
from .color import run_program, size_of
from .task_rows import find_task, load_channel, load_pixels, rows_and_columns, store_pixels

STRIP = 32  # columns of a program of the Gaussian kernel


class BlurOptions(TypedDict):
    BLOCK_W: int
    BLOCK_H: int
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
    """Columns and warps of a program of the Gaussian kernel, and rows a step: columns are a warp's lanes."""
    return {
        "BLOCK_W": STRIP,
        "BLOCK_H": 64 if knobs.runtime.interpret else 16,
        "num_warps": 4,
        "num_stages": 1,
        "maxnreg": 128,
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
def gaussian_weight(distance, exponent):
    # The weight, not yet normalized, of a pixel at this distance, a whole number.
    d = distance * 1.0
    return tl.exp2(d * d * exponent)


@triton.jit
def gaussian_total(radius, exponent):
    # The sum of the weights along one axis.
    total = 0.0
    for distance in range(-radius, radius + 1):
        total += gaussian_weight(distance, exponent)
    return total


@triton.jit
def gaussian_across(line, channel_step, column_step, x, width, radius, exponent):
    # The weighted sums across, not yet normalized, at columns x of rows that begin at `line`, of bytes or floats.
    r = tl.zeros_like(x).to(tl.float32)
    g = r
    b = r
    for distance in range(-radius, radius + 1):
        weight = gaussian_weight(distance, exponent)
        pixel = line + reflect(x + distance, width) * column_step
        r = tl.fma(tl.load(pixel).to(tl.float32), weight, r)
        g = tl.fma(tl.load(pixel + channel_step).to(tl.float32), weight, g)
        b = tl.fma(tl.load(pixel + 2 * channel_step).to(tl.float32), weight, b)
    return r, g, b


@triton.jit(do_not_specialize=["num_groups"])
def gaussian_blur_kernel(tasks, groups, num_groups, crops, programs, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr):
    # One program blurs BLOCK_W columns of one image, all rows and channels, and runs the rest of the pass on them,
    # BLOCK_H rows a step. Blocks are flat: of two axes the compiler may give a warp's lanes to the rows.
    task, strip = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    height = size[0]
    lane = tl.arange(0, BLOCK_H * BLOCK_W) % BLOCK_W
    step_row = tl.arange(0, BLOCK_H * BLOCK_W) // BLOCK_W
    x = strip * BLOCK_W + lane
    x_live = x < size[1]

    first = tl.load(task + 5)
    program = programs + first * 16
    radius_x = tl.load(program + 1).to(tl.int32) // 2
    radius_y = tl.load(program + 2).to(tl.int32) // 2
    exponent_x = gaussian_exponent(tl.load(program + 3))
    exponent_y = gaussian_exponent(tl.load(program + 4))
    share = 1.0 / (gaussian_total(radius_x, exponent_x) * gaussian_total(radius_y, exponent_y))

    # across: a row or column past the last one does the last one's work, which nobody stores
    source = tl.load(task)
    layout = crops + tl.load(task + 1)
    channel_step = tl.load(layout)
    row_step = tl.load(layout + 1).to(tl.int32)
    column_step = tl.load(layout + 2).to(tl.int32)
    is_bytes = tl.load(layout + 3) == 0
    rows = height + 2 * radius_y  # with those that are reflected, so that going down is a plain step
    between = tl.load(task + 7).to(tl.pointer_type(tl.float32)) + strip.to(tl.int64) * rows * (3 * BLOCK_W)
    held_x = tl.minimum(x, size[1] - 1)
    for row in range(0, rows, BLOCK_H):
        y = row + step_row
        line = reflect(tl.minimum(y, rows - 1) - radius_y, height) * row_step
        if is_bytes:
            octets = source.to(tl.pointer_type(tl.uint8)) + line
            r, g, b = gaussian_across(octets, channel_step, column_step, held_x, size[1], radius_x, exponent_x)
        else:
            floats = source.to(tl.pointer_type(tl.float32)) + line
            r, g, b = gaussian_across(floats, channel_step, column_step, held_x, size[1], radius_x, exponent_x)
        to = between + (y * (3 * BLOCK_W) + lane)
        live = (y < rows) & x_live
        tl.store(to, r, mask=live)
        tl.store(to + BLOCK_W, g, mask=live)
        tl.store(to + 2 * BLOCK_W, b, mask=live)
    tl.debug_barrier()  # a barrier orders what a program's threads wrote and read

    # down
    held_lane = lane + (held_x - x)
    share *= tl.where(is_bytes, BYTE_STEP, 1.0)
    count = (tl.load(task + 6) - first).to(tl.int32)
    target = tl.load(task + 2)
    for row in range(0, height, BLOCK_H):
        y = row + step_row
        pixel = between + (tl.minimum(y, height - 1) * (3 * BLOCK_W) + held_lane)
        r = tl.zeros([BLOCK_H * BLOCK_W], tl.float32)
        g = r
        b = r
        for distance in range(-radius_y, radius_y + 1):
            weight = gaussian_weight(distance, exponent_y)
            r = tl.fma(tl.load(pixel), weight, r)
            g = tl.fma(tl.load(pixel + BLOCK_W), weight, g)
            b = tl.fma(tl.load(pixel + 2 * BLOCK_W), weight, b)
            pixel += 3 * BLOCK_W
        number = y * size[1] + x
        r, g, b = run_program(r * share, g * share, b * share, y, number, size, program, count, task, READINGS=False)
        live = (y < height) & x_live
        store_pixels(r, g, b, target, crops + tl.load(task + 3), y, x, live)


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
    # One program blurs a tile of `step` x TILE_W results of one image, and runs the rest of the pass on it. What is
    # loaded and stored is flat, as in the Gaussian's.
    task, tile = find_task(tasks, groups, num_groups)
    size = size_of(task, crops)
    tiles_across = tl.cdiv(size[1], TILE_W)
    top = tile // tiles_across * step
    left = tile % tiles_across * TILE_W
    # the results are amid the window's rows, and x amid its columns
    first_row = top - (WINDOW_H - step) // 2
    first_column = left - (WINDOW_W - TILE_W) // 2
    rows = first_row + tl.arange(0, WINDOW_H)
    columns = first_column + tl.arange(0, WINDOW_W)
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
    # rows outside the image count nothing, so any may stand for them: no mask but the columns' to keep in registers
    down = tl.minimum(tl.maximum(first_row + tl.arange(0, WINDOW_H * WINDOW_W) // WINDOW_W, 0), size[0] - 1)
    across = first_column + tl.arange(0, WINDOW_H * WINDOW_W) % WINDOW_W
    live = (across >= 0) & (across < size[1])
    place = down * tl.load(layout + 1).to(tl.int32) + across * tl.load(layout + 2).to(tl.int32)
    r = tl.zeros([WINDOW_H * TILE_W], tl.float32)
    g = r
    b = r
    for channel in range(size[2]):
        pixels = (unit_to_byte(load_channel(address, kind, place, live)).to(tl.int32) - 128).to(tl.int8)
        pixels = tl.reshape(pixels, [WINDOW_H, WINDOW_W])
        pixels = box_across(pixels, counts_across, ends_across, inner_weight, end_weight, bias)
        pixels = box_across(pixels, counts_across, ends_across, inner_weight, end_weight, bias)
        pixels = box_across(pixels, counts_last, ends_last, inner_weight, end_weight, bias)
        pixels = box_down(pixels, counts_down, ends_down, inner_weight, end_weight, bias)
        pixels = box_down(pixels, counts_down, ends_down, inner_weight, end_weight, bias)
        pixels = box_down(pixels, counts_down, ends_down, inner_weight, end_weight, bias)
        value = byte_to_unit(tl.reshape(pixels, [WINDOW_H * TILE_W]).to(tl.int32) + 128)
        r = tl.where(channel == 0, value, r)
        g = tl.where(channel == 1, value, g)
        b = tl.where(channel == 2, value, b)
        address += channel_step
    down = first_row + tl.arange(0, WINDOW_H * TILE_W) // TILE_W
    across = left + tl.arange(0, WINDOW_H * TILE_W) % TILE_W
    count = (tl.load(task + 6) - first).to(tl.int32)
    r, g, b = run_program(r, g, b, down, down * size[1] + across, size, program, count, task, READINGS=False)
    live = (down >= top) & (down < tl.minimum(top + step, size[0])) & (across < size[1])
    store_pixels(r, g, b, tl.load(task + 2), crops + tl.load(task + 3), down, across, live)


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
    r, g, b = run_program(r, g, b, y, pixel, size, program, count, task, READINGS=False)
    store_pixels(r, g, b, tl.load(task + 2), crops + tl.load(task + 3), y, x, live)
