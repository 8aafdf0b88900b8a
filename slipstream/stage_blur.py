"""Stages that read a pixel's neighbourhood: torchvision's Gaussian blur, Pillow's, and sharpness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from slipstream_kernels import ops

from . import checks
from .distributions import between
from .draws import Draws
from .stage_program import ProgramStage, applied, rows, where

MAX_RADIUS = 16.0  # Pillow's, in pixels; its box radius is 15.48, and the kernel's is below 16


@dataclass(frozen=True, slots=True)
class GaussianBlur(ProgramStage):
    """Blur with a Gaussian kernel, reflected at the borders: torchvision's GaussianBlur, drawn for each sample.

    kernel_size: odd, 1 or more, one int or (x, y), in pixels; half of it must be smaller than the crop's side. sigma:
    in pixels, above 0, a number or (low, high) drawn uniformly, the same on both axes. p: the share of samples blurred.
    seed: its own instead of the loader's. Images and output as in RandomGrayscale. Raises ValueError or TypeError for a
    parameter outside these ranges.
    """

    kernel_size: int | Sequence[int]
    sigma: float | Sequence[float] = (0.1, 2.0)
    _: KW_ONLY
    p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        sigma = _range("sigma", self.sigma)
        if sigma[0] <= 0.0:
            raise ValueError(f"sigma must be above 0, got {self.sigma!r}")
        checks.settle(
            self,
            kernel_size=_kernel("kernel_size", self.kernel_size),
            sigma=sigma,
            p=checks.probability("p", self.p),
            seed=checks.seed("seed", self.seed),
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.GAUSSIAN_BLUR,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: applied (word 0), sigma (word 1). ValueError for a kernel that the size is too small for."""
        kernel: Any = self.kernel_size  # settled
        across, down = kernel
        if across // 2 >= size[1] or down // 2 >= size[0]:
            raise ValueError(
                f"kernel_size {across} x {down} reaches beyond the reflection of a crop of {size[1]} x {size[0]} "
                f"(width x height): half of it must be smaller than the side"
            )
        sigma = between(draws.uniform(0)[:, 0, 1], self.sigma)
        return where(applied(draws, self.p), rows(len(draws), ops.GAUSSIAN_BLUR, across, down, sigma, sigma))


@dataclass(frozen=True, slots=True)
class PILGaussianBlur(ProgramStage):
    """Pillow's ImageFilter.GaussianBlur, which is three box blurs an axis, rounded to bytes as Pillow rounds.

    radius: Pillow's, in pixels, in [0, 16], a number or (low, high) drawn uniformly; 0 leaves the image alone. p: the
    share of samples blurred. seed: its own instead of the loader's. Not torchvision's GaussianBlur, which convolves
    with the Gaussian itself. Images and output as in RandomGrayscale. Raises ValueError or TypeError for a parameter
    outside these ranges.
    """

    radius: float | Sequence[float] = (0.1, 2.0)
    _: KW_ONLY
    p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        radius = _range("radius", self.radius)
        if radius[0] < 0.0 or radius[1] > MAX_RADIUS:
            raise ValueError(f"radius must be in [0, {MAX_RADIUS:g}], got {self.radius!r}")
        checks.settle(self, radius=radius, p=checks.probability("p", self.p), seed=checks.seed("seed", self.seed))

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.BOX_BLUR,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: applied (word 0), radius (word 1)."""
        radius = between(draws.uniform(0)[:, 0, 1], self.radius)
        chosen = applied(draws, self.p) & (radius.astype(np.float32) > 0)
        return where(chosen, rows(len(draws), ops.BOX_BLUR, box_radius(radius)))


@dataclass(frozen=True, slots=True)
class RandomAdjustSharpness(ProgramStage):
    """Adjust the sharpness with probability p: torchvision's RandomAdjustSharpness.

    sharpness_factor: 0 or more; 0 smooths, 1 changes nothing, 2 sharpens. Images and output as in RandomGrayscale.
    Raises ValueError or TypeError for others.
    """

    sharpness_factor: float
    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        factor = checks.number("sharpness_factor", self.sharpness_factor)
        if factor < 0.0:
            raise ValueError(f"sharpness_factor must be 0 or more, got {self.sharpness_factor!r}")
        checks.settle(
            self, sharpness_factor=factor, p=checks.probability("p", self.p), seed=checks.seed("seed", self.seed)
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.SHARPNESS,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Word 0 of block 0 decides."""
        return where(applied(draws, self.p), rows(len(draws), ops.SHARPNESS, self.sharpness_factor))


def box_radius(radius: np.ndarray) -> np.ndarray:
    """The radius of each of three box blurs that make Pillow's Gaussian blur of this radius: float32, any shape.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM 2011), equations
    7, 11 and 14, rounded where Pillow's C rounds: a step that C computes in double is float64 here.
    """
    radius = radius.astype(np.float32)
    variance = radius * radius / np.float32(3)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    one, six = np.float32(1), np.float32(6)
    part = (2 * whole + one) * (whole * (whole + one) - 3 * variance)
    return whole + part / (six * (variance - (whole + one) * (whole + one)))


def _range(field: str, value: Any) -> tuple[float, float]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        low, high = checks.numbers(field, value, 2, "a number or (low, high)")
    else:
        low = high = checks.number(field, value)
    if low > high:
        raise ValueError(f"{field} must be (low, high) with low <= high, got {value!r}")
    return low, high


def _kernel(field: str, value: Any) -> tuple[int, int]:
    pair = isinstance(value, Sequence) and not isinstance(value, str)
    if pair and len(value) != 2:
        raise ValueError(f"{field} must be an odd int or two of them (x, y), got {value!r}")
    across, down = (checks.whole(field, each, 1) for each in (value if pair else (value, value)))
    if across % 2 == 0 or down % 2 == 0:
        raise ValueError(f"{field} must be odd, got {value!r}")
    return across, down
