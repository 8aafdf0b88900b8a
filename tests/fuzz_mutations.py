"""Ways of damaging bytes, drawn from a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Mutation = Callable[[bytearray, np.random.Generator], None]
EXTREMES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutate(data: bytes, rng: np.random.Generator, *, head: int = 0, others: Sequence[bytes] = ()) -> bytes:
    """One to four damages; half of them in the first `head` bytes, if that is given. May splice in one of `others`."""
    torn = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 4]))):
        if others and rng.random() < 0.05:
            _splice(torn, rng, others[int(rng.integers(len(others)))])
        else:
            _MUTATIONS[int(rng.integers(len(_MUTATIONS)))](torn, rng, _place(torn, rng, head))
    return bytes(torn)


def _place(data: bytearray, rng: np.random.Generator, head: int) -> int:
    end = min(head, len(data)) if head and rng.random() < 0.5 else len(data)
    return int(rng.integers(end)) if end else 0


def _flip(data: bytearray, rng: np.random.Generator, at: int) -> None:
    if data:
        data[at] ^= 1 << int(rng.integers(8))


def _byte(data: bytearray, rng: np.random.Generator, at: int) -> None:
    if data:
        data[at] = int(rng.integers(256))


def _number(data: bytearray, rng: np.random.Generator, at: int) -> None:
    size = int(rng.choice([2, 4]))
    value = int(rng.choice(EXTREMES)) & (256**size - 1)
    data[at : at + size] = value.to_bytes(size, "big" if rng.random() < 0.5 else "little")


def _near(data: bytearray, rng: np.random.Generator, at: int) -> None:
    # A number a little off, as no bit flip makes it.
    order = "big" if rng.random() < 0.5 else "little"
    size = int(rng.choice([1, 2, 4]))
    value = int.from_bytes(data[at : at + size], order) + int(rng.integers(-9, 10))
    data[at : at + size] = (value % 256**size).to_bytes(size, order)


def _marker(data: bytearray, rng: np.random.Generator, at: int) -> None:
    data[at : at + 2] = bytes([0xFF, int(rng.integers(256))])


def _cut(data: bytearray, rng: np.random.Generator, at: int) -> None:
    del data[at:]


def _delete(data: bytearray, rng: np.random.Generator, at: int) -> None:
    del data[at : at + int(2 ** rng.uniform(0, 10))]


def _insert(data: bytearray, rng: np.random.Generator, at: int) -> None:
    data[at:at] = rng.bytes(int(2 ** rng.uniform(0, 8)))


def _repeat(data: bytearray, rng: np.random.Generator, at: int) -> None:
    data[at:at] = data[at : at + int(2 ** rng.uniform(0, 9))]


def _zeros(data: bytearray, rng: np.random.Generator, at: int) -> None:
    count = int(2 ** rng.uniform(0, 9))
    data[at : at + count] = bytes(len(data[at : at + count]))


def _append(data: bytearray, rng: np.random.Generator, at: int) -> None:
    data += rng.bytes(int(rng.integers(1, 300)))


def _move(data: bytearray, rng: np.random.Generator, at: int) -> None:
    count = int(2 ** rng.uniform(0, 8))
    part = data[at : at + count]
    del data[at : at + count]
    to = int(rng.integers(len(data) + 1))
    data[to:to] = part


def _splice(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at, begin = int(rng.integers(len(data) + 1)), int(rng.integers(len(other) + 1))
    data[at:] = other[begin:]


_MUTATIONS = (_flip, _flip, _byte, _number, _number, _near, _marker)
_MUTATIONS += (_cut, _delete, _insert, _repeat, _zeros, _append, _move)
# Those that leave everything else where it is.
IN_PLACE = (_flip, _byte, _number, _near, _zeros)


def mutate_in_place(data: bytes, rng: np.random.Generator, *, head: int) -> bytes:
    """One damage that leaves every other byte where it is, mostly in the first `head` bytes."""
    torn = bytearray(data)
    at = int(rng.integers(head)) if rng.random() < 0.7 else int(rng.integers(len(data)))
    IN_PLACE[int(rng.integers(len(IN_PLACE)))](torn, rng, at)
    return bytes(torn[: len(data)])
