"""Helpers on loaded values: no tl.load, no tl.store."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter cuts bfloat16 off where the hardware rounds it, and need not fuse a multiply-add.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# The float32 nearest to 1 / 255.
BYTE_STEP = tl.constexpr(0.00392156862745098)


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
def round_to_byte(total):
    """A 22-bit fixed-point sum, its rounding half already added, as a whole number in [0, 255] (int32)."""
    return tl.minimum(tl.maximum(total >> 22, 0), 255)


@triton.jit
def chroma_of_four(near, below, beside, across, odd):
    """A chroma plane between its samples, less 128 (int32): 9 of the nearest, 3 of the one above or below it and of the
    one beside it, 1 of the one across, sixteenths, rounded down in odd columns and up in the others (yuv420.py)."""
    return ((3 * (3 * near + below) + (3 * beside + across) + 8 - odd) >> 4) - 128


@triton.jit
def byte_of_planes(luma, share):
    """A channel's byte (int32) of Y and of its share of chroma, which has 16 fractional bits and their half."""
    return tl.minimum(tl.maximum(luma.to(tl.int32) + (share >> 16), 0), 255)


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
    """The lower edge of x's level, of `levels` (a power of two) in [0, 1]."""
    share = (0x7F000000 - levels.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # 1 / levels: 2**-n for 2**n
    return tl.minimum(tl.maximum(tl.floor(x * levels), 0.0), levels - 1.0) * share


@triton.jit
def reciprocal_of(d):
    """1 / d (normal), its last bit wrong once in many: an approximate one and a step of Newton's."""
    approximate = 1.0 / d
    return tl.fma(approximate, tl.fma(-approximate, d, 1.0), approximate)


@triton.jit
def quotient_of(x, d, reciprocal):
    """x / d as IEEE rounds it, for normal numbers, from the float32 nearest to 1 / d: the quotient by that is put right
    twice by what is left, which a fused multiply-add gives exactly (Markstein)."""
    q = x * reciprocal
    q = tl.fma(tl.fma(-q, d, x), reciprocal, q)
    return tl.fma(tl.fma(-q, d, x), reciprocal, q)


@triton.jit
def divide_many(x, d, reciprocal):
    """x / d as IEEE rounds it, for many x and one d. IEEE's own division is three times as long, and a call where
    numbers are not normal, around which the assembler spills."""
    return tl.div_rn(x, d) if INTERPRETED else quotient_of(x, d, reciprocal)


@triton.jit
def hue_channel(sixths, high, spread):
    """One channel from its place on the circle of hues, in sixths of a turn in [0, 12): least from 0 to 1 of its
    distance to 4, full from 2 on."""
    k = tl.where(sixths >= 6.0, sixths - 6.0, sixths)
    return high - spread * clamp_unit(tl.minimum(k, 4.0 - k))


@triton.jit
def shift_hue(r, g, b, shift):
    """A pixel's colour with its hue moved by `shift` turns in [-0.5, 0.5]: what torchvision's way through HSV and its
    six cases comes to, with one division and no cases."""
    high = tl.maximum(tl.maximum(r, g), b)
    spread = high - tl.minimum(tl.minimum(r, g), b)
    red = high == r
    green = high == g
    beyond = tl.where(red, g - b, tl.where(green, b - r, r - g))
    start = tl.where(red, 0.0, tl.where(green, 2.0, 4.0))
    sixths = beyond / tl.where(spread > 0.0, spread, 1.0) + start
    turn = sixths * 0.16666666666666666 + shift
    sixths = (turn - tl.floor(turn)) * 6.0
    r = hue_channel(sixths + 5.0, high, spread)
    g = hue_channel(sixths + 3.0, high, spread)
    b = hue_channel(sixths + 1.0, high, spread)
    return r, g, b


@triton.jit
def unit_to_byte(x):
    """x * 255, rounded half to even and clamped to [0, 255]."""
    x = tl.minimum(tl.maximum(x * 255.0, 0.0), 255.0)
    # at 2**23 a float32 has no fraction, so the addition rounds
    return ((x + 8388608.0) - 8388608.0).to(tl.uint8)


@triton.jit
def byte_to_unit(byte):
    """A byte as a float32 in [0, 1]: times the nearest float32 to 1 / 255, as torchvision does."""
    return byte.to(tl.float32) * BYTE_STEP


@triton.jit
def round_to_bfloat16(x):
    """x (float32, no NaN) rounded to the nearest bfloat16, ties to even, still as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 32767 + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_half_even(x):
    """x (float32, under 2**22 in size) as a whole number, halves to even."""
    # at 1.5 * 2**23 a float32 has no fraction, so the addition rounds
    return (x + 12582912.0) - 12582912.0


@triton.jit
def reflect(index, length):
    """An index, less than `length` beyond a line of that, mirrored at both ends, without doubling their pixels."""
    index = tl.abs(index)
    return tl.minimum(index, 2 * length - 2 - index)


@triton.jit
def solarize(x, threshold):
    """1 - x where x is the threshold or more."""
    return tl.where(x >= threshold, 1.0 - x, x)


@triton.jit
def solarize_add(x, threshold, addend):
    """clamp(x + addend) where x is under the threshold."""
    return tl.where(x < threshold, clamp_unit(x + addend), x)


@triton.jit
def equalize_bin(x):
    """The byte that torchvision's equalize counts x as (its conversion of floats to uint8)."""
    return tl.minimum(tl.maximum(x * 255.999, 0.0), 255.0).to(tl.int32)


@triton.jit
def equalize_table(histogram, num_pixels):
    """What each of the 256 bytes becomes, from how many pixels have it (torchvision's `equalize_image`)."""
    level = tl.arange(0, 256)
    total = tl.cumsum(histogram, 0)
    brightest = tl.sum(tl.where((total == num_pixels) & (histogram > 0), histogram, 0), 0)
    step = (num_pixels - brightest) // 255
    entry = (total - histogram + step // 2) // tl.maximum(step, 1)
    return tl.where(step == 0, level, tl.minimum(entry, 255))


@triton.jit
def philox4x32(k0, k1, c0, c1):
    """The first two words of Philox4x32-10's block for the key (k0, k1) and the counter (c0, c1, 0, 0), all uint32."""
    m0 = tl.full([], 0xD2511F53, tl.uint32)
    m1 = tl.full([], 0xCD9E8D57, tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1


@triton.jit
def log_unit(x):
    """The natural logarithm of x in [2**-126, 1], within 2e-7 of its size: the hardware's is far off near 1."""
    bits = x.to(tl.int32, bitcast=True)
    # x = 2**power * m with m in [sqrt(1/2), sqrt(2)): log m = 2 atanh(s), s = (m - 1) / (m + 1), a series in s**2
    power = (bits - 0x3F3504F3) >> 23
    f = (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = (((z * 0.2222222222222222 + 0.2857142857142857) * z + 0.4) * z + 0.6666666666666666) * z
    return power.to(tl.float32) * 0.6931471805599453 + (2.0 * s + s * series)


@triton.jit
def cos_turns(turns):
    """cos(2 pi turns) for turns in [0, 1], within 1e-7: from the nearest quarter turn, by sine's or cosine's series."""
    quarters = turns * 4.0
    nearest = tl.floor(quarters + 0.5)
    angle = (quarters - nearest) * 1.5707963267948966  # [-pi/4, pi/4]
    z = angle * angle
    sine = ((z * 2.7557319223985893e-06 - 0.0001984126984126984) * z + 0.008333333333333333) * z - 0.16666666666666666
    sine = sine * z * angle + angle
    cosine = (((z * 2.48015873015873e-05 - 0.001388888888888889) * z + 0.041666666666666664) * z - 0.5) * z + 1.0
    quarter = nearest.to(tl.int32) & 3
    value = tl.where((quarter & 1) == 0, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -value, value)


@triton.jit
def standard_normal(w0, w1):
    """A standard normal (float32) from two uint32 words, by Box and Muller."""
    u1 = (w0.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u2 = w1.to(tl.float32) * 2.3283064365386963e-10
    return tl.sqrt(-2.0 * log_unit(u1)) * cos_turns(u2)
