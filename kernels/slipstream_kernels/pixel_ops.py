"""Programs of per-pixel operations: what a pixel-ops launch is told, one program for each image of each crop.

A program is float32 [K, 8]: each row an operation's code and its parameters, run in order, so that every image can have
its own operations in its own order; NOTHING takes no effect. A byte becomes a float32 by a product with float32(1/255),
as in torchvision v2's to_dtype, and values stay float32 in [0, 1] between operations (NORMALIZE leaves that range: only
another NORMALIZE may follow). The formulas are torchvision v2's float functionals, each clamped to [0, 1] as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

OP_WIDTH = 8
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)

NOTHING = 0
BRIGHTNESS = 1  # factor: clamp(factor * x)
ADD_BRIGHTNESS = 2  # delta: clamp(x + delta) (BYOL)
CONTRAST = 3  # factor: clamp(factor * x + (1 - factor) * mean of the image's grey)
SATURATION = 4  # factor: clamp(factor * x + (1 - factor) * the pixel's grey)
HUE = 5  # shift in turns, [-0.5, 0.5]: through HSV
GREY = 6  # 0.2989 r + 0.587 g + 0.114 b in every channel
SOLARIZE = 7  # threshold in [0, 1]: 1 - x where x >= threshold
POSTERIZE = 8  # levels, 2**bits: floor(x * levels) clamped to [0, levels - 1], / levels
INVERT = 9  # 1 - x
NORMALIZE = 10  # mean r, g, b, std r, g, b: (x - mean) / std, IEEE division
NUM_OPS = 11


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelFormat:
    """One crop's output: its dtype and memory format, and the most CONTRAST operations in any of its programs.

    dtype: uint8 is x * 255 rounded half to even and clamped, the floats are casts. Each contrast needs one reading.
    """

    dtype: torch.dtype = torch.uint8
    channels_last: bool = False
    contrasts: int = 0


def check_programs(
    images: Sequence[torch.Tensor], programs: Sequence[np.ndarray], formats: Sequence[PixelFormat]
) -> None:
    """Raise ValueError or TypeError for images, programs and formats that do not fit together.

    images: C crops, uint8 [B, 3, h, w] each, any strides. programs: C of float32 [B, K, 8] (K may differ). formats: C.
    """
    if not len(images) == len(programs) == len(formats):
        raise ValueError(
            f"images, programs and formats must be of one length, got {len(images)}, {len(programs)}, {len(formats)}"
        )
    for index, (image, program, fmt) in enumerate(zip(images, programs, formats, strict=True)):
        if image.dtype != torch.uint8:
            raise TypeError(f"images[{index}] must be uint8, got {image.dtype}")
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"images[{index}] must be [B, 3, h, w], got {list(image.shape)}")
        if program.dtype != np.float32 or program.ndim != 3 or program.shape[::2] != (len(image), OP_WIDTH):
            raise ValueError(
                f"programs[{index}] must be float32 [{len(image)}, K, {OP_WIDTH}], got {program.dtype} {program.shape}"
            )
        codes = program[..., 0]
        if codes.size and not np.isin(codes, np.arange(NUM_OPS)).all():
            raise ValueError(f"programs[{index}] holds an unknown operation code")
        contrasts = int((codes == CONTRAST).sum(1).max(initial=0))
        if contrasts > fmt.contrasts:
            raise ValueError(f"programs[{index}] holds {contrasts} contrasts, formats[{index}] allows {fmt.contrasts}")


def check_pixels(images: Sequence[torch.Tensor], out: Sequence[torch.Tensor], formats: Sequence[PixelFormat]) -> None:
    """Raise ValueError or TypeError where outputs are not what images and formats say."""
    if len(out) != len(images):
        raise ValueError(f"out must hold {len(images)} tensors, got {len(out)}")
    for index, (image, tensor, fmt) in enumerate(zip(images, out, formats, strict=True)):
        if fmt.dtype not in DTYPES:
            raise TypeError(f"formats[{index}].dtype must be one of {[str(d) for d in DTYPES]}, got {fmt.dtype}")
        if image.device != images[0].device:
            raise ValueError(f"images[{index}] must be on {images[0].device}, got {image.device}")
        if tensor.shape != image.shape or tensor.dtype != fmt.dtype or tensor.device != image.device:
            raise ValueError(
                f"out[{index}] must be {fmt.dtype} {list(image.shape)} on {image.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def empty_pixels(images: Sequence[torch.Tensor], formats: Sequence[PixelFormat]) -> list[torch.Tensor]:
    """Unwritten outputs of the images' shapes."""
    return [
        torch.empty(
            image.shape,
            dtype=fmt.dtype,
            device=image.device,
            memory_format=torch.channels_last if fmt.channels_last else torch.contiguous_format,
        )
        for image, fmt in zip(images, formats, strict=True)
    ]
