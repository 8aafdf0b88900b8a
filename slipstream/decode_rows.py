"""The rows of a ragged batch while a decoder fills them in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from slipstream_kernels.ragged import RaggedBatch


class Rows:
    """The rows of a ragged batch while they are filled in; every image is contiguous [H, W, 3]."""

    def __init__(self, count: int, device: torch.device, stream: Any) -> None:
        self._addresses = np.zeros(count, np.int64)
        self._sizes = np.zeros((count, 2), np.int32)
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
        with torch.cuda.stream(self._stream):
            copied = torch.from_numpy(pixels).to(self._device)
        self._addresses[row] = copied.data_ptr()
        self.owners.append(copied)

    def batch(self) -> RaggedBatch:
        strides = np.empty((len(self._sizes), 3), np.int64)
        strides[:, 0], strides[:, 2] = 1, 3
        strides[:, 1] = 3 * self._sizes[:, 1].astype(np.int64)
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
        )
