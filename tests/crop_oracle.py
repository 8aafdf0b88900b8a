"""The oracle of the pixels' contract: two one-axis Pillow resizes, which every Pillow version does alike."""

from __future__ import annotations

import numpy as np
from PIL import Image
from slipstream_kernels.crop_jobs import (
    FILTER,
    FLIP,
    FLIP_HORIZONTAL,
    FLIP_VERTICAL,
    FULL_H,
    FULL_W,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    WINDOW_LEFT,
    WINDOW_TOP,
)

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def oracle(image: np.ndarray, job: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What Pillow gives for this antialiased job (int32 [10]) on this image (uint8 [H, W, 3]): uint8 [3, h, w]."""
    job = [int(value) for value in job]
    box = (job[LEFT], job[TOP], job[LEFT] + job[WIDTH], job[TOP] + job[HEIGHT])
    resample = FILTERS[job[FILTER]]
    across = Image.fromarray(image).crop(box).resize((job[FULL_W], job[HEIGHT]), resample)
    full = np.asarray(across.resize((job[FULL_W], job[FULL_H]), resample))
    window = full[job[WINDOW_TOP] : job[WINDOW_TOP] + size[0], job[WINDOW_LEFT] : job[WINDOW_LEFT] + size[1]]
    if job[FLIP] & FLIP_HORIZONTAL:
        window = window[:, ::-1]
    if job[FLIP] & FLIP_VERTICAL:
        window = window[::-1]
    return window.transpose(2, 0, 1)


def random_jobs(rng: np.random.Generator, images: list[np.ndarray], sizes: list[tuple[int, int]]) -> np.ndarray:
    """A job for each image and window size, int32 [B, C, 10]: boxes of every kind, windows inside larger full sizes."""
    jobs = np.zeros((len(images), len(sizes), 10), np.int32)
    for b, image in enumerate(images):
        height, width = image.shape[:2]
        for c, (h, w) in enumerate(sizes):
            box_h, box_w = rng.integers(1, height + 1), rng.integers(1, width + 1)
            kind = rng.integers(0, 6)
            if kind == 0:
                box_h = box_w = 1
            elif kind == 1:
                box_h, box_w = height, width
            # at a border as often as anywhere
            top = rng.choice([0, height - box_h, rng.integers(0, height - box_h + 1)])
            left = rng.choice([0, width - box_w, rng.integers(0, width - box_w + 1)])
            spare_h, spare_w = rng.choice([0, rng.integers(0, 20)]), rng.choice([0, rng.integers(0, 20)])
            origin = rng.integers(0, spare_h + 1), rng.integers(0, spare_w + 1)
            full = h + spare_h, w + spare_w
            jobs[b, c] = (top, left, box_h, box_w, *full, *origin, rng.integers(0, 2), rng.integers(0, 4))
    return jobs
