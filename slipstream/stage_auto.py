"""Automatic augmentation: RandAugment, TrivialAugmentWide and timm's RandAugment, as programs of other stages' rows.

torchvision's two pick from a table of finitely many rows, made once for a crop's size; timm's draws its magnitudes.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from slipstream_kernels import ops

from . import checks
from .distributions import standard_normal
from .draws import Draws
from .stage_program import ProgramStage, rows, where
from .stage_warp import INTERPOLATIONS, Fill, check_fill, inverse_affine, warp_rows

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
_CODES = (
    ops.WARP,
    ops.BRIGHTNESS,
    ops.SATURATION,
    ops.CONTRAST,
    ops.SHARPNESS,
    ops.POSTERIZE,
    ops.SOLARIZE,
    ops.AUTOCONTRAST,
    ops.EQUALIZE,
)
TIMM_OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
_TIMM_PLAIN = {"AutoContrast": ops.AUTOCONTRAST, "Equalize": ops.EQUALIZE, "Invert": ops.INVERT}
_TIMM_FACTORS = {
    "Color": ops.SATURATION,
    "Contrast": ops.CONTRAST,
    "Brightness": ops.BRIGHTNESS,
    "Sharpness": ops.SHARPNESS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Space:
    """The largest magnitudes: shear as a tangent, shift in pixels or (relative) in sides, angle in degrees, factor away
    from 1, bits taken away."""

    shear: float
    shift: float
    relative: bool
    angle: float
    factor: float
    bits: int


_SPACES = {
    "rand": _Space(shear=0.3, shift=150.0 / 331.0, relative=True, angle=30.0, factor=0.9, bits=4),
    "wide": _Space(shear=0.99, shift=32.0, relative=False, angle=135.0, factor=0.99, bits=6),
}


@dataclass(frozen=True, slots=True)
class RandAugment(ProgramStage):
    """num_ops of 14 operations, drawn for each sample, all at one magnitude: torchvision's RandAugment.

    num_ops: 1 or more. magnitude: a bin, 0 ... num_magnitude_bins - 1. interpolation: "nearest" or "bilinear". fill:
    what warps leave empty, in [0, 1]: a number, three, or None (zeros). seed: its own instead of the loader's. The
    operations are torchvision's on float images: a threshold or a number of bits may part from those on bytes in the
    last step. Images and output as in RandomGrayscale. Raises ValueError or TypeError for a parameter outside these
    ranges.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    interpolation: str = "nearest"
    fill: Fill = None
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        bins = checks.whole("num_magnitude_bins", self.num_magnitude_bins, 2)
        magnitude = checks.whole("magnitude", self.magnitude, 0)
        if magnitude >= bins:
            raise ValueError(f"magnitude must be below num_magnitude_bins ({bins}), got {magnitude}")
        checks.one_of("interpolation", self.interpolation, INTERPOLATIONS)
        checks.settle(
            self,
            num_ops=checks.whole("num_ops", self.num_ops, 1),
            magnitude=magnitude,
            num_magnitude_bins=bins,
            fill=check_fill("fill", self.fill),
            seed=checks.seed("seed", self.seed),
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Every operation in every row."""
        return (_CODES,) * self.num_ops

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """A block for each operation: which (word 0), its sign (word 1)."""
        table = operation_table("rand", self.num_magnitude_bins, size, self.interpolation, self.fill)
        words = draws.words(0, self.num_ops)
        return table[_pick(words[:, :, 0], len(OPERATIONS)), self.magnitude, _pick(words[:, :, 1], 2)]


@dataclass(frozen=True, slots=True)
class TrivialAugmentWide(ProgramStage):
    """One of 14 operations at a random magnitude, drawn for each sample: torchvision's TrivialAugmentWide.

    num_magnitude_bins: 2 or more. interpolation, fill, seed: as RandAugment's, and so are the operations. Images and
    output as in RandomGrayscale. Raises ValueError or TypeError for a parameter outside these ranges.
    """

    num_magnitude_bins: int = 31
    interpolation: str = "nearest"
    fill: Fill = None
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.one_of("interpolation", self.interpolation, INTERPOLATIONS)
        checks.settle(
            self,
            num_magnitude_bins=checks.whole("num_magnitude_bins", self.num_magnitude_bins, 2),
            fill=check_fill("fill", self.fill),
            seed=checks.seed("seed", self.seed),
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Every operation in the one row."""
        return (_CODES,)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: which operation (word 0), its magnitude (word 1) and sign (word 2)."""
        table = operation_table("wide", self.num_magnitude_bins, size, self.interpolation, self.fill)
        words = draws.words(0)
        counts = (len(OPERATIONS), self.num_magnitude_bins, 2)
        return table[tuple(_pick(words[:, :, i], count) for i, count in enumerate(counts))]


@dataclass(frozen=True, slots=True)
class TimmRandAugment(ProgramStage):
    """timm's RandAugment, drawn for each sample: "rand-m9-mstd0.5-inc1" by default (timm/data/auto_augment.py).

    magnitude: in [0, 10]. magnitude_std: 0 or more, of the normal number added to it for each operation. num_ops: 1 or
    more of 15 operations. increasing: whether all grow stronger with the magnitude (inc1). p: the share of operations
    applied, of each by itself. interpolation: "nearest" or "bilinear". fill: what warps leave empty, in [0, 1]: a
    number, three, or None. seed: its own instead of the loader's. Unlike timm: no bicubic, which timm draws half of the
    time unless told otherwise; warps blend into the fill as torchvision's do, half a pixel wide; values are not rounded
    to bytes between operations, so thresholds, greys and numbers of bits are those of float images. Images and output
    as in RandomGrayscale. Raises ValueError or TypeError for a parameter outside these ranges.
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_ops: int = 2
    increasing: bool = True
    p: float = 0.5
    interpolation: str = "bilinear"
    fill: Fill = (128 / 255, 128 / 255, 128 / 255)
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        magnitude, std = checks.number("magnitude", self.magnitude), checks.number("magnitude_std", self.magnitude_std)
        if not 0.0 <= magnitude <= 10.0:
            raise ValueError(f"magnitude must be in [0, 10], got {self.magnitude!r}")
        if std < 0.0:
            raise ValueError(f"magnitude_std must be 0 or more, got {self.magnitude_std!r}")
        checks.flag("increasing", self.increasing)
        checks.one_of("interpolation", self.interpolation, INTERPOLATIONS)
        checks.settle(
            self,
            magnitude=magnitude,
            magnitude_std=std,
            num_ops=checks.whole("num_ops", self.num_ops, 1),
            p=checks.probability("p", self.p),
            fill=check_fill("fill", self.fill),
            seed=checks.seed("seed", self.seed),
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Every operation in every row."""
        return ((*_CODES, ops.INVERT, ops.SOLARIZE_ADD),) * self.num_ops

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Two blocks for each operation: applied, which, sign (words 0 to 2); the magnitude (words 0, 1)."""
        words = draws.words(0, 2 * self.num_ops).reshape(len(draws) * self.num_ops, 2, 4)
        level = (self.magnitude + self.magnitude_std * standard_normal(words[:, 1, :2])).clip(0.0, 10.0) / 10.0
        sign = np.where(words[:, 0, 2] < 2**31, 1.0, -1.0)
        which = _pick(words[:, 0, 1], len(TIMM_OPERATIONS))
        program = np.zeros((len(words), 1, ops.OP_WIDTH), np.float32)
        for index, name in enumerate(TIMM_OPERATIONS):
            chosen = which == index
            program[chosen] = self._rows(name, level[chosen], sign[chosen], size)
        program = where(words[:, 0, 0] * 2.0**-32 < self.p, program)
        return program.reshape(len(draws), self.num_ops, ops.OP_WIDTH)

    def _rows(self, name: str, level: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        # programs of one operation, float32 [N, 1, 16], at these levels, [N] in [0, 1], and signs, [N] of 1 and -1
        count, signed = len(level), sign * level
        if name in _TIMM_FACTORS:
            factor = np.maximum(1.0 + signed * 0.9, 0.1) if self.increasing else level * 1.8 + 0.1
            return rows(count, _TIMM_FACTORS[name], factor)
        if name == "Posterize":
            bits = np.floor(level * 4)
            return rows(count, ops.POSTERIZE, 2.0 ** (4 - bits if self.increasing else bits))
        if name == "Solarize":
            threshold = np.floor(level * 256)
            return rows(count, ops.SOLARIZE, _bytes(256 - threshold if self.increasing else threshold))
        if name == "SolarizeAdd":
            return rows(count, ops.SOLARIZE_ADD, _bytes(128), _bytes(np.floor(level * 110)))
        if name in _TIMM_PLAIN:
            return rows(count, _TIMM_PLAIN[name])
        if name == "Rotate":
            maps = inverse_affine(size, angle=-30.0 * signed)
        elif name.startswith("Shear"):
            shear = np.degrees(np.arctan(0.3 * signed))
            maps = inverse_affine(size, shear=(shear, 0.0) if name == "ShearX" else (0.0, shear), center=(0, 0))
        else:  # shares of a side, not rounded to whole pixels
            share = -0.45 * signed
            across = (share * size[1], 0.0) if name == "TranslateXRel" else (0.0, share * size[0])
            maps = inverse_affine(size, translate=across)
        return warp_rows(maps, self.interpolation, self.fill)


@lru_cache(maxsize=64)
def operation_table(
    kind: str, bins: int, size: tuple[int, int], interpolation: str, fill: tuple[float, float, float] | None
) -> np.ndarray:
    """Every row of torchvision's RandAugment ("rand") or TrivialAugmentWide ("wide"), float32 [14, bins, 2, 16].

    By operation (OPERATIONS), magnitude and sign (0: as it is, 1: negated), for crops of this size (h, w). bins, fill:
    settled. Magnitudes are rounded to float32 as torchvision's, which decides what a shift in pixels is cut off to.
    """
    space = _SPACES[kind]
    height, width = size
    reach_x, reach_y = (space.shift * width, space.shift * height) if space.relative else (space.shift, space.shift)

    def signed(end: float) -> np.ndarray:
        magnitude = torch.linspace(0.0, end, bins, dtype=torch.float32, device="cpu").double().numpy()
        return np.stack([magnitude, -magnitude], axis=1).reshape(-1)

    def warped(**options: Any) -> np.ndarray:
        return warp_rows(inverse_affine(size, **options), interpolation, fill)

    shear, factor = np.degrees(np.arctan(signed(space.shear))), 1.0 + signed(space.factor)
    step = torch.arange(bins, device="cpu") / ((bins - 1) / space.bits)
    levels = 2.0 ** (8 - step).round().double().numpy()
    threshold = torch.linspace(1.0, 0.0, bins, dtype=torch.float32, device="cpu").numpy()
    count = 2 * bins
    parts = [
        rows(count, ops.NOTHING),
        warped(shear=(shear, 0.0), center=(0, 0)),
        warped(shear=(0.0, shear), center=(0, 0)),
        warped(translate=(np.trunc(signed(reach_x)), 0.0)),
        warped(translate=(0.0, np.trunc(signed(reach_y)))),
        warped(angle=-signed(space.angle)),
        rows(count, ops.BRIGHTNESS, factor),
        rows(count, ops.SATURATION, factor),
        rows(count, ops.CONTRAST, factor),
        rows(count, ops.SHARPNESS, factor),
        rows(count, ops.POSTERIZE, levels.repeat(2)),
        rows(count, ops.SOLARIZE, threshold.repeat(2)),
        rows(count, ops.AUTOCONTRAST),
        rows(count, ops.EQUALIZE),
    ]
    table = np.concatenate(parts, axis=1).swapaxes(0, 1).reshape(len(OPERATIONS), bins, 2, ops.OP_WIDTH)
    table.setflags(write=False)
    return table


def _pick(words: np.ndarray, count: int) -> np.ndarray:
    # one of 0 ... count - 1 for each word, all as likely to within 2**-32
    return ((words.astype(np.uint64) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def _bytes(value: Any) -> Any:
    # the product that a byte becomes, so that a byte equal to a threshold is at it
    return np.asarray(value, np.float32) * np.float32(1 / 255)
