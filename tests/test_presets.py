"""Presets against a table of the published numbers, copied from the papers' code and not computed from the presets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from slipstream import presets
from slipstream.batch_stage import CutMix, MixUp, RandomBatchChoice
from slipstream.crop import CenterCrop, MultiRandomResizedCrop, RandomResizedCrop
from slipstream.pipeline import Pipeline
from slipstream.stage import MultiCropPipeline, Normalize, ToDtype
from slipstream.stage_auto import TimmRandAugment, TrivialAugmentWide
from slipstream.stage_blur import GaussianBlur, PILGaussianBlur
from slipstream.stage_color import ColorJitter, RandomGrayscale, RandomSolarize
from slipstream.stage_erase import RandomErasing
from slipstream.stage_flip import RandomHorizontalFlip

TENSORFLOW_BOX = ("box", 224, (0.08, 1.0), "bicubic, no antialias")
FLIP = ("flip", 0.5)
GREY = ("grey", 0.2)
JITTER = ("jitter", (0.4, 0.4, 0.2, 0.1), 0.8)
ADDITIVE = ("jitter, additive", (0.4, 0.4, 0.2, 0.1), 0.8)
STRONG = ("jitter", (0.8, 0.8, 0.8, 0.2), 0.8)
SOLARIZE = ("solarize", 128, 0.2)
LAST = ("normalize", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SWAV_LAST = ("normalize", (0.485, 0.456, 0.406), (0.228, 0.224, 0.225))


def pil(p: float) -> tuple:
    return ("pil blur", (0.1, 2.0), p)


def kernel(size: int, p: float) -> tuple:
    return ("kernel blur", size, (0.1, 2.0), p)


# what a crop is: its box and filter, then its stages in order
TWO_VIEWS: list[tuple[str, list[Any], list[Any]]] = [
    (
        "simclr",
        [TENSORFLOW_BOX, FLIP, STRONG, GREY, kernel(23, 0.5), ("to dtype", torch.float32)],
        [TENSORFLOW_BOX, FLIP, STRONG, GREY, kernel(23, 0.5), ("to dtype", torch.float32)],
    ),
    (
        "byol",
        [TENSORFLOW_BOX, FLIP, ADDITIVE, GREY, kernel(23, 1.0), LAST],
        [TENSORFLOW_BOX, FLIP, ADDITIVE, GREY, kernel(23, 0.1), ("solarize", 127.5, 0.2), LAST],
    ),
    (
        "mocov3",
        [("box", 224, (0.08, 1.0), "bilinear"), JITTER, GREY, pil(1.0), FLIP, LAST],
        [("box", 224, (0.08, 1.0), "bilinear"), JITTER, GREY, pil(0.1), SOLARIZE, FLIP, LAST],
    ),
    (
        "vicreg",
        [("box", 224, (0.08, 1.0), "bicubic"), FLIP, JITTER, GREY, pil(1.0), LAST],
        [("box", 224, (0.08, 1.0), "bicubic"), FLIP, JITTER, GREY, pil(0.1), SOLARIZE, LAST],
    ),
]

# the first global crop, the second, the number of local crops, a local crop
MULTI_CROP: list[tuple[str, dict[str, Any], list[Any], list[Any], int, list[Any]]] = [
    (
        "swav",
        {},
        [("box", 224, (0.14, 1.0), "bilinear"), FLIP, STRONG, GREY, pil(0.5), SWAV_LAST],
        [("box", 224, (0.14, 1.0), "bilinear"), FLIP, STRONG, GREY, pil(0.5), SWAV_LAST],
        6,
        [("box", 96, (0.05, 0.14), "bilinear"), FLIP, STRONG, GREY, pil(0.5), SWAV_LAST],
    ),
    (
        "dino",
        {},
        [("box", 224, (0.4, 1.0), "bicubic"), FLIP, JITTER, GREY, pil(1.0), LAST],
        [("box", 224, (0.4, 1.0), "bicubic"), FLIP, JITTER, GREY, pil(0.1), SOLARIZE, LAST],
        8,
        [("box", 96, (0.05, 0.4), "bicubic"), FLIP, JITTER, GREY, pil(0.5), LAST],
    ),
    (
        "ibot",
        {},
        [("box", 224, (0.25, 1.0), "bicubic"), FLIP, JITTER, GREY, pil(1.0), LAST],
        [("box", 224, (0.25, 1.0), "bicubic"), FLIP, JITTER, GREY, pil(0.1), SOLARIZE, LAST],
        10,
        [("box", 96, (0.05, 0.25), "bicubic"), FLIP, JITTER, GREY, pil(0.5), LAST],
    ),
    (
        "dinov2",
        dict(blur="as_written"),
        [("box", 224, (0.32, 1.0), "bicubic"), FLIP, JITTER, GREY, kernel(9, 1.0), LAST],
        [("box", 224, (0.32, 1.0), "bicubic"), FLIP, JITTER, GREY, kernel(9, 0.1), SOLARIZE, LAST],
        8,
        [("box", 96, (0.05, 0.32), "bicubic"), FLIP, JITTER, GREY, kernel(9, 0.5), LAST],
    ),
    (
        "dinov2",
        dict(blur="as_trained", local_size=98),
        [("box", 224, (0.32, 1.0), "bicubic"), FLIP, JITTER, GREY, LAST],
        [("box", 224, (0.32, 1.0), "bicubic"), FLIP, JITTER, GREY, kernel(9, 0.9), SOLARIZE, LAST],
        8,
        [("box", 98, (0.05, 0.32), "bicubic"), FLIP, JITTER, GREY, kernel(9, 0.5), LAST],
    ),
    (
        "dinov3",
        {},
        [("box", 224, (0.32, 1.0), "bicubic"), FLIP, JITTER, GREY, kernel(9, 1.0), LAST],
        [("box", 224, (0.32, 1.0), "bicubic"), FLIP, JITTER, GREY, kernel(9, 0.1), SOLARIZE, LAST],
        8,
        [("box", 96, (0.05, 0.32), "bicubic"), FLIP, JITTER, GREY, kernel(9, 0.5), LAST],
    ),
    (
        "dinov3",
        dict(blur="as_trained", size=256, local_size=112, horizontal_flips=False),
        [("box", 256, (0.32, 1.0), "bicubic"), JITTER, GREY, LAST],
        [("box", 256, (0.32, 1.0), "bicubic"), JITTER, GREY, kernel(9, 0.9), SOLARIZE, LAST],
        8,
        [("box", 112, (0.05, 0.32), "bicubic"), JITTER, GREY, kernel(9, 0.5), LAST],
    ),
    (
        "lejepa",
        {},
        [("box", 224, (0.3, 1.0), "bilinear"), FLIP, JITTER, GREY, kernel(23, 0.5), SOLARIZE, LAST],
        [("box", 224, (0.3, 1.0), "bilinear"), FLIP, JITTER, GREY, kernel(23, 0.5), SOLARIZE, LAST],
        6,
        [("box", 98, (0.05, 0.3), "bilinear"), FLIP, JITTER, GREY, kernel(23, 0.5), SOLARIZE, LAST],
    ),
    (
        "multicrop",
        {},
        [("box", 224, (0.4, 1.0), "bicubic"), FLIP, LAST],
        [("box", 224, (0.4, 1.0), "bicubic"), FLIP, LAST],
        8,
        [("box", 96, (0.05, 0.4), "bicubic"), FLIP, LAST],
    ),
]

SINGLE: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("ijepa", {}, [("box", 224, (0.3, 1.0), "bilinear"), LAST]),
    ("supervised_train", {}, [("box", 224, (0.08, 1.0), "bilinear"), FLIP, LAST]),
    (
        "supervised_train",
        dict(style="torchvision", erase=0.1),
        [
            ("box", 224, (0.08, 1.0), "bilinear"),
            FLIP,
            LAST,
            ("erase", 0.1, (0.02, 0.33), (0.3, 3.3), (0.0, 0.0, 0.0)),
        ],
    ),
    (
        "supervised_train",
        dict(style="torchvision_new"),
        [
            ("box", 176, (0.08, 1.0), "bilinear"),
            FLIP,
            ("trivial augment wide", 31, "bilinear", None),
            LAST,
            ("erase", 0.1, (0.02, 0.33), (0.3, 3.3), (0.0, 0.0, 0.0)),
        ],
    ),
    (
        "supervised_train",
        dict(style="timm"),
        [
            ("box", 224, (0.08, 1.0), "random"),
            FLIP,
            ("timm", 9.0, 0.5, 2, True, 0.5, (124 / 255, 116 / 255, 104 / 255)),
            LAST,
            ("erase", 0.25, (0.02, 1 / 3), (0.3, 1 / 0.3), "random"),
        ],
    ),
    ("supervised_val", {}, [("centre", 224, 256, "bilinear"), LAST]),
    ("supervised_val", dict(style="torchvision_new"), [("centre", 224, 232, "bilinear"), LAST]),
    ("supervised_val", dict(style="timm"), [("centre", 224, 256, "bicubic"), LAST]),
]

ALL: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, *_ in TWO_VIEWS),
    *((name, given) for name, given, *_ in MULTI_CROP),
    *((name, given) for name, given, _ in SINGLE),
]


def made(name: str, **given: Any) -> list[Any]:
    preset: Callable[..., list[Any]] = getattr(presets, name)
    return preset(**given)


def facts(stage: Any) -> tuple:
    """A spec as a line of the table; what the table does not name must be at its default."""
    match stage:
        case RandomResizedCrop(
            size=(h, w), ratio=(low, high), subset_of=None, return_boxes=False, memory_format=torch.contiguous_format
        ) if h == w and (low, high) == (3 / 4, 4 / 3):
            return ("box", h, stage.scale, stage.interpolation + ("" if stage.antialias else ", no antialias"))
        case CenterCrop(size=(h, w), antialias=True) if h == w:
            return ("centre", h, stage.resize, stage.interpolation)
        case RandomHorizontalFlip():
            return ("flip", stage.p)
        case ColorJitter(order="random"):
            ranges: Any = (stage.brightness, stage.contrast, stage.saturation, stage.hue)
            centres = [round((low + high) / 2, 9) for low, high in ranges]
            assert centres == [0 if stage.additive_brightness else 1, 1, 1, 0]
            amounts = tuple(round((high - low) / 2, 9) for low, high in ranges)
            return ("jitter, additive" if stage.additive_brightness else "jitter", amounts, stage.p)
        case RandomGrayscale():
            return ("grey", stage.p)
        case GaussianBlur(kernel_size=(x, y)) if x == y:
            return ("kernel blur", x, stage.sigma, stage.p)
        case PILGaussianBlur():
            return ("pil blur", stage.radius, stage.p)
        case RandomSolarize():
            return ("solarize", stage.threshold, stage.p)
        case Normalize(dtype=None):
            return ("normalize", stage.mean, stage.std)
        case ToDtype(scale=True):
            return ("to dtype", stage.dtype)
        case RandomErasing():
            return ("erase", stage.p, stage.scale, stage.ratio, stage.value)
        case TrivialAugmentWide():
            return ("trivial augment wide", stage.num_magnitude_bins, stage.interpolation, stage.fill)
        case TimmRandAugment(interpolation="bilinear"):
            return (
                "timm",
                stage.magnitude,
                stage.magnitude_std,
                stage.num_ops,
                stage.increasing,
                stage.p,
                stage.fill,
            )
    raise AssertionError(f"the table has no line for {stage!r}")


def crops_of(preset: list[Any]) -> dict[str, list[tuple]]:
    """Each named crop's lines; no crop and no stage has a seed of its own."""
    cut, chains = preset
    assert isinstance(cut, MultiRandomResizedCrop) and isinstance(chains, MultiCropPipeline)
    assert list(cut.crops) == list(chains.pipelines) and cut.seed == chains.seed
    specs = {name: [cut.crops[name], *chains.pipelines[name]] for name in cut.crops}
    assert all(getattr(spec, "seed", None) is None for chain in specs.values() for spec in chain)
    return {name: [facts(spec) for spec in chain] for name, chain in specs.items()}


@pytest.mark.parametrize(("name", "first", "second"), TWO_VIEWS, ids=lambda value: value if type(value) is str else "")
def test_two_views_are_as_published(name, first, second) -> None:
    assert crops_of(made(name)) == {"view_0": first, "view_1": second}


@pytest.mark.parametrize(("name", "given", "first", "second", "count", "local"), MULTI_CROP)
def test_multi_crop_recipes_are_as_published(name, given, first, second, count, local) -> None:
    expected = {"global_0": first, "global_1": second} | {f"local_{index}": local for index in range(count)}
    assert crops_of(made(name, **given)) == expected


@pytest.mark.parametrize(("name", "given", "stages"), SINGLE)
def test_recipes_of_one_crop_are_as_published(name, given, stages) -> None:
    assert [facts(stage) for stage in made(name, **given)] == stages


def test_batch_stages_are_as_published() -> None:
    assert presets.supervised_batch_stages("torchvision", 10) == []
    for style, alphas in (("torchvision_new", (0.2, 1.0)), ("timm", (0.8, 1.0))):
        (choice,) = presets.supervised_batch_stages(style, 10, "class", seed=3)
        assert isinstance(choice, RandomBatchChoice) and choice.p is None and choice.seed == 3
        assert choice.stages == (MixUp(10, alphas[0], "class"), CutMix(10, alphas[1], "class"))


@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [(32, 3), (64, 7), (96, 9), (128, 13), (160, 17), (192, 19), (200, 21), (224, 23), (256, 25), (19, 1)],
)
def test_simclrs_and_byols_kernel_is_a_tenth_of_the_height(size: int, kernel_size: int) -> None:
    for name in ("simclr", "byol"):
        assert ("kernel blur", kernel_size) in [line[:2] for line in crops_of(made(name, size=size))["view_0"]]


def test_simclrs_strength_multiplies_the_jitter() -> None:
    assert ("jitter", (0.4, 0.4, 0.4, 0.1), 0.8) in crops_of(presets.simclr(strength=0.5))["view_1"]


def test_numbers_of_crops() -> None:
    assert list(crops_of(presets.dino(local_crops=0))) == ["global_0", "global_1"]
    three = crops_of(presets.ibot(global_crops=3, local_crops=1))
    assert list(three) == ["global_0", "global_1", "global_2", "local_0"] and three["global_2"] == three["global_1"]
    assert list(crops_of(presets.multicrop(global_crops=1, local_crops=2))) == ["global_0", "local_0", "local_1"]
    frame = crops_of(presets.multicrop(stages=[RandomGrayscale(0.3)]))
    assert frame["global_0"][1:] == frame["local_7"][1:] == [("grey", 0.3), LAST]


def drawn(preset: list[Any], seed: int = 0) -> Any:
    sizes = np.full((6, 2), (300, 400), np.int32)
    return Pipeline(preset, seed=seed).draw(sizes, np.arange(6), 0)


def test_dinov3_shares_one_jitter() -> None:
    """The same rows of colour in every crop, by sample; without sharing, other ones."""

    def colour(preset: list[Any], name: str) -> np.ndarray:
        stages = preset[1].pipelines[name]
        plan = drawn([RandomResizedCrop(64), *[s for s in stages if isinstance(s, (ColorJitter, RandomGrayscale))]])
        return plan.steps[""][0]

    shared, own = presets.dinov3(share_color_jitter=True, seed=4), presets.dinov3(seed=4)
    names = ["global_0", "global_1", *(f"local_{index}" for index in range(8))]
    assert list(shared[1].pipelines) == names
    for kind in (ColorJitter, RandomGrayscale):
        seeds = {s.seed for name in names for s in shared[1].pipelines[name] if isinstance(s, kind)}
        assert len(seeds) == 1 and None not in seeds
    assert np.array_equal(colour(shared, "global_0"), colour(shared, "local_7"))
    other = presets.dinov3(share_color_jitter=True, seed=5)
    assert not np.array_equal(colour(shared, "global_0"), colour(other, "global_0"))
    assert all(s.seed is None for s in own[1].pipelines["local_0"] if isinstance(s, ColorJitter))


def test_dinov3s_local_crops_from_globals_lie_inside_them() -> None:
    """At the scale of the global crop, as a window of its pixels would be."""
    plan = drawn(presets.dinov3(subset_of_globals=True))
    names = list(plan.crops)
    boxes = {name: plan.boxes[:, names.index(name)].astype(int) for name in names}
    for index in range(8):
        top, left, height, width = boxes[f"local_{index}"].T
        outer = boxes["global_0" if index < 4 else "global_1"].T
        assert (top >= outer[0]).all() and (top + height <= outer[0] + outer[2]).all()
        assert (left >= outer[1]).all() and (left + width <= outer[1] + outer[3]).all()
        assert abs(height * width / (outer[2] * outer[3]) - (96 / 224) ** 2).max() < 0.01
        assert (height == width).all()


def test_dinov3s_gram_crops_are_the_globals_again() -> None:
    preset = presets.dinov3(gram_size=512, size=256, local_size=112)
    names = ["global_0", "global_1", *(f"local_{index}" for index in range(8)), "gram_0", "gram_1"]
    assert list(preset[0].crops) == names
    plan = drawn(preset)
    place = [names.index(name) for name in ("global_0", "gram_0", "global_1", "gram_1")]
    first, gram, second, other = (plan.jobs[:, index] for index in place)
    assert np.array_equal(first[:, :4], gram[:, :4]) and np.array_equal(first[:, 9], gram[:, 9])
    assert np.array_equal(second[:, :4], other[:, :4]) and np.array_equal(second[:, 9], other[:, 9])
    assert not np.array_equal(first[:, :4], second[:, :4])
    assert (gram[:, 4:6] == 512).all() and (first[:, 4:6] == 256).all()
    assert [facts(stage) for stage in preset[1].pipelines["gram_0"]] == [FLIP, LAST]
    plain = presets.dinov3(gram_size=512, horizontal_flips=False)[1].pipelines
    assert [facts(stage) for stage in plain["gram_1"]] == [LAST] and facts(plain["global_1"][0]) == JITTER


@pytest.mark.parametrize(("name", "given"), ALL)
def test_every_preset_compiles_with_other_dtypes_and_seeds(name: str, given: dict[str, Any]) -> None:
    """A seed decides the boxes whatever the loader's; without one the loader's does."""
    if name != "supervised_val":
        boxes = [drawn(made(name, **given, seed=seed), loader).boxes for seed, loader in ((7, 0), (7, 1), (8, 0))]
        assert np.array_equal(boxes[0], boxes[1]) and not np.array_equal(boxes[0], boxes[2])
        free = [drawn(made(name, **given), loader).boxes for loader in (0, 1)]
        assert not np.array_equal(*free)
    last: Any = made(name, **given, dtype=torch.bfloat16)[-1]
    ends: list[Any] = (
        [chain[-1] for chain in last.pipelines.values()] if isinstance(last, MultiCropPipeline) else [last]
    )
    assert all(isinstance(end, RandomErasing) or end.dtype == torch.bfloat16 for end in ends)


@pytest.mark.parametrize(("name", "given"), ALL)
def test_every_preset_runs(name: str, given: dict[str, Any], scenes: list[np.ndarray]) -> None:
    """From decoded pixels to finite crops of the sizes and the dtype asked for, on the CPU."""
    images = [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes[:2]]
    small = dict(size=48, dtype=torch.bfloat16) | ({"local_size": 32} if name in {row[0] for row in MULTI_CROP} else {})
    batch = Pipeline(made(name, **(given | small)), seed=1)(images, sample_ids=[3, 4])
    for crop, pixels in batch.items():
        side = 32 if crop.startswith("local") else 48
        assert pixels.shape == (2, 3, side, side) and pixels.dtype == torch.bfloat16
        assert pixels.isfinite().all() and pixels.float().std() > 0.01
