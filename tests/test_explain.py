"""What explain says is what is launched: kinds, order, stages and bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from slipstream_kernels import ops
from slipstream_kernels.programs import count_launches
from slipstream_kernels.schedule import join_programs, plan_launches

from slipstream import (
    ColorJitter,
    GaussianBlur,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    NamedCopies,
    Normalize,
    PILGaussianBlur,
    Pipeline,
    RandAugment,
    RandomApply,
    RandomAutocontrast,
    RandomChoice,
    RandomEqualize,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomOrder,
    RandomResizedCrop,
    RandomRotation,
    RandomSolarize,
    ToDtype,
    presets,
)
from slipstream.chain import Chain, Section
from slipstream.explain import every_program, explain, launches

JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)
BF16 = Normalize(dtype=torch.bfloat16)
CHAINS = {
    "nothing": ([], []),
    "rides": ([RandomHorizontalFlip(), Normalize()], []),
    "pointwise": ([RandomGrayscale(0.2), RandomSolarize(128, 0.2), RandomErasing(), BF16], ["pixels"]),
    "jitter": ([JITTER, RandomGrayscale(0.2), Normalize()], ["readings", "pixels"]),
    "two jitters": ([JITTER, JITTER], ["readings", "pixels"] * 2),
    "dinov2": ([RandomHorizontalFlip(), JITTER, GaussianBlur(9, p=0.5), BF16], ["readings", "pixels", "blur"]),
    "dino": ([JITTER, PILGaussianBlur(p=0.1), RandomSolarize(128, 0.2), BF16], ["readings", "pixels", "box blur"]),
    "wide boxes": ([PILGaussianBlur((0.1, 4.0)), BF16], ["pixels", "box blur", *["box blur line"] * 6]),
    "blur first": ([GaussianBlur(9, p=0.5), RandomGrayscale(), BF16], ["pixels", "blur"]),
    "always blurred": ([GaussianBlur(9), BF16], ["pixels", "blur"]),
    "equalize": ([RandomAutocontrast(), RandomEqualize()], ["readings", "equalize", "pixels", "equalize", "pixels"]),
    "warp": ([RandomRotation(30), RandomGrayscale()], ["pixels"]),
    "two warps": ([RandomRotation(30), RandomRotation(30)], ["pixels", "pixels"]),
}


def pipeline_of(stages: list[Any]) -> Pipeline:
    crops = {"a": dict(size=24), "b": dict(size=16)}
    return Pipeline([MultiRandomResizedCrop(crops), MultiCropPipeline({"a": stages, "b": stages})], seed=1)


@pytest.mark.parametrize("name", CHAINS)
def test_it_names_the_launches_of_a_large_batch(name: str) -> None:
    stages, kinds = CHAINS[name]
    pipeline = pipeline_of(stages)
    found = [each.kind for each in launches(pipeline)]
    assert found == ["weights", "crops", *kinds]
    plan = pipeline.draw(np.full((3000, 2), 40, np.int32), np.arange(3000), 0)
    programs = [plan.steps[crop][0] for crop in plan.steps]
    drawn = count_launches(programs)
    if name in ("always blurred", "wide boxes"):  # no image is without
        assert drawn == kinds[1:]
    else:
        assert drawn == kinds


@pytest.mark.parametrize(
    "stages", [presets.dinov2(), presets.simclr(), presets.swav(), presets.supervised_train(style="timm")]
)
def test_no_batch_of_a_preset_launches_more(stages: list[Any]) -> None:
    pipeline = Pipeline(stages, seed=1)
    most = [each.kind for each in launches(pipeline)][2:]
    for count in (1, 7, 400):
        plan = pipeline.draw(np.full((count, 2), 300, np.int32), np.arange(count), 0)
        drawn = iter(most)
        kinds = count_launches([steps[0] for steps in plan.steps.values()])
        assert all(kind in drawn for kind in kinds), (kinds, most)  # in this order, some left out


SHUFFLED = RandomOrder([JITTER, GaussianBlur(9, p=0.5), RandomRotation(30, p=0.5), RandomEqualize(0.5)])
MANY = [RandomGrayscale(0.5), RandomSolarize(128), RandomErasing()] * 5
LONG = {
    "any order": [SHUFFLED],
    "any order of wide boxes": [RandomOrder([JITTER, PILGaussianBlur((0.1, 5.0))]), Normalize()],
    "an order inside a choice": [RandomChoice([RandomApply([SHUFFLED]), RandomGrayscale(0.5)])],
    "five policies": [RandAugment(5)],
    "a jitter and three policies": [JITTER, RandAugment(3)],
    "many stages, then a reading": [*MANY, GaussianBlur(9, p=0.5), RandomEqualize(0.5)],
}


@pytest.mark.parametrize("name", LONG)
def test_no_launch_is_left_out_however_many_programs_there_are(name: str) -> None:
    pipeline = Pipeline([RandomResizedCrop(24), *LONG[name]], seed=1)
    plan = pipeline.draw(np.full((8000, 2), 40, np.int32), np.arange(8000), 0)
    assert [each.kind for each in launches(pipeline)][2:] == count_launches([steps[0] for steps in plan.steps.values()])


@pytest.mark.parametrize(
    "stages", [[RandomOrder([GaussianBlur(9), RandomEqualize(1.0), *[RandomGrayscale(0.5)] * 5])], [SHUFFLED] * 3]
)
def test_an_order_of_many_stages_is_not_short_of_a_launch(stages: list[Any]) -> None:
    """Too many orders to go through: more launches may be said than there are."""
    pipeline = Pipeline([RandomResizedCrop(24), *stages], seed=1)
    plan = pipeline.draw(np.full((3000, 2), 40, np.int32), np.arange(3000), 0)
    said = iter([each.kind for each in launches(pipeline)])
    assert all(kind in said for kind in count_launches([plan.steps[""][0]]))


ORDER = RandomOrder([JITTER, GaussianBlur(3, p=0.5), RandomEqualize()])
CHOICE = RandomChoice([RandomGrayscale(), RandomApply([GaussianBlur(3), RandomEqualize(1.0)])])
WIDE = PILGaussianBlur((0.1, 5.0), p=0.5)
STRETCHED = [RandomAutocontrast(), RandomEqualize(), RandomErasing(), WIDE]
UNLIKE = [  # b and c begin at their neighbours, which is their first pass alone and their second beside a
    {"a": [JITTER, JITTER, CHOICE, BF16], "b": [JITTER], "c": [WIDE, ORDER, BF16]},
    {"a": [CHOICE], "b": [GaussianBlur(5, p=0.5), *STRETCHED], "c": [WIDE, RandomGrayscale(), *STRETCHED, BF16]},
]


def section_of(chain: Chain) -> Section:
    (section,) = chain.steps
    assert isinstance(section, Section)
    return section


def test_a_stage_inside_another_need_not_be_one_of_ours() -> None:
    class Blur:
        def slots(self) -> tuple[tuple[int, ...], ...]:
            return ((ops.GAUSSIAN_BLUR,),)

        def sample_program(self, draws: Any, size: tuple[int, int]) -> np.ndarray:
            return GaussianBlur(3).sample_program(draws, size)

    for stage in (RandomApply([Blur()], 0.5), RandomOrder([RandomGrayscale(), Blur()])):  # type: ignore[list-item]
        kinds = [each.kind for each in launches(Pipeline([RandomResizedCrop(24), stage]))]
        assert "blur" in kinds


@pytest.mark.parametrize("stages", UNLIKE)
def test_a_launch_names_every_stage_that_some_image_has_in_it(stages: dict[str, list[Any]]) -> None:
    crops = {name: dict(size=16) for name in stages}
    pipeline = Pipeline([MultiRandomResizedCrop(crops), MultiCropPipeline(stages)], seed=1)
    plan = pipeline.draw(np.full((4000, 2), 40, np.int32), np.arange(4000), 0)
    drawn = [plan.steps[name][0] for name in stages]
    owners = {each.name: every_program(section_of(each.chain))[1] for each in pipeline.programs}
    joined = join_programs(drawn)
    schedule, said = plan_launches(joined), launches(pipeline)[2:]
    assert [each.kind for each in said] == [each.kind for each in schedule.launches]
    crop_of = np.repeat(np.arange(len(stages)), [len(each) for each in drawn])
    for launch, words in zip(schedule.launches, said, strict=True):
        for crop, name in enumerate(stages):
            found = set()
            images = launch.images[crop_of[launch.images] == crop]
            for image in images.tolist():
                first, end = schedule.passes[image, launch.number].tolist()
                if launch.kind in ("readings", "equalize"):
                    end = int(schedule.read_at[image, launch.number]) + 1
                rows = np.flatnonzero(joined[image, first:end, 0]) + first - joined.shape[1] + drawn[crop].shape[1]
                found |= {type(stages[name][owners[name][row]]).__name__ for row in rows}
            assert found <= set(words.stages.get(name, ())), (launch.kind, launch.number, name)


def test_crops_of_unlike_chains_share_what_they_can() -> None:
    """A crop that begins with its blur waits for the other's launch; one of Pillow's has its own."""
    crops = {"a": dict(size=24), "b": dict(size=16), "c": dict(size=8)}
    stages = {"a": [JITTER, GaussianBlur(9), BF16], "b": [GaussianBlur(9, p=0.5), BF16], "c": [RandomSolarize(128)]}
    pipeline = Pipeline([MultiRandomResizedCrop(crops), MultiCropPipeline(stages)])
    found = launches(pipeline)[2:]
    assert [each.kind for each in found] == ["readings", "pixels", "blur"]
    plan = pipeline.draw(np.full((3000, 2), 40, np.int32), np.arange(3000), 0)
    assert count_launches([steps[0] for steps in plan.steps.values()]) == ["readings", "pixels", "blur"]
    assert list(found[0].stages) == ["a"] and set(found[2].stages) == {"a", "b"}


def test_bytes_are_those_of_the_tensors() -> None:
    weights, crops, readings, pixels, blur = launches(pipeline_of(CHAINS["dinov2"][0]))
    values = 3 * (24 * 24 + 16 * 16)
    assert (weights.read, weights.written) == (0, 0)
    assert crops.written == values
    assert (readings.read, readings.written) == (values, 0)
    assert (pixels.read, pixels.written) == (values, 4 * values)  # float32 for what is blurred after it
    assert (blur.read, blur.written) == (4 * values, 2 * values)
    (_, rides) = launches(pipeline_of([Normalize()]))
    assert rides.written == 4 * values
    (_, _, only) = launches(pipeline_of([RandomGrayscale(), BF16]))
    assert (only.read, only.written) == (values, 2 * values)


def test_it_says_which_stages_are_where() -> None:
    _, crops, readings, pixels, blur = launches(pipeline_of(CHAINS["dinov2"][0]))
    assert crops.stages["a"] == ("RandomResizedCrop", "RandomHorizontalFlip")
    assert readings.stages["b"] == ("ColorJitter",)
    assert pixels.stages["a"] == ("ColorJitter", "Normalize")
    assert blur.stages["a"] == ("GaussianBlur", "Normalize")


def test_own_stages_and_copies() -> None:
    def darker(images: torch.Tensor) -> torch.Tensor:
        return images // 2

    stages = [
        RandomResizedCrop(16),
        NamedCopies(["a", "b"]),
        MultiCropPipeline({"a": [RandomGrayscale(), darker, ToDtype(torch.float32, scale=True)]}),
    ]
    kinds = [each.kind for each in launches(Pipeline(stages))]
    assert kinds == ["weights", "crops", "copy", "pixels", "own", "pixels"]
    text = explain(Pipeline(stages))
    assert text.splitlines()[0].startswith("image: 1 crop, at most 5 launches")
    assert "a: darker (what it does itself)" in text


def test_copies_are_read_as_the_shared_stages_leave_them() -> None:
    copies = [NamedCopies(["a", "b"]), MultiCropPipeline({"a": [RandomErasing()], "b": [RandomHorizontalFlip()]})]
    for shared, size in (([], 1), ([RandomGrayscale()], 1), ([BF16], 2), ([RandomGrayscale(), BF16], 2)):
        copy, pixels = launches(Pipeline([RandomResizedCrop(16), *shared, *copies]))[-2:]
        assert (copy.kind, copy.read, copy.written) == ("copy", *[3 * 256 * size] * 2)
        assert (pixels.kind, pixels.read, pixels.written) == ("pixels", *[3 * 256 * size] * 2)


def test_names_that_count_on_are_one_run() -> None:
    line = explain(Pipeline(presets.dinov2())).splitlines()[1]
    assert "global_0, global_1, local_0 ... local_7" in line


def test_every_program_has_each_operation_and_none() -> None:
    program, owners = every_program(section_of(pipeline_of([RandAugment(2)]).programs[0].chain))
    assert owners == [0, 0]
    assert len(np.unique(program[:, 0, 0])) > 8 and (program[..., 0] == 0).any()
