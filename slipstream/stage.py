"""Stages that map each value by itself, and the list of stages that a crop goes through.

A map of each channel's values (`PointwiseStage`) is on bytes a table of 3 x 256 values, which rides in the last step of
the crop launch and is exact on every device by construction. The stages that are drawn are in stage_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from . import checks
from .device import to_device
from .stage_own import is_own
from .stage_program import ProgramStage

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (torch.uint8, *FLOAT_DTYPES)


@runtime_checkable
class PointwiseStage(Protocol):
    """A stage that maps each value by itself, alike at every pixel, perhaps unlike in each channel."""

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """images [..., 3, h, w] -> the same shape."""
        ...

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What it makes of this dtype; TypeError for one that it cannot take."""
        ...


@dataclass(frozen=True, slots=True)
class Normalize:
    """(x - mean) / std for each channel; uint8 is scaled to [0, 1] first.

    mean, std: three numbers, of values in [0, 1]. dtype: of the output, float32 by default for uint8 and the input's
    own for floats; the arithmetic is float32 for uint8, rounded once. On uint8 it equals torchvision v2's
    to_dtype(float32, scale=True) then normalize bit for bit. Called on [..., 3, h, w] it gives the same shape. Raises
    ValueError or TypeError that names the parameter (a std of zero is one; a mean above 1, for uint8), or the images'
    shape or dtype.
    """

    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    _: KW_ONLY
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        checks.settle(self, mean=checks.three("mean", self.mean), std=checks.three("std", self.std))
        if 0.0 in np.array(self.std, np.float32):
            raise ValueError(f"std must not be zero in float32, got {self.std}")
        checks.one_of("dtype", self.dtype, (None, *FLOAT_DTYPES))

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32 for uint8, a float dtype stays, unless the stage names one."""
        if dtype != torch.uint8 and not dtype.is_floating_point:
            raise TypeError(f"Normalize takes uint8 or float images, got {dtype}")
        if dtype == torch.uint8 and max(self.mean) > 1.0:
            # DALI's users write them so; every pixel would come out as nearly the same number
            raise ValueError(f"mean must be of values in [0, 1] for uint8 images, got {self.mean}: divide both by 255")
        return self.dtype or (torch.float32 if dtype == torch.uint8 else dtype)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """images [..., 3, h, w] of uint8 or float -> the same shape, normalised."""
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images must be a tensor [..., 3, h, w], got {type(images).__name__}")
        if images.ndim < 3 or images.shape[-3] != 3:
            raise ValueError(f"images must be [..., 3, h, w], got shape {list(images.shape)}")
        output_dtype = self.output_dtype(images.dtype)
        if images.dtype == torch.uint8:
            images = _to_float32(images)
        # the divisor is a tensor: CUDA divides by a Python number through its reciprocal, which rounds otherwise
        mean, std = (
            to_device(torch.tensor(v, dtype=images.dtype, device="cpu"), images.device).view(3, 1, 1)
            for v in (self.mean, self.std)
        )
        return ((images - mean) / std).to(output_dtype)

    def __call__(self, images: torch.Tensor, *, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor:
        """The normalised images; sample_ids and epoch change nothing."""
        return self.apply(images)


@dataclass(frozen=True, slots=True)
class ToDtype:
    """Another dtype: torchvision v2's ToDtype for uint8 -> float and float -> float.

    dtype: uint8 (images that are already), float16, bfloat16 or float32. scale: uint8 to [0, 1]. bfloat16 and float16
    come from float32, rounded once to nearest even. Called on images of any shape it gives the same shape. Raises
    ValueError for another dtype, TypeError for float images to be made uint8 (their range is not known).
    """

    dtype: torch.dtype
    scale: bool = False

    def __post_init__(self) -> None:
        checks.one_of("dtype", self.dtype, DTYPES)
        checks.flag("scale", self.scale)

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The stage's dtype."""
        if dtype != torch.uint8 and not dtype.is_floating_point:
            raise TypeError(f"ToDtype takes uint8 or float images, got {dtype}")
        if dtype.is_floating_point and self.dtype == torch.uint8:
            raise TypeError(f"ToDtype(uint8) takes uint8 images, got {dtype}")
        return self.dtype

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """images of any shape -> the same shape in the stage's dtype."""
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        self.output_dtype(images.dtype)
        if images.dtype == torch.uint8 and self.dtype != torch.uint8 and self.scale:
            images = _to_float32(images)
        return images.to(self.dtype)

    def __call__(self, images: torch.Tensor, *, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor:
        """The converted images; sample_ids and epoch change nothing."""
        return self.apply(images)


Stage = ProgramStage | PointwiseStage | Any  # the last: a user's own (stage_own.py)


@dataclass(frozen=True, slots=True)
class MultiCropPipeline:
    """The stages of each named crop, in order; a crop not named here stays as it is.

    pipelines: crop name -> list of stages. seed: stands in for the loader's seed, for stages that have none of their
    own. Called on a dict of crops, name -> [B, 3, h, w], it gives a dict with the named ones transformed.
    Raises TypeError for what is no stage, or for a stage that cannot take what the one before it gives.
    """

    pipelines: Mapping[str, Sequence[Stage]]
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pipelines, Mapping):
            raise TypeError(f"pipelines must be a dict of crop name -> stages, got {checks.brief(self.pipelines)}")
        from .chain import check_chain

        settled = {name: check_stages(f"pipelines[{name!r}]", stages) for name, stages in self.pipelines.items()}
        for name, stages in settled.items():
            check_chain(f"pipelines[{name!r}]", stages)
        checks.settle(self, pipelines=settled, seed=checks.seed("seed", self.seed))

    def __call__(
        self, crops: Mapping[str, torch.Tensor], *, sample_ids: Any = None, epoch: int = 0
    ) -> dict[str, torch.Tensor]:
        """The transformed crops; with sample_ids a pure function of (seed, sample id, epoch) and the pixels."""
        from .standalone import apply_named_stages

        return apply_named_stages(self, crops, sample_ids, epoch)


def check_stages(field: str, stages: Any) -> tuple[Stage, ...]:
    """A crop's stages as a tuple; TypeError that names the field and the place of what is no stage."""
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise TypeError(f"{field} must be a list of stages, got {checks.brief(stages)}")
    return tuple(check_stage(f"{field}[{index}]", stage) for index, stage in enumerate(stages))


def check_stage(field: str, stage: Any) -> Stage:
    """One stage; TypeError that names its place for what is none."""
    checks.refuse_torchvision(field, stage)
    if isinstance(stage, type) or not (isinstance(stage, (ProgramStage, PointwiseStage)) or is_own(stage)):
        raise TypeError(
            f"{field} must be a stage (RandomHorizontalFlip, ColorJitter, Normalize, ...), a function on a tensor "
            f"[B, 3, h, w], or an object with sample_params and apply, got {checks.brief(stage)}{_place_of(stage)}"
        )
    return stage


def _place_of(stage: Any) -> str:
    # Where something of ours belongs that is no stage of a crop: the end of a message.
    if isinstance(stage, type):
        return ""
    if hasattr(stage, "return_boxes"):
        return ": a crop stage stands once, at the beginning of a field's pipeline"
    return ": it goes into the loader's batch_stages" if hasattr(stage, "num_classes") else ""


def _to_float32(images: torch.Tensor) -> torch.Tensor:
    return images.to(torch.float32).mul_(1.0 / 255)  # a product, as torchvision's to_dtype
