"""Each launcher again, slow and obvious: what tests, benchmarks and notebooks compare with."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from .crop_jobs import (
    BICUBIC,
    FILTER,
    FLIP,
    FLIP_HORIZONTAL,
    FLIP_VERTICAL,
    FULL_H,
    FULL_W,
    HEIGHT,
    LEFT,
    NO_ANTIALIAS,
    PRECISION_BITS,
    TOP,
    WIDTH,
    WINDOW_LEFT,
    WINDOW_TOP,
    OutputFormat,
)
from .ragged import RaggedBatch
from .reference_programs import run_programs_reference as run_programs_reference


def resized_crop_reference(
    images: RaggedBatch, jobs: np.ndarray, formats: Sequence[OutputFormat]
) -> list[torch.Tensor]:
    """resized_crop in plain torch, one crop at a time, on the CPU: the same arguments, the same bytes."""
    outputs = []
    for crop, fmt in enumerate(formats):
        h, w = fmt.size
        windows = []
        for index, job in enumerate(jobs[:, crop].tolist()):
            top, left = job[TOP], job[LEFT]
            box = images.image(index).cpu()[:, top : top + job[HEIGHT], left : left + job[WIDTH]].to(torch.int64)
            across = _resize_last_axis(box, job[FULL_W], job[FILTER])
            down = _resize_last_axis(across.transpose(1, 2), job[FULL_H], job[FILTER]).transpose(1, 2)
            y, x = job[WINDOW_TOP], job[WINDOW_LEFT]
            window = down[:, y : y + h, x : x + w]
            if job[FLIP] & FLIP_HORIZONTAL:
                window = window.flip(2)
            if job[FLIP] & FLIP_VERTICAL:
                window = window.flip(1)
            windows.append(window)
        pixels = torch.stack(windows) if windows else torch.zeros((0, 3, h, w), dtype=torch.int64)
        if fmt.table is None:
            output = pixels.to(torch.uint8)
        else:
            table = fmt.table.cpu()
            output = torch.stack([table[channel][pixels[:, channel]] for channel in range(3)], dim=1)
        layout = torch.channels_last if fmt.channels_last else torch.contiguous_format
        outputs.append(output.contiguous(memory_format=layout).to(images.device))
    return outputs


def resize_weights_reference(length: int, full: int, kind: int) -> torch.Tensor:
    """Pillow's 22-bit weights for one axis as a dense matrix, int64 [full, length] (Resample.c, precompute_coeffs).

    kind: a job's FILTER; without antialias the support is never stretched.
    """
    scale = length / full
    stretch = 1.0 if kind & NO_ANTIALIAS else max(scale, 1.0)
    bicubic = bool(kind & BICUBIC)
    support = (2.0 if bicubic else 1.0) * stretch
    matrix = torch.zeros((full, length), dtype=torch.int64)
    for pixel in range(full):
        centre = (pixel + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), length)
        weights = [_filter(abs((source - centre + 0.5) * (1.0 / stretch)), bicubic) for source in range(first, last)]
        total = 0.0
        for weight in weights:  # not sum(): it compensates its rounding from Python 3.12 on
            total += weight
        for source, weight in enumerate(weights, first):
            fixed = weight / total * (1 << PRECISION_BITS)
            matrix[pixel, source] = int(fixed + (0.5 if fixed >= 0 else -0.5))
    return matrix


def _filter(x: float, bicubic: bool) -> float:
    if not bicubic:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


def _resize_last_axis(pixels: torch.Tensor, full: int, kind: int) -> torch.Tensor:
    weights = resize_weights_reference(pixels.shape[-1], full, kind)
    total = pixels @ weights.T + (1 << (PRECISION_BITS - 1))
    return (total >> PRECISION_BITS).clamp(0, 255)


def bytes_at_reference(addresses: torch.Tensor) -> torch.Tensor:
    """bytes_at in plain Python, for memory of the host."""
    return torch.tensor([ctypes.c_uint8.from_address(at).value for at in addresses.tolist()], dtype=torch.uint8)
