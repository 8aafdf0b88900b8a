"""The peers of the crop launch on a GPU, each of which makes DINO's ten normalised crops of a batch already decoded.

A provider takes a batch and gives the call that is timed; the call gives the crops, one [B, 3, h, w] tensor each.
A provider whose package is missing raises ModuleNotFoundError. What each does otherwise than the launch, it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_batch import Batch
from slipstream_kernels.crop_jobs import TOP, WIDTH
from slipstream_kernels.resized_crop import resized_crop

from slipstream.stage import IMAGENET_MEAN, IMAGENET_STD

GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)
RATIO = (3 / 4, 4 / 3)

Call = Callable[[], list[torch.Tensor]]


def with_slipstream(batch: Batch) -> Call:
    """The launcher as a loader calls it, tables packed from jobs in the call."""
    return lambda: resized_crop(batch.images, batch.jobs, batch.formats)


def with_torchvision(batch: Batch) -> Call:
    """torchvision v2 image by image, antialiased, with the same boxes.

    It rounds once, where Pillow rounds and clips between the passes: within 2 of a byte but beside hard edges.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    images = [array.permute(2, 0, 1) for array in batch.arrays]
    boxes = batch.jobs[..., TOP : WIDTH + 1].transpose(1, 0, 2).tolist()

    def crop(index: int) -> torch.Tensor:
        size = [*batch.formats[index].size]
        pixels = torch.stack(
            [
                functional.resized_crop(
                    image, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True
                )
                for image, (top, left, height, width) in zip(images, boxes[index], strict=True)
            ]
        )
        scaled = functional.to_dtype(pixels, torch.float32, scale=True)
        return functional.normalize(scaled, [*IMAGENET_MEAN], [*IMAGENET_STD]).to(torch.bfloat16)

    return lambda: [crop(index) for index in range(len(batch.formats))]


def with_kornia(batch: Batch) -> Call:
    """Kornia crop by crop on the whole batch: images of one size, float32 in [0, 1]; no antialiasing, boxes its own."""
    import kornia.augmentation as augmentation  # pyright: ignore[reportMissingImports]

    height, width = batch.arrays[0].shape[:2]
    uniform = torch.stack(
        [
            torch.nn.functional.interpolate(array.permute(2, 0, 1)[None].float() / 255, (height, width))[0]
            for array in batch.arrays
        ]
    )
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    normalize = augmentation.Normalize(mean=mean, std=std).to(uniform.device)
    crops = [
        augmentation.RandomResizedCrop(
            fmt.size, scale=_scale(batch, fmt.size), ratio=RATIO, resample="bicubic", cropping_mode="resample"
        ).to(uniform.device)
        for fmt in batch.formats
    ]
    return lambda: [normalize(crop(uniform)).to(torch.bfloat16) for crop in crops]


def with_dali(batch: Batch) -> Call:
    """DALI, one operator a crop, antialiased, fed the decoded images without copies; float16, boxes its own."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.types import DALIDataType, DALIInterpType

    device = batch.images.device
    if device.type != "cuda":
        raise ModuleNotFoundError("DALI's GPU operators need a GPU")
    pipeline: Any = Pipeline(
        batch_size=len(batch.arrays),
        num_threads=4,
        device_id=device.index or 0,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        seed=0,
    )
    with pipeline:
        images = fn.external_source(
            name="images", device="gpu", no_copy=True, layout="HWC", dtype=DALIDataType.UINT8, ndim=3
        )
        pipeline.set_outputs(
            *(
                fn.crop_mirror_normalize(
                    fn.random_resized_crop(
                        images,
                        device="gpu",
                        size=fmt.size,
                        random_area=_scale(batch, fmt.size),
                        random_aspect_ratio=RATIO,
                        interp_type=DALIInterpType.INTERP_CUBIC,
                        antialias=True,
                    ),
                    device="gpu",
                    dtype=DALIDataType.FLOAT16,
                    output_layout="CHW",
                    mean=[255 * value for value in IMAGENET_MEAN],
                    std=[255 * value for value in IMAGENET_STD],
                )
                for fmt in batch.formats
            )
        )
    pipeline.build()

    def call() -> list[torch.Tensor]:
        pipeline.feed_input("images", batch.arrays)
        return [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]

    return call


PROVIDERS: dict[str, Callable[[Batch], Call]] = {
    "slipstream": with_slipstream,
    "torchvision v2": with_torchvision,
    "Kornia": with_kornia,
    "DALI": with_dali,
}
SAME_BOXES = ("slipstream", "torchvision v2")


def check_peer(name: str, outputs: list[torch.Tensor], batch: Batch) -> None:
    """Raise AssertionError where a peer's crops are not what they should be: the answer, or crops like it."""
    for output, expected in zip(outputs, batch.expected, strict=True):
        assert output.shape == expected.shape, (name, output.shape)
        assert output.isfinite().all(), name
        if name == "slipstream":
            assert torch.equal(output, expected), name
        elif name in SAME_BOXES:
            # Two of 255 in units of the smallest deviation, and a bfloat16's own rounding on top. Where bicubic weights
            # overshoot white or black, it was 14 of 255 on photographs, in 8.5e-6 of all values.
            apart = (output.float() - expected.float()).abs()
            share = (apart >= 2.5 / 255 / min(IMAGENET_STD) + 2**-7).float().mean().item()
            assert share < 1e-4, (name, share)
            assert apart.max().item() < 0.6, (name, apart.max().item())
        else:
            # other boxes of the same images: between the means is chance, by five standard errors at the most
            difference = output.float().mean((1, 2, 3)) - expected.float().mean((1, 2, 3))
            allowed = 0.05 + 5 * difference.std().item() / len(difference) ** 0.5
            assert abs(difference.mean().item()) < allowed, (name, difference.mean().item(), allowed)


def _scale(batch: Batch, size: tuple[int, int]) -> tuple[float, float]:
    return GLOBAL_SCALE if size == max(fmt.size for fmt in batch.formats) else LOCAL_SCALE
