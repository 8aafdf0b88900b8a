"""Checks of the operations that read other pixels: what a kernel relies on, beyond the shapes that ops checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .ops import BOX_BLUR, GAUSSIAN_BLUR

MOST_RADIUS = 16  # of a box blur, in pixels: its sums then fit the kernels' integers


def check_neighbours(images: Sequence[torch.Tensor], programs: Sequence[np.ndarray]) -> None:
    """Raise ValueError for a blur that its crop cannot hold.

    images, programs: as check_programs has passed them. GAUSSIAN_BLUR: odd kernel sizes whose half (rounded down) is
    less than the crop's side, as reflection at the borders asks; sigmas above 0. BOX_BLUR: a radius in [0, 16).
    """
    for index, (image, program) in enumerate(zip(images, programs, strict=True)):
        codes = program[..., 0]
        radius = program[codes == BOX_BLUR][:, 1]
        if not ((radius >= 0) & (radius < MOST_RADIUS)).all():
            raise ValueError(f"programs[{index}]: a box blur's radius must be in [0, {MOST_RADIUS}), got {radius}")
        blurs = program[codes == GAUSSIAN_BLUR][:, 1:5]
        if not (blurs[:, 2:] > 0).all():
            raise ValueError(f"programs[{index}]: a Gaussian blur's sigma must be above 0, got {blurs[:, 2:].tolist()}")
        for axis, side in ((0, image.shape[3]), (1, image.shape[2])):
            size = blurs[:, axis]
            if not ((size > 0) & (size % 2 == 1)).all():
                raise ValueError(f"programs[{index}]: a Gaussian blur's kernel size must be odd, got {size}")
            if image.numel() and (size // 2 >= side).any():
                raise ValueError(
                    f"programs[{index}]: a Gaussian blur of kernel size {int(size.max())} needs a crop side above "
                    f"{int(size.max()) // 2} to reflect, got {list(image.shape[2:])}"
                )
