"""Colour stages on [0, 1] images: jitter, grey, solarize, posterize, invert, autocontrast, equalize.

A run of these is one launch that reads and writes each pixel once, with one reading more for a contrast's mean, and for
autocontrast and equalize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import permutations
from typing import Any, ClassVar

import numpy as np
from slipstream_kernels import ops

from . import checks
from .draws import Draws
from .stage_program import ProgramStage, applied, rows, where

_ORDERS = np.array(list(permutations(range(4))))
JITTER_ORDERS = ("random", "fixed")


@dataclass(frozen=True, slots=True)
class ColorJitter(ProgramStage):
    """Brightness, contrast, saturation and hue by random amounts: torchvision's ColorJitter, drawn for each sample.

    brightness, contrast, saturation: b for factors in [max(0, 1 - b), 1 + b], or (low, high) with 0 <= low <= high.
    hue: h <= 0.5 for a shift in [-h, h] turns, or (low, high) within [-0.5, 0.5]. p: the share of samples changed.
    order: "random" draws one of the 24 orders for each sample (torchvision), "fixed" is in the order of the arguments.
    additive_brightness: brightness b adds a number in [-b, b] instead (BYOL). seed: its own instead of the loader's.
    Every operation clamps to [0, 1]. Images and output as RandomGrayscale's. Raises ValueError or TypeError for a
    parameter outside these ranges.
    """

    brightness: float | Sequence[float] = 0.0
    contrast: float | Sequence[float] = 0.0
    saturation: float | Sequence[float] = 0.0
    hue: float | Sequence[float] = 0.0
    _: KW_ONLY
    p: float = 1.0
    order: str = "random"
    additive_brightness: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.flag("additive_brightness", self.additive_brightness)
        checks.one_of("order", self.order, JITTER_ORDERS)
        centre = 0.0 if self.additive_brightness else 1.0
        checks.settle(
            self,
            brightness=_factors("brightness", self.brightness, centre),
            contrast=_factors("contrast", self.contrast, 1.0),
            saturation=_factors("saturation", self.saturation, 1.0),
            hue=_hues(self.hue),
            p=checks.probability("p", self.p),
            seed=checks.seed("seed", self.seed),
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """The operations whose amount is not always neutral."""
        return tuple((code,) for code, limits, still in self._parts() if limits != (still, still))

    def _parts(self) -> list[tuple[int, tuple[float, float], float]]:
        # code, range (settled) and neutral amount of each operation
        brightness = (ops.ADD_BRIGHTNESS, 0.0) if self.additive_brightness else (ops.BRIGHTNESS, 1.0)
        ranges: list[Any] = [self.brightness, self.contrast, self.saturation, self.hue]
        kinds = [brightness, (ops.CONTRAST, 1.0), (ops.SATURATION, 1.0), (ops.HUE, 0.0)]
        return [(code, limits, still) for (code, still), limits in zip(kinds, ranges, strict=True)]

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: applied (word 0), order (word 1); block 1: the four amounts."""
        words = draws.words(0, 2)
        amount = words[:, 1] * 2.0**-32
        program = np.zeros((len(draws), 4, ops.OP_WIDTH), np.float32)
        for index, (code, (low, high), still) in enumerate(self._parts()):
            if (low, high) != (still, still):
                program[:, index, 0] = code
                program[:, index, 1] = low + amount[:, index] * (high - low)
        if self.order == "random":
            order = _ORDERS[(words[:, 0, 1].astype(np.uint64) * np.uint64(24)) >> np.uint64(32)]
            program = np.take_along_axis(program, order[:, :, None], axis=1)
        return where(words[:, 0, 0] * 2.0**-32 < self.p, program)


class _OneOperation(ProgramStage):
    # One operation without parameters, with probability p.
    __slots__ = ()
    operation: ClassVar[int]
    p: float

    def __post_init__(self) -> None:
        checks.settle(self, p=checks.probability("p", self.p), seed=checks.seed("seed", self.seed))

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((self.operation,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Word 0 of block 0 decides."""
        return where(applied(draws, self.p), rows(len(draws), self.operation))


@dataclass(frozen=True, slots=True)
class RandomGrayscale(_OneOperation):
    """Grey (0.2989 r + 0.587 g + 0.114 b, in all three channels) with probability p: torchvision's RandomGrayscale.

    p: the share of samples changed, in [0, 1]. seed: its own instead of the loader's. Called on images [B, 3, h, w],
    uint8 or float in [0, 1], it gives a new tensor of that shape and dtype (float32 for float64). Raises ValueError or
    TypeError that names the parameter, or the images' shape or dtype.
    """

    p: float = 0.1
    _: KW_ONLY
    seed: int | None = None
    operation: ClassVar[int] = ops.GREY


@dataclass(frozen=True, slots=True)
class RandomSolarize(ProgramStage):
    """Invert the values at or above a threshold, with probability p: torchvision's RandomSolarize.

    threshold: in [0, 256], on the scale of uint8, as torchvision's for uint8 images (128 is the recipes'). The others,
    images, output and errors as in RandomGrayscale.
    """

    threshold: float
    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        threshold = checks.number("threshold", self.threshold)
        if not 0.0 <= threshold <= 256.0:
            raise ValueError(f"threshold must be in [0, 256] (the scale of uint8), got {self.threshold!r}")
        checks.settle(self, threshold=threshold, p=checks.probability("p", self.p), seed=checks.seed("seed", self.seed))

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.SOLARIZE,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Word 0 of block 0 decides."""
        # the product that a byte becomes, so that a byte equal to the threshold is at it
        threshold = np.float32(self.threshold) * np.float32(1 / 255)
        return where(applied(draws, self.p), rows(len(draws), ops.SOLARIZE, threshold))


@dataclass(frozen=True, slots=True)
class RandomPosterize(ProgramStage):
    """Keep `bits` bits of each value (0 to 8), with probability p: torchvision's RandomPosterize on float images.

    The others, images, output and errors as in RandomGrayscale.
    """

    bits: int
    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        bits = checks.whole("bits", self.bits, 0)
        if bits > 8:
            raise ValueError(f"bits must be in [0, 8], got {bits}")
        checks.settle(self, bits=bits, p=checks.probability("p", self.p), seed=checks.seed("seed", self.seed))

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.POSTERIZE,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Word 0 of block 0 decides."""
        return where(applied(draws, self.p), rows(len(draws), ops.POSTERIZE, 2**self.bits))


@dataclass(frozen=True, slots=True)
class RandomInvert(_OneOperation):
    """1 - x with probability p: torchvision's RandomInvert.

    Parameters, images, output and errors as in RandomGrayscale.
    """

    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None
    operation: ClassVar[int] = ops.INVERT


@dataclass(frozen=True, slots=True)
class RandomAutocontrast(_OneOperation):
    """Stretch each channel from its (min, max) to (0, 1), with probability p: torchvision's RandomAutocontrast.

    Parameters, images, output and errors as in RandomGrayscale.
    """

    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None
    operation: ClassVar[int] = ops.AUTOCONTRAST


@dataclass(frozen=True, slots=True)
class RandomEqualize(_OneOperation):
    """Make each channel's histogram flat, with probability p: torchvision's RandomEqualize on float images.

    Parameters, images, output and errors as in RandomGrayscale.
    """

    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None
    operation: ClassVar[int] = ops.EQUALIZE


def _factors(field: str, value: Any, centre: float) -> tuple[float, float]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{field} must be a number or (low, high), got {value!r}")
        low, high = (checks.number(field, end) for end in value)
    else:
        spread = checks.number(field, value)
        if spread < 0:
            raise ValueError(f"{field} must be 0 or more, got {value!r}")
        low, high = max(centre - spread, 0.0) if centre else -spread, centre + spread
    if not (0.0 if centre else -1.0) <= low <= high < float("inf"):
        raise ValueError(f"{field} must be (low, high) with {0 if centre else -1} <= low <= high, got {value!r}")
    return low, high


def _hues(value: Any) -> tuple[float, float]:
    low, high = (
        _factors("hue", value, 0.0)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else (-checks.number("hue", value), checks.number("hue", value))
    )
    if not -0.5 <= low <= high <= 0.5:
        raise ValueError(f"hue must be in [0, 0.5], or (low, high) within [-0.5, 0.5], got {value!r}")
    return low, high
