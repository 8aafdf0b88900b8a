"""The ragged batch: images of unlike sizes, described by addresses, sizes and strides.

Nothing is copied to make one. A decoder's outputs, a list of tensors and one [B, 3, H, W] tensor all become the
same three small arrays, which is all that a kernel needs to reach every pixel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class RaggedBatch:
    """B uint8 RGB images of any sizes and strides.

    addresses: int64 [B], the address of pixel (0, 0) of channel 0. sizes: int32 [B, 2], (h, w) in pixels.
    strides: int64 [B, 3], bytes from one channel, row and column to the next; any sign, 0 repeats (grey as RGB).
    owners: what must stay alive while the addresses are read. ready: a CUDA event (or None) after which they may be.
    """

    addresses: np.ndarray
    sizes: np.ndarray
    strides: np.ndarray
    device: torch.device
    owners: tuple[Any, ...] = ()
    ready: Any = None

    def __post_init__(self) -> None:
        count = len(self.addresses)
        for name, array, dtype, shape in (
            ("addresses", self.addresses, np.int64, (count,)),
            ("sizes", self.sizes, np.int32, (count, 2)),
            ("strides", self.strides, np.int64, (count, 3)),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"RaggedBatch.{name} must be {np.dtype(dtype)} {list(shape)}, got {array.dtype} {list(array.shape)}"
                )
        if count and self.sizes.min() < 1:
            raise ValueError(f"RaggedBatch.sizes must be 1 or more, got {self.sizes.min()}")

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def from_images(cls, images: torch.Tensor | Sequence[torch.Tensor | np.ndarray]) -> RaggedBatch:
        """Describe a uint8 [B, 3, H, W] tensor, or a sequence of [3, H, W] tensors or arrays, without copying.

        One-channel images ([1, H, W]) are read as RGB with three equal channels. Raises TypeError for what is not
        uint8 and ValueError for other shapes, an empty image, or images on unlike devices.
        """
        if isinstance(images, torch.Tensor):
            if images.ndim != 4:
                raise ValueError(f"images must be [B, 3, H, W] or a list of [3, H, W], got shape {list(images.shape)}")
            _check_image(images.dtype, tuple(images.shape[1:]), "images")
            count, channels, height, width = images.shape
            step, *inner = images.stride()
            return cls(
                addresses=images.data_ptr() + np.arange(count, dtype=np.int64) * step,
                sizes=np.tile(np.array([height, width], np.int32), (count, 1)),
                strides=np.tile(np.array(_channel_stride(inner, channels), np.int64), (count, 1)),
                device=images.device,
                owners=(images,),
            )
        images = list(images)
        addresses, sizes, strides, devices = [], [], [], set()
        for index, image in enumerate(images):
            if isinstance(image, torch.Tensor):
                address, stride, device = image.data_ptr(), list(image.stride()), image.device
            elif isinstance(image, np.ndarray):
                address, stride, device = image.ctypes.data, list(image.strides), torch.device("cpu")
            else:
                raise TypeError(f"images[{index}] must be a torch.Tensor or numpy array, got {type(image).__name__}")
            _check_image(image.dtype, tuple(image.shape), f"images[{index}]")
            addresses.append(address)
            sizes.append(image.shape[1:])
            strides.append(_channel_stride(stride, image.shape[0]))
            devices.add(device)
        if len(devices) > 1:
            raise ValueError(f"images must be on one device, got {sorted(map(str, devices))}")
        return cls(
            addresses=np.array(addresses, np.int64).reshape(-1),
            sizes=np.array(sizes, np.int32).reshape(-1, 2),
            strides=np.array(strides, np.int64).reshape(-1, 3),
            device=devices.pop() if devices else torch.device("cpu"),
            owners=tuple(images),
        )

    @classmethod
    def from_arrays(cls, arrays: Sequence[np.ndarray], *, owners: tuple[Any, ...] = ()) -> RaggedBatch:
        """Describe host arrays in a decoder's layout, uint8 [H, W, 3] or [H, W, 1], without copying."""
        batch = cls.from_images([array.transpose(2, 0, 1) for array in arrays])
        return cls(
            addresses=batch.addresses,
            sizes=batch.sizes,
            strides=batch.strides,
            device=batch.device,
            owners=(*batch.owners, *owners),
        )

    def rows(self, rows: np.ndarray) -> RaggedBatch:
        """The images at these places, whole numbers or bools [n], without copying."""
        return dataclasses.replace(
            self, addresses=self.addresses[rows], sizes=self.sizes[rows], strides=self.strides[rows]
        )

    def with_rows(self, rows: np.ndarray, other: RaggedBatch) -> RaggedBatch:
        """This batch with the images at `rows` from another, which was made on the same stream, later."""
        addresses, sizes, strides = self.addresses.copy(), self.sizes.copy(), self.strides.copy()
        addresses[rows], sizes[rows], strides[rows] = other.addresses, other.sizes, other.strides
        return RaggedBatch(
            addresses=addresses,
            sizes=sizes,
            strides=strides,
            device=self.device,
            owners=(*self.owners, *other.owners),
            ready=other.ready,
        )

    def wait_on_current_stream(self) -> None:
        """Make torch's current stream wait until the pixels may be read; the host does not wait."""
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)

    def image(self, index: int) -> torch.Tensor:
        """Image `index` as a uint8 [3, H, W] view of its own memory (a copy only where a stride is negative)."""
        memory = _Memory(self, index)
        if self.device.type == "cuda":
            return torch.as_tensor(memory, device=self.device)
        array = np.asarray(memory)
        if min(array.strides) < 0:
            array = array.copy()
        return torch.from_numpy(array)


class _Memory:
    """One image as numpy's and CUDA's array interfaces see it; keeps the owners alive."""

    def __init__(self, batch: RaggedBatch, index: int) -> None:
        self.owners = batch.owners
        interface = {
            "shape": (3, *map(int, batch.sizes[index])),
            "strides": tuple(map(int, batch.strides[index])),
            "typestr": "|u1",
            "data": (int(batch.addresses[index]), False),
            "version": 3,
        }
        if batch.device.type == "cuda":
            self.__cuda_array_interface__ = interface
        else:
            self.__array_interface__ = interface


def _channel_stride(stride: Sequence[int], channels: int) -> tuple[int, int, int]:
    channel, row, column = map(int, stride)
    return (0 if channels == 1 else channel), row, column


def _check_image(dtype: Any, shape: tuple[int, ...], name: str) -> None:
    if dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"{name} must be uint8, got {dtype}")
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise ValueError(f"{name} must be [3, H, W] (or [1, H, W]) with H, W >= 1, got shape {list(shape)}")
