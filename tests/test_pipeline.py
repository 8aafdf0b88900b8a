"""The public crop stages on every backend: the CPU kernel's bytes in the Triton interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from slipstream_kernels.ragged import RaggedBatch

from slipstream import (
    CenterCrop,
    MultiCropPipeline,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToDtype,
)
from slipstream.pipeline import Pipeline, resolve_backend

NAMES = {
    "global_0": {"size": (20, 13), "scale": (0.4, 1.0), "seed": 42},
    "global_1": {"size": 14, "scale": (0.4, 1.0), "interpolation": "bicubic"},
    "local_0": {"size": 7, "scale": (0.05, 0.4), "memory_format": torch.channels_last},
    "middle": CenterCrop(9, resize=12),
}
STAGES = MultiCropPipeline(
    {
        "global_0": [Normalize(), RandomHorizontalFlip()],
        "global_1": [RandomHorizontalFlip(seed=1), Normalize(dtype=torch.bfloat16)],
        "local_0": [RandomHorizontalFlip()],
        "middle": [ToDtype(torch.float16, scale=True)],
    }
)


@pytest.fixture
def images(scenes: list[np.ndarray]) -> list[torch.Tensor]:
    """Images of unlike sizes and strides, uint8 [3, H, W]: decoders' layout, planar, transposed, and one pixel."""
    small = torch.from_numpy(scenes[0]).permute(2, 0, 1)[:, :45, :70]
    return [
        small,
        torch.from_numpy(scenes[7]).permute(2, 0, 1).contiguous(),
        small.transpose(1, 2)[:, 20:],
        small[:, :1, :1],
    ]


def stages(backend: str | None) -> list[Any]:
    """Every public crop stage, on one backend."""
    return [
        MultiRandomResizedCrop(NAMES, return_boxes=True, backend=backend),
        MultiCropRandomResizedCrop(2, 13, interpolation="bicubic", return_boxes=True, backend=backend),
        RandomResizedCrop((9, 14), backend=backend),
        CenterCrop((17, 12), resize=18, interpolation="bicubic", return_boxes=True, backend=backend),
    ]


def one_launch(images: list[torch.Tensor], backend: str) -> dict[str, Any]:
    """Crops with flips, normalisation and casts, as a loader makes them."""
    pipeline = Pipeline([MultiRandomResizedCrop(NAMES, return_boxes=True), STAGES], seed=3)
    batch = RaggedBatch.from_images(images)
    assert resolve_backend(backend, batch.device) == backend
    plan = pipeline.draw(batch.sizes, np.arange(len(batch)), 1)
    return pipeline.outputs(pipeline.run(batch, pipeline.prepare(batch, plan, backend), backend), plan)


def assert_same(result: Any, expected: Any) -> None:
    """Equal bytes, dtypes and layouts, whatever the device and the container."""
    if isinstance(expected, dict):
        assert list(result) == list(expected)
        result, expected = list(result.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(result, expected, strict=True):
            assert_same(one, other)
        return
    assert result.dtype == expected.dtype
    assert result.stride() == expected.stride()
    assert torch.equal(result.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.interpret
@pytest.mark.parametrize("index", range(4))
def test_the_interpreter_makes_the_cpu_kernels_crops(images: list[torch.Tensor], index: int) -> None:
    ids = range(len(images))
    result = stages("triton")[index](images, sample_ids=ids, epoch=1)
    assert_same(result, stages("cpu")[index](images, sample_ids=ids, epoch=1))


@pytest.mark.interpret
def test_the_interpreter_makes_the_cpu_kernels_normalised_crops(images: list[torch.Tensor]) -> None:
    assert_same(one_launch(images, "triton"), one_launch(images, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(4))
def test_a_gpu_makes_the_cpu_kernels_crops(images: list[torch.Tensor], index: int) -> None:
    ids = range(len(images))
    on_gpu = [image.cuda() for image in images]
    result = stages(None)[index](on_gpu, sample_ids=ids, epoch=1)
    assert_same(result, stages(None)[index](images, sample_ids=ids, epoch=1))
    uniform = torch.stack([images[0]] * 3)
    assert_same(
        stages(None)[index](uniform.cuda(), sample_ids=range(3)), stages(None)[index](uniform, sample_ids=range(3))
    )


@pytest.mark.gpu
def test_a_gpu_makes_the_cpu_kernels_normalised_crops(images: list[torch.Tensor]) -> None:
    assert_same(one_launch([image.cuda() for image in images], "triton"), one_launch(images, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_stages_by_themselves_are_the_same_on_a_gpu(dtype: torch.dtype) -> None:
    """Normalisation divides by IEEE's rule on both, so all its bits are the same, from bytes and from floats."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(6, 3, 1, 1)
    values = values if dtype == torch.uint8 else (values.float() / 255).to(dtype)
    for stage in (
        Normalize(),
        Normalize((0.1, 0.2, 0.3), (0.7, 3e-4, 1e3), dtype=torch.bfloat16),
        RandomHorizontalFlip(),
    ):
        assert_same(stage(values.cuda(), sample_ids=range(6)), stage(values, sample_ids=range(6)))
    crops = dict.fromkeys(NAMES, values)
    on_gpu = {name: values.cuda() for name in NAMES}
    assert_same(STAGES(on_gpu, sample_ids=range(6)), STAGES(crops, sample_ids=range(6)))


@pytest.mark.gpu
def test_the_cpu_backend_takes_no_cuda_tensors() -> None:
    with pytest.raises(RuntimeError, match='backend="cpu" takes images on the CPU, got images on a CUDA device'):
        RandomResizedCrop(8, backend="cpu")(torch.zeros(1, 3, 9, 9, dtype=torch.uint8, device="cuda"))


def test_the_backend_follows_the_device() -> None:
    assert resolve_backend(None, torch.device("cuda", 0)) == "triton"
    assert resolve_backend(None, torch.device("cpu")) == "cpu"
    assert resolve_backend("triton", torch.device("cuda", 0)) == "triton"
    with pytest.raises(RuntimeError, match='backend="cpu" takes images on the CPU'):
        resolve_backend("cpu", torch.device("cuda", 0))


def test_tables_are_made_on_the_host_whatever_torchs_default_device() -> None:
    with torch.device("meta"):
        (fmt,) = Pipeline([RandomResizedCrop(8), Normalize()]).formats(torch.device("cpu"))
    assert fmt.table is not None and fmt.table.device == torch.device("cpu")


def test_boxes_are_only_for_a_crop_that_takes_them() -> None:
    image = [torch.zeros(3, 20, 20, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="boxes are for a ResizedCrop, and RandomResizedCrop draws or has its own"):
        Pipeline(RandomResizedCrop(8))(image, boxes=[[0, 0, 4, 4]])
