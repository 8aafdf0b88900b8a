"""Crop kernels on one CPU thread: slipstream's, Pillow and torchvision v2, on the same boxes of the same photographs.

Each provider turns decoded photographs into one uint8 [B, 3, h, w] tensor a crop. It is checked before it is timed:
two one-axis Pillow resizes, horizontal first, are the answer; the kernel equals it byte for byte, torchvision within 2.
`bytes` of a result are what must move at the least: each box's pixels read once, each output byte written once.

On an AMD EPYC (Zen 4), 2026-11-23, b70fe32: the kernel takes 0.28 ms an image for 1x224 bilinear and 0.92 ms for 8x96
bicubic, 0.32 and 0.15 of Pillow's time; torchvision, with 16-bit weights, takes 1.1 to 2.6 times as long. Every
sample is in results/crop-cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import photographs
import pytest
import torch
from slipstream_kernels.crop_jobs import BICUBIC, BILINEAR, OutputFormat
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.resized_crop_cpu import resized_crop_cpu
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from slipstream.crop import RandomResizedCrop, sample_boxes
from slipstream.draws import Draws, stream_key

IMAGES = 32
CROPS = {
    "1x224": [RandomResizedCrop(224)],
    "2x224": [RandomResizedCrop(224, scale=(0.4, 1.0))] * 2,
    "8x96": [RandomResizedCrop(96, scale=(0.05, 0.4))] * 8,
}
# torchvision's weights have up to 16 bits (Pillow's have 22): a pass may round the other way, and there are two.
TOLERANCE = {"slipstream": 0, "Pillow": 0, "torchvision": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Photographs, [H, W, 3] arrays and one crop's boxes of each, int32 [B, C, 4], with what is wanted of them."""

    arrays: list[np.ndarray]
    boxes: np.ndarray
    size: int
    bicubic: bool


def with_slipstream(task: Task) -> list[torch.Tensor]:
    """The CPU kernel on the caller's thread."""
    count, crops = task.boxes.shape[:2]
    jobs = np.zeros((count, crops, 10), np.int32)
    jobs[..., :4] = task.boxes
    jobs[..., 4:6] = task.size
    jobs[..., 8] = BICUBIC if task.bicubic else BILINEAR
    formats = [OutputFormat(size=(task.size, task.size))] * crops
    return resized_crop_cpu(RaggedBatch.from_arrays(task.arrays), jobs, formats)


def with_pillow(task: Task) -> list[torch.Tensor]:
    """Pillow in two one-axis passes: its single call may take the other axis first, which is another answer."""
    size = (task.size, task.size)
    outputs = []
    for crop in range(task.boxes.shape[1]):
        pixels = []
        for array, box in zip(task.arrays, task.boxes[:, crop].tolist(), strict=True):
            cut = photographs.two_passes(array, box, size, task.bicubic)
            pixels.append(torch.from_numpy(cut.copy()).permute(2, 0, 1))
        outputs.append(torch.stack(pixels))
    return outputs


def with_torchvision(task: Task) -> list[torch.Tensor]:
    """torchvision v2's resized_crop of uint8 tensors, antialiased, in the memory layout that its JPEG decoder gives."""
    kind = InterpolationMode.BICUBIC if task.bicubic else InterpolationMode.BILINEAR
    images = [torch.from_numpy(array).permute(2, 0, 1) for array in task.arrays]
    size = [task.size, task.size]
    return [
        torch.stack(
            [
                functional.resized_crop(image, top, left, height, width, size, kind, antialias=True)
                for image, (top, left, height, width) in zip(images, task.boxes[:, crop].tolist(), strict=True)
            ]
        )
        for crop in range(task.boxes.shape[1])
    ]


PROVIDERS: dict[str, Callable[[Task], list[torch.Tensor]]] = {
    "slipstream": with_slipstream,
    "Pillow": with_pillow,
    "torchvision": with_torchvision,
}


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    with photographs.in_memory(None) as folder:
        found = photographs.paths(folder)
        return [photographs.decoded(found[index % len(found)]) for index in range(IMAGES)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crops", CROPS)
@pytest.mark.usefixtures("one_thread")
def test_crop(benchmark, arrays: list[np.ndarray], crops: str, interpolation: str, provider: str) -> None:
    benchmark.group = f"{crops} {interpolation}"
    specs = CROPS[crops]
    sizes = np.array([array.shape[:2] for array in arrays], np.int32)
    boxes = [
        sample_boxes(spec, sizes, Draws(stream_key(0, str(index)), np.arange(len(sizes)), 0))
        for index, spec in enumerate(specs)
    ]
    side = specs[0].size
    assert isinstance(side, tuple)
    task = Task(arrays=arrays, boxes=np.stack(boxes, axis=1), size=side[0], bicubic=interpolation == "bicubic")
    outputs = PROVIDERS[provider](task)
    for crop, output in enumerate(outputs):
        for array, box, got in zip(arrays, task.boxes[:, crop].tolist(), output, strict=True):
            expected = photographs.two_passes(array, tuple(box), side, task.bicubic).astype(int)
            assert got.dtype == torch.uint8
            difference = np.abs(got.permute(1, 2, 0).numpy() - expected).max()
            assert difference <= TOLERANCE[provider], difference
    read = int(task.boxes[..., 2:].astype(np.int64).prod(-1).sum() * 3)
    benchmark.extra_info |= {"images": IMAGES, "bytes": read + sum(output.numel() for output in outputs)}
    benchmark.pedantic(PROVIDERS[provider], (task,), rounds=15, warmup_rounds=2)
