"""The only source of random numbers: Philox4x32-10 blocks, addressed by (seed, stream, sample_id, epoch, draw).

The 64-bit key is a hash of (seed, stream); the 128-bit counter is (sample_id u64, epoch u32, draw u32). No two of them
are ever summed: with sums, stream c of sample i + 1 would equal stream c + 1 of sample i.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import numpy as np
import torch
from slipstream_kernels.philox import philox_blocks

_U32 = 2**32
_U64 = 2**64


def stream_key(seed: int, stream: str) -> int:
    """The 64-bit key of one stream of random numbers: blake2b-64 of (seed, stream), little endian.

    seed: any whole number, negative ones and those of more than 64 bits too; all give unrelated keys. stream: any
    string, the empty one too. TypeError for a seed that is no int (bool is none) and for a stream that is no str.
    """
    if isinstance(seed, (bool, np.bool_)):
        raise TypeError(f"seed must be an int, got {seed!r}")
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an int, got {seed!r}") from None
    if not isinstance(stream, str):
        raise TypeError(f"stream must be a str, got {stream!r}")
    # A hexadecimal number holds no colon, so the first colon ends the seed whatever the stream's name holds.
    encoded = f"{seed:x}:{stream}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


class Draws:
    """The random numbers of one stream for the samples of one batch: a pure function of key, sample id, epoch and draw.

    key: from `stream_key`. sample_ids: whole numbers [B], 0 <= id < 2**64 (copied). epoch: 0 <= epoch < 2**32.
    A sample's numbers do not depend on the other samples of the batch. ValueError or TypeError names a bad argument.
    """

    __slots__ = ("epoch", "key", "sample_ids")

    def __init__(self, key: int, sample_ids: np.ndarray | Sequence[int], epoch: int) -> None:
        self.key = _in_range("key", key, _U64)
        self.sample_ids = _as_uint64(sample_ids)
        self.epoch = _in_range("epoch", epoch, _U32)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def words(self, first: int, count: int = 1) -> np.ndarray:
        """The blocks of draws first ... first + count - 1 as uint32 [B, count, 4]; every draw is in [0, 2**32)."""
        first = _in_range("first", first, _U32)
        count = _in_range("count", count, _U32 + 1 - first)
        return philox_blocks(self.key, self.sample_ids, self.epoch, first, count)

    def uniform(self, first: int, count: int = 1) -> np.ndarray:
        """The same blocks as float64 [B, count, 4] in [0, 1): each word times 2**-32."""
        return self.words(first, count) * 2.0**-32

    def child(self, name: str) -> Draws:
        """The draws of a part that has this name: the key stream_key(key, name), the same sample ids and epoch."""
        return Draws(stream_key(self.key, name), self.sample_ids, self.epoch)


def fresh_sample_ids(count: int) -> np.ndarray:
    """Random sample ids, uint64 [count], from torch's default CPU generator, so that torch.manual_seed decides them."""
    return torch.empty(count, dtype=torch.int64, device="cpu").random_().numpy().astype(np.uint64)


def ids_array(sample_ids: np.ndarray | Sequence[int]) -> np.ndarray:
    """Ids as numpy's asarray gives them, but without floats in place of ints on both sides of 2**63."""
    ids = np.asarray(sample_ids)
    if ids.dtype.kind == "f" and isinstance(sample_ids, Sequence):
        whole = [isinstance(each, (int, np.integer)) and 0 <= each < _U64 for each in sample_ids]
        if all(whole):
            return np.array([int(each) for each in sample_ids], np.uint64)
    return ids


def _in_range(field: str, value: int, end: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{field} must be an int, got {value!r}") from None
    if not 0 <= number < end:
        raise ValueError(f"{field} must be in [0, {end}), got {number}")
    return number


def _as_uint64(sample_ids: np.ndarray | Sequence[int]) -> np.ndarray:
    ids = ids_array(sample_ids)
    if ids.ndim != 1:
        raise ValueError(f"sample_ids must have one dimension, got shape {ids.shape}")
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"sample_ids must be whole numbers in [0, 2**64), got dtype {ids.dtype}")
    if ids.size and ids.dtype.kind == "i" and ids.min() < 0:
        raise ValueError(f"sample_ids must be in [0, 2**64), got {ids.min()}")
    # A copy: the numbers must not change when the caller reuses its array.
    return ids.astype(np.uint64, order="C", copy=True)
