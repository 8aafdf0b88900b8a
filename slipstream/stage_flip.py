"""Flips: the one change of geometry that costs nothing, for the crop launch writes a mirrored crop as well as another.

A flip commutes with every colour, blur and normalisation, so it rides in the crop launch wherever it stands among them.
After a warp or an erased box it stays in its place, as an operation of the program that moves pixels and changes none.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels import ops

from . import checks
from .draws import Draws
from .stage_program import ProgramStage

HORIZONTAL, VERTICAL = 1, 2  # bits of a crop job's FLIP


class _RandomFlip(ProgramStage):
    __slots__ = ()
    p: float

    def sample_params(self, draws: Draws) -> np.ndarray:
        """Which samples are flipped: bool [B]; word 0 of block 0 decides."""
        return draws.uniform(0)[:, 0, 0] < self.p

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One warp, where it cannot ride in the crop launch."""
        return ((ops.WARP,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """The flip as a warp to the nearest pixel, which is exact: float32 [B, 1, 16]."""
        from .stage_warp import flip_rows

        flipped, none = self.sample_params(draws), np.zeros(len(draws), bool)
        horizontal = isinstance(self, RandomHorizontalFlip)
        return flip_rows(flipped if horizontal else none, none if horizontal else flipped, size)

    def __call__(self, images: torch.Tensor, *, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor:
        """The images, flipped where drawn; with sample_ids a pure function of (seed, sample id, epoch)."""
        from .standalone import apply_stage

        return apply_stage(self, images, sample_ids, epoch)


@dataclass(frozen=True, slots=True)
class RandomHorizontalFlip(_RandomFlip):
    """Mirror the crop left to right with probability p, drawn for each sample (torchvision's RandomHorizontalFlip).

    p: in [0, 1]. seed: its own instead of the loader's; two with the same seed flip the same samples. Called on images
    [B, C, h, w] of any dtype it gives a new tensor of that shape and dtype. Raises ValueError or TypeError that names
    the parameter, or the images' shape.
    """

    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.settle(self, p=checks.probability("p", self.p), seed=checks.seed("seed", self.seed))


@dataclass(frozen=True, slots=True)
class RandomVerticalFlip(_RandomFlip):
    """Turn the crop upside down with probability p, drawn for each sample (torchvision's RandomVerticalFlip).

    Parameters, outputs and errors as in RandomHorizontalFlip.
    """

    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.settle(self, p=checks.probability("p", self.p), seed=checks.seed("seed", self.seed))


def flip_bits(stage: Any) -> int:
    """The FLIP bit of a flip, 0 for another stage."""
    if isinstance(stage, RandomHorizontalFlip):
        return HORIZONTAL
    return VERTICAL if isinstance(stage, RandomVerticalFlip) else 0


def flip_images(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Images [B, C, h, w] flipped by their bits, int [B] on the same device: a new tensor."""
    bits = bits.view(-1, 1, 1, 1)
    images = torch.where((bits & HORIZONTAL) != 0, images.flip(-1), images)
    return torch.where((bits & VERTICAL) != 0, images.flip(-2), images)
