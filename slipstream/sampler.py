"""The order of an epoch: position -> sample_id, a keyed bijection that needs no memory.

A Feistel network over Philox permutes [0, 2**bits); a value that lands at or beyond the length goes through it again
(cycle walking), so that [0, length) is permuted within itself: 1 to 2 passes on average, at most 16 in a tiny set.

- Halves: ceil(bits / 2) and floor(bits / 2) bits, changed in turn by `half ^= philox(counter = (other half, epoch,
  round))` under the key of (seed, "order"): the counter (sample_id, epoch, draw) of draws.py, a half in the id's place.
- Parity: halves of two or more bits give even permutations only, and cycle walking does not mend it: with n of N points
  in sight, the orders' mean sign is +-n (n - 1) / (N (N - 1)), which is nearly 1 where n is nearly N. So one keyed bit
  an epoch swaps positions 0 and 1 first, which makes both signs equally likely and mends it for every n.
- Rounds: 24, chosen for the smallest domain. With truly random round functions the exact distance of pairs from uniform
  falls by a factor of 2 a round on 4 bits (halves of 2), 4 on 8 bits, and so on; sets of four or five fall by 1.7 a
  round on 4 bits, to under 3e-6 after 24 rounds. That is less than a million epochs could show.
- At least 4 bits: on 3 bits (halves of 2 and 1) sets of four are still 1.2e-2 from uniform after 24 rounds.
"""

from __future__ import annotations

import operator
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
from numba import njit
from slipstream_kernels.philox import philox4x32

from .draws import stream_key

_MAX_LENGTH = 2**62
_ROUNDS = 24


@dataclass(frozen=True, slots=True)
class Sampler:
    """The order of every epoch of `length` samples: a pure function of (seed, epoch, position), with O(1) memory.

    length: 0 to 2**62. shuffle: False gives sample_id = position in every epoch. seed: as in `stream_key`.
    Each epoch is a permutation of [0, length). ValueError or TypeError names a bad argument.
    """

    length: int
    _: KW_ONLY
    shuffle: bool
    seed: int
    _key: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        length = _whole("length", self.length)
        if not 0 <= length <= _MAX_LENGTH:
            raise ValueError(f"length must be in [0, 2**62], got {length}")
        if not isinstance(self.shuffle, bool):
            raise TypeError(f"shuffle must be True or False, got {self.shuffle!r}")
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "_key", stream_key(self.seed, "order"))

    def __len__(self) -> int:
        return self.length

    def sample_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sample ids at these positions of this epoch, int64 [n] for whole numbers [n]; the positions may repeat.

        epoch: 0 <= epoch < 2**32. A position outside [0, length) is an IndexError that names it.
        """
        epoch = _whole("epoch", epoch)
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
        given = np.asarray(positions)
        if given.ndim != 1:
            raise ValueError(f"positions must have one dimension, got shape {given.shape}")
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"positions must be whole numbers, got dtype {given.dtype}")
        outside = (given < 0) | (given >= self.length)
        if outside.any():
            raise IndexError(f"positions must be in [0, {self.length}), got {given[outside][0]}")
        return permute_within(given, self.length, self._key, epoch) if self.shuffle else given.astype(np.int64)


def permute_within(values: np.ndarray, length: int, key: int, epoch: int) -> np.ndarray:
    """The image of each value in [0, length) under the keyed bijection of this epoch: int64 [n], a new array."""
    images = values.astype(np.int64, order="C", copy=True)
    bits = max(4, (length - 1).bit_length())
    _permute(images, length, bits, key & 0xFFFFFFFF, key >> 32, epoch)
    return images


@njit(nogil=True, cache=True)
def _permute(values, length, bits, key_low, key_high, epoch):
    """Replaces each value in [0, length), length <= 2**bits, by its image, in place."""
    k0 = np.uint32(key_low)
    k1 = np.uint32(key_high)
    c1 = np.uint32(0)  # a half has at most 31 bits
    c2 = np.uint32(epoch)
    right_bits = bits // 2
    left_mask = np.uint32((1 << (bits - right_bits)) - 1)
    right_mask = np.uint32((1 << right_bits) - 1)
    swap = philox4x32(k0, k1, np.uint32(0), c1, c2, np.uint32(_ROUNDS))[0] & np.uint32(1)
    for i in range(len(values)):
        value = values[i]
        if value < 2 and length > 1:
            value ^= np.int64(swap)
        while True:
            left = np.uint32(value >> right_bits)
            right = np.uint32(value) & right_mask
            for r in range(0, _ROUNDS, 2):
                left ^= philox4x32(k0, k1, right, c1, c2, np.uint32(r))[0] & left_mask
                right ^= philox4x32(k0, k1, left, c1, c2, np.uint32(r + 1))[0] & right_mask
            value = np.int64(left) << right_bits | np.int64(right)
            if value < length:
                break
        values[i] = value


def _whole(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
