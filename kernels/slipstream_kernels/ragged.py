"""The ragged batch: images of unlike sizes, described by addresses, sizes and strides.

Nothing is copied to make one. A decoder's outputs, a list of tensors and one [B, 3, H, W] tensor all become the
same three small arrays, which is all that a kernel needs to reach every pixel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .yuv420 import chroma_size, rgb_of_planes


@dataclass(frozen=True, kw_only=True, slots=True)
class RaggedBatch:
    """B uint8 images of any sizes and strides: RGB, or planar YUV 4:2:0 that is read as RGB (yuv420.py).

    addresses: int64 [B], the address of pixel (0, 0) of channel 0. sizes: int32 [B, 2], (h, w) in pixels.
    strides: int64 [B, 3], bytes from one channel, row and column to the next; any sign, 0 repeats (grey as RGB).
    owners: what must stay alive while the addresses are read. ready: a CUDA event (or None) after which they may be.
    chroma: int64 [B, 3], the addresses of Cb and of Cr and the bytes from one row of either to the next; zeros for an
    RGB image, None where all are. Where they are not, the image's channel 0 is Y, its strides (0, any, 1), and the
    columns of Cb and Cr lie one byte apart. A batch may hold both kinds.
    """

    addresses: np.ndarray
    sizes: np.ndarray
    strides: np.ndarray
    device: torch.device
    owners: tuple[Any, ...] = ()
    ready: Any = None
    chroma: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.addresses)
        for name, array, dtype, shape in (
            ("addresses", self.addresses, np.int64, (count,)),
            ("sizes", self.sizes, np.int32, (count, 2)),
            ("strides", self.strides, np.int64, (count, 3)),
            ("chroma", self.chroma, np.int64, (count, 3)),
        ):
            if array is None:
                continue
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"RaggedBatch.{name} must be {np.dtype(dtype)} {list(shape)}, got {array.dtype} {list(array.shape)}"
                )
        if count and self.sizes.min() < 1:
            raise ValueError(f"RaggedBatch.sizes must be 1 or more, got {self.sizes.min()}")
        if self.chroma is not None:
            wrong = (self.chroma[:, 0] != 0) & ((self.strides[:, [0, 2]] != (0, 1)).any(1) | (self.chroma[:, 1] == 0))
            if wrong.any():
                index = int(wrong.argmax())
                raise ValueError(
                    f"RaggedBatch.chroma[{index}] is of planes, which need two addresses and strides (0, any, 1), "
                    f"got {self.chroma[index].tolist()} and strides {self.strides[index].tolist()}"
                )

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
        if isinstance(images, (str, Mapping)) or not isinstance(images, Iterable):
            kind = type(images).__name__
            raise TypeError(f"images must be a tensor [B, 3, H, W] or a list of [3, H, W], got {kind}")
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

    @classmethod
    def from_planes(cls, images: Sequence[tuple[torch.Tensor | np.ndarray, ...]]) -> RaggedBatch:
        """Describe YUV 4:2:0 images, each uint8 Y [H, W], Cb and Cr [ceil(H / 2), ceil(W / 2)], without copying.

        Rows may lie anywhere, but as far apart in Cb as in Cr; columns are neighbours. Raises ValueError for others.
        """
        batch = cls.from_images([luma[None] for luma, _, _ in images])
        chroma = np.zeros((len(images), 3), np.int64)
        for index, (luma, *pair) in enumerate(images):
            size, planes = chroma_size(*luma.shape), cls.from_images([plane[None] for plane in pair])
            if (planes.sizes != size).any() or len(set(planes.strides[:, 1])) > 1 or (planes.strides[:, 2] != 1).any():
                raise ValueError(
                    f"images[{index}] must have Cb and Cr {list(size)} of like strides (row, 1), "
                    f"got sizes {planes.sizes.tolist()} and strides {planes.strides.tolist()}"
                )
            if planes.device != batch.device:
                raise ValueError(f"images[{index}] must be on one device, got {batch.device} and {planes.device}")
            chroma[index] = (*planes.addresses, planes.strides[0, 1])
        return dataclasses.replace(batch, chroma=chroma, owners=tuple(images))

    @property
    def has_planes(self) -> bool:
        """Whether any image is YUV."""
        return self.chroma is not None and bool(self.chroma[:, 0].any())

    def rows(self, rows: np.ndarray) -> RaggedBatch:
        """The images at these places, whole numbers or bools [n], without copying."""
        return dataclasses.replace(
            self,
            addresses=self.addresses[rows],
            sizes=self.sizes[rows],
            strides=self.strides[rows],
            chroma=None if self.chroma is None else self.chroma[rows],
        )

    def with_rows(self, rows: np.ndarray, other: RaggedBatch) -> RaggedBatch:
        """This batch with the images at `rows` from another, which was made on the same stream, later."""
        addresses, sizes, strides = self.addresses.copy(), self.sizes.copy(), self.strides.copy()
        addresses[rows], sizes[rows], strides[rows] = other.addresses, other.sizes, other.strides
        chroma = None
        if self.chroma is not None or other.chroma is not None:
            chroma = np.zeros_like(strides) if self.chroma is None else self.chroma.copy()
            chroma[rows] = 0 if other.chroma is None else other.chroma
        return RaggedBatch(
            addresses=addresses,
            sizes=sizes,
            strides=strides,
            device=self.device,
            owners=(*self.owners, *other.owners),
            ready=other.ready,
            chroma=chroma,
        )

    def table(self) -> np.ndarray:
        """What a kernel is told of each image, int64 [B, 9]: address and strides, chroma, and chroma's (h, w)."""
        chroma = np.zeros_like(self.strides) if self.chroma is None else self.chroma
        return np.concatenate([self.addresses[:, None], self.strides, chroma, (self.sizes + 1) // 2], axis=1)

    def wait_on_current_stream(self) -> None:
        """Make torch's current stream wait until the pixels may be read; the host does not wait."""
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)

    def image(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 [3, H, W]: a view of its own memory (a copy where a stride is negative), or of YUV the
        RGB that it stands for, made on torch's current stream."""
        size, (channel, *steps) = tuple(map(int, self.sizes[index])), map(int, self.strides[index])
        address = int(self.addresses[index])
        if self.chroma is None or not self.chroma[index, 0]:
            return self._view(address, (3, *size), (channel, *steps))
        blue, red, row = map(int, self.chroma[index])
        halves = [self._view(place, chroma_size(*size), (row, 1)) for place in (blue, red)]
        return rgb_of_planes(self._view(address, size, tuple(steps)), *halves)

    def _view(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        memory = _Memory(self, {"data": (address, False), "shape": shape, "strides": strides})
        if self.device.type == "cuda":
            return torch.as_tensor(memory, device=self.device)
        array = np.asarray(memory)
        if min(array.strides) < 0:
            array = array.copy()
        return torch.from_numpy(array)


class _Memory:
    """A part of an image as numpy's and CUDA's array interfaces see it; keeps the owners alive."""

    def __init__(self, batch: RaggedBatch, place: dict[str, Any]) -> None:
        self.owners = batch.owners
        interface = {**place, "typestr": "|u1", "version": 3}
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
