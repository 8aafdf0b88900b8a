"""Chains of random stages, whatever they are: torchvision v2's operations in turn, to a bound that adds up."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from program_oracle import OPERATIONS, TOLERANCES, near_a_jump, warped
from slipstream_kernels import ops

from slipstream import (
    ColorJitter,
    GaussianBlur,
    Normalize,
    PILGaussianBlur,
    Pipeline,
    RandAugment,
    RandomAdjustSharpness,
    RandomAffine,
    RandomApply,
    RandomAutocontrast,
    RandomChoice,
    RandomEqualize,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomInvert,
    RandomOrder,
    RandomPerspective,
    RandomPosterize,
    RandomResizedCrop,
    RandomRotation,
    RandomSolarize,
    RandomVerticalFlip,
    ToDtype,
    TrivialAugmentWide,
)

SIZE = (20, 24)
SCALE = ToDtype(torch.float32, scale=True)
NAMES = {int(row[0]): name for name, (row, _) in OPERATIONS.items()}

probability = st.sampled_from([0.5, 1.0])
strength = st.floats(0.0, 0.6)
interpolation = st.sampled_from(["nearest", "bilinear"])
fill = st.sampled_from([None, 0, 0.25, (0.1, 0.5, 0.9)])
simple = st.one_of(
    st.builds(ColorJitter, strength, strength, strength, st.floats(0.0, 0.5), p=probability),
    st.builds(ColorJitter, strength, order=st.just("fixed"), additive_brightness=st.just(True)),
    st.builds(RandomGrayscale, probability),
    st.builds(RandomInvert, probability),
    st.builds(RandomSolarize, st.integers(0, 256), p=probability),
    st.builds(RandomPosterize, st.integers(1, 8), p=probability),
    st.builds(RandomAutocontrast, probability),
    st.builds(RandomEqualize, probability),
    st.builds(RandomAdjustSharpness, st.floats(0.0, 2.0), p=probability),
    st.builds(GaussianBlur, st.sampled_from([3, 9, (5, 7)]), st.just((0.1, 2.0)), p=probability),
    st.builds(PILGaussianBlur, st.just((0.1, 2.0)), p=probability),
    st.builds(RandomErasing, probability, value=st.sampled_from([0, 0.5, (0.1, 0.2, 0.3)])),
    st.builds(RandomHorizontalFlip, probability),
    st.builds(RandomVerticalFlip, probability),
    st.builds(RandomRotation, st.floats(0, 180), interpolation, fill=fill),
    st.builds(
        RandomAffine,
        st.floats(0, 45),
        st.just((0.2, 0.1)),
        st.just((0.7, 1.4)),
        st.just((-20, 20, -5, 5)),
        interpolation,
    ),
    st.builds(RandomPerspective, st.floats(0.1, 0.6), probability, interpolation, fill),
    st.builds(RandAugment, st.integers(1, 3), st.integers(0, 30), interpolation=interpolation),
    st.builds(TrivialAugmentWide, interpolation=interpolation),
)
several = st.lists(simple, min_size=1, max_size=3)
stage = st.one_of(
    simple,
    simple,
    st.builds(RandomApply, several, probability),
    st.builds(RandomChoice, several),
    st.builds(RandomOrder, several),
)


def by_torchvision(x: torch.Tensor, row: list[float]) -> torch.Tensor:
    """One operation on float32 [1, 3, h, w]; what has no functional there, by its formula."""
    code, a, *rest = int(row[0]), *row[1:]
    functionals = {
        ops.BRIGHTNESS: lambda: tv.adjust_brightness(x, a),
        ops.ADD_BRIGHTNESS: lambda: (x + a).clamp(0, 1),
        ops.CONTRAST: lambda: tv.adjust_contrast(x, a),
        ops.SATURATION: lambda: tv.adjust_saturation(x, a),
        ops.HUE: lambda: tv.adjust_hue(x, a),
        ops.GREY: lambda: tv.rgb_to_grayscale(x, 3),
        ops.SOLARIZE: lambda: tv.solarize(x, a) if a <= 1 else x,  # 256 of bytes, which torchvision refuses
        ops.POSTERIZE: lambda: tv.posterize(x, int(a).bit_length() - 1),
        ops.INVERT: lambda: tv.invert(x),
        ops.AUTOCONTRAST: lambda: tv.autocontrast(x),
        ops.EQUALIZE: lambda: tv.equalize(x),
        ops.SHARPNESS: lambda: tv.adjust_sharpness(x, a),
        ops.GAUSSIAN_BLUR: lambda: tv.gaussian_blur(x, [int(a), int(rest[0])], [rest[1], rest[2]]),
        ops.BOX_BLUR: lambda: by_pillow(x, a),
        ops.WARP: lambda: warped(x, tuple(row[1:9]), row[9] == ops.NEAREST, tuple(row[10:13]) if row[13] else None),
        ops.ERASE: lambda: tv.erase(x, *map(int, row[1:5]), torch.tensor(row[5:8]).view(3, 1, 1)),
    }
    return functionals[code]()


def by_pillow(x: torch.Tensor, box: float) -> torch.Tensor:
    # Pillow takes the radius: the one whose boxes these are, to float32, is found by halving.
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if box_radius(middle) < box else (low, middle)
    picture = Image.fromarray((x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(high)))
    return torch.from_numpy(blurred.copy()).permute(2, 0, 1)[None] * (1 / 255)


def box_radius(radius: float) -> float:
    variance = radius * radius / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return float(whole + part)


def gain(x: torch.Tensor, row: list[float]) -> float:
    """How much an operation enlarges a difference, at the most."""
    code, a = int(row[0]), row[1]
    if code == ops.AUTOCONTRAST:
        low, high = x.amin((2, 3)), x.amax((2, 3))
        return float((1 / (high - low).where(high > low, torch.ones(()))).max())
    if code in (ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION, ops.SHARPNESS):
        return abs(a) + abs(1 - a)
    return {ops.HUE: 3.0, ops.EQUALIZE: 0.0, ops.POSTERIZE: 0.0, ops.BOX_BLUR: 0.0}.get(code, 1.0)


def own_bound(row: list[float]) -> float:
    code = int(row[0])
    if code == ops.WARP:
        return TOLERANCES["warp_nearest" if row[9] == ops.NEAREST else "warp_bilinear"]
    return 1e-7 if code == ops.BOX_BLUR else TOLERANCES[NAMES[code]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(stages=st.lists(stage, min_size=1, max_size=4), seed=st.integers(0, 2**32), normalize=st.booleans())
def test_any_chain_is_torchvisions(stages: list[Any], seed: int, normalize: bool) -> None:
    rng = np.random.default_rng(seed)
    images = [smooth(rng, 30, 41), smooth(rng, 25, 22), torch.from_numpy(rng.integers(0, 256, (3, 33, 28), np.uint8))]
    ids = np.arange(3) + seed
    pipeline = Pipeline([RandomResizedCrop(SIZE, scale=(0.5, 1.0)), *stages, SCALE], seed=seed)
    plan = pipeline.plan(images, sample_ids=ids)
    cut = Pipeline([RandomResizedCrop(SIZE, scale=(0.5, 1.0)), SCALE], seed=seed)
    bare = dataclasses.replace(plan, steps={}, flips={})  # the same boxes and flips
    crops = cut(images, plan=bare)["image"]
    (program,) = plan.steps.get("", (np.zeros((3, 0, ops.OP_WIDTH), np.float32),))
    expected, bounds = [], []
    for image, rows in zip(crops, program, strict=True):
        x, bound = image[None], 0.0
        for place, row in enumerate(rows.tolist()):
            if row[0] == ops.NOTHING:
                continue
            if bool(near_a_jump(x, row).any()):
                rows[place:] = 0.0  # from here on the two may differ in every pixel: both stop
                break
            bound = bound * gain(x, row) + own_bound(row) + 6e-8
            x = by_torchvision(x, row)
        expected.append(x[0])
        bounds.append(bound)
    got = pipeline(images, plan=plan)["image"]
    for index in range(3):
        assert float((got[index] - expected[index]).abs().max()) <= bounds[index], plan.describe(index)
    if normalize:
        whole = Pipeline([RandomResizedCrop(SIZE, scale=(0.5, 1.0)), *stages, Normalize()], seed=seed)
        normal = whole(images, sample_ids=ids)["image"]
        plain = pipeline(images, sample_ids=ids)["image"]
        assert torch.allclose(normal, Normalize()(plain), atol=1e-6)


MOVING = [
    RandomRotation(40),
    RandomAffine(0, (0.3, 0.3)),
    RandomErasing(1.0, value=0.5),
    RandomErasing(1.0, value="random"),
    TrivialAugmentWide(),
    RandomApply([RandomPerspective(0.5, 1.0)], 1.0),
    RandomChoice([RandomInvert(1.0), RandomErasing(1.0)]),
    RandomOrder([RandomInvert(), RandomRotation(40)]),
]
STILL = [ColorJitter(0.4, 0.4, 0.2, 0.1), GaussianBlur((5, 9)), RandomAdjustSharpness(2.0, 1.0), RandomEqualize(1.0)]


@pytest.mark.parametrize("flip", [RandomHorizontalFlip(1.0), RandomVerticalFlip(1.0)], ids=["horizontal", "vertical"])
@pytest.mark.parametrize("before", [*MOVING, *STILL], ids=lambda stage: type(stage).__name__)
def test_a_flip_mirrors_what_the_stages_before_it_made(before: Any, flip: Any) -> None:
    """Whether it rides in the crop launch, which it must not after a stage that treats places unlike."""
    images = [smooth(np.random.default_rng(seed), 40, 50) for seed in range(6)]
    given = dict(sample_ids=np.arange(6))
    plain = Pipeline([RandomResizedCrop(SIZE), before, SCALE], seed=3)(images, **given)["image"]
    pipeline = Pipeline([RandomResizedCrop(SIZE), before, flip, SCALE], seed=3)
    mirrored = plain.flip(-1 if isinstance(flip, RandomHorizontalFlip) else -2)
    assert bool(pipeline.programs[0].chain.flips) == (before in STILL)
    assert float((pipeline(images, **given)["image"] - mirrored).abs().max()) <= 2e-6  # sums in another order


@pytest.mark.parametrize("flip", [RandomHorizontalFlip(0.5), RandomVerticalFlip(0.5)], ids=["horizontal", "vertical"])
def test_a_flip_may_be_the_last_stage_of_all(flip: Any) -> None:
    """Behind a Normalize it rides; behind a box erased after it, it moves the normalised values as they are."""
    images = [smooth(np.random.default_rng(seed), 40, 50) for seed in range(8)]
    given = dict(sample_ids=np.arange(8))
    start = [RandomResizedCrop(SIZE), ColorJitter(0.4), Normalize()]
    erased = Pipeline([*start, RandomErasing(1.0, value=(-3.0, 0.5, 2.0))])(images, **given)["image"]
    pipeline = Pipeline([*start, RandomErasing(1.0, value=(-3.0, 0.5, 2.0)), flip])
    got = pipeline(images, **given)["image"]
    flipped = [bool(row[-1, 0]) for row in pipeline.plan(images, **given).steps[""][0]]
    mirrored = erased.flip(-1 if isinstance(flip, RandomHorizontalFlip) else -2)
    assert set(flipped) == {True, False}
    assert all(torch.equal(got[i], (mirrored if each else erased)[i]) for i, each in enumerate(flipped))
    assert Pipeline([*start, flip]).programs[0].chain.flips


def smooth(rng: np.random.Generator, height: int, width: int) -> torch.Tensor:
    """A picture with edges and slopes, uint8 [3, h, w]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(x * rng.uniform(0.05, 0.4) + rng.uniform(0, 6)) + np.cos(y * rng.uniform(0.05, 0.4)) for _ in range(3)
    ]
    picture = np.stack(waves) * 50 + 128 + rng.normal(0, 6, (3, height, width))
    picture[:, height // 3 : height // 2, width // 4 : width // 2] += 70
    return torch.from_numpy(np.clip(picture, 0, 255).astype(np.uint8))
