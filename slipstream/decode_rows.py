"""The rows of a ragged batch while a decoder fills them in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from slipstream_kernels.ragged import RaggedBatch

from .device import on_stream
from .yuv420 import plane_addresses

_ALIGNMENT = 16  # of samples in one copy to a device


class Rows:
    """The rows of a ragged batch while they are filled in; an image is contiguous [H, W, 3], or planes of YUV 4:2:0."""

    def __init__(self, count: int, device: torch.device, stream: Any) -> None:
        self._addresses = np.zeros(count, np.int64)
        self._sizes = np.zeros((count, 2), np.int32)
        self._chroma = np.zeros((count, 3), np.int64)
        self._device = device
        self._stream = stream
        self.owners: list[Any] = []
        self.on_device: list[int] = []  # rows that DALI decoded where they lie

    def put_outputs(self, rows: list[int], outputs: Any) -> None:
        """Take a DALI TensorList of uint8 [H, W, 3] samples; addresses and shapes are host data, so nothing waits."""
        shapes = np.array(outputs.shape())
        if shapes.shape != (len(rows), 3) or (shapes[:, 2] != 3).any():
            raise AssertionError(f"DALI gave samples of shapes {shapes.tolist()}, not [H, W, 3]")
        self._addresses[rows] = [outputs[i].data_ptr() for i in range(len(rows))]
        self._sizes[rows] = shapes[:, :2]
        self.owners.append(outputs)
        self.on_device += rows

    def put_array(self, row: int, pixels: np.ndarray) -> None:
        self._sizes[row] = pixels.shape[:2]
        if self._stream is None:
            self._addresses[row] = pixels.ctypes.data
            self.owners.append(pixels)
            return
        with on_stream(self._stream):
            copied = torch.from_numpy(pixels).to(self._device)
        self._addresses[row] = copied.data_ptr()
        self.owners.append(copied)

    def put_stored(self, rows: list[int], encoded: list[np.ndarray], sizes: list[tuple[int, int]]) -> None:
        """Take images as yuv420.py stores them, of these sizes: read in place, or all in one copy to the device."""
        if self._stream is None:
            begins = np.array([data.ctypes.data for data in encoded])
            self.owners += encoded
        else:
            begins, copy = copy_together(encoded, self._device, self._stream)
            self.owners.append(copy)
        self._sizes[rows] = sizes
        places = plane_addresses(begins, np.array(sizes, np.int64))
        self._addresses[rows] = places[:, 0]
        self._chroma[rows, :2] = places[:, 1:]
        self._chroma[rows, 2] = (self._sizes[rows, 1] + 1) // 2

    def batch(self) -> RaggedBatch:
        planes = self._chroma[:, 0] != 0
        strides = np.where(planes[:, None], (0, 1, 1), (1, 3, 3))
        strides[:, 1] *= self._sizes[:, 1]
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return RaggedBatch(
            addresses=self._addresses,
            sizes=self._sizes,
            strides=strides,
            device=self._device,
            owners=tuple(self.owners),
            ready=ready,
            chroma=self._chroma if planes.any() else None,
        )


def copy_together(encoded: list[np.ndarray], device: torch.device, stream: Any) -> tuple[np.ndarray, torch.Tensor]:
    """One asynchronous copy of all of these bytes by way of pinned memory: where each begins, int64 [n], and the copy.

    What is copied may change on return; the copy is there once the stream is.
    """
    lengths = np.array([len(data) for data in encoded], np.int64)
    ends = np.cumsum((lengths + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT)
    offsets = np.concatenate([[0], ends[:-1]])
    staging = torch.empty(int(ends[-1]), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    memory = staging.numpy()
    for data, offset in zip(encoded, offsets.tolist(), strict=True):
        memory[offset : offset + len(data)] = data
    with on_stream(stream):
        copy = staging.to(device, non_blocking=True)  # torch reuses the pinned memory only after it
    return copy.data_ptr() + offsets, copy
