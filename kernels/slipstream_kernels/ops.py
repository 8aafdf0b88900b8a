"""Programs of operations: what a programs launch is told, one program for each image of each crop.

A program is float32 [K, 16]: each row an operation's code and its parameters, run in order, so that every image can
have its own operations in its own order; NOTHING takes no effect. A byte becomes a float32 by a product with
float32(1/255), as in torchvision v2's to_dtype, and values stay float32 in [0, 1] between operations (NORMALIZE leaves
that range: only ERASE, another NORMALIZE and a WARP to the nearest pixel may follow). The formulas are torchvision v2's
float functionals, each clamped to [0, 1] as there. Most take a pixel by itself; STATISTICS need a reading of the whole
image first, NEIGHBOURS read other pixels, so what comes before them must have been written: a program is run in passes
(split_passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

OP_WIDTH = 16
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
IN_DTYPES = (torch.uint8, torch.float32)

# The parameters of each operation, from column 1 of its row on.
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
AUTOCONTRAST = 11  # each channel stretched from its (min, max) to (0, 1); left alone where they are equal
EQUALIZE = 12  # each channel's histogram of floor(x * 255.999) made flat; the result on the 256 bytes' values
SHARPNESS = 13  # factor: clamp(factor * x + (1 - factor) * smooth), smooth by 3 x 3 / 13 inside, x on the border
GAUSSIAN_BLUR = 14  # kernel size x, y (odd), sigma x, y in pixels; reflected at the borders
BOX_BLUR = 15  # radius: three box blurs an axis, across first, each rounded to bytes (Pillow's GaussianBlur)
WARP = 16  # a b c d e f g h, interpolation, fill r g b, has fill: see README.md
ERASE = 17  # top, left, height, width, value r g b, noise (0, 1: normal), key as four 16-bit pieces, the lowest first
SOLARIZE_ADD = 18  # threshold, addend: clamp(x + addend) where x < threshold (timm)
NUM_OPS = 19

STATISTICS = (CONTRAST, AUTOCONTRAST, EQUALIZE)
BLURS = (GAUSSIAN_BLUR, BOX_BLUR)
NEIGHBOURS = (SHARPNESS, *BLURS, WARP)
NEAREST, BILINEAR = 0, 1  # WARP's interpolation


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramFormat:
    """One crop's output: its dtype and memory format.

    dtype: uint8 is x * 255 rounded half to even and clamped, the floats are casts.
    """

    dtype: torch.dtype = torch.uint8
    channels_last: bool = False


def split_passes(programs: np.ndarray) -> np.ndarray:
    """The rows that each pass over an image runs: int32 [B, P, 2] (first, end), programs float32 [B, K, 16].

    A pass begins at an operation that reads its neighbours, and at one that needs a reading where its pass already has
    one of either: so a pass is neighbours or not, then pixels, with one reading at the most, of pixels only. (0, 0) is
    no pass: an image that begins at its neighbours leaves the first to those that do not, so that one launch blurs them
    all, and an image is finished when its last is done. An image of no operations has pass 0, (0, K), which copies it.
    """
    codes = programs[..., 0].astype(np.int64)
    count, rows = codes.shape
    number = np.zeros(count, np.int64)  # the pass of the row before
    busy = np.zeros(count, bool)  # whether it has begun
    taken = np.zeros(count, bool)  # whether it can have no reading any more
    place = np.zeros((count, rows), np.int64)
    for row in range(rows):
        code = codes[:, row]
        neighbours, reading = np.isin(code, NEIGHBOURS), np.isin(code, STATISTICS)
        begins = (neighbours & busy.any()) | (reading & taken)
        number += begins
        taken = np.where(begins, False, taken) | neighbours | reading
        busy |= code != NOTHING
        place[:, row] = number
    passes = np.zeros((count, int(number.max(initial=0)) + 1, 2), np.int32)
    for index in range(passes.shape[1]):
        inside = (place == index) & ((codes != NOTHING) | ~busy[:, None])
        some = inside.any(1)
        passes[some, index, 0] = inside[some].argmax(1)
        passes[some, index, 1] = rows - inside[some, ::-1].argmax(1)
    return passes


def check_programs(
    images: Sequence[torch.Tensor], programs: Sequence[np.ndarray], formats: Sequence[ProgramFormat]
) -> None:
    """Raise ValueError or TypeError for images, programs and formats that do not fit together.

    images: C crops, uint8 or float32 [B, 3, h, w] each, any strides. programs: C of float32 [B, K, 16] (K may differ).
    formats: C.
    """
    if not len(images) == len(programs) == len(formats):
        raise ValueError(
            f"images, programs and formats must be of one length, got {len(images)}, {len(programs)}, {len(formats)}"
        )
    for index, (image, program) in enumerate(zip(images, programs, strict=True)):
        if image.dtype not in IN_DTYPES:
            raise TypeError(f"images[{index}] must be uint8 or float32, got {image.dtype}")
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"images[{index}] must be [B, 3, h, w], got {list(image.shape)}")
        shape = program.shape
        if program.dtype != np.float32 or len(shape) != 3 or shape[::2] != (len(image), OP_WIDTH) or not shape[1]:
            raise ValueError(
                f"programs[{index}] must be float32 [{len(image)}, 1 or more, {OP_WIDTH}], got {program.dtype} {shape}"
            )
        codes = program[..., 0]
        if codes.size and not np.isin(codes, np.arange(NUM_OPS)).all():
            raise ValueError(f"programs[{index}] holds an unknown operation code")


def check_pixels(images: Sequence[torch.Tensor], out: Sequence[torch.Tensor], formats: Sequence[ProgramFormat]) -> None:
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


def empty_pixels(images: Sequence[torch.Tensor], formats: Sequence[ProgramFormat]) -> list[torch.Tensor]:
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
