"""Philox4x32-10 against Random123's known answers and against plain Python integers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from slipstream_kernels.philox import philox4x32, philox_blocks

# (counter, key, answer) from the lines "philox4x32 10" of Random123's kat_vectors: zeros, all ones, digits of pi.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
U32 = 0xFFFFFFFF


def numbers(line: str) -> list[int]:
    return [int(word, 16) for word in line.split()]


def scalar(key: list[int], counter: list[int]) -> list[int]:
    return [int(word) for word in philox4x32(*(np.uint32(number) for number in key + counter))]


def philox_reference(key: list[int], counter: list[int]) -> list[int]:
    """The paper's definition: substitute each half, swap, with the key of round r equal to k + r W."""
    left, right = [counter[1], counter[3]], [counter[0], counter[2]]
    for r in range(10):
        products = [0xD2511F53 * right[0], 0xCD9E8D57 * right[1]]
        high, low = [p >> 32 for p in products], [p & U32 for p in products]
        keys = [(key[0] + r * 0x9E3779B9) & U32, (key[1] + r * 0xBB67AE85) & U32]
        left, right = [low[1], low[0]], [high[1] ^ left[0] ^ keys[0], high[0] ^ left[1] ^ keys[1]]
    return [right[0], left[0], right[1], left[1]]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_scalar_gives_random123s_known_answers(counter, key, answer):
    assert scalar(numbers(key), numbers(counter)) == numbers(answer)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_blocks_give_random123s_known_answers(counter, key, answer):
    c0, c1, c2, c3 = numbers(counter)
    k0, k1 = numbers(key)
    blocks = philox_blocks(k0 | k1 << 32, np.array([c0 | c1 << 32], np.uint64), c2, c3, 1)
    assert blocks.dtype == np.uint32
    assert blocks.tolist() == [[numbers(answer)]]


def test_scalar_equals_plain_python_on_random_inputs():
    rng = random.Random(0)
    for _ in range(500):
        key = [rng.getrandbits(32) for _ in range(2)]
        counter = [rng.getrandbits(32) for _ in range(4)]
        assert scalar(key, counter) == philox_reference(key, counter)


def test_blocks_lay_the_counter_out_as_documented():
    rng = random.Random(1)
    key, third, first = rng.getrandbits(64), rng.getrandbits(32), U32 - 4
    ids = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, rng.getrandbits(64)]
    blocks = philox_blocks(key, np.array(ids, np.uint64), third, first, 5)
    expected = [
        [philox_reference([key & U32, key >> 32], [i & U32, i >> 32, third, first + j]) for j in range(5)] for i in ids
    ]
    assert blocks.tolist() == expected


def test_blocks_of_nothing_are_empty():
    assert philox_blocks(1, np.empty(0, np.uint64), 0, 0, 3).shape == (0, 3, 4)
    assert philox_blocks(1, np.zeros(2, np.uint64), 0, 0, 0).shape == (2, 0, 4)
