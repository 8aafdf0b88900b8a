"""Crops of which nothing is random: the middle, the corners, all of the image, and boxes that the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels.crop_jobs import FLIP_HORIZONTAL, FLIP_VERTICAL

from . import checks
from .crop_geometry import (
    Crop,
    Geometry,
    ImageSizeError,
    check_full_sizes,
    check_output,
    filter_of,
    geometry_of,
    resized_sizes,
    whole_images,
)
from .draws import Draws

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
FLIPS = {None: 0, "horizontal": FLIP_HORIZONTAL, "vertical": FLIP_VERTICAL}


@dataclass(frozen=True, slots=True)
class CenterCrop(Crop):
    """The middle of the image: torchvision's Resize(resize) then CenterCrop(size), to the byte, in one pass.

    size: int or (h, w) of the crop, pixels. resize: the short side is resized to this first, the long one in proportion
    (an int, at least the crop's sides), or both sides to (h, w), or None for no resize. An image that is smaller than
    the crop is a ValueError when it comes (from a loader a DecodeError that names the sample). return_boxes: the part
    of the source that is seen, in the nearest whole pixels. Others, outputs and errors as in RandomResizedCrop; nothing
    here is random. Source: torchvision's _compute_resized_image_output_size and center_crop.
    """

    size: int | tuple[int, int]
    _: KW_ONLY
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        _settle_sizes(self)
        check_output(self)

    def sample_geometry(
        self, sizes: np.ndarray, draws: Draws | None, within: np.ndarray | None, boxes: np.ndarray | None
    ) -> Geometry:
        """Raises ImageSizeError."""
        return _corner_geometry(self, f"CenterCrop({self.size})", sizes, "center", None)


@dataclass(frozen=True, slots=True)
class CornerCrop(Crop):
    """A corner, or the middle, of the image: one of the crops of torchvision's FiveCrop and TenCrop.

    size, resize and others as in CenterCrop. corner: "top_left", "top_right", "bottom_left", "bottom_right" or
    "center". flip: None, "horizontal" or "vertical": the image is flipped before that corner is cut.
    """

    size: int | tuple[int, int]
    _: KW_ONLY
    resize: int | tuple[int, int] | None = None
    corner: str
    flip: str | None = None
    interpolation: str = "bilinear"
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        _settle_sizes(self)
        checks.one_of("corner", self.corner, CORNERS)
        checks.one_of("flip", self.flip, FLIPS)
        check_output(self)

    def sample_geometry(
        self, sizes: np.ndarray, draws: Draws | None, within: np.ndarray | None, boxes: np.ndarray | None
    ) -> Geometry:
        """Raises ImageSizeError."""
        return _corner_geometry(self, f"a corner crop of {self.size}", sizes, self.corner, self.flip)


@dataclass(frozen=True, slots=True)
class FiveCrop:
    """The four corners and the middle, as a list: torchvision's Resize(resize) then FiveCrop(size), to the byte.

    Order: top left, top right, bottom left, bottom right, middle. size, resize and others as in CenterCrop; the boxes
    are `image_0_box`, `image_1_box`, ... for a field named image. Called on images it gives a list of five uint8
    [B, 3, h, w] tensors (with return_boxes a dict: that list as `image`, and the boxes).
    """

    size: int | tuple[int, int]
    _: KW_ONLY
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        _settle_sizes(self)
        check_output(self)

    @property
    def crops(self) -> tuple[CornerCrop, ...]:
        """The five crops, in order."""
        return tuple(_corner_crop(self, corner, None) for corner in CORNERS)

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> list[torch.Tensor] | Any:
        """The crops of these images; sample_ids and epoch change nothing."""
        from .standalone import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


@dataclass(frozen=True, slots=True)
class TenCrop:
    """FiveCrop, and then FiveCrop of the flipped image, as a list: torchvision's TenCrop(size), to the byte.

    vertical_flip: the second five are upside down instead of mirrored. All else as in FiveCrop.
    """

    size: int | tuple[int, int]
    vertical_flip: bool = False
    _: KW_ONLY
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        _settle_sizes(self)
        checks.flag("vertical_flip", self.vertical_flip)
        check_output(self)

    @property
    def crops(self) -> tuple[CornerCrop, ...]:
        """The ten crops, in order."""
        flip = "vertical" if self.vertical_flip else "horizontal"
        return tuple(_corner_crop(self, corner, each) for each in (None, flip) for corner in CORNERS)

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> list[torch.Tensor] | Any:
        """The crops of these images; sample_ids and epoch change nothing."""
        from .standalone import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


@dataclass(frozen=True, slots=True)
class Resize(Crop):
    """All of the image, resized to one size, whatever its shape: torchvision's Resize((h, w)), to the byte.

    size: (h, w), pixels. Not an int, torchvision's short side, which gives images of unlike sizes and so no tensor:
    CenterCrop(size, resize=...) is that and one size. Others, outputs and errors as in RandomResizedCrop.
    """

    size: int | tuple[int, int]
    _: KW_ONLY
    interpolation: str = "bilinear"
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        size = checks.size("size", self.size)
        if not isinstance(self.size, Sequence):
            raise TypeError(
                f"size must be (h, w), so that all images of a batch have one size, got {self.size!r}: give {size}, or "
                f"CenterCrop({self.size!r}, resize={self.size!r}), which resizes the short side and cuts the long one"
            )
        checks.settle(self, size=size)
        check_output(self)

    def sample_geometry(
        self, sizes: np.ndarray, draws: Draws | None, within: np.ndarray | None, boxes: np.ndarray | None
    ) -> Geometry:
        """All of each image."""
        return geometry_of(box=whole_images(sizes), full=self.size, kind=filter_of(self))


@dataclass(frozen=True, slots=True)
class ResizedCrop(Crop):
    """A box that the user gives, resized to one size: torchvision's resized_crop, to the byte Pillow's.

    size: int or (h, w), pixels. boxes: (top, left, height, width), the same for all images, in whole pixels of the
    source; or the name of the field that holds each sample's; or None where each call gives them. A box that leaves its
    image is an ImageSizeError, a ValueError, that names the box and its place in the batch. Others, outputs and errors
    as in RandomResizedCrop.
    """

    size: int | tuple[int, int]
    boxes: str | Sequence[int] | None = None
    _: KW_ONLY
    interpolation: str = "bilinear"
    antialias: bool = True
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        checks.settle(self, size=checks.size("size", self.size), boxes=_settled_boxes(self.boxes))
        check_output(self)

    def sample_geometry(
        self, sizes: np.ndarray, draws: Draws | None, within: np.ndarray | None, boxes: np.ndarray | None
    ) -> Geometry:
        """The spec's own box, else `boxes`, checked against the images' sizes."""
        given = self.boxes if isinstance(self.boxes, tuple) else boxes
        if given is None:
            where = "boxes=, whole numbers [B, 4]" if self.boxes is None else f"the field {self.boxes!r}, or boxes="
            raise ValueError(f"ResizedCrop({self.size}) needs boxes: give {where}")
        box = _boxes_inside(given, sizes)
        return geometry_of(box=box, full=self.size, kind=filter_of(self))

    def __call__(self, images: Any, *, boxes: Any = None, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor | Any:
        """The crops of these images at these boxes, whole numbers [B, 4] (top, left, height, width), a tensor, array or
        list; sample_ids and epoch change nothing."""
        from .standalone import apply_crops

        if boxes is not None and isinstance(self.boxes, tuple):
            raise ValueError(f"boxes must be given once, ResizedCrop has boxes={self.boxes} of its own")
        return apply_crops(self, images, sample_ids, epoch, boxes=boxes)


def _settle_sizes(spec: Any) -> None:
    size = checks.size("size", spec.size)
    resize = spec.resize
    if resize is not None:
        sides = checks.size("resize", resize)
        if sides[0] < size[0] or sides[1] < size[1]:
            raise ValueError(f"resize must be at least the crop's size {size}, got {resize!r}")
        resize = sides if isinstance(resize, Sequence) else sides[0]
    checks.settle(spec, size=size, resize=resize)


def _settled_boxes(boxes: Any) -> Any:
    if boxes is None or (isinstance(boxes, str) and boxes):
        return boxes
    if isinstance(boxes, str) or not isinstance(boxes, Sequence) or len(boxes) != 4:
        raise TypeError(f"boxes must be None, a field's name or (top, left, height, width), got {boxes!r}")
    least = {"top": 0, "left": 0, "height": 1, "width": 1}
    return tuple(checks.whole(f"boxes' {name}", value, least[name]) for name, value in zip(least, boxes, strict=True))


def _boxes_inside(given: Any, sizes: np.ndarray) -> np.ndarray:
    # The user's boxes for each of these images, int64 [B, 4], or an error that names the first that is wrong.
    boxes = np.asarray(given.cpu() if isinstance(given, torch.Tensor) else given)
    if boxes.dtype.kind not in "iu" and boxes.size:
        raise TypeError(f"boxes must be whole numbers, got {boxes.dtype}")
    if boxes.shape not in ((4,), (len(sizes), 4)):
        raise ValueError(f"boxes must be [{len(sizes)}, 4] (top, left, height, width), got shape {list(boxes.shape)}")
    boxes = np.broadcast_to(boxes.astype(np.int64), (len(sizes), 4))
    # a difference, for the sum of two large numbers could overflow
    outside = (boxes < (0, 0, 1, 1)).any(1) | (boxes[:, :2] > sizes - boxes[:, 2:]).any(1)
    if outside.any():
        index = int(outside.argmax())
        box, size = tuple(boxes[index].tolist()), tuple(sizes[index].tolist())
        raise ImageSizeError(
            f"boxes must lie inside their images, got (top, left, height, width) = {box} in an image of "
            f"(h, w) = {size} at batch index {index}",
            index,
        )
    return boxes


def _corner_crop(spec: FiveCrop | TenCrop, corner: str, flip: str | None) -> CornerCrop:
    return CornerCrop(
        spec.size,
        resize=spec.resize,
        corner=corner,
        flip=flip,
        interpolation=spec.interpolation,
        antialias=spec.antialias,
        return_boxes=spec.return_boxes,
        memory_format=spec.memory_format,
        backend=spec.backend,
    )


def _corner_geometry(
    spec: CenterCrop | CornerCrop, label: str, sizes: np.ndarray, corner: str, flip: str | None
) -> Geometry:
    assert isinstance(spec.size, tuple)
    full = resized_sizes(sizes, spec.resize)
    check_full_sizes(label if spec.resize is None else f"{label} with resize={spec.resize}", spec.size, sizes, full)
    room = full - spec.size
    if corner == "center":
        origin = np.rint(room / 2.0).astype(np.int64)
    else:
        origin = room * (corner.startswith("bottom"), corner.endswith("right"))
    # the corner is the flipped image's, the window is cut from the upright one
    if flip is not None:
        axis = 1 if flip == "horizontal" else 0
        origin[:, axis] = room[:, axis] - origin[:, axis]
    return geometry_of(box=whole_images(sizes), full=full, origin=origin, kind=filter_of(spec), flip=FLIPS[flip])
