"""What a crop spec is, and the geometry that it gives: box, full size, window, filter and flip of each image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels.crop_jobs import BICUBIC, BILINEAR, NO_ANTIALIAS

from . import checks
from .draws import Draws

INTERPOLATIONS = ("bilinear", "bicubic")
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Where one crop of each of B images comes from.

    box: int32 [B, 4] (top, left, height, width) in the source. full: int32 [B, 2] (h, w), what the box is resized to.
    origin: int32 [B, 2] (top, left) of the wanted window in that. filter and flip: int32 [B], a job's FILTER and FLIP
    (slipstream_kernels.crop_jobs); the window is flipped after it is cut.
    """

    box: np.ndarray
    full: np.ndarray
    origin: np.ndarray
    filter: np.ndarray
    flip: np.ndarray


class ImageSizeError(ValueError):
    """An image that does not hold the crop or the box asked of it; `index` is its place in the batch."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message, index)  # both, for it is made again from these where it comes from another process
        self.index = index

    def __str__(self) -> str:
        return self.args[0]


class Crop(ABC):
    """One window of each image: subclasses are frozen dataclasses with these fields, and sample a geometry."""

    __slots__ = ()
    size: int | tuple[int, int]
    interpolation: str
    antialias: bool
    return_boxes: bool
    memory_format: torch.memory_format
    backend: str | None

    @abstractmethod
    def sample_geometry(
        self, sizes: np.ndarray, draws: Draws | None, within: np.ndarray | None, boxes: np.ndarray | None
    ) -> Geometry:
        """The geometry for images of these sizes, int32 [B, 2]; see crop.sample_geometry."""

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor | Any:
        """The crops of these images; with sample_ids a pure function of (seed, sample id, epoch) and the pixels.

        sample_ids: [B] whole numbers in [0, 2**64), None draws new crops. epoch: in [0, 2**32). A crop of which nothing
        is random uses neither.
        """
        from .standalone import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


def check_output(spec: Any, interpolations: tuple[str, ...] = INTERPOLATIONS) -> None:
    """Raise for a wrong value among the fields that every crop spec has beside its size."""
    checks.one_of("interpolation", spec.interpolation, interpolations)
    checks.flag("antialias", spec.antialias)
    checks.one_of("memory_format", spec.memory_format, MEMORY_FORMATS)
    checks.flag("return_boxes", spec.return_boxes)
    checks.one_of("backend", spec.backend, checks.BACKENDS)


def filter_of(spec: Crop) -> int:
    """A job's FILTER, for a spec whose interpolation is not random."""
    kind = {"bilinear": BILINEAR, "bicubic": BICUBIC}[spec.interpolation]
    return kind if spec.antialias else kind + NO_ANTIALIAS


def geometry_of(*, box: np.ndarray, full: Any, kind: Any, origin: Any = 0, flip: int = 0) -> Geometry:
    """A geometry of boxes [B, 4], full sizes and origins [B, 2] and filters [B], all int; all but the boxes may be
    something that fits the shape."""
    count = len(box)
    return Geometry(
        box=box.astype(np.int32),
        full=np.broadcast_to(full, (count, 2)).astype(np.int32),
        origin=np.broadcast_to(origin, (count, 2)).astype(np.int32),
        filter=np.full(count, kind, np.int32),
        flip=np.full(count, flip, np.int32),
    )


def whole_images(sizes: np.ndarray) -> np.ndarray:
    """Boxes that are all of each image, int32 [B, 4]."""
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)


def resized_sizes(sizes: np.ndarray, resize: int | tuple[int, int] | None) -> np.ndarray:
    """What torchvision's Resize makes of images of these sizes: int64 [B, 2]; None leaves them as they are.

    An int is for the short side, and the long one goes with it. Source: _compute_resized_image_output_size.
    """
    sides = sizes.astype(np.int64)
    if resize is None:
        return sides
    if isinstance(resize, tuple):
        return np.broadcast_to(np.array(resize, np.int64), sides.shape)
    # int(resize * long / short) in torchvision: exact in whole numbers up to 2**53
    short = sides.min(1, keepdims=True)
    return np.where(sides == short, resize, (resize * sides / short).astype(np.int64))


def check_full_sizes(label: str, size: tuple[int, int], sizes: np.ndarray, full: np.ndarray) -> None:
    """Raise ImageSizeError, beginning with the label, for a full size that does not hold a window of that size, or is
    past what a job can say."""
    for wrong, needs in (
        ((full < size).any(1), "needs images of at least that size (or give resize=)"),
        ((full >= 2**31).any(1), "needs images less thin"),
    ):
        if wrong.any():
            index = int(wrong.argmax())
            found = tuple(sizes[index].tolist())
            raise ImageSizeError(f"{label} {needs}, got (h, w) = {found} at batch index {index}", index)


def seen_boxes(geometry: Geometry, size: tuple[int, int]) -> np.ndarray:
    """The part of each source that the window shows, in the nearest whole pixels, at least one: int32 [B, 4], boxes."""
    scale = geometry.box[:, 2:] / geometry.full
    begin = np.minimum(np.rint(geometry.origin * scale), geometry.box[:, 2:] - 1)
    end = np.maximum(np.rint((geometry.origin + np.array(size)) * scale), begin + 1)
    return np.concatenate([geometry.box[:, :2] + begin, end - begin], axis=1).astype(np.int32)
