"""The peers of DINOv2's whole recipe on a GPU: ten crops in bfloat16 or float16, of images decoded already.

A provider takes the images as uint8 [H, W, 3] tensors on the device, and the crops; it gives the call that is timed,
and the call gives the crops, one [B, 3, h, w] tensor each. Random numbers are each library's own, and their drawing is
in the time. A provider whose package is missing raises ModuleNotFoundError. What each does otherwise, it says.
"""

# DALI rewrites an `if` on what is not there yet, which a type checker cannot know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from slipstream_kernels.ragged import RaggedBatch

from slipstream import Pipeline, presets
from slipstream.stage import IMAGENET_MEAN, IMAGENET_STD

RATIO = (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.2, 0.1)

Call = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """One crop of the recipe: side, area fractions, the probabilities of its blur and of solarizing."""

    side: int
    scale: tuple[float, float]
    blur: float
    solarize: float


def recipe(global_side: int, local_side: int) -> list[Crop]:
    """DINOv2's ten crops as its code is written."""
    large, small = (0.32, 1.0), (0.05, 0.32)
    return [
        Crop(side=global_side, scale=large, blur=1.0, solarize=0.0),
        Crop(side=global_side, scale=large, blur=0.1, solarize=0.2),
        *[Crop(side=local_side, scale=small, blur=0.5, solarize=0.0)] * 8,
    ]


def with_slipstream(images: Sequence[torch.Tensor], crops: Sequence[Crop]) -> Call:
    """The preset as its users call it outside a loader: draws, tables and launches in the call."""
    batch = RaggedBatch.from_images([image.permute(2, 0, 1) for image in images])
    large, small = crops[0].side, crops[-1].side
    pipeline = Pipeline(presets.dinov2(blur="as_written", size=large, local_size=small, dtype=torch.bfloat16))
    return lambda: [*pipeline(batch).values()]


def with_torchvision(images: Sequence[torch.Tensor], crops: Sequence[Crop]) -> Call:
    """torchvision v2 image by image on uint8 tensors on the device, antialiased, each step rounded to bytes."""
    from torchvision.transforms import InterpolationMode, v2

    transforms = [
        v2.Compose(
            [
                v2.RandomResizedCrop(crop.side, crop.scale, RATIO, InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], crop.blur),
                *([v2.RandomSolarize(128, crop.solarize)] if crop.solarize else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([*IMAGENET_MEAN], [*IMAGENET_STD]),
                v2.ToDtype(torch.bfloat16),
            ]
        )
        for crop in crops
    ]
    planar = [image.permute(2, 0, 1).contiguous() for image in images]

    def call() -> list[torch.Tensor]:
        rows = [[transform(image) for transform in transforms] for image in planar]
        return [torch.stack(crop) for crop in zip(*rows, strict=True)]

    return call


def with_kornia(images: Sequence[torch.Tensor], crops: Sequence[Crop]) -> Call:
    """Kornia crop by crop on the whole batch: images of one size, float32 in [0, 1]; no antialiasing."""
    import kornia.augmentation as augmentation  # pyright: ignore[reportMissingImports]

    size = images[0].shape[:2]
    uniform = torch.cat(
        [torch.nn.functional.interpolate(image.permute(2, 0, 1)[None].float() / 255, size) for image in images]
    )
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    transforms = []
    for crop in crops:
        solarize = augmentation.RandomSolarize((128 / 255, 128 / 255), (0.0, 0.0), p=crop.solarize)
        transforms.append(
            torch.nn.Sequential(
                augmentation.RandomResizedCrop(
                    (crop.side, crop.side), crop.scale, RATIO, resample="bicubic", cropping_mode="resample"
                ),
                augmentation.RandomHorizontalFlip(),
                augmentation.ColorJitter(*JITTER, p=0.8),
                augmentation.RandomGrayscale(p=0.2),
                augmentation.RandomGaussianBlur((9, 9), (0.1, 2.0), p=crop.blur),
                *([solarize] if crop.solarize else []),
                augmentation.Normalize(mean=mean, std=std),
            ).to(uniform.device)
        )
    return lambda: [transform(uniform).to(torch.bfloat16) for transform in transforms]


def with_dali(images: Sequence[torch.Tensor], crops: Sequence[Crop]) -> Call:
    """DALI's operators crop by crop, fed the images without copies on a GPU; float16, jitter in a fixed order."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def
    from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

    device = images[0].device
    place = "gpu" if device.type == "cuda" else "cpu"
    bool_type, byte = DALIDataType.BOOL, DALIDataType.UINT8

    # What is applied to some samples takes an `if` there, as DALI's own augmentations do.
    def coloured(pixels: Any) -> Any:
        if fn.random.coin_flip(probability=0.8, dtype=bool_type):
            pixels = fn.color_twist(
                pixels,
                brightness=fn.random.uniform(range=[1 - JITTER[0], 1 + JITTER[0]]),
                contrast=fn.random.uniform(range=[1 - JITTER[1], 1 + JITTER[1]]),
                saturation=fn.random.uniform(range=[1 - JITTER[2], 1 + JITTER[2]]),
                hue=fn.random.uniform(range=[-360 * JITTER[3], 360 * JITTER[3]]),
            )
        if fn.random.coin_flip(probability=0.2, dtype=bool_type):
            pixels = fn.hsv(pixels, saturation=0.0)
        return pixels

    def blurred(pixels: Any, probability: float) -> Any:
        if fn.random.coin_flip(probability=probability, dtype=bool_type):
            pixels = fn.gaussian_blur(pixels, window_size=9, sigma=fn.random.uniform(range=[0.1, 2.0]))
        return pixels

    def solarized(pixels: Any, probability: float) -> Any:
        if fn.random.coin_flip(probability=probability, dtype=bool_type):
            kept = pixels < Constant(128, dtype=byte)
            pixels = kept * pixels + (kept ^ True) * (Constant(255, dtype=byte) - pixels)
        return pixels

    @pipeline_def(
        batch_size=len(images),
        num_threads=4,
        device_id=(device.index or 0) if place == "gpu" else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        seed=0,
        enable_conditionals=True,
    )
    def define() -> Any:
        given = fn.external_source(name="images", device=place, no_copy=True, layout="HWC", dtype=byte, ndim=3)
        outputs = []
        for crop in crops:
            pixels = fn.random_resized_crop(
                given,
                size=[crop.side, crop.side],
                random_area=list(crop.scale),
                random_aspect_ratio=list(RATIO),
                interp_type=DALIInterpType.INTERP_CUBIC,
                antialias=True,
            )
            pixels = blurred(coloured(pixels), crop.blur)
            if crop.solarize > 0:
                pixels = solarized(pixels, crop.solarize)
            outputs.append(
                fn.crop_mirror_normalize(
                    pixels,
                    dtype=DALIDataType.FLOAT16,
                    output_layout="CHW",
                    mirror=fn.random.coin_flip(),
                    mean=[255 * value for value in IMAGENET_MEAN],
                    std=[255 * value for value in IMAGENET_STD],
                )
            )
        return tuple(outputs)

    pipeline: Any = define()
    pipeline.build()
    fed = [*images] if place == "gpu" else [image.numpy() for image in images]

    def call() -> list[torch.Tensor]:
        pipeline.feed_input("images", fed)
        return [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]

    return call


# provider -> what makes its call, and for how many images of a batch at the most: one by one they take seconds
PROVIDERS: dict[str, tuple[Callable[[Sequence[torch.Tensor], Sequence[Crop]], Call], int]] = {
    "slipstream": (with_slipstream, 1 << 20),
    "torchvision v2": (with_torchvision, 32),
    "Kornia": (with_kornia, 1 << 20),
    "DALI": (with_dali, 1 << 20),
}


def check_peer(name: str, outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Raise AssertionError for crops that are not like slipstream's of the same images.

    Shapes, finite values; means and deviations within five standard errors (draws are others) and 0.1 (filters differ).
    """
    assert len(outputs) == len(expected), (name, len(outputs))
    for index, (output, other) in enumerate(zip(outputs, expected, strict=True)):
        assert output.shape == other.shape, (name, index, output.shape)
        assert output.device == other.device, (name, index, output.device)
        assert output.dtype in (torch.float16, torch.bfloat16), (name, index, output.dtype)
        assert bool(output.isfinite().all()), (name, index)
        for statistic in (torch.mean, torch.std):
            one, two = (statistic(crop.float(), (1, 2, 3)) for crop in (output, other))
            chance = ((one.var() + two.var()) / len(one)).sqrt().item()
            difference = abs((one.mean() - two.mean()).item())
            assert difference <= 0.1 + 5 * chance, (name, index, statistic.__name__, difference, chance)
