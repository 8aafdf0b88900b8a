"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a pure function of numbers.

A block is four uint32 words, computed from a 64-bit key (k0, k1) and a 128-bit counter (c0, c1, c2, c3). A round is

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

and between two of the ten rounds the key advances by (W0, W1). There is no state: who asks for which block, and in what
order, changes nothing. Which number means what in the counter is the caller's business.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint32(0x9E3779B9)
_W1 = np.uint32(0xBB67AE85)
_SHIFT = np.uint64(32)


@njit(nogil=True, cache=True)
def philox4x32(k0, k1, c0, c1, c2, c3):
    """One block: four uint32 words from a key of two uint32 and a counter of four uint32 (callers cast)."""
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32(p1 >> _SHIFT) ^ c1 ^ k0,
            np.uint32(p1),
            np.uint32(p0 >> _SHIFT) ^ c3 ^ k1,
            np.uint32(p0),
        )
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


@njit(nogil=True, cache=True)
def _fill(out, key_low, key_high, ids, third, first):
    k0 = np.uint32(key_low)
    k1 = np.uint32(key_high)
    c2 = np.uint32(third)
    for i in range(out.shape[0]):
        c0 = np.uint32(ids[i])
        c1 = np.uint32(ids[i] >> _SHIFT)
        for j in range(out.shape[1]):
            w0, w1, w2, w3 = philox4x32(k0, k1, c0, c1, c2, np.uint32(first + j))
            out[i, j, 0] = w0
            out[i, j, 1] = w1
            out[i, j, 2] = w2
            out[i, j, 3] = w3


def philox_blocks(key: int, ids: np.ndarray, third: int, first: int, count: int) -> np.ndarray:
    """Blocks for the counters (id low half, id high half, third, first + j), j < count, as uint32 [n, count, 4].

    key: 0 <= key < 2**64, its low half is k0. ids: contiguous, writable uint64 [n]. third and first + count - 1 are
    uint32. Nothing is checked here.
    """
    out = np.empty((len(ids), count, 4), np.uint32)
    # The key goes in as two halves because Numba types a Python int above 2**63 differently, and would compile twice.
    _fill(out, key & 0xFFFFFFFF, key >> 32, ids, third, first)
    return out
