"""The numbers that travel to the device with a batch's crops: images, tasks and outputs, made before the launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .crop_jobs import HEIGHT, JOB_COLUMNS, WIDTH, OutputFormat, check_jobs, tap_counts
from .ragged import RaggedBatch

# int64 columns of the three tables that travel to the device. Even, but for the last: so each table begins at 16 bytes,
# and no batch has a kernel compiled again for one that does not.
IMAGE_COLUMNS = 4  # address, channel stride, row stride, column stride
PLANES_COLUMNS = 10  # and, where any image is YUV, Cb's and Cr's address, their row stride, height and width, unused
# a job, where its vertical and horizontal weights begin, their tap counts, where its rows between begin, unused
TASK_COLUMNS = JOB_COLUMNS + 6
OUTPUT_COLUMNS = 9  # address, image / channel / row / column stride (elements), element size, table's address, h, w
HEADER = 1  # int32 beside each output pixel's weights: the source pixel of the first


@dataclass(frozen=True, kw_only=True, slots=True)
class CropTables:
    """What one launch is told, packed for one copy to the device. For one launch: it writes the outputs' part.

    table: int64, pinned where CUDA is: images [B, 4 or 10], tasks [B, C, 16], outputs [C, 9] (filled in at the launch).
    num_images: B. num_weights, num_words: int32 weights, and pixels between the passes, of all jobs together. planes:
    whether any image is YUV. interleaved: whether every image is [H, W, 3] in memory, but for what lies between rows.
    """

    table: torch.Tensor
    num_images: int
    num_weights: int
    num_words: int
    planes: bool
    interleaved: bool


def pack_tables(images: RaggedBatch, jobs: np.ndarray, formats: Sequence[OutputFormat]) -> CropTables:
    """Check the jobs (int32 [B, C, 10]) and pack them with the images' addresses: host work that can be done ahead."""
    check_jobs(images.sizes, jobs, formats)
    sources, planes = images.table(), images.has_planes
    span = np.maximum((np.abs(sources[:, 2:4]) * (images.sizes - 1)).sum(1), np.abs(sources[:, 6]) * sources[:, 7])
    if len(span) and span.max() >= 2**31:
        raise ValueError(
            f"images[{span.argmax()}] spans {span.max()} bytes of memory, allowed is less than 2 GiB: copy it"
        )
    count, crops = jobs.shape[:2]
    sizes = np.array([fmt.size for fmt in formats], np.int64).reshape(-1, 2)
    taps = np.minimum(tap_counts(jobs), jobs[..., [HEIGHT, WIDTH]])
    lengths = sizes * (taps + HEADER)
    ends = np.cumsum(lengths).reshape(lengths.shape)
    words = jobs[..., HEIGHT] * sizes[:, 1]
    if words.size and words.max() >= 2**31:
        image, crop = map(int, np.unravel_index(words.argmax(), words.shape))
        raise ValueError(
            f"jobs[{image}, {crop}] has {words.max()} pixels between its passes, a box of {jobs[image, crop, HEIGHT]} "
            f"rows by a window of {sizes[crop, 1]} columns, allowed are less than 2**31"
        )
    columns = PLANES_COLUMNS if planes else IMAGE_COLUMNS
    table = torch.zeros(
        count * columns + count * crops * TASK_COLUMNS + crops * OUTPUT_COLUMNS,
        dtype=torch.int64,
        device="cpu",
        pin_memory=images.device.type == "cuda",
    )
    numbers = table.numpy()
    image_part = numbers[: count * columns].reshape(count, columns)
    image_part[:, : sources.shape[1]] = sources[:, :columns]
    task_part = numbers[image_part.size : image_part.size + count * crops * TASK_COLUMNS]
    task_part = task_part.reshape(count, crops, TASK_COLUMNS)
    task_part[..., :JOB_COLUMNS] = jobs
    task_part[..., JOB_COLUMNS : JOB_COLUMNS + 2] = ends - lengths
    task_part[..., JOB_COLUMNS + 2 : JOB_COLUMNS + 4] = taps
    task_part[..., JOB_COLUMNS + 4] = np.cumsum(words).reshape(words.shape) - words
    return CropTables(
        table=table,
        num_images=count,
        num_weights=int(lengths.sum()),
        num_words=int(words.sum()),
        planes=planes,
        interleaved=not planes and bool((sources[:, [1, 3]] == (1, 3)).all()),
    )
