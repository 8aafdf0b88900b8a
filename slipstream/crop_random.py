"""Crops at random places: specs, and the boxes drawn for them. Pixels are never touched here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels.crop_jobs import BICUBIC, BILINEAR, NO_ANTIALIAS

from . import checks
from .crop_geometry import (
    INTERPOLATIONS,
    Crop,
    Geometry,
    check_full_sizes,
    check_output,
    filter_of,
    geometry_of,
    resized_sizes,
    whole_images,
)
from .distributions import below, between, log_between
from .draws import Draws

TRIES = 10


@dataclass(frozen=True, slots=True)
class RandomResizedCrop(Crop):
    """A random box of the image, resized to one size: torchvision's RandomResizedCrop, antialiased.

    size: int or (h, w), pixels. scale: range of the box's area as a fraction of the image's, in (0, 1]. ratio: range of
    its width / height, drawn uniformly in the logarithm. interpolation: "bilinear", "bicubic", or "random" for one of
    the two by a fair coin for each sample (timm). antialias: False leaves out pixels where the box shrinks, as
    TensorFlow's resize does. seed: fixes the box only; two crops with the same seed and parameters get the same boxes.
    subset_of: the name of another crop of the same MultiRandomResizedCrop; the box is then drawn in that crop's box as
    if it were the image. return_boxes: add `<field>_box` int32 [B, 4] (top, left, height, width), in pixels of the
    source, and `<field>_flip` bool [B] where it is flipped at random. memory_format: of the output,
    torch.contiguous_format or torch.channels_last. backend: None (Triton for CUDA tensors, else the CPU kernel),
    "triton" or "cpu".

    Called on images (uint8 [B, 3, H, W], or a list of [3, H, W] of any sizes and strides, on the CPU or a GPU) it gives
    one uint8 [B, 3, h, w] tensor there (with return_boxes a dict: `image` and `image_box`).
    Raises ValueError or TypeError for a parameter outside these ranges. Source: torchvision's get_params.
    """

    size: int | tuple[int, int]
    _: KW_ONLY
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    seed: int | None = None
    antialias: bool = True
    subset_of: str | None = None
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        checks.settle(
            self,
            size=checks.size("size", self.size),
            scale=checks.interval("scale", self.scale, 0.0, 1.0),
            ratio=checks.interval("ratio", self.ratio, 0.0, math.inf),
            seed=checks.seed("seed", self.seed),
        )
        if self.subset_of is not None and not isinstance(self.subset_of, str):
            raise TypeError(f"subset_of must be the name of a crop or None, got {self.subset_of!r}")
        check_output(self, (*INTERPOLATIONS, "random"))

    def sample_geometry(
        self, sizes: np.ndarray, draws: Draws | None, within: np.ndarray | None, boxes: np.ndarray | None
    ) -> Geometry:
        """The boxes of sample_boxes, in `within` for a subset; word 0 of block 10 chooses a random filter."""
        assert draws is not None
        if self.subset_of is None:
            box = sample_boxes(self, sizes, draws)
        elif within is None:
            raise ValueError(f"subset_of={self.subset_of!r} is for a crop beside that one, in a MultiRandomResizedCrop")
        else:
            box = sample_boxes(self, within[:, 2:], draws)
            box[:, :2] += within[:, :2]
        if self.interpolation == "random":
            kind = np.where(draws.words(TRIES)[:, 0, 0] < 2**31, BILINEAR, BICUBIC)
            kind += 0 if self.antialias else NO_ANTIALIAS
        else:
            kind = filter_of(self)
        return geometry_of(box=box, full=self.size, kind=kind)


@dataclass(frozen=True, slots=True)
class RandomResizeShortCropLong(Crop):
    """The short side resized to `size`, and of the long one a window of `size` at a random place.

    It is torchvision's Resize(size) then RandomCrop(size), to the byte Pillow's, in one pass. size: int, pixels, for
    the crop is square. seed: fixes the place only. return_boxes: the part of the source that is seen, in the nearest
    whole pixels. Others, outputs and errors as in RandomResizedCrop.
    """

    size: int | tuple[int, int]
    _: KW_ONLY
    interpolation: str = "bilinear"
    seed: int | None = None
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        size = checks.size("size", self.size)
        if size[0] != size[1]:
            raise ValueError(f"size must be one int, for the crop is square, got {self.size!r}")
        checks.settle(self, size=size, seed=checks.seed("seed", self.seed))
        check_output(self)

    def sample_geometry(
        self, sizes: np.ndarray, draws: Draws | None, within: np.ndarray | None, boxes: np.ndarray | None
    ) -> Geometry:
        """Word 0 of block 0 places the window, every whole pixel alike."""
        assert draws is not None
        assert isinstance(self.size, tuple)
        full = resized_sizes(sizes, self.size[0])
        check_full_sizes(f"RandomResizeShortCropLong({self.size[0]})", self.size, sizes, full)
        origin = below(draws.words(0)[:, 0, :1], full - self.size + 1)
        return geometry_of(box=whole_images(sizes), full=full, origin=origin, kind=filter_of(self))


@dataclass(frozen=True, slots=True)
class MultiCropRandomResizedCrop:
    """The same random resized crop several times, each with boxes of its own, as a list.

    num_crops: 1 or more. seed: stands in for the loader's. The others as in RandomResizedCrop; boxes and flips are
    `image_0_box`, `image_0_flip`, ... for a field named image. Called on images it gives a list of uint8 [B, 3, h, w]
    (with return_boxes a dict: that list as `image`, then `image_0_box`, `image_1_box`, ...). Raises ValueError or
    TypeError that names the parameter.
    """

    num_crops: int = 2
    size: int | tuple[int, int] = 224
    _: KW_ONLY
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    seed: int | None = None
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        crop = self.crop
        checks.settle(
            self,
            num_crops=checks.whole("num_crops", self.num_crops, 1),
            size=crop.size,
            scale=crop.scale,
            ratio=crop.ratio,
            seed=checks.seed("seed", self.seed),
        )

    @property
    def crop(self) -> RandomResizedCrop:
        """The crop that is repeated."""
        return RandomResizedCrop(
            self.size,
            scale=self.scale,
            ratio=self.ratio,
            interpolation=self.interpolation,
            antialias=self.antialias,
            return_boxes=self.return_boxes,
            memory_format=self.memory_format,
            backend=self.backend,
        )

    @property
    def crops(self) -> tuple[RandomResizedCrop, ...]:
        """That crop, num_crops times."""
        return (self.crop,) * self.num_crops

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> list[torch.Tensor] | Any:
        """The crops of these images; with sample_ids a pure function of (seed, sample id, epoch) and the pixels.

        sample_ids: [B] whole numbers in [0, 2**64), None draws new crops. epoch: in [0, 2**32).
        """
        from .standalone import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


def sample_boxes(spec: RandomResizedCrop, sizes: np.ndarray, draws: Draws) -> np.ndarray:
    """Draw a box for each image: int32 [B, 4] (top, left, height, width), whole pixels inside the image.

    sizes: int32 [B, 2] (h, w). Ten tries of area and ratio, the first that fits is placed uniformly, else the largest
    centred box within the ratio's range (torchvision's RandomResizedCrop.get_params). Block t of `draws` is try t:
    words (area, ratio, top, left). Only IEEE-exact float64 operations, so every machine draws the same boxes.
    """
    words = draws.words(0, TRIES)
    height, width = sizes.astype(np.int64).T
    area = (height * width)[:, None] * between(words[..., 0] * 2.0**-32, spec.scale)
    aspect = log_between(words[..., 1] * 2.0**-32, spec.ratio)
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    chosen = np.arange(len(sizes)), fits.argmax(1)
    found = fits.any(1)

    low, high = spec.ratio
    narrow, flat = width / height < low, width / height > high
    w = np.where(found, w[chosen], np.where(flat, np.maximum(np.rint(height * high), 1), width).astype(np.int64))
    h = np.where(found, h[chosen], np.where(narrow, np.maximum(np.rint(width / low), 1), height).astype(np.int64))
    top = np.where(found, below(words[..., 2][chosen], height - h + 1), (height - h) // 2)
    left = np.where(found, below(words[..., 3][chosen], width - w + 1), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)
