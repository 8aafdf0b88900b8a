"""Random erasing: a box of each crop overwritten by a constant, a random colour or noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from slipstream_kernels import ops

from . import checks
from .distributions import between, log_between, standard_normal
from .draws import Draws
from .stage_program import ProgramStage, applied, rows, where

TRIES = 10
NOISES = ("random", "color")


@dataclass(frozen=True, slots=True)
class RandomErasing(ProgramStage):
    """Overwrite a random box with probability p: torchvision's RandomErasing, drawn for each sample.

    scale: (low, high), the box's share of the crop's area, in [0, 1]. ratio: (low, high) of its height / width, above
    0, drawn uniformly in the logarithm. value: what is written, a number, three, "random" (a standard normal number for
    each value: torchvision's, and timm's "pixel") or "color" (one for each channel: timm's "rand"), on the scale of the
    image there: [0, 1], or what Normalize makes of it. seed: its own instead of the loader's. Ten boxes are tried; if
    none is smaller than the crop on both sides, nothing is erased. Images and output as in RandomGrayscale. Raises
    ValueError or TypeError for a parameter outside these ranges.
    """

    p: float = 0.5
    scale: Sequence[float] = (0.02, 0.33)
    ratio: Sequence[float] = (0.3, 3.3)
    value: float | Sequence[float] | str = 0
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        low, high = checks.numbers("scale", self.scale, 2, "two numbers (low, high)")
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"scale must satisfy 0 <= low <= high <= 1, got {self.scale!r}")
        checks.settle(
            self,
            p=checks.probability("p", self.p),
            scale=(low, high),
            ratio=checks.interval("ratio", self.ratio, 0.0, float("inf")),
            value=_value(self.value),
            seed=checks.seed("seed", self.seed),
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.ERASE,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: applied; blocks 1 to 10: area, ratio, top, left of a try; 11, 12: the noise's key, or the colour."""
        boxes, fits = self._boxes(draws, size)
        colour: Any = (0.0, 0.0, 0.0) if isinstance(self.value, str) else self.value
        pieces: Any = ()
        words = draws.words(TRIES + 1, 2)
        if self.value == "color":
            colour = standard_normal(words.reshape(-1, 4, 2))[:, :3].T
        elif self.value == "random":
            low, high = words[:, 0, 0], words[:, 0, 1]
            pieces = (low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16)
        program = rows(len(draws), ops.ERASE, *boxes.T, *colour, self.value == "random", *pieces)
        return where(applied(draws, self.p) & fits, program)

    def _boxes(self, draws: Draws, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        # the first box that fits, int64 [B, 4] (top, left, height, width), and whether one does, bool [B]
        u = draws.uniform(1, TRIES)
        area = size[0] * size[1] * between(u[:, :, 0], self.scale)
        ratio = log_between(u[:, :, 1], self.ratio)
        height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (height < size[0]) & (width < size[1])
        top, left = np.floor(u[:, :, 2] * (size[0] - height + 1)), np.floor(u[:, :, 3] * (size[1] - width + 1))
        tries = np.stack([top, left, height, width], axis=2).astype(np.int64)
        first = np.arange(len(u)), fits.argmax(1)
        return tries[first], fits[first]


def _value(value: Any) -> tuple[float, float, float] | str:
    if isinstance(value, str):
        if value not in NOISES:
            raise ValueError(f"value must be a number, three numbers, 'random' or 'color', got {value!r}")
        return value
    if isinstance(value, Sequence):
        return checks.three("value", value)
    number = checks.number("value", value)
    return number, number, number
