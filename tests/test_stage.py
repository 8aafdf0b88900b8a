"""Stages: torchvision's arithmetic to the bit, flips from streams of their own, alone or inside the crop launch."""

# A spec takes more than the settled types that its fields declare, and scipy declares none.
# pyright: reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from slipstream_kernels.ragged import RaggedBatch
from torchvision.transforms import v2

from slipstream import (
    CenterCrop,
    ColorJitter,
    MultiCropPipeline,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    ToDtype,
)
from slipstream.pipeline import Pipeline

IDS = np.arange(100, 106)
MEANS_AND_STDS = [
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ((-0.1, 1 / 3, 1e-5), (3e-4, -0.7, 1e3)),
]


def every_byte() -> torch.Tensor:
    """All 256 values in each of three channels: uint8 [1, 3, 16, 16]."""
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)


def torchvision_normalize(images: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    functional = v2.functional
    return functional.normalize(functional.to_dtype(images, torch.float32, scale=True), list(mean), list(std))


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    """Six images of unlike sizes, uint8 [3, H, W]."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) for size in rng.integers(40, 90, (6, 2))]


def launch(stages: Any, images: list[torch.Tensor], *, seed: int = 0, epoch: int = 0, ids: Any = IDS) -> dict[str, Any]:
    """A whole pipeline in one launch on the CPU, as a loader runs it."""
    pipeline = Pipeline(stages, seed=seed)
    batch = RaggedBatch.from_images(images)
    plan = pipeline.draw(batch.sizes, ids, epoch)
    outputs = pipeline.outputs(pipeline.run(batch, pipeline.prepare(batch, plan, "cpu"), "cpu"), plan)
    assert list(outputs) == pipeline.output_names
    return outputs


@pytest.mark.parametrize(("mean", "std"), MEANS_AND_STDS)
def test_normalize_on_bytes_is_torchvisions(mean, std) -> None:
    result = Normalize(mean=mean, std=list(std))(every_byte())
    expected = torchvision_normalize(every_byte(), mean, std)
    assert result.dtype == torch.float32
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("mean", "std"), MEANS_AND_STDS)
def test_a_normalised_crop_is_torchvisions(images: list[torch.Tensor], mean, std) -> None:
    """Inside the launch: a 1:1 window over every byte, and crops of photographs' worth of noise."""
    identity = launch([CenterCrop(16), Normalize(mean, std)], list(every_byte()), ids=[0])["image"]
    assert torch.equal(identity.view(torch.int32), torchvision_normalize(every_byte(), mean, std).view(torch.int32))
    plain = launch([RandomResizedCrop(24)], images)["image"]
    fused = launch([RandomResizedCrop(24), Normalize(mean, std)], images)["image"]
    assert torch.equal(fused.view(torch.int32), torchvision_normalize(plain, mean, std).view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_normalize_on_floats_is_torchvisions(dtype: torch.dtype) -> None:
    values = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(dtype)
    for mean, std in MEANS_AND_STDS:
        result = Normalize(mean, std)(values)
        assert result.dtype == dtype
        assert torch.equal(result, v2.functional.normalize(values, list(mean), list(std)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_dtype_is_rounded_once_from_float32(images: list[torch.Tensor], dtype: torch.dtype) -> None:
    once = Normalize()(every_byte()).to(dtype)
    assert torch.equal(Normalize(dtype=dtype)(every_byte()), once)
    # and not the arithmetic of the narrow type
    assert not torch.equal(Normalize()(every_byte().to(dtype) / 255), once)
    fused = launch([CenterCrop(16), Normalize(dtype=dtype)], list(every_byte()), ids=[0])["image"]
    assert fused.dtype == dtype
    assert torch.equal(fused, once)
    assert torch.equal(ToDtype(dtype, scale=True)(every_byte()), (every_byte().float() * (1 / 255)).to(dtype))


def test_to_dtype_is_torchvisions() -> None:
    for scale in (False, True):
        expected = v2.functional.to_dtype(every_byte(), torch.float32, scale=scale)
        result = ToDtype(torch.float32, scale=scale)(every_byte())
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)
        halves = ToDtype(torch.float16, scale=scale)(expected)  # floats are never scaled
        assert torch.equal(halves, expected.half())
    assert torch.equal(ToDtype(torch.uint8)(every_byte()), every_byte())


def test_to_dtype_then_normalize_is_normalize(images: list[torch.Tensor]) -> None:
    both = launch([RandomResizedCrop(16), ToDtype(torch.float32, scale=True), Normalize()], images)["image"]
    assert torch.equal(both, launch([RandomResizedCrop(16), Normalize()], images)["image"])


def test_two_normalizes_follow_each_other(images: list[torch.Tensor]) -> None:
    first, second = Normalize(), Normalize(mean=(0.1, 0.2, 0.3), std=(2.0, 3.0, 0.5))
    plain = launch([RandomResizedCrop(16)], images)["image"]
    expected = v2.functional.normalize(
        torchvision_normalize(plain, first.mean, first.std), [0.1, 0.2, 0.3], [2, 3, 0.5]
    )
    assert torch.equal(launch([RandomResizedCrop(16), first, second], images)["image"], expected)
    assert not torch.equal(launch([RandomResizedCrop(16), second, first], images)["image"], expected)


def test_a_mean_of_bytes_is_refused_where_values_are_in_0_to_1(images: list[torch.Tensor]) -> None:
    """As DALI has it, [0.485 * 255, ...]: every pixel would come out as nearly the same number."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    refused = pytest.raises(
        ValueError, match=r"mean must be of values in \[0, 1\] for uint8 images, got \(123.675, .*255"
    )
    for make in (
        lambda: Pipeline([RandomResizedCrop(8), Normalize(mean, std)]),
        lambda: Pipeline([RandomResizedCrop(8), ColorJitter(0.4), Normalize(mean, std)]),
        lambda: MultiCropPipeline({"a": [RandomHorizontalFlip(), Normalize(mean, std)]}),
        lambda: Normalize(mean, std)(every_byte()),
    ):
        with refused:
            make()
    unscaled = launch([RandomResizedCrop(16), ToDtype(torch.float32), Normalize(mean, std)], images)["image"]
    assert unscaled.min() < -1 and unscaled.max() > 1


@pytest.mark.parametrize("shape", [(3, 8, 9), (2, 3, 8, 9), (5, 2, 3, 1, 1)])
def test_normalize_takes_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    result = Normalize()(values)
    assert result.shape == shape
    assert torch.equal(result, torchvision_normalize(values, Normalize().mean, Normalize().std))
    assert ToDtype(torch.float32)(values).shape == shape


def test_a_stage_that_draws_nothing_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    Normalize()(every_byte())
    ToDtype(torch.float32)(every_byte())
    assert torch.equal(torch.get_rng_state(), before)


def flipped(stage: RandomHorizontalFlip, count: int = 40_000, **options) -> np.ndarray:
    """Which of that many samples the stage by itself flips: bool [count]."""
    pair = torch.tensor([0, 1], dtype=torch.uint8).view(1, 1, 1, 2).expand(count, 1, 1, 2)
    return stage(pair, **{"sample_ids": np.arange(count), **options})[:, 0, 0, 0].numpy() == 1


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_flips_come_with_probability_p(p: float) -> None:
    """The share of 40,000 samples lies within five deviations of p."""
    share = flipped(RandomHorizontalFlip(p)).mean()
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 40_000)


def test_flips_of_neighbours_epochs_and_seeds_are_uncorrelated() -> None:
    """Correlations of 40,000 flips stay under five deviations, 5 / sqrt(40,000)."""
    seeds = [flipped(RandomHorizontalFlip(seed=seed)) for seed in (42, 43)]
    columns = [*seeds, flipped(RandomHorizontalFlip(seed=42), epoch=1), flipped(RandomHorizontalFlip())]
    for index, one in enumerate(columns):
        for other in columns[index:]:
            for lag in (0, 1) if one is not other else (1, 2):
                across = np.corrcoef(one[: 40_000 - lag], other[lag:])[0, 1]
                assert abs(across) < 5 / math.sqrt(40_000)


@pytest.mark.parametrize(
    ("stages", "axes"),
    [([RandomVerticalFlip(1.0)], (2,)), ([RandomHorizontalFlip(1.0), RandomVerticalFlip(1.0)], (2, 3))],
)
def test_upside_down_is_the_crop_reversed(images: list[torch.Tensor], stages: list, axes: tuple[int, ...]) -> None:
    """In the crop launch, alone on its crops, and alone on images of another dtype and number of channels."""
    upright = launch([RandomResizedCrop(9)], images)["image"]
    assert torch.equal(launch([RandomResizedCrop(9), *stages], images)["image"], upright.flip(axes))
    for crops in (upright, torch.rand(4, 1, 5, 6)):
        turned = crops
        for stage in stages:
            turned = stage(turned, sample_ids=np.arange(len(crops)))
        assert torch.equal(turned, crops.flip(axes))


def test_flips_are_yoked_by_an_explicit_seed(images: list[torch.Tensor]) -> None:
    names = MultiRandomResizedCrop({name: {"size": 8} for name in "abcd"}, return_boxes=True)
    ids = np.arange(300)
    many = [images[0][:, :9, :9]] * 300
    stages = {
        "a": [RandomHorizontalFlip(seed=3)],
        "b": [Normalize(), RandomHorizontalFlip(seed=3)],
        "c": [RandomHorizontalFlip()],
        "d": [RandomHorizontalFlip()],
    }
    batch = launch([names, MultiCropPipeline(stages)], many, ids=ids)
    assert torch.equal(batch["a_flip"], batch["b_flip"])
    assert np.array_equal(batch["a_flip"].numpy(), flipped(RandomHorizontalFlip(seed=3), 300))
    assert not torch.equal(batch["a_flip"], batch["c_flip"])
    assert not torch.equal(batch["c_flip"], batch["d_flip"])
    assert "a_flip" not in launch(names, many, ids=ids)


def test_a_second_flip_draws_from_a_stream_of_its_own(images: list[torch.Tensor]) -> None:
    """Two flips are their exclusive or: they would undo each other if they shared a stream."""
    ids = np.arange(2000)
    many = [images[0][:, :4, :4]] * 2000
    crop = RandomResizedCrop(4, return_boxes=True)
    one = launch([crop, RandomHorizontalFlip()], many, ids=ids)["image_flip"]
    two = launch([crop, RandomHorizontalFlip(), RandomHorizontalFlip()], many, ids=ids)["image_flip"]
    assert 0.4 < two.float().mean() < 0.6
    assert 0.4 < (one ^ two).float().mean() < 0.6
    certain = launch([crop, RandomHorizontalFlip(1.0), RandomHorizontalFlip(1)], many, ids=ids)
    assert not certain["image_flip"].any()


def test_flips_inside_the_launch_are_flips_afterwards(images: list[torch.Tensor]) -> None:
    crop = RandomResizedCrop((15, 22), return_boxes=True)
    plain = launch(crop, images)["image"]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        fused = launch(
            [RandomResizedCrop((15, 22), return_boxes=True, memory_format=memory_format), RandomHorizontalFlip()],
            images,
        )
        where = fused["image_flip"]
        assert where.dtype == torch.bool
        assert 0 < where.sum() < len(images)
        assert torch.equal(fused["image"], torch.where(where.view(-1, 1, 1, 1), plain.flip(-1), plain))
        assert torch.equal(fused["image_box"], launch(crop, images)["image_box"])
    assert torch.equal(RandomHorizontalFlip()(plain, sample_ids=IDS), fused["image"])


def test_normalize_and_flip_commute(images: list[torch.Tensor]) -> None:
    crop = RandomResizedCrop(16)
    one = launch([crop, Normalize(), RandomHorizontalFlip()], images)["image"]
    other = launch([crop, RandomHorizontalFlip(), Normalize()], images)["image"]
    assert torch.equal(one, other)


def test_channels_last_changes_the_layout_alone(images: list[torch.Tensor]) -> None:
    for stages in ([], [Normalize()], [Normalize(dtype=torch.bfloat16), RandomHorizontalFlip()]):
        plain = launch([RandomResizedCrop((12, 17)), *stages], images)["image"]
        last = launch([RandomResizedCrop((12, 17), memory_format=torch.channels_last), *stages], images)["image"]
        assert plain.is_contiguous()
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(plain, last)


def named_crops(**options) -> MultiRandomResizedCrop:
    return MultiRandomResizedCrop(
        {
            "global_0": {"size": 24, "scale": (0.4, 1.0), "seed": 42},
            "global_1": {"size": 24, "scale": (0.4, 1.0), "interpolation": "bicubic"},
            "local_0": {"size": (9, 12), "scale": [0.05, 0.4], "memory_format": torch.channels_last},
            "middle": CenterCrop(20, resize=24),
        },
        **options,
    )


def named_stages(**options) -> MultiCropPipeline:
    return MultiCropPipeline(
        {
            "global_0": [Normalize(), RandomHorizontalFlip(), RandomHorizontalFlip(0.3)],
            "global_1": [
                RandomHorizontalFlip(seed=1),
                ToDtype(torch.float32, scale=True),
                Normalize(dtype=torch.bfloat16),
            ],
            "local_0": [RandomHorizontalFlip()],
        },
        **options,
    )


@pytest.mark.parametrize("seed", [0, 11])
def test_stages_by_themselves_make_the_one_launchs_crops(images: list[torch.Tensor], seed: int) -> None:
    together = launch([named_crops(), named_stages()], images, seed=seed, epoch=2)
    crops = named_crops(seed=seed)(images, sample_ids=torch.from_numpy(IDS), epoch=2)
    apart = named_stages(seed=seed)(crops, sample_ids=IDS.tolist(), epoch=2)
    assert list(together) == list(apart) == ["global_0", "global_1", "local_0", "middle"]
    for name, pixels in together.items():
        assert pixels.dtype == apart[name].dtype
        assert torch.equal(pixels, apart[name]), name
        assert pixels.stride() == apart[name].stride(), name
    assert [pixels.dtype for pixels in together.values()] == [torch.float32, torch.bfloat16, torch.uint8, torch.uint8]


def test_the_multi_crop_pipelines_seed_moves_flips_but_no_box(images: list[torch.Tensor]) -> None:
    many = [images[0]] * 64
    ids = np.arange(64)
    crops = named_crops(return_boxes=True)
    one = launch([crops, named_stages()], many, seed=5, ids=ids)
    other = launch([crops, named_stages(seed=6)], many, seed=5, ids=ids)
    for name in ("global_0", "global_1", "local_0", "middle"):
        assert torch.equal(one[f"{name}_box"], other[f"{name}_box"])
    assert not torch.equal(one["local_0_flip"], other["local_0_flip"])
    assert torch.equal(one["global_1_flip"], other["global_1_flip"])  # a seed of its own


def test_an_unlisted_crop_stays_as_it_is(images: list[torch.Tensor]) -> None:
    plain = launch(named_crops(), images)
    batch = launch([named_crops(), MultiCropPipeline({"global_0": [Normalize()], "global_1": []})], images)
    assert batch["global_0"].dtype == torch.float32
    for name in ("global_1", "local_0", "middle"):
        assert batch[name].dtype == torch.uint8
        assert torch.equal(batch[name], plain[name])
    crops = MultiCropPipeline({"global_1": []})(plain)
    assert all(torch.equal(crops[name], plain[name]) for name in plain)


CALLS: list[Callable[..., Any]] = [
    lambda images, **call: RandomResizedCrop(8)(images, **call),
    lambda images, **call: torch.stack(MultiCropRandomResizedCrop(2, 8)(images, **call)),
    lambda images, **call: MultiRandomResizedCrop({"a": {"size": 8}})(images, **call)["a"],
    lambda images, **call: RandomHorizontalFlip()(torch.stack([image[:, :40, :40] for image in images]), **call),
    lambda images, **call: MultiCropPipeline({"a": [RandomHorizontalFlip()]})(
        {"a": torch.stack([image[:, :40, :40] for image in images])}, **call
    )["a"],
]


@pytest.mark.parametrize("call", CALLS)
def test_calls_without_ids_differ_and_with_ids_are_pure(images: list[torch.Tensor], call: Callable[..., Any]) -> None:
    images = images * 4
    ids = np.arange(len(images))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = call(images), call(images)
        torch.manual_seed(3)
        again = [call(images), call(images)]
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    state = torch.get_rng_state()
    pure = call(images, sample_ids=ids)
    assert torch.equal(pure, call(images, sample_ids=torch.from_numpy(ids), epoch=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(pure, call(images, sample_ids=ids, epoch=1))
    assert not torch.equal(pure, call(images, sample_ids=ids + 1))


def test_a_list_of_crops_has_boxes_and_flips_by_number(images: list[torch.Tensor]) -> None:
    stage = MultiCropRandomResizedCrop(2, 8, return_boxes=True)
    batch = launch([stage, RandomHorizontalFlip(), Normalize()], images)
    assert list(batch) == ["image", "image_0_box", "image_0_flip", "image_1_box", "image_1_flip"]
    assert isinstance(batch["image"], list)
    assert [crop.dtype for crop in batch["image"]] == [torch.float32] * 2
    alone = stage(images, sample_ids=IDS)
    assert isinstance(alone, dict)
    assert set(alone) == {"image", "image_0_box", "image_1_box"}
    assert torch.equal(alone["image_1_box"], batch["image_1_box"])
    assert not torch.equal(alone["image_0_box"], alone["image_1_box"])
