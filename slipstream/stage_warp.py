"""Stages that move pixels: rotation, affine maps, perspective; and the rows that other stages build on them.

Every map is an inverse one, from the place of an output pixel to where it is read, with (0, 0) the outer corner of the
first pixel: (a x + b y + c, d x + e y + f) / (g x + h y + 1), its eight numbers a ... h. Outputs have their inputs'
size.
"""

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

INTERPOLATIONS = ("nearest", "bilinear")  # in the order of ops.NEAREST, ops.BILINEAR
_IDENTITY = np.array([1, 0, 0, 0, 1, 0, 0, 0], np.float32)
Fill = float | Sequence[float] | None


@dataclass(frozen=True, slots=True)
class RandomRotation(ProgramStage):
    """Rotate counter-clockwise by a random angle: torchvision's RandomRotation, drawn for each sample.

    degrees: d for angles in [-d, d], or (low, high). interpolation: "nearest" or "bilinear". center: (x, y) in pixels
    from the upper left corner, the crop's middle by default. fill: what is outside, in [0, 1]: a number, three, or None
    (torchvision's: zeros, blended otherwise). p: the share of samples rotated. seed: its own instead of the loader's.
    There is no `expand`: a crop's size is fixed. Images and output as in RandomGrayscale. Raises ValueError or
    TypeError for a parameter outside these ranges.
    """

    degrees: float | Sequence[float]
    interpolation: str = "nearest"
    _: KW_ONLY
    center: Sequence[float] | None = None
    fill: Fill = 0
    p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.settle(
            self,
            degrees=_angles("degrees", self.degrees),
            center=_pair("center", self.center),
            fill=check_fill("fill", self.fill),
            p=checks.probability("p", self.p),
            seed=checks.seed("seed", self.seed),
        )
        checks.one_of("interpolation", self.interpolation, INTERPOLATIONS)

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.WARP,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: applied (word 0), angle (word 1)."""
        angle = between(draws.uniform(0)[:, 0, 1], self.degrees)
        maps = inverse_affine(size, angle=-angle, center=self.center)
        return where(applied(draws, self.p), warp_rows(maps, self.interpolation, self.fill))


@dataclass(frozen=True, slots=True)
class RandomAffine(ProgramStage):
    """Rotate, translate, scale and shear by random amounts: torchvision's RandomAffine, drawn for each sample.

    degrees: d for angles in [-d, d], or (low, high), clockwise. translate: (x, y), the largest shares of the crop's
    width and height, in [0, 1]; shifts are whole pixels. scale: (low, high), above 0. shear: s for [-s, s] degrees
    along x, (low, high) along x, or (low, high, low, high) along x and y, within (-90, 90). interpolation, fill,
    center, p, seed: as RandomRotation's. Images and output as in RandomGrayscale. Raises ValueError or TypeError for a
    parameter outside these ranges.
    """

    degrees: float | Sequence[float]
    translate: Sequence[float] | None = None
    scale: Sequence[float] | None = None
    shear: float | Sequence[float] | None = None
    interpolation: str = "nearest"
    fill: Fill = 0
    center: Sequence[float] | None = None
    _: KW_ONLY
    p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        translate = _pair("translate", self.translate)
        if not all(0.0 <= share <= 1.0 for share in translate or ()):
            raise ValueError(f"translate must be in [0, 1], shares of the width and height, got {self.translate!r}")
        checks.settle(
            self,
            degrees=_angles("degrees", self.degrees),
            translate=translate,
            scale=None if self.scale is None else checks.interval("scale", self.scale, 0.0, float("inf")),
            shear=None if self.shear is None else _shears("shear", self.shear),
            fill=check_fill("fill", self.fill),
            center=_pair("center", self.center),
            p=checks.probability("p", self.p),
            seed=checks.seed("seed", self.seed),
        )
        checks.one_of("interpolation", self.interpolation, INTERPOLATIONS)

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.WARP,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: applied; block 1: angle, shift x, shift y, scale; block 2: shear x, shear y."""
        u = draws.uniform(1, 2)
        share_x, share_y = self.translate or (0.0, 0.0)
        most_x, most_y = share_x * size[1], share_y * size[0]
        shear: Any = self.shear or (0.0, 0.0)  # settled
        maps = inverse_affine(
            size,
            angle=between(u[:, 0, 0], self.degrees),
            translate=(
                np.rint(between(u[:, 0, 1], (-most_x, most_x))),
                np.rint(between(u[:, 0, 2], (-most_y, most_y))),
            ),
            scale=between(u[:, 0, 3], self.scale or (1.0, 1.0)),
            shear=(between(u[:, 1, 0], shear[:2]), between(u[:, 1, 1], shear[2:] or (0.0, 0.0))),
            center=self.center,
        )
        return where(applied(draws, self.p), warp_rows(maps, self.interpolation, self.fill))


@dataclass(frozen=True, slots=True)
class RandomPerspective(ProgramStage):
    """Move the four corners inwards at random, with probability p: torchvision's RandomPerspective.

    distortion_scale: in [0, 1]; a corner moves by up to that share of half a side, in whole pixels. interpolation,
    fill, seed: as RandomRotation's. Corners that no perspective reaches (three on a line, as in a crop one pixel wide)
    leave the sample alone. Images and output as in RandomGrayscale. Raises ValueError or TypeError for a parameter
    outside these ranges.
    """

    distortion_scale: float = 0.5
    p: float = 0.5
    interpolation: str = "bilinear"
    fill: Fill = 0
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.settle(
            self,
            distortion_scale=checks.probability("distortion_scale", self.distortion_scale),
            p=checks.probability("p", self.p),
            fill=check_fill("fill", self.fill),
            seed=checks.seed("seed", self.seed),
        )
        checks.one_of("interpolation", self.interpolation, INTERPOLATIONS)

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """One operation."""
        return ((ops.WARP,),)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Block 0: applied; blocks 1, 2: x, y of the corners, the upper left first, clockwise."""
        maps, exists = inverse_perspective(size, self._corners(draws, size))
        return where(applied(draws, self.p) & exists, warp_rows(maps, self.interpolation, self.fill))

    def _corners(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        # float64 [B, 4, 2] (x, y): each moved by one of the whole numbers from 0 to the bound
        sides = np.array(size[::-1])
        bounds = (self.distortion_scale * (sides // 2)).astype(int) + 1
        moved = np.floor(draws.uniform(1, 2).reshape(-1, 4, 2) * bounds)
        far = np.array([[False, False], [True, False], [True, True], [False, True]])
        return np.where(far, sides - bounds + moved, moved)


def inverse_affine(
    size: tuple[int, int],
    *,
    angle: Any = 0.0,
    translate: tuple[Any, Any] = (0.0, 0.0),
    scale: Any = 1.0,
    shear: tuple[Any, Any] = (0.0, 0.0),
    center: Sequence[float] | None = None,
) -> np.ndarray:
    """The maps of torchvision's functional affine, float64 [N, 8], on images of this size (h, w).

    angle: degrees clockwise. translate: pixels (x, y). shear: degrees (x, y). Each is a number or [N]; N is 1 if none
    is. center: (x, y) in pixels from the upper left corner, the image's middle by default. An image is sheared along
    x, then along y, scaled and turned about the center, then shifted; the map goes the other way.
    """
    x0, y0 = (size[1] / 2, size[0] / 2) if center is None else center
    angle, along_x, along_y = (np.radians(np.asarray(each, np.float64)) for each in (angle, *shear))
    cos, sin = np.cos(angle), np.sin(angle)
    # the columns of rotation times shears, whose determinant is 1
    left_x, left_y = cos + sin * np.tan(along_y), sin - cos * np.tan(along_y)
    right_x, right_y = -sin - left_x * np.tan(along_x), cos - left_y * np.tan(along_x)
    a, b, d, e = right_y / scale, -right_x / scale, -left_y / scale, left_x / scale
    from_x, from_y = x0 + translate[0], y0 + translate[1]
    c, f = x0 - a * from_x - b * from_y, y0 - d * from_x - e * from_y
    maps = np.stack(np.broadcast_arrays(*np.atleast_1d(a, b, c, d, e, f, 0.0, 0.0)), axis=1)
    return maps + 0.0  # no negative zeros, which a plan's words would show


def inverse_perspective(size: tuple[int, int], corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maps that bring the image's corners to these, float64 [N, 8], and whether there is one, bool [N].

    corners: [N, 4, 2] (x, y), whole numbers, upper left first, clockwise; those of an image of this size (h, w) are
    (0, 0), (w - 1, 0), (w - 1, h - 1), (0, h - 1), as torchvision has it. Where there is none, it is the identity.
    """
    across, down = size[1] - 1, size[0] - 1
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corners[:, i].T.astype(np.float64) for i in range(4))
    # The unit square to the corners (Heckbert, "Fundamentals of texture mapping and image warping", 1989), all times
    # `square` so that whole numbers stay whole and a zero is exactly zero.
    square = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    g = sum_x * (y3 - y2) - (x3 - x2) * sum_y
    h = (x1 - x2) * sum_y - sum_x * (y1 - y2)
    forward = np.stack(
        [
            np.stack([(x1 - x0) * square + g * x1, (x3 - x0) * square + h * x3, x0 * square], 1),
            np.stack([(y1 - y0) * square + g * y1, (y3 - y0) * square + h * y3, y0 * square], 1),
            np.stack([g, h, square], 1),
        ],
        1,
    )
    # the rows of its inverse, up to a factor, scaled from the unit square to the image
    inverse = np.stack([np.cross(forward[:, :, 1], forward[:, :, 2]), np.cross(forward[:, :, 2], forward[:, :, 0])], 1)
    last = np.cross(forward[:, :, 0], forward[:, :, 1])
    exists = np.full(len(corners), across > 0 and down > 0)
    for i in range(4):  # three corners on a line
        one, two = corners[:, (i + 1) % 4] - corners[:, i], corners[:, (i + 2) % 4] - corners[:, i]
        exists &= one[:, 0] * two[:, 1] != one[:, 1] * two[:, 0]
    # the upper left corner of the output may come from infinity, and g and h are then without bound
    exists &= np.abs(last[:, 2]) > 1e-6 * (np.abs(last[:, 0]) * size[1] + np.abs(last[:, 1]) * size[0])
    maps = np.tile(_IDENTITY.astype(np.float64), (len(corners), 1))
    divisor = last[exists, 2:]
    maps[exists, 0:3] = inverse[exists, 0] * across / divisor
    maps[exists, 3:6] = inverse[exists, 1] * down / divisor
    maps[exists, 6:8] = last[exists, :2] / divisor
    return maps + 0.0, exists


def warp_rows(maps: np.ndarray, interpolation: str, fill: Fill) -> np.ndarray:
    """Programs of one warp for each map, [N, 8]: float32 [N, 1, 16], NOTHING where the map changes nothing.

    interpolation, fill: settled, as RandomRotation's.
    """
    colour: Any = (0.0, 0.0, 0.0) if fill is None else fill
    program = rows(len(maps), ops.WARP, *maps.T, INTERPOLATIONS.index(interpolation), *colour, fill is not None)
    return where((program[:, 0, 1:9] != _IDENTITY).any(1), program)


def flip_rows(horizontal: np.ndarray, vertical: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Programs that mirror left to right, top to bottom, both or neither: float32 [B, 1, 16], exact.

    horizontal, vertical: bool [B]. size: (h, w) of the crop.
    """
    maps = np.zeros((len(horizontal), 8))
    maps[:, 0], maps[:, 2] = np.where(horizontal, -1, 1), horizontal * size[1]
    maps[:, 4], maps[:, 5] = np.where(vertical, -1, 1), vertical * size[0]
    return warp_rows(maps, "nearest", None)


def check_fill(field: str, value: Any) -> tuple[float, float, float] | None:
    """A fill in its settled form, three numbers in [0, 1] or None; ValueError or TypeError for another."""
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        red, green, blue = checks.three(field, value)
    else:
        red = green = blue = checks.number(field, value)
    if not all(0.0 <= each <= 1.0 for each in (red, green, blue)):
        raise ValueError(f"{field} must be in [0, 1] (128 of uint8 is 128 / 255), got {value!r}")
    return red, green, blue


def _pair(field: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    x, y = checks.numbers(field, value, 2, "two numbers (x, y) or None")
    return x, y


def _angles(field: str, value: Any) -> tuple[float, float]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        low, high = checks.numbers(field, value, 2, "a number or (low, high)")
        if low > high:
            raise ValueError(f"{field} must be (low, high) with low <= high, got {value!r}")
        return low, high
    spread = checks.number(field, value)
    if spread < 0:
        raise ValueError(f"{field} must be 0 or more, or (low, high), got {value!r}")
    return -spread, spread


def _shears(field: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, Sequence) and len(value) == 4 and not isinstance(value, str):
        shear = (*_angles(field, value[:2]), *_angles(field, value[2:]))
    else:
        shear = _angles(field, value)
    if not all(-90.0 < angle < 90.0 for angle in shear):
        raise ValueError(f"{field} must be within (-90, 90) degrees, got {value!r}")
    return shear
