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


@triton.jit
def clamp_unit(x):
    """x held to [0, 1]."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def grey_of(r, g, b):
    """A pixel's grey, by torchvision's weights (`_rgb_to_grayscale_image`)."""
    return r * 0.2989 + g * 0.587 + b * 0.114


@triton.jit
def blend(x, other, ratio):
    """clamp(ratio * x + (1 - ratio) * other): torchvision's `_blend`."""
    return clamp_unit(x * ratio + other * (1.0 - ratio))


@triton.jit
def posterize(x, levels):
    """The lower edge of x's level, of `levels` (a power of two, so its reciprocal is exact) in [0, 1]."""
    return tl.minimum(tl.maximum(tl.floor(x * levels), 0.0), levels - 1.0) * tl.div_rn(1.0, levels)


@triton.jit
def rgb_to_hsv(r, g, b):
    """Hue in turns [0, 1), saturation, value (torchvision's `_rgb_to_hsv`); a grey pixel has hue and saturation 0."""
    top = tl.maximum(tl.maximum(r, g), b)
    spread = top - tl.minimum(tl.minimum(r, g), b)
    is_grey = spread == 0.0
    saturation = tl.div_rn(spread, tl.where(is_grey, 1.0, top))
    # which two of the three distances from the top count, and from which third of the circle
    red = top == r
    green = top == g
    ahead = top - tl.where(red, b, tl.where(green, r, g))
    behind = top - tl.where(red, g, tl.where(green, b, r))
    third = tl.where(red, 0.0, tl.where(green, 2.0, 4.0))
    divisor = tl.where(is_grey, 1.0, spread)
    sixths = (tl.div_rn(ahead, divisor) + third) - tl.div_rn(behind, divisor)
    hue = sixths * 0.16666666666666666 + 1.0
    return hue - tl.floor(hue), saturation, top


@triton.jit
def hsv_to_rgb(hue, saturation, value):
    """Red, green, blue of a hue in turns [0, 1], a saturation and a value (torchvision's `_hsv_to_rgb`)."""
    sixths = hue * 6.0
    whole = tl.floor(sixths)
    part = sixths - whole
    sector = whole.to(tl.int32)
    sector = tl.where(sector == 6, 0, sector)  # rounding may have made the hue a whole turn
    rest = 1.0 - saturation
    p = clamp_unit(rest * value)
    q = clamp_unit((1.0 - saturation * part) * value)
    t = clamp_unit((saturation * part + rest) * value)
    r = tl.where(sector % 5 == 0, value, tl.where(sector == 1, q, tl.where(sector == 4, t, p)))
    g = tl.where(sector == 0, t, tl.where(sector <= 2, value, tl.where(sector == 3, q, p)))
    b = tl.where(sector <= 1, p, tl.where(sector == 2, t, tl.where(sector == 5, q, value)))
    return r, g, b


@triton.jit
def shift_hue(r, g, b, shift):
    """A pixel's colour with its hue moved by `shift` turns in [-0.5, 0.5] (torchvision's `adjust_hue_image`)."""
    hue, saturation, value = rgb_to_hsv(r, g, b)
    hue += shift
    return hsv_to_rgb(hue - tl.floor(hue), saturation, value)


@triton.jit
def unit_to_byte(x):
    """x * 255, rounded half to even and clamped to [0, 255]."""
    x = tl.minimum(tl.maximum(x * 255.0, 0.0), 255.0)
    # at 2**23 a float32 has no fraction, so the addition rounds
    return ((x + 8388608.0) - 8388608.0).to(tl.uint8)


@triton.jit
def round_to_bfloat16(x):
    """x (float32, no NaN) rounded to the nearest bfloat16, ties to even, still as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 32767 + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)
