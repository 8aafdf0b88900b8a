"""Each launcher again, slow and obvious: what tests, benchmarks and notebooks compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .crop_jobs import (
    BICUBIC,
    FILTER,
    FLIP,
    FULL_H,
    FULL_W,
    HEIGHT,
    LEFT,
    PRECISION_BITS,
    TOP,
    WIDTH,
    WINDOW_LEFT,
    WINDOW_TOP,
    OutputFormat,
)
from .ops import (
    ADD_BRIGHTNESS,
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    INVERT,
    NORMALIZE,
    POSTERIZE,
    SATURATION,
    SOLARIZE,
    ProgramFormat,
    check_programs,
)
from .ragged import RaggedBatch


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
            across = _resize_last_axis(box, job[FULL_W], job[FILTER] == BICUBIC)
            down = _resize_last_axis(across.transpose(1, 2), job[FULL_H], job[FILTER] == BICUBIC).transpose(1, 2)
            y, x = job[WINDOW_TOP], job[WINDOW_LEFT]
            window = down[:, y : y + h, x : x + w]
            windows.append(window.flip(2) if job[FLIP] else window)
        pixels = torch.stack(windows) if windows else torch.zeros((0, 3, h, w), dtype=torch.int64)
        if fmt.table is None:
            output = pixels.to(torch.uint8)
        else:
            table = fmt.table.cpu()
            output = torch.stack([table[channel][pixels[:, channel]] for channel in range(3)], dim=1)
        layout = torch.channels_last if fmt.channels_last else torch.contiguous_format
        outputs.append(output.contiguous(memory_format=layout).to(images.device))
    return outputs


def resize_weights_reference(length: int, full: int, bicubic: bool) -> torch.Tensor:
    """Pillow's 22-bit weights for one axis as a dense matrix, int64 [full, length] (Resample.c, precompute_coeffs)."""
    scale = length / full
    stretch = max(scale, 1.0)
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


def _resize_last_axis(pixels: torch.Tensor, full: int, bicubic: bool) -> torch.Tensor:
    weights = resize_weights_reference(pixels.shape[-1], full, bicubic)
    total = pixels @ weights.T + (1 << (PRECISION_BITS - 1))
    return (total >> PRECISION_BITS).clamp(0, 255)


def run_programs_reference(
    images: Sequence[torch.Tensor], programs: Sequence[np.ndarray], formats: Sequence[ProgramFormat]
) -> list[torch.Tensor]:
    """run_programs in plain torch, one image and operation at a time: the same arguments, torchvision v2's formulas."""
    check_programs(images, programs, formats)
    outputs = []
    for batch, program, fmt in zip(images, programs, formats, strict=True):
        output = torch.empty(batch.shape, dtype=fmt.dtype, device=batch.device)
        for index, image in enumerate(batch):
            x = image.to(torch.float32) * (1.0 / 255.0)
            for op in program[index].tolist():
                x = _pixel_op(x, int(op[0]), op[1:])
            # torch's round takes halves to even
            output[index] = (x * 255.0).round().clamp(0, 255) if fmt.dtype == torch.uint8 else x
        layout = torch.channels_last if fmt.channels_last else torch.contiguous_format
        outputs.append(output.contiguous(memory_format=layout))
    return outputs


def _grey(x: torch.Tensor) -> torch.Tensor:
    return (0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]).expand(3, -1, -1)


def _pixel_op(x: torch.Tensor, code: int, parameters: Sequence[float]) -> torch.Tensor:
    # One operation on one image, float32 [3, h, w].
    amount = parameters[0]
    if code == BRIGHTNESS:
        return (amount * x).clamp(0, 1)
    if code == ADD_BRIGHTNESS:
        return (x + amount).clamp(0, 1)
    if code == CONTRAST:
        mean = _grey(x)[0].mean(dtype=torch.float64).to(torch.float32)
        return (amount * x + (1.0 - amount) * mean).clamp(0, 1)
    if code == SATURATION:
        return (amount * x + (1.0 - amount) * _grey(x)).clamp(0, 1)
    if code == HUE:
        return _shift_hue(x, amount)
    if code == GREY:
        return _grey(x)
    if code == SOLARIZE:
        return torch.where(x >= amount, 1.0 - x, x)
    if code == POSTERIZE:
        return (x * amount).floor().clamp(0, amount - 1) / amount
    if code == INVERT:
        return 1.0 - x
    if code == NORMALIZE:
        mean, std = torch.tensor(parameters[:6], dtype=torch.float32, device=x.device).view(2, 3, 1, 1)
        return (x - mean) / std
    return x


def _shift_hue(x: torch.Tensor, shift: float) -> torch.Tensor:
    # To hue, saturation and value, and back from each sixth of the turn by its own formula.
    r, g, b = x
    value, least = x.max(0).values, x.min(0).values
    span = value - least
    colourless = span == 0
    divisor = torch.where(colourless, 1.0, span)
    saturation = span / torch.where(colourless, 1.0, value)
    from_blue = 4.0 + (r - g) / divisor
    from_green = 2.0 + (b - r) / divisor
    from_red = (g - b) / divisor
    hue = torch.where(value == r, from_red, torch.where(value == g, from_green, from_blue)) / 6.0
    sixths = torch.remainder(hue + shift, 1.0) * 6.0
    sector = sixths.floor()
    part = sixths - sector
    low = value * (1.0 - saturation)
    falling = value * (1.0 - saturation * part)
    rising = value * (1.0 - saturation * (1.0 - part))
    sectors = [
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    ]
    result = torch.empty_like(x)
    for index, colours in enumerate(sectors):
        result = torch.where(sector % 6 == index, torch.stack(colours), result)
    return result
