"""RGB as planes of YUV 4:2:0 on the CPU: what slipstream's `yuv420.py` stores, in one thread without Python's lock.

Y = (19595 R + 38470 G + 7471 B + 2**15) >> 16. Cb and Cr are mixed alike, halved along both axes by the weights
(-1, 0, 5, 5, 0, -1) / 8, the edges repeated, and rounded once: README.md states it. Their halving is nearly the inverse
of the doubling that readers do, so that less is lost than by the mean.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# 16 bits of the shares and 3 for each halving; no sum leaves int32: |sum| <= 12 * 12 * 127.5 * 2**16
_MIDDLE = (128 << 22) + (1 << 21)


@njit(nogil=True, cache=True)
def planes_of_rgb(pixels, luma, blue, red):
    """Write the planes of an image, uint8 [H, W, 3]: luma uint8 [H, W], blue and red uint8 [ceil(H / 2), ceil(W / 2)].

    Shares of red, green and blue as libjpeg has them (jccolor.c); those of Cb and of Cr sum to 0, so grey stays grey.
    """
    height, width = luma.shape
    rows, columns = blue.shape
    # Rows of Cb and Cr at half their length; one row at a time is mixed, with two columns before it and three behind.
    halves = np.empty((2, height, columns), np.int32)
    cb, cr = np.empty(width + 5, np.int32), np.empty(width + 5, np.int32)
    for y in range(height):
        for x in range(width):
            r, g, b = np.int32(pixels[y, x, 0]), np.int32(pixels[y, x, 1]), np.int32(pixels[y, x, 2])
            luma[y, x] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
            cb[x + 2] = 32768 * b - 11059 * r - 21709 * g
            cr[x + 2] = 32768 * r - 27439 * g - 5329 * b
        for wide, out in ((cb, halves[0]), (cr, halves[1])):
            wide[:2] = wide[2]
            wide[width + 2 :] = wide[width + 1]
            for x in range(columns):
                out[y, x] = 5 * (wide[2 * x + 2] + wide[2 * x + 3]) - wide[2 * x] - wide[2 * x + 5]
    for half, plane in ((halves[0], blue), (halves[1], red)):
        for y in range(rows):
            outer, inner = half[max(2 * y - 2, 0)], half[2 * y]
            inner_next, outer_next = half[min(2 * y + 1, height - 1)], half[min(2 * y + 3, height - 1)]
            for x in range(columns):
                value = (5 * (inner[x] + inner_next[x]) - outer[x] - outer_next[x] + _MIDDLE) >> 22
                plane[y, x] = min(max(value, 0), 255)
