"""Stored YUV images in memory, good and bad, and the same pictures as PNG: shared by the tests of what reads them."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from slipstream import yuv420
from slipstream.source import ReadError

# What is wrong with a sample of each kind, as the message says it.
BAD = {
    "short": "which take 3696 bytes: the data has 3695",
    "long": "which take 3696 bytes: the data has 3697",
    "cut": "take 3696 bytes: the data has 20",
    "large": "height 4294967295 and width 4294967295",
    "empty": "height 0, width 61: both must be > 0",
    "version": "version 7",
}


def stored(pixels: np.ndarray) -> np.ndarray:
    return np.frombuffer(yuv420.encode(pixels), np.uint8)


def scene(seed: int, height: int = 40, width: int = 61) -> np.ndarray:
    """Noise of many colours, uint8 [H, W, 3]; stored at its default size it has 3,696 bytes."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def damaged(kind: str, data: bytes) -> bytes:
    return {
        "short": data[:-1],
        "long": data + b"\0",
        "cut": data[:20],
        "large": data[:8] + b"\xff" * 8 + data[16:],
        "empty": data[:8] + struct.pack("<II", 0, 61) + data[16:],
        "version": data[:7] + b"\7" + data[8:],
    }[kind]


def png(pixels: np.ndarray) -> np.ndarray:
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "PNG")
    return np.frombuffer(memory.getvalue(), np.uint8)


class Memory:
    """A source of encoded images in memory, uint8 arrays; those of `unreadable` cannot be read."""

    def __init__(self, files: list[np.ndarray], unreadable: tuple[int, ...] = ()) -> None:
        self.fields = {"image": "image"}
        self.files = files
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.files)

    def read(self, ids, field="image"):
        found = [(int(i), self.describe(i), "no bytes") for i in ids if int(i) in self.unreadable]
        if found:
            raise ReadError(found)
        return [self.files[int(i)] for i in ids]

    def values(self, ids, field):
        return [bytes(self.files[int(i)]) for i in ids]

    def describe(self, sample_id) -> str:
        return f"memory:{sample_id}"

    def close(self) -> None:
        pass
