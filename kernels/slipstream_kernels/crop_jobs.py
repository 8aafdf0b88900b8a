"""What a resized-crop launch is told: one job for each image and crop, one output format for each crop.

A job says which box of the source is resized to which full size, and which window of that result is wanted. Resize
then CenterCrop is a window smaller than the full size; a random resized crop is the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Columns of a job, int32: the box in the source, the size it is resized to, the window's place in that, and how.
TOP, LEFT, HEIGHT, WIDTH, FULL_H, FULL_W, WINDOW_TOP, WINDOW_LEFT, FILTER, FLIP = range(10)
JOB_COLUMNS = 10
# FILTER: one of the two, plus NO_ANTIALIAS where the support is not to be stretched when the box shrinks.
BILINEAR, BICUBIC = 0, 1
NO_ANTIALIAS = 2
# FLIP: the sum of what is to be done to the upright window.
FLIP_HORIZONTAL, FLIP_VERTICAL = 1, 2
SUPPORT = (1.0, 2.0)  # of BILINEAR and BICUBIC, in source pixels

PRECISION_BITS = (
    22  # 32 - 8 - 2: a weight of 1.0 is 1 << 22, so sums of 8-bit pixels stay in 32 bits (Pillow's Resample.c)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFormat:
    """One crop's output: its window's size, and what becomes of each byte.

    size: (h, w) of the window in pixels. table: [3, 256], the output value for each channel and byte, of any 1-, 2- or
    4-byte dtype (normalisation and cast are such a table, exact by construction); None leaves the bytes as they are.
    channels_last: memory format of the output, [B, 3, h, w] either way.
    """

    size: tuple[int, int]
    table: torch.Tensor | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"OutputFormat.size must be 1 or more, got {self.size}")
        if self.table is not None and (self.table.shape != (3, 256) or self.table.element_size() not in (1, 2, 4)):
            raise ValueError(
                f"OutputFormat.table must be [3, 256] of a 1-, 2- or 4-byte dtype, "
                f"got {list(self.table.shape)} {self.table.dtype}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The output's dtype: the table's, or uint8."""
        return torch.uint8 if self.table is None else self.table.dtype


def empty_outputs(count: int, formats: Sequence[OutputFormat], device: torch.device) -> list[torch.Tensor]:
    """Unwritten outputs, one [count, 3, h, w] tensor for each format."""
    return [
        torch.empty(
            (count, 3, *fmt.size),
            dtype=fmt.dtype,
            device=device,
            memory_format=torch.channels_last if fmt.channels_last else torch.contiguous_format,
        )
        for fmt in formats
    ]


def tap_counts(jobs: np.ndarray) -> np.ndarray:
    """Weights that each output pixel of a job has at the most, int64 [B, C, 2] (vertical, horizontal).

    ceil(support * stretch) * 2 + 1 with stretch = max(box / full size, 1), or 1 without antialias: Pillow's Resample.c,
    precompute_coeffs.
    """
    scale = jobs[..., [HEIGHT, WIDTH]] / jobs[..., [FULL_H, FULL_W]].astype(np.float64)
    kind = jobs[..., FILTER, None]
    stretch = np.where(kind & NO_ANTIALIAS, 1.0, np.maximum(scale, 1.0))
    support = np.array(SUPPORT)[kind & BICUBIC] * stretch
    return np.ceil(support).astype(np.int64) * 2 + 1


def check_jobs(sizes: np.ndarray, jobs: np.ndarray, formats: Sequence[OutputFormat]) -> None:
    """Raise ValueError for jobs that would read outside an image or write outside a window.

    sizes: int32 [B, 2] (h, w); jobs: int32 [B, C, 10]; formats: C of them. A kernel trusts what passes here.
    """
    if jobs.dtype != np.int32 or jobs.shape != (len(sizes), len(formats), JOB_COLUMNS):
        raise ValueError(
            f"jobs must be int32 {[len(sizes), len(formats), JOB_COLUMNS]}, got {jobs.dtype} {list(jobs.shape)}"
        )
    wide = jobs.astype(np.int64)
    window = np.array([fmt.size for fmt in formats], np.int64).reshape(-1, 2)
    inside = (
        (wide[..., [TOP, LEFT, WINDOW_TOP, WINDOW_LEFT]] >= 0).all(-1)
        & (wide[..., [HEIGHT, WIDTH, FULL_H, FULL_W]] >= 1).all(-1)
        & (wide[..., [TOP, LEFT]] + wide[..., [HEIGHT, WIDTH]] <= sizes[:, None]).all(-1)
        & (wide[..., [WINDOW_TOP, WINDOW_LEFT]] + window <= wide[..., [FULL_H, FULL_W]]).all(-1)
        & np.isin(wide[..., FILTER], range(4))
        & np.isin(wide[..., FLIP], range(4))
    )
    if not inside.all():
        image, crop = map(int, np.argwhere(~inside)[0])
        raise ValueError(
            f"jobs[{image}, {crop}] does not fit: {jobs[image, crop].tolist()} for an image of (h, w) = "
            f"{tuple(sizes[image].tolist())} and a window of {formats[crop].size}"
        )


def check_outputs(
    out: Sequence[torch.Tensor], count: int, formats: Sequence[OutputFormat], device: torch.device
) -> None:
    """Raise ValueError where a given output is not what its format says."""
    if len(out) != len(formats):
        raise ValueError(f"out must hold {len(formats)} tensors, got {len(out)}")
    for index, (tensor, fmt) in enumerate(zip(out, formats, strict=True)):
        shape = (count, 3, *fmt.size)
        if tensor.shape != shape or tensor.dtype != fmt.dtype or tensor.device != device:
            raise ValueError(
                f"out[{index}] must be {fmt.dtype} {list(shape)} on {device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if fmt.table is not None and (fmt.table.device != device or not fmt.table.is_contiguous()):
            raise ValueError(f"formats[{index}].table must be contiguous on {device}, got one on {fmt.table.device}")


def box_cost(jobs: np.ndarray) -> np.ndarray:
    """A job's rough cost in multiply-adds, float64 [B, C]: what balances work between threads."""
    taps = tap_counts(jobs).astype(np.float64)
    rows, columns = jobs[..., HEIGHT].astype(np.float64), jobs[..., FULL_W].astype(np.float64)
    return columns * (rows * taps[..., 1] + jobs[..., FULL_H] * taps[..., 0] * 0.2) + math.e
