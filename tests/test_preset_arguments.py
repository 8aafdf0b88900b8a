"""Sizes that presets take, and the arguments that they refuse when they are called."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from slipstream import (
    ColorJitter,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    Pipeline,
    RandomErasing,
    TimmRandAugment,
    presets,
)

STYLES = {"supervised_train": ("torchvision", "torchvision_new", "timm"), "supervised_val": ("torchvision", "timm")}
NAMES = [
    "simclr",
    "byol",
    "mocov3",
    "swav",
    "dino",
    "ibot",
    "dinov2",
    "dinov3",
    "vicreg",
    "ijepa",
    "lejepa",
    "multicrop",
]
CALLS = [*((name, {}) for name in NAMES), *((name, {"style": each}) for name in STYLES for each in STYLES[name])]


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("dinov2", dict(blur="written"), "blur must be one of 'as_written', 'as_trained', got 'written'"),
        ("dinov3", dict(blur=None), "blur must be one of"),
        ("supervised_train", dict(style="keras"), "style must be one of 'torchvision', 'torchvision_new', 'timm'"),
        ("supervised_val", dict(style="keras"), "style must be one of"),
        ("supervised_batch_stages", dict(style="keras"), "style must be one of"),
        ("dino", dict(local_crops=-1), "local_crops must be 0 or more"),
        ("multicrop", dict(global_crops=0), "global_crops must be 1 or more"),
        ("dino", dict(scale=(0.5, 2.0)), "scale must satisfy"),
        ("simclr", dict(size="224"), r"size must be an int or two ints \(h, w\), got '224'"),
        ("supervised_train", dict(size=0), "size must be 1 pixel or more, got 0"),
        ("supervised_train", dict(interpolation=""), "interpolation must be one of"),
        ("supervised_val", dict(resize=0), "resize must be 1 pixel or more, got 0"),
        ("supervised_val", dict(style="timm", size=(224, 224)), r"size must be an int, got \(224, 224\)"),
        ("dinov3", dict(subset_of_globals=True, local_size=300), r"local_size must be at most size \(224\)"),
        ("dinov3", dict(subset_of_globals=True, local_size=(96, 96)), "local_size must be an int"),
        ("multicrop", dict(stages=ColorJitter(0.4)), "stages must be a list of stages, got ColorJitter"),
    ],
)
def test_bad_arguments_are_refused(name, given, match) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        getattr(presets, name)(**given)


def test_sizes_of_two_sides() -> None:
    for name in ("simclr", "byol", "dinov2", "supervised_train", "supervised_val"):
        pipeline = Pipeline(getattr(presets, name)(size=[64, 48]))
        assert pipeline.formats_on_host[0].size == (64, 48)
    assert presets.simclr(size=(64, 48))[1].pipelines["view_0"][3].kernel_size == (7, 7)


def specs_of(preset: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The crops by name, and all the stages after them."""
    first, *rest = preset
    if not isinstance(first, MultiRandomResizedCrop):
        return {"image": first}, rest
    (chains,) = rest
    assert isinstance(chains, MultiCropPipeline)
    return dict(first.crops), [stage for chain in chains.pipelines.values() for stage in chain]


@pytest.mark.parametrize(("name", "given"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_argument_reaches_what_it_names(name: str, given: dict[str, Any]) -> None:
    """And nothing else: the local crops keep their scale where the large ones get another."""
    preset = getattr(presets, name)
    taken = inspect.signature(preset).parameters
    crops, _ = specs_of(preset(**given))
    values: dict[str, Any] = dict(scale=(0.21, 0.87), local_scale=(0.06, 0.17), size=80, local_size=40)
    for field, value in values.items():
        changed = {crop for crop in crops if crop.startswith("local_") == field.startswith("local_")}
        if field in taken:
            now, _ = specs_of(preset(**given, **{field: value}))
            what = field.removeprefix("local_")
            assert now.keys() == crops.keys() and changed
            for crop in crops:
                wanted = (
                    ((value, value) if what == "size" else value) if crop in changed else getattr(crops[crop], what)
                )
                assert getattr(now[crop], what) == wanted, (field, crop)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    if name != "simclr":
        _, stages = specs_of(preset(**given, mean=mean, std=std))
        found = [stage for stage in stages if isinstance(stage, Normalize)]
        assert len(found) == len(crops) and all((each.mean, each.std) == (mean, std) for each in found)
        fills = [stage.fill for stage in stages if isinstance(stage, TimmRandAugment)]
        assert all(fill == (26 / 255, 51 / 255, 76 / 255) for fill in fills)  # 76.5 to even, as Python rounds
    if "interpolation" in taken:
        assert specs_of(preset(**given, interpolation="bicubic"))[0]["image"].interpolation == "bicubic"
    if "erase" in taken:
        for p in (0.0, 0.3):
            erasing = [s.p for s in specs_of(preset(**given, erase=p))[1] if isinstance(s, RandomErasing)]
            assert erasing == ([p] if p else [])
    if "kernel_size" in taken:
        assert "kernel_size=(7, 7)" in repr(preset(kernel_size=7)) and "(23, 23)" not in repr(preset(kernel_size=7))
