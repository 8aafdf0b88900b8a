"""How a pass of the pixel kernel begins that is not at each pixel itself: at its 3 x 3 neighbours, or elsewhere."""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from . import ops
from ._math import clamp_unit, round_half_even
from .task_rows import load_pixels

BILINEAR = tl.constexpr(ops.BILINEAR)


@triton.jit
def sharpen(address, layout, y, x, size, live, factor):
    # The pixels (y, x) of an image, size (h, w, 3), against their smooth, which they are themselves on the border.
    r, g, b = load_pixels(address, layout, y, x, live)
    inside = live & (y > 0) & (y < size[0] - 1) & (x > 0) & (x < size[1] - 1)
    smooth_r = tl.zeros_like(r)
    smooth_g = tl.zeros_like(r)
    smooth_b = tl.zeros_like(r)
    for tap in range(size[2] * 3):
        near_r, near_g, near_b = load_pixels(address, layout, y + (tap // 3 - 1), x + (tap % 3 - 1), inside)
        weight = tl.where(tap == 4, 0.38461538461538464, 0.07692307692307693)
        smooth_r += near_r * weight
        smooth_g += near_g * weight
        smooth_b += near_b * weight
    rest = 1.0 - factor
    r = clamp_unit(tl.where(inside, r + (smooth_r - r) * rest, r))
    g = clamp_unit(tl.where(inside, g + (smooth_g - g) * rest, g))
    b = clamp_unit(tl.where(inside, b + (smooth_b - b) * rest, b))
    return r, g, b


@triton.jit
def source_place(x_row, px, py, den, length):
    # Where pixels come from along one axis, in source pixels: row x_row of the inverse map.
    top = px * tl.load(x_row) + py * tl.load(x_row + 1) + tl.load(x_row + 2)
    # an affine map divides by 1, which the GPU's approximate division need not give back as it is
    place = tl.where(den == 1.0, top, top / den) - 0.5
    # what is far outside reads nothing, nor does what is no number: -2 stands for both, for they must be whole numbers
    return tl.where((place > -2.0) & (place < length + 1.0), place, -2.0)


@triton.jit
def warp(address, layout, y, x, size, live, op):
    # What torchvision's grid_sample with fill gives at (y, x): nearest, or four pixels by their areas; zeros outside.
    px = x.to(tl.float32) + 0.5
    py = y.to(tl.float32) + 0.5
    den = px * tl.load(op + 7) + py * tl.load(op + 8) + 1.0
    sx = source_place(op + 1, px, py, den, size[1])
    sy = source_place(op + 4, px, py, den, size[0])
    bilinear = tl.load(op + 9).to(tl.int32) == BILINEAR
    left = tl.where(bilinear, tl.floor(sx), round_half_even(sx))
    top = tl.where(bilinear, tl.floor(sy), round_half_even(sy))
    right_share = tl.where(bilinear, sx - left, 0.0)
    lower_share = tl.where(bilinear, sy - top, 0.0)

    r = tl.zeros_like(px)
    g = tl.zeros_like(px)
    b = tl.zeros_like(px)
    covered = tl.zeros_like(px)
    for tap in range(tl.where(bilinear, 4, 1)):
        xs = left.to(tl.int32) + tap % 2
        ys = top.to(tl.int32) + tap // 2
        weight = tl.where(tap % 2 == 1, right_share, 1.0 - right_share)
        weight *= tl.where(tap // 2 == 1, lower_share, 1.0 - lower_share)
        inside = live & (xs >= 0) & (xs < size[1]) & (ys >= 0) & (ys < size[0])
        tap_r, tap_g, tap_b = load_pixels(address, layout, ys, xs, inside)
        r += tap_r * weight
        g += tap_g * weight
        b += tap_b * weight
        covered += tl.where(inside, weight, 0.0)
    if tl.load(op + 13) != 0:
        r = filled(r, covered, tl.load(op + 10), bilinear)
        g = filled(g, covered, tl.load(op + 11), bilinear)
        b = filled(b, covered, tl.load(op + 12), bilinear)
    return r, g, b


@triton.jit
def filled(x, covered, fill, bilinear):
    # As torchvision fills, which blends what the border has faded already.
    return tl.where(bilinear, (x - fill) * covered + fill, tl.where(covered < 0.5, fill, x))
