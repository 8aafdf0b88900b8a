"""Helpers on loaded values: no tl.load, no tl.store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def filter_weight(x, bicubic):
    """The resampling filter at distance x (float64): triangle, or Keys' cubic with a = -0.5, in Pillow's order."""
    x = tl.abs(x)
    triangle = tl.where(x < 1.0, 1.0 - x, 0.0)
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    cubic = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(bicubic, cubic, triangle)


@triton.jit
def low_piece(weight):
    """The low eight bits of an int32 as a signed number in [-128, 127]."""
    return ((weight + 128) & 255) - 128


@triton.jit
def pack_weight(weight):
    """An int32 weight as its three int8 pieces in one int32, bytes (low, middle, high):
    weight == high * 65536 + middle * 256 + low."""
    low = low_piece(weight)
    rest = (weight - low) >> 8
    middle = low_piece(rest)
    high = (rest - middle) >> 8
    return (high << 16) | ((middle & 255) << 8) | (low & 255)


@triton.jit
def unpack_weight(packed):
    """The three int8 pieces (high, middle, low) of a packed weight."""
    return (packed >> 16).to(tl.int8), (packed >> 8).to(tl.int8), packed.to(tl.int8)


@triton.jit
def round_to_byte(total):
    """A 22-bit fixed-point sum, its rounding half already added, as a whole number in [0, 255] (int32)."""
    return tl.minimum(tl.maximum(total >> 22, 0), 255)
