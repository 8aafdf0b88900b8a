"""Planar YUV 4:2:0 as RGB, in whole numbers: JPEG's colours (BT.601, full range), chroma at half the size.

`rgb_of_planes` is the law of such an image's pixels: a kernel that reads planes computes these very bytes, and they are
those of libjpeg's decoder for a 4:2:0 JPEG of the same planes. README.md states it.
"""

from __future__ import annotations

import torch

# Each channel's share of Cb and of Cr, 16 fractional bits, as libjpeg has them (jdcolor.c).
OF_CB = (0, -22554, 116130)
OF_CR = (91881, -46802, 0)
HALF = 1 << 15


def chroma_size(height: int, width: int) -> tuple[int, int]:
    """(h, w) of the chroma planes of an image of this size: halves, rounded up."""
    return (height + 1) // 2, (width + 1) // 2


def rgb_of_planes(luma: torch.Tensor, blue: torch.Tensor, red: torch.Tensor) -> torch.Tensor:
    """The image that three planes stand for, uint8 [3, H, W] on their device.

    luma: Y, uint8 [H, W]. blue, red: Cb and Cr, uint8 [ceil(H / 2), ceil(W / 2)]. Source: libjpeg's jdsample.c
    (h2v2_fancy_upsample) and jdcolor.c; where a chroma plane is narrower than 3, libjpeg repeats it and this does not.
    """
    height, width = luma.shape
    for name, plane in (("blue", blue), ("red", red)):
        if tuple(plane.shape) != chroma_size(height, width):
            raise ValueError(
                f"{name} must be {list(chroma_size(height, width))} for luma {[height, width]}, got {list(plane.shape)}"
            )
    blue, red = (_upsampled(plane, height, width).to(torch.int32) - 128 for plane in (blue, red))
    shares = [(of_cb * blue + of_cr * red + HALF) >> 16 for of_cb, of_cr in zip(OF_CB, OF_CR, strict=True)]
    return (torch.stack(shares) + luma).clamp_(0, 255).to(torch.uint8)


def _upsampled(plane: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # int16 [height, width]. The rounding, up in even columns and down in odd ones, is libjpeg's.
    sums = _doubled(_doubled(plane.to(torch.int16), 0)[:height], 1)[:, :width]
    return (sums + (8 - torch.arange(width, dtype=torch.int16, device=plane.device) % 2)) >> 4


def _doubled(plane: torch.Tensor, axis: int) -> torch.Tensor:
    # Four times the plane at twice the length: 3/4 of the nearer sample, 1/4 of the farther, and at an edge of itself.
    last = plane.shape[axis] - 1
    before = torch.cat([plane.narrow(axis, 0, 1), plane.narrow(axis, 0, last)], axis)
    after = torch.cat([plane.narrow(axis, 1, last), plane.narrow(axis, last, 1)], axis)
    return torch.stack([3 * plane + before, 3 * plane + after], axis + 1).flatten(axis, axis + 1)
