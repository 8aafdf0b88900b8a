"""Whole pipelines on a GPU beside the CPU backend on the same plan: every preset, and what no preset holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from compiled import running_compiled
from program_oracle import TOLERANCES
from slipstream_kernels import ops

from slipstream import (
    ColorJitter,
    FiveCrop,
    GaussianBlur,
    MultiCropPipeline,
    NamedCopies,
    Normalize,
    PILGaussianBlur,
    Pipeline,
    Plan,
    RandAugment,
    RandomAutocontrast,
    RandomEqualize,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomPerspective,
    RandomResizedCrop,
    RandomSolarize,
    RandomVerticalFlip,
    Resize,
    TenCrop,
    presets,
)

IDS = np.array([5, 9, 2, 77, 8])
BOUNDS = {ops.GAUSSIAN_BLUR: TOLERANCES["gaussian_blur"], ops.WARP: TOLERANCES["warp_bilinear"]}
# A value near a threshold, or near halfway between two bytes, may land on either side: so many values at the most.
JUMPS = {ops.SOLARIZE, ops.SOLARIZE_ADD, ops.POSTERIZE, ops.EQUALIZE, ops.BOX_BLUR, ops.WARP}
MOST_BEYOND = 1e-3


class RandomShade:
    """A stage of a user's: darken each image by a factor of its own."""

    def sample_params(self, draws: Any) -> np.ndarray:
        return draws.uniform(0)[:, 0, 0].astype(np.float32)

    def apply(self, images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return (images.float() * params.view(-1, 1, 1, 1)).to(images.dtype)


def copies(large: int, small: int) -> list[Any]:
    own = {
        "jittered": [RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1), GaussianBlur(5, (0.1, 2.0), p=0.5)],
        "shaded": [RandomShade(), RandomGrayscale(0.5), Normalize(dtype=torch.bfloat16)],
    }
    return [RandomResizedCrop(large), NamedCopies(["plain", *own]), MultiCropPipeline(own)]


def every_kind(large: int, small: int) -> list[Any]:
    """Bytes in, bytes out, through each kind of launch."""
    return [
        RandomResizedCrop((large, small), interpolation="random"),
        RandomVerticalFlip(),
        ColorJitter(0.4, 0.4, 0.2, 0.1),
        RandomAutocontrast(0.5),
        PILGaussianBlur((0.1, 2.0), p=0.5),
        RandomPerspective(0.4, 0.5, "bilinear", 0.5),
        RandAugment(2, 9),
        RandomEqualize(0.3),
        RandomErasing(0.5, value="random"),
        RandomSolarize(128, 0.3),
    ]


PIPELINES: dict[str, Callable[[int, int], list[Any]]] = {
    "simclr": lambda large, small: presets.simclr(size=large),
    "byol": lambda large, small: presets.byol(size=large),
    "mocov3": lambda large, small: presets.mocov3(size=large),
    "vicreg": lambda large, small: presets.vicreg(size=large),
    "swav": lambda large, small: presets.swav(size=large, local_size=small),
    "dino": lambda large, small: presets.dino(size=large, local_size=small),
    "ibot": lambda large, small: presets.ibot(size=large, local_size=small),
    "dinov2": lambda large, small: presets.dinov2(size=large, local_size=small),
    "dinov2 as trained": lambda large, small: presets.dinov2(
        blur="as_trained", size=large, local_size=small, dtype=torch.bfloat16
    ),
    "dinov3": lambda large, small: presets.dinov3(
        size=large, local_size=small, subset_of_globals=True, share_color_jitter=True, gram_size=2 * large
    ),
    "lejepa": lambda large, small: presets.lejepa(size=large, local_size=small),
    "multicrop": lambda large, small: presets.multicrop(size=large, local_size=small),
    "ijepa": lambda large, small: presets.ijepa(size=large),
    "torchvision": lambda large, small: presets.supervised_train("torchvision", size=large),
    "torchvision_new": lambda large, small: presets.supervised_train("torchvision_new", size=large, erase=0.5),
    "timm": lambda large, small: presets.supervised_train("timm", size=large, erase=0.5),
    "validation": lambda large, small: presets.supervised_val("timm", size=large),
    "copies": copies,
    "every kind": every_kind,
    "own": lambda large, small: [RandomResizedCrop(large), RandomGrayscale(0.5), RandomShade(), ColorJitter(0.4)],
    "five": lambda large, small: [FiveCrop(small, resize=large), ColorJitter(0.4), Normalize()],
    "ten": lambda large, small: [TenCrop(small, resize=large), RandomGrayscale(0.5)],
    "resized": lambda large, small: [Resize((large, small)), GaussianBlur(3, (0.1, 2.0))],
}


@pytest.fixture
def images(scenes: list[np.ndarray]) -> list[torch.Tensor]:
    """Five of unlike sizes, uint8 [3, H, W], as decoders lay them out."""
    return [torch.from_numpy(scenes[index]).permute(2, 0, 1) for index in (0, 1, 2, 3, 7)]


def pipeline_of(name: str, large: int = 96, small: int = 40) -> Pipeline:
    return Pipeline(PIPELINES[name](large, small), seed=3)


def run(pipeline: Pipeline, images: list[torch.Tensor], plan: Plan, backend: str) -> dict[str, list[torch.Tensor]]:
    """Every output's crops: one, or a list's."""
    from slipstream_kernels.ragged import RaggedBatch

    batch = RaggedBatch.from_images(images)
    outputs = pipeline.outputs(pipeline.run(batch, pipeline.prepare(batch, plan, backend), backend), plan)
    return {name: crops if isinstance(crops, list) else [crops] for name, crops in outputs.items()}


def assert_like_the_cpus(
    result: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]], plan: Plan
) -> None:
    """Exactly, where no program of operations ran; else within the bounds above."""
    steps = [step for each in plan.steps.values() for step in each if isinstance(step, np.ndarray) and step.ndim == 3]
    rows = np.concatenate([step.reshape(-1, ops.OP_WIDTH) for step in steps] or [np.zeros((0, ops.OP_WIDTH))])
    codes = {int(code) for code in rows[:, 0]} - {ops.NOTHING}
    deviation = rows[rows[:, 0] == ops.NORMALIZE][:, 4:7].min(initial=1.0)
    bound = max([TOLERANCES["program"], *(BOUNDS[code] for code in codes & set(BOUNDS))]) / deviation
    assert list(result) == list(expected)
    for name in expected:
        for crop, other in zip(result[name], expected[name], strict=True):
            assert (crop.dtype, crop.shape, crop.stride()) == (other.dtype, other.shape, other.stride()), name
            there, right = crop.cpu().float(), other.float()
            if not codes:
                assert torch.equal(there, right), name
                continue
            # a rounding to bytes or to a narrow float may fall to the other side, seldom
            step = {torch.uint8: 1.0, torch.bfloat16: 2**-7 * right.abs()}.get(other.dtype, 2**-22 * right.abs())
            difference = (there - right).abs()
            beyond = ~(difference <= bound + step)
            most = MOST_BEYOND if codes & JUMPS else 0.0
            assert float(beyond.float().mean()) <= most, (name, float(difference.max()))
            if other.dtype != torch.float32:
                assert float((difference != 0).float().mean()) <= 0.02, name


@contextlib.contextmanager
def poisoned(byte: int) -> Iterator[None]:
    """What torch allocates is full of this byte: 255 is NaN in every float."""
    make = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}

    def maker(name: str) -> Callable[..., torch.Tensor]:
        def fill(*args: Any, **settings: Any) -> torch.Tensor:
            tensor = make[name](*args, **settings)
            make["empty"](0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).fill_(byte)
            return tensor

        return fill

    with contextlib.ExitStack() as stack:
        for name in make:
            stack.enter_context(mock.patch.object(torch, name, maker(name)))
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIPELINES)
def test_a_gpu_makes_the_cpus_crops(name: str, images: list[torch.Tensor]) -> None:
    pipeline = pipeline_of(name)
    plan = pipeline.plan(images, sample_ids=IDS)
    there = run(pipeline, [image.cuda() for image in images], plan, "triton")
    assert all(crop.is_cuda for crops in there.values() for crop in crops)
    assert_like_the_cpus(there, run(pipeline, images, plan, "cpu"), plan)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["copies", "every kind", "five"])
def test_the_interpreter_makes_the_cpus_crops(name: str, images: list[torch.Tensor]) -> None:
    pipeline = pipeline_of(name, 16, 12)
    plan = pipeline.plan(images, sample_ids=IDS)
    assert_like_the_cpus(run(pipeline, images, plan, "triton"), run(pipeline, images, plan, "cpu"), plan)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_compiled_kernels_make_the_cpus_crops(name: str, images: list[torch.Tensor]) -> None:
    pipeline = pipeline_of(name)
    plan = pipeline.plan(images, sample_ids=IDS)
    with running_compiled():
        there = run(pipeline, images, plan, "triton")
    assert_like_the_cpus(there, run(pipeline, images, plan, "cpu"), plan)


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize("name", ["dino", "every kind"])
def test_kernels_compiled_for_other_gpus_do_too(name: str, capability: int, images: list[torch.Tensor]) -> None:
    pipeline = pipeline_of(name, 40, 24)
    plan = pipeline.plan(images, sample_ids=IDS)
    with running_compiled(capability):
        there = run(pipeline, images, plan, "triton")
    assert_like_the_cpus(there, run(pipeline, images, plan, "cpu"), plan)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIPELINES)
def test_the_bytes_before_colour_are_the_cpus(name: str, images: list[torch.Tensor]) -> None:
    """The crops alone, in every filter that a preset has: equal, not near."""
    pipeline = Pipeline(PIPELINES[name](96, 40)[:1], seed=3)
    plan = pipeline.plan(images, sample_ids=IDS)
    there = run(pipeline, [image.cuda() for image in images], plan, "triton")
    for key, crops in run(pipeline, images, plan, "cpu").items():
        for crop, other in zip(there[key], crops, strict=True):
            assert crop.dtype == torch.uint8, key
            assert torch.equal(crop.cpu(), other), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_unwritten_is_read_or_given(name: str, images: list[torch.Tensor]) -> None:
    """Memory full of either poison gives the same bytes as memory of whatever was there."""
    pipeline, on_gpu = pipeline_of(name), [image.cuda() for image in images]
    plan = pipeline.plan(images, sample_ids=IDS)
    plain = run(pipeline, on_gpu, plan, "triton")
    for byte in (0xFF, 0x55):
        with poisoned(byte):
            again = run(pipeline, on_gpu, plan, "triton")
        for key, crops in plain.items():
            for crop, other in zip(crops, again[key], strict=True):
                assert torch.equal(crop.view(torch.uint8), other.view(torch.uint8)), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIPELINES)
def test_the_host_never_waits_in_run(name: str, images: list[torch.Tensor]) -> None:
    """torch's own waits are errors; and the device still sleeps when `run` has returned."""
    from slipstream_kernels.ragged import RaggedBatch

    pipeline, batch = pipeline_of(name), RaggedBatch.from_images([image.cuda() for image in images])
    plans = [pipeline.plan(batch, sample_ids=IDS + shift) for shift in (0, 0, 1000)]
    prepared = [pipeline.prepare(batch, plan, "triton") for plan in plans]
    pipeline.run(batch, prepared[0], "triton")  # compiles what the second one needs
    torch.cuda.synchronize()
    torch.cuda._sleep(600_000_000)  # about a third of a second
    asleep = torch.cuda.Event()
    asleep.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipeline.run(batch, prepared[1], "triton")
        waited = asleep.query()
        pipeline.run(batch, prepared[2], "triton")  # other operations, whose kernels may be new
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not waited


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dino", "dinov2", "timm", "copies", "own"])
def test_all_of_it_runs_on_the_current_stream(name: str, images: list[torch.Tensor]) -> None:
    """A side stream sleeps, then writes the pixels: what ran elsewhere would be of what lay there before."""
    pipeline, final = pipeline_of(name), [image.cuda() for image in images]
    expected = pipeline(final, sample_ids=IDS)
    pixels = [torch.zeros_like(image) for image in final]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for image, written in zip(pixels, final, strict=True):
            image.copy_(written)
        result = pipeline(pixels, sample_ids=IDS)
    side.synchronize()
    for key, crop in expected.items():
        assert torch.equal(crop, result[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIPELINES)
def test_an_image_does_not_depend_on_its_batch(name: str, images: list[torch.Tensor]) -> None:
    """Alone, and in another order beside others: the same bits."""
    pipeline, on_gpu = pipeline_of(name), [image.cuda() for image in images]
    whole = pipeline(on_gpu, sample_ids=IDS)
    order = [3, 0, 4]
    for chosen in ([1], order):
        some = pipeline([on_gpu[index] for index in chosen], sample_ids=IDS[chosen])
        for key, crop in some.items():
            parts = zip(crop, whole[key], strict=True) if isinstance(crop, list) else [(crop, whole[key])]
            for one, other in parts:
                assert torch.equal(one, other[chosen]), (key, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dinov2", "timm", "every kind"])
def test_a_saved_plan_makes_the_same_bytes(name: str, images: list[torch.Tensor], tmp_path: Path) -> None:
    pipeline, on_gpu = pipeline_of(name), [image.cuda() for image in images]
    plan = pipeline.plan(on_gpu, sample_ids=IDS, epoch=7)
    plan.save(tmp_path / "plan.npz")
    first, again = (pipeline(on_gpu, plan=each) for each in (plan, Plan.load(tmp_path / "plan.npz")))
    for key, crop in first.items():
        assert torch.equal(crop, again[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("floats", [False, True], ids=["bytes", "floats"])
def test_stages_by_themselves_on_a_gpu(scenes: list[np.ndarray], floats: bool) -> None:
    """On a batch that somebody else made there: the CPU's values."""
    image = torch.from_numpy(scenes[0]).permute(2, 0, 1)[None, :, :90, :120].repeat(5, 1, 1, 1)
    batch = image.float() / 255 if floats else image
    for stage in (
        ColorJitter(0.4, 0.4, 0.2, 0.1),
        GaussianBlur(9, (0.1, 2.0)),
        RandomPerspective(0.4, 1.0),
        RandomErasing(1.0, value="random"),
    ):
        there, here = stage(batch.cuda(), sample_ids=IDS), stage(batch, sample_ids=IDS)
        assert there.is_cuda
        assert there.dtype == here.dtype == batch.dtype
        difference = (there.cpu().float() - here.float()).abs()
        bound = 1e-4 if floats else 1.0
        assert float(difference.max()) <= bound, type(stage).__name__
        assert float((difference > (2e-5 if floats else 0.0)).float().mean()) <= 0.02, type(stage).__name__
