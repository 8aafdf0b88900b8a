"""Crop stages, all of them, and named crops. Pixels are never touched here.

The specs are in crop_random.py and crop_fixed.py, what they have in common in crop_geometry.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import numpy as np
import torch

from . import checks
from .crop_fixed import CenterCrop as CenterCrop
from .crop_fixed import CornerCrop as CornerCrop
from .crop_fixed import FiveCrop as FiveCrop
from .crop_fixed import Resize as Resize
from .crop_fixed import ResizedCrop as ResizedCrop
from .crop_fixed import TenCrop as TenCrop
from .crop_geometry import INTERPOLATIONS as INTERPOLATIONS
from .crop_geometry import MEMORY_FORMATS as MEMORY_FORMATS
from .crop_geometry import Crop as Crop
from .crop_geometry import Geometry as Geometry
from .crop_geometry import ImageSizeError as ImageSizeError
from .crop_geometry import seen_boxes as seen_boxes
from .crop_random import MultiCropRandomResizedCrop as MultiCropRandomResizedCrop
from .crop_random import RandomResizedCrop as RandomResizedCrop
from .crop_random import RandomResizeShortCropLong as RandomResizeShortCropLong
from .crop_random import sample_boxes as sample_boxes
from .draws import Draws


@dataclass(frozen=True, slots=True)
class MultiRandomResizedCrop:
    """Named crops of every image, all cut in one launch from one decode.

    crops: name -> parameters of a RandomResizedCrop as a dict, or any spec of a single crop (RandomResizedCrop,
    CenterCrop, ResizedCrop, RandomResizeShortCropLong, Resize). A crop with subset_of="other" is cut from within that
    crop's box. seed: stands in for the loader's seed, for crops that have none of their own. return_boxes: add
    `<crop>_box` int32 [B, 4] (top, left, height, width) for every crop, and `<crop>_flip` bool [B] where it is flipped
    at random. backend: as in RandomResizedCrop, for all crops.

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
            raise TypeError(f"crops must be a dict of name -> parameters, got {checks.brief(self.crops)}")
        if not self.crops:
            raise ValueError("crops must name at least one crop, got {}")
        checks.settle(
            self,
            crops={_crop_name(name): _named_crop(name, given) for name, given in self.crops.items()},
            seed=checks.seed("seed", self.seed),
        )
        for name in self.crops:
            _ancestry(self.crops, name)
        checks.one_of("backend", self.backend, checks.BACKENDS)
        if checks.flag("return_boxes", self.return_boxes):
            for name in (f"{crop}_{kind}" for crop in self.crops for kind in ("box", "flip")):
                if name in self.crops:
                    raise ValueError(f"crops must not name {name!r}, which return_boxes=True gives: name it otherwise")

    @property
    def order(self) -> tuple[str, ...]:
        """The crops' names, each after the crop that it is a subset of."""
        return tuple(dict.fromkeys(each for name in self.crops for each in _ancestry(self.crops, name)))

    def __call__(self, images: Any, *, sample_ids: Any = None, epoch: int = 0) -> dict[str, torch.Tensor]:
        """The named crops of these images; with sample_ids pure in (seed, sample id, epoch) and the pixels.

        sample_ids: [B] whole numbers in [0, 2**64), None draws new crops. epoch: in [0, 2**32).
        """
        from .standalone import apply_crops

        return apply_crops(self, images, sample_ids, epoch)


CropList = MultiCropRandomResizedCrop | FiveCrop | TenCrop
CropStage = Crop | CropList | MultiRandomResizedCrop


def sample_geometry(
    spec: Crop,
    sizes: np.ndarray,
    draws: Draws | None,
    within: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
) -> Geometry:
    """The geometry of one crop of each image, drawn where the crop is random (`draws` is None where it is not).

    sizes: int32 [B, 2] (h, w). within: int32 [B, 4], the boxes of the crop that subset_of names. boxes: whole numbers
    [B, 4], the user's, for a ResizedCrop; other crops have no use for them. Raises ImageSizeError.
    """
    return spec.sample_geometry(sizes, draws, within, boxes)


def _crop_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        wrong = ValueError if name == "" else TypeError
        raise wrong(f"crops must be named by non-empty strings, got {name!r}")
    return name


def _named_crop(name: str, given: Any) -> Crop:
    if isinstance(given, Crop):
        if given.return_boxes or given.backend is not None:
            raise ValueError(f"crops[{name!r}]: return_boxes and backend are arguments of MultiRandomResizedCrop")
        if isinstance(given, ResizedCrop) and given.boxes is None:
            raise ValueError(f"crops[{name!r}]: boxes must be a field's name or (top, left, height, width), got None")
        return given
    if not isinstance(given, Mapping):
        checks.refuse_torchvision(f"crops[{name!r}]", given)
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


def _ancestry(crops: Mapping[str, Any], name: str) -> list[str]:
    # The crop that this one descends from by subset_of, its child, and so on to this one.
    names = [name]
    while (parent := getattr(crops[names[-1]], "subset_of", None)) is not None:
        allowed = [other for other in crops if other != names[-1]]
        if parent not in allowed:
            raise ValueError(
                f"crops[{names[-1]!r}]: subset_of must name another crop beside it, one of {allowed}, got {parent!r}"
            )
        if parent in names:
            way = " -> ".join(map(repr, [*names, parent]))
            raise ValueError(f"crops[{parent!r}]: subset_of must not lead back to the crop itself, got {way}")
        names.append(parent)
    return names[::-1]
