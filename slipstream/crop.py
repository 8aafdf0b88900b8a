"""Crop specs, and the boxes drawn for them. Pixels are never touched here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import numpy as np
import torch

from . import checks
from .draws import Draws

INTERPOLATIONS = ("bilinear", "bicubic")
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)
TRIES = 10


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """A random box of the image, resized to one size: torchvision's RandomResizedCrop, antialiased.

    size: int or (h, w), pixels. scale: range of the box's area as a fraction of the image's, in (0, 1]. ratio: range of
    its width / height, drawn uniformly in the logarithm. interpolation: "bilinear" or "bicubic". seed: fixes the box
    only; two crops with the same seed and parameters get the same boxes. return_boxes: add `<field>_box` int32 [B, 4]
    (top, left, height, width), in pixels of the source, and `<field>_flip` bool [B] where it is flipped at random.
    memory_format: of the output, torch.contiguous_format or torch.channels_last. backend: None (Triton for CUDA
    tensors, else the CPU kernel), "triton" or "cpu".

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
        _check_output(self)

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor | Any:
        """The crops of these images; with sample_ids a pure function of (seed, sample id, epoch) and the pixels.

        sample_ids: [B] whole numbers in [0, 2**64), None draws new crops. epoch: in [0, 2**32).
        """
        from .pipeline import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


@dataclass(frozen=True, slots=True)
class CenterCrop:
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
    return_boxes: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    backend: str | None = None

    def __post_init__(self) -> None:
        size = checks.size("size", self.size)
        resize = self.resize
        if resize is not None:
            sides = checks.size("resize", resize)
            if sides[0] < size[0] or sides[1] < size[1]:
                raise ValueError(f"resize must be at least the crop's size {size}, got {resize!r}")
            resize = sides if isinstance(resize, Sequence) else sides[0]
        checks.settle(self, size=size, resize=resize)
        _check_output(self)

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor | Any:
        """The crops of these images, [B, 3, h, w]; sample_ids and epoch change nothing."""
        from .pipeline import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


Crop = RandomResizedCrop | CenterCrop


@dataclass(frozen=True, slots=True)
class MultiRandomResizedCrop:
    """Named crops of every image, all cut in one launch from one decode.

    crops: name -> parameters of a RandomResizedCrop as a dict, or a RandomResizedCrop or CenterCrop. seed: stands in
    for the loader's seed, for crops that have none of their own. return_boxes: add `<crop>_box` int32 [B, 4] (top,
    left, height, width) for every crop, and `<crop>_flip` bool [B] where it is flipped at random. backend: as in
    RandomResizedCrop, for all crops.

    Called on images it gives a dict name -> uint8 [B, 3, h, w]. Raises ValueError or TypeError that names crop and
    parameter.
    """

    crops: Mapping[str, Mapping[str, Any] | Crop]
    _: KW_ONLY
    seed: int | None = None
    return_boxes: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.crops, Mapping):
            raise TypeError(f"crops must be a dict of name -> parameters, got {self.crops!r}")
        if not self.crops:
            raise ValueError("crops must name at least one crop, got {}")
        checks.settle(
            self,
            crops={_crop_name(name): _named_crop(name, given) for name, given in self.crops.items()},
            seed=checks.seed("seed", self.seed),
        )
        checks.one_of("backend", self.backend, checks.BACKENDS)
        if checks.flag("return_boxes", self.return_boxes):
            for name in (f"{crop}_{kind}" for crop in self.crops for kind in ("box", "flip")):
                if name in self.crops:
                    raise ValueError(f"crops must not name {name!r}, which return_boxes=True gives: name it otherwise")

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> dict[str, torch.Tensor]:
        """The named crops of these images; with sample_ids pure in (seed, sample id, epoch) and the pixels.

        sample_ids: [B] whole numbers in [0, 2**64), None draws new crops. epoch: in [0, 2**32).
        """
        from .pipeline import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


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
            return_boxes=self.return_boxes,
            memory_format=self.memory_format,
            backend=self.backend,
        )

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> list[torch.Tensor] | Any:
        """The crops of these images; with sample_ids a pure function of (seed, sample id, epoch) and the pixels.

        sample_ids: [B] whole numbers in [0, 2**64), None draws new crops. epoch: in [0, 2**32).
        """
        from .pipeline import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


CropStage = RandomResizedCrop | CenterCrop | MultiRandomResizedCrop | MultiCropRandomResizedCrop


class ImageSizeError(ValueError):
    """An image too small or too thin for the crop that is to be cut from it; `index` is its place in the batch."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Where one crop of each image comes from, all int32: box [B, 4] (top, left, height, width) in source pixels, the
    full size (h, w) [B, 2] that it is resized to, and the window's origin (top, left) [B, 2] in that."""

    box: np.ndarray
    full: np.ndarray
    origin: np.ndarray


def sample_boxes(spec: RandomResizedCrop, sizes: np.ndarray, draws: Draws) -> np.ndarray:
    """Draw a box for each image: int32 [B, 4] (top, left, height, width), whole pixels inside the image.

    sizes: int32 [B, 2] (h, w). Ten tries of area and ratio, the first that fits is placed uniformly, else the largest
    centred box within the ratio's range (torchvision's RandomResizedCrop.get_params). Block t of `draws` is try t:
    words (area, ratio, top, left). Only IEEE-exact float64 operations, so every machine draws the same boxes.
    """
    words = draws.words(0, TRIES)
    height, width = sizes.astype(np.int64).T
    area = (height * width)[:, None] * _between(words[..., 0], *spec.scale)
    aspect = _exp(_between(words[..., 1], *map(_log, spec.ratio)))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    chosen = np.arange(len(sizes)), fits.argmax(1)
    found = fits.any(1)

    low, high = spec.ratio
    narrow, flat = width / height < low, width / height > high
    w = np.where(found, w[chosen], np.where(flat, np.maximum(np.rint(height * high), 1), width).astype(np.int64))
    h = np.where(found, h[chosen], np.where(narrow, np.maximum(np.rint(width / low), 1), height).astype(np.int64))
    top = np.where(found, _below(words[..., 2][chosen], height - h + 1), (height - h) // 2)
    left = np.where(found, _below(words[..., 3][chosen], width - w + 1), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def centre_geometry(spec: CenterCrop, sizes: np.ndarray) -> Geometry:
    """Full sizes and window origins of a centre crop of images of these sizes (int32 [B, 2]).

    Source: torchvision's _compute_resized_image_output_size and center_crop. Raises ImageSizeError.
    """
    sides = sizes.astype(np.int64)
    if spec.resize is None:
        full = sides
    elif isinstance(spec.resize, tuple):
        full = np.broadcast_to(np.array(spec.resize, np.int64), sides.shape)
    else:
        # int(resize * long / short) in torchvision: exact in whole numbers up to 2**53
        short = sides.min(1, keepdims=True)
        full = np.where(sides == short, spec.resize, (spec.resize * sides / short).astype(np.int64))
    for wrong, needs in (
        ((full < spec.size).any(1), "needs images of at least that size (or give resize=)"),
        ((full >= 2**31).any(1), f"with resize={spec.resize} needs images less thin"),
    ):
        if wrong.any():
            index = int(wrong.argmax())
            size = tuple(sizes[index].tolist())
            raise ImageSizeError(f"CenterCrop({spec.size}) {needs}, got (h, w) = {size} at batch index {index}", index)
    origin = np.rint((full - np.array(spec.size)) / 2.0)
    box = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    return Geometry(box=box.astype(np.int32), full=full.astype(np.int32), origin=origin.astype(np.int32))


def sample_geometry(spec: Crop, sizes: np.ndarray, draws: Draws | None) -> Geometry:
    """The geometry of one crop of each image, drawn where the crop is random (`draws` is None where it is not)."""
    if isinstance(spec, CenterCrop):
        return centre_geometry(spec, sizes)
    assert draws is not None
    box = sample_boxes(spec, sizes, draws)
    full = np.broadcast_to(np.array(spec.size, np.int32), sizes.shape)
    return Geometry(box=box, full=full, origin=np.zeros_like(full))


def seen_boxes(geometry: Geometry, size: tuple[int, int]) -> np.ndarray:
    """The part of each source that the window shows, in the nearest whole pixels, at least one: int32 [B, 4], boxes."""
    scale = geometry.box[:, 2:] / geometry.full
    begin = np.minimum(np.rint(geometry.origin * scale), geometry.box[:, 2:] - 1)
    end = np.maximum(np.rint((geometry.origin + np.array(size)) * scale), begin + 1)
    return np.concatenate([geometry.box[:, :2] + begin, end - begin], axis=1).astype(np.int32)


def _check_output(spec: Crop) -> None:
    checks.one_of("interpolation", spec.interpolation, INTERPOLATIONS)
    checks.one_of("memory_format", spec.memory_format, MEMORY_FORMATS)
    checks.flag("return_boxes", spec.return_boxes)
    checks.one_of("backend", spec.backend, checks.BACKENDS)


def _crop_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        wrong = ValueError if name == "" else TypeError
        raise wrong(f"crops must be named by non-empty strings, got {name!r}")
    return name


def _named_crop(name: str, given: Any) -> Crop:
    if isinstance(given, Crop):
        if given.return_boxes or given.backend is not None:
            raise ValueError(f"crops[{name!r}]: return_boxes and backend are arguments of MultiRandomResizedCrop")
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"crops[{name!r}] must be a dict of parameters or a crop, got {given!r}")
    allowed = [field.name for field in fields(RandomResizedCrop) if field.name not in ("_", "return_boxes", "backend")]
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise ValueError(f"crops[{name!r}] has an unknown parameter {unknown[0]!r}; allowed are {', '.join(allowed)}")
    if "size" not in given:
        raise ValueError(f"crops[{name!r}] must have a size, got {dict(given)!r}")
    try:
        return RandomResizedCrop(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"crops[{name!r}]: {error}") from None


def _between(words: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + words * 2.0**-32 * (high - low)


def _below(words: np.ndarray, end: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint64) * end.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def _log(x: float) -> float:
    return round(math.log(x) * 2.0**40) * 2.0**-40  # a machine's library may differ in the last bit: rounded away


_LOG2_HIGH, _LOG2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")


def _exp(x: np.ndarray) -> np.ndarray:
    # By the four operations alone, which round the same everywhere; a library's exp need not. With x = k log 2 + r the
    # series of exp(r) ends below a last bit after 14 terms; log 2 is split so that k times its first part is exact.
    k = np.rint(x / (_LOG2_HIGH + _LOG2_LOW))
    r = (x - k * _LOG2_HIGH) - k * _LOG2_LOW
    total = np.ones_like(r)
    for n in range(14, 0, -1):
        total = 1.0 + r / n * total
    return np.ldexp(total, k.astype(np.int64))
