"""run_programs again in plain torch, one operation of one image at a time: the formulas of torchvision v2, slow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .ops import (
    ADD_BRIGHTNESS,
    AUTOCONTRAST,
    BOX_BLUR,
    BRIGHTNESS,
    CONTRAST,
    EQUALIZE,
    ERASE,
    GAUSSIAN_BLUR,
    GREY,
    HUE,
    INVERT,
    NEAREST,
    NORMALIZE,
    POSTERIZE,
    SATURATION,
    SHARPNESS,
    SOLARIZE,
    SOLARIZE_ADD,
    WARP,
    ProgramFormat,
    check_programs,
)
from .philox import philox_blocks
from .program_checks import check_neighbours

BYTE = 1.0 / 255.0


def run_programs_reference(
    images: Sequence[torch.Tensor], programs: Sequence[np.ndarray], formats: Sequence[ProgramFormat]
) -> list[torch.Tensor]:
    """run_programs in plain torch, one image and operation at a time: the same arguments, torchvision v2's formulas."""
    check_programs(images, programs, formats)
    check_neighbours(images, programs)
    outputs = []
    for batch, program, fmt in zip(images, programs, formats, strict=True):
        output = torch.empty(batch.shape, dtype=fmt.dtype, device=batch.device)
        for index, image in enumerate(batch):
            x = image * BYTE if image.dtype == torch.uint8 else image
            for op in program[index].tolist():
                x = operation_reference(x, int(op[0]), op[1:])
            # torch's round takes halves to even
            output[index] = (x * 255.0).round().clamp(0, 255) if fmt.dtype == torch.uint8 else x
        layout = torch.channels_last if fmt.channels_last else torch.contiguous_format
        outputs.append(output.contiguous(memory_format=layout))
    return outputs


def operation_reference(x: torch.Tensor, code: int, parameters: Sequence[float]) -> torch.Tensor:
    """One operation on one image, float32 [3, h, w]; parameters: columns 1 to 15 of its row."""
    amount, second = parameters[:2]
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
    if code == AUTOCONTRAST:
        least, greatest = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
        return torch.where(greatest > least, (x - least) / (greatest - least), x).clamp(0, 1)
    if code == EQUALIZE:
        return torch.stack([_equalize(channel) for channel in x])
    if code == SHARPNESS:
        return _sharpen(x, amount)
    if code == GAUSSIAN_BLUR:
        across = _blur_last_axis(x, int(parameters[0]), parameters[2])
        return _blur_last_axis(across.transpose(1, 2), int(second), parameters[3]).transpose(1, 2)
    if code == BOX_BLUR:
        return _box_blur(x, amount)
    if code == WARP:
        return _warp(x, parameters)
    if code == ERASE:
        return _erase(x, parameters)
    if code == SOLARIZE_ADD:
        return torch.where(x < amount, (x + second).clamp(0, 1), x)
    return x


def _grey(x: torch.Tensor) -> torch.Tensor:
    return (0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]).expand(3, -1, -1)


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


def _equalize(channel: torch.Tensor) -> torch.Tensor:
    # float32 [h, w]; Pillow's law on the histogram of its bytes
    level = (channel * 255.999).long()
    histogram = torch.bincount(level.flatten(), minlength=256)
    brightest = int(histogram.nonzero().max())
    step = (level.numel() - int(histogram[brightest])) // 255
    if step:
        below = histogram.cumsum(0) - histogram
        level = ((below + step // 2) // step).clamp(0, 255)[level]
    return level * BYTE


def _sharpen(x: torch.Tensor, factor: float) -> torch.Tensor:
    h, w = x.shape[1:]
    if h < 3 or w < 3:
        return x
    windows = [x[:, i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3)]
    inside = x[:, 1:-1, 1:-1]
    smooth = sum(windows, 4.0 * inside) / 13.0
    result = x.clone()
    result[:, 1:-1, 1:-1] = (factor * inside + (1.0 - factor) * smooth).clamp(0, 1)
    return result


def _blur_last_axis(x: torch.Tensor, taps: int, sigma: float) -> torch.Tensor:
    # torchvision takes the bell's points (taps - 1) / 2 / sqrt(2) apart, which makes exp(-x**2 / 2) of exp(-x**2)
    reach = taps // 2
    points = torch.arange(-reach, reach + 1, dtype=torch.float32) / math.sqrt(2.0) / sigma
    weights = torch.softmax(-(points**2), 0)
    padded = torch.nn.functional.pad(x, (reach, reach), mode="reflect")
    result = torch.zeros_like(x)
    for tap, weight in enumerate(weights.tolist()):
        result += weight * padded[..., tap : tap + x.shape[-1]]
    return result


def _box_blur(x: torch.Tensor, radius: float) -> torch.Tensor:
    # Pillow's BoxBlur.c: 24-bit fixed point, in which the two outermost pixels count by the radius's fraction
    reach = int(radius)
    inner = int(np.float32(1 << 24) / (np.float32(radius) * np.float32(2) + np.float32(1)))
    outer = ((1 << 24) - (2 * reach + 1) * inner) // 2
    values = (x * 255.0).round().clamp(0, 255).long()
    for _ in range(2):  # across, then down
        for _ in range(3):
            total = outer * (_beside(values, -reach - 1) + _beside(values, reach + 1)) + (1 << 23)
            for distance in range(-reach, reach + 1):
                total = total + inner * _beside(values, distance)
            values = total >> 24
        values = values.transpose(1, 2)
    return values * BYTE


def _beside(values: torch.Tensor, distance: int) -> torch.Tensor:
    # The values so far along the last axis, its ends repeated.
    last = values.shape[-1] - 1
    return values[..., (torch.arange(last + 1, device=values.device) + distance).clamp(0, last)]


def _warp(x: torch.Tensor, parameters: Sequence[float]) -> torch.Tensor:
    a, b, c, d, e, f, g, h, interpolation, *fill, has_fill = parameters[:13]
    height, width = x.shape[1:]
    py = (torch.arange(height, dtype=torch.float32, device=x.device) + 0.5).view(-1, 1)
    px = torch.arange(width, dtype=torch.float32, device=x.device) + 0.5
    under = g * px + h * py + 1.0
    sx = (a * px + b * py + c) / under - 0.5
    sy = (d * px + e * py + f) / under - 0.5
    with_mask = torch.cat([x, torch.ones_like(x[:1])])

    def pixels(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        found = with_mask[:, torch.where(inside, row, 0.0).long(), torch.where(inside, column, 0.0).long()]
        return torch.where(inside, found, 0.0)

    if interpolation == NEAREST:
        sampled = pixels(sy.round(), sx.round())
    else:
        top, left = sy.floor(), sx.floor()
        down, right = sy - top, sx - left
        sampled = pixels(top, left) * ((1.0 - down) * (1.0 - right))
        sampled += pixels(top, left + 1.0) * ((1.0 - down) * right)
        sampled += pixels(top + 1.0, left) * (down * (1.0 - right))
        sampled += pixels(top + 1.0, left + 1.0) * (down * right)
    if not has_fill:
        return sampled[:3]
    colour = torch.tensor(fill, dtype=torch.float32, device=x.device).view(3, 1, 1)
    if interpolation == NEAREST:
        return torch.where(sampled[3:] < 0.5, colour, sampled[:3])
    return (sampled[:3] - colour) * sampled[3:] + colour


def _erase(x: torch.Tensor, parameters: Sequence[float]) -> torch.Tensor:
    top, left, height, width = map(int, parameters[:4])
    if parameters[7]:
        value = _noise(x.shape[1:], sum(int(piece) << 16 * i for i, piece in enumerate(parameters[8:12]))).to(x.device)
    else:
        value = torch.tensor(parameters[4:7], dtype=torch.float32, device=x.device).view(3, 1, 1).expand_as(x)
    result = x.clone()
    box = slice(max(top, 0), max(top + height, 0)), slice(max(left, 0), max(left + width, 0))
    result[:, *box] = value[:, *box]
    return result


def _noise(size: Sequence[int], key: int) -> torch.Tensor:
    # Box and Muller's normal numbers, float32 [3, h, w], one Philox block each: counter (y * w + x, channel, 0, 0).
    pixels = np.arange(size[0] * size[1], dtype=np.uint64)
    ids = pixels + (np.arange(3, dtype=np.uint64)[:, None] << np.uint64(32))
    words = philox_blocks(key, ids.reshape(-1), 0, 0, 1)[:, 0, :2].astype(np.float32)
    first, second = torch.from_numpy(words.T.reshape(2, 3, *size))
    length = (-2.0 * ((first + 0.5) * 2.0**-32).log()).sqrt()
    return length * (2.0 * math.pi * (second * 2.0**-32)).cos()
