"""The ragged batch that the GPU benchmarks crop: ImageNet's sizes, real pixels, DINO's boxes, the answer beside it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import photographs
import torch
from PIL import Image
from slipstream_kernels.crop_jobs import OutputFormat
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.resized_crop_cpu import resized_crop_cpu

from slipstream.crop import MultiRandomResizedCrop
from slipstream.pipeline import Pipeline
from slipstream.stage import MultiCropPipeline, Normalize

POISON = -1000.0  # no normalised byte is near it


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How large: B images with a long side in pixels, and the sides of DINO's two global and eight local crops."""

    images: int = 256
    long_side: int = 500
    global_side: int = 224
    local_side: int = 96

    def crops(self) -> dict[str, dict[str, object]]:
        """DINO's crops, parameters by name."""
        large = {"size": self.global_side, "scale": (0.4, 1.0), "interpolation": "bicubic"}
        small = {"size": self.local_side, "scale": (0.05, 0.4), "interpolation": "bicubic"}
        return {f"global_{i}": large for i in range(2)} | {f"local_{i}": small for i in range(8)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images on the device, what is to be cut from them, and the right crops.

    images: B ragged. arrays: the same as [H, W, 3] tensors on the device. jobs: int32 [B, C, 10]. formats: C of them,
    normalised bfloat16. expected: C tensors [B, 3, h, w] on the device, the CPU kernel's.
    """

    images: RaggedBatch
    arrays: list[torch.Tensor]
    jobs: np.ndarray
    formats: list[OutputFormat]
    expected: list[torch.Tensor]

    def moved_bytes(self) -> int:
        """The fewest bytes that the crops must move: each source byte read once, each output byte written once."""
        return sum(array.numel() for array in self.arrays) + sum(
            output.numel() * output.element_size() for output in self.expected
        )

    def poisoned(self) -> list[torch.Tensor]:
        """Outputs to be written, full of a value that no right crop holds."""
        return [torch.full_like(output, POISON) for output in self.expected]


def draw_sizes(count: int, long_side: int, seed: int) -> np.ndarray:
    """Sizes as ImageNet's, int32 [B, 2] (h, w): three of four landscape, ratios from 4:3 to 3:2."""
    draw = np.random.default_rng(seed)
    short = draw.integers(round(long_side / 1.5), round(long_side / 1.25) + 1, count)
    landscape = draw.random(count) < 0.75
    return np.where(
        landscape[:, None], np.stack([short, short * 0 + long_side], 1), np.stack([short * 0 + long_side, short], 1)
    ).astype(np.int32)


def make_batch(folder: Path, shape: Shape, device: torch.device, seed: int) -> Batch:
    """One batch: a folder's photographs at drawn sizes, its boxes drawn with the seed."""
    found = photographs.paths(folder)
    sizes = draw_sizes(shape.images, shape.long_side, seed)

    def picture(index: int) -> np.ndarray:
        pixels = photographs.decoded(found[(index + seed * shape.images) % len(found)])
        height, width = sizes[index].tolist()
        return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        arrays = list(pool.map(picture, range(shape.images)))
        crops = shape.crops()
        normalize = MultiCropPipeline({name: [Normalize(dtype=torch.bfloat16)] for name in crops})
        pipeline = Pipeline([MultiRandomResizedCrop(crops), normalize], seed=seed)
        plan = pipeline.draw(sizes, np.arange(shape.images), 0)
        cpu = pipeline.formats(torch.device("cpu"))
        expected = resized_crop_cpu(RaggedBatch.from_arrays(arrays), plan.jobs, cpu, pool=pool, num_threads=cores)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    return Batch(
        images=RaggedBatch.from_images([tensor.permute(2, 0, 1) for tensor in tensors]),
        arrays=tensors,
        jobs=plan.jobs,
        formats=pipeline.formats(device),
        expected=[output.to(device) for output in expected],
    )
