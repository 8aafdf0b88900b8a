"""Blurs and sharpness: the laws of what they draw, and Pillow's box radius against Pillow itself."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (wrong parameters are given on purpose)

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from slipstream_kernels import ops

from slipstream.draws import Draws, stream_key
from slipstream.stage_blur import MAX_RADIUS, GaussianBlur, PILGaussianBlur, RandomAdjustSharpness, box_radius

IDS = np.arange(20_000)
SIZE = (32, 48)


def program_of(stage, ids=IDS, seed: int = 0, name: str = "test", size=SIZE) -> np.ndarray:
    return stage.sample_program(Draws(stream_key(seed, name), ids, 0), size)


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    # mean and variance within five standard deviations of the law's
    spread, count = high - low, len(values)
    inside = low <= values.min() and values.max() <= high
    mean = abs(values.mean() - (low + high) / 2) < 5 * spread / np.sqrt(12 * count)
    variance = abs(values.var() - spread**2 / 12) < 5 * spread**2 * np.sqrt(1 / 180 / count)
    return bool(inside and mean and variance)


def test_gaussian_blur_draws_one_uniform_sigma_for_both_axes() -> None:
    stage = GaussianBlur((5, 9), (0.1, 2.0), p=0.7)
    program = program_of(stage)
    assert program.shape == (len(IDS), 1, ops.OP_WIDTH) and program.dtype == np.float32
    blurred = program[:, 0, 0] == ops.GAUSSIAN_BLUR
    assert abs(blurred.mean() - 0.7) < 5 * np.sqrt(0.21 / len(IDS))
    assert (program[~blurred] == 0).all()
    assert (program[blurred, 0, 1:3] == [5, 9]).all()
    assert (program[blurred, 0, 3] == program[blurred, 0, 4]).all() and (program[blurred, 0, 5:] == 0).all()
    assert is_uniform(program[blurred, 0, 3].astype(float), 0.1, 2.0)


def test_whether_a_sample_is_blurred_says_nothing_of_its_sigma() -> None:
    draws = Draws(stream_key(0, "test"), IDS, 0)
    always = GaussianBlur(3).sample_program(draws, SIZE)[:, 0, 3]
    chosen = GaussianBlur(3, p=0.5).sample_program(draws, SIZE)[:, 0, 0] != 0
    assert abs(np.corrcoef(always, chosen)[0, 1]) < 5 / np.sqrt(len(IDS))


def test_a_number_is_a_fixed_amount() -> None:
    assert (program_of(GaussianBlur(3, 1.5))[:, 0, 1:5] == [3, 3, 1.5, 1.5]).all()
    assert (program_of(PILGaussianBlur(2))[:, 0, 1] == box_radius(np.array(2.0))).all()


def test_a_kernel_larger_than_the_crop_is_refused_as_torchvision_does() -> None:
    GaussianBlur((95, 63)).sample_program(Draws(0, [1], 0), SIZE)
    for kernel in ((97, 3), (3, 65)):
        with pytest.raises(ValueError, match=f"kernel_size {kernel[0]} x {kernel[1]} reaches beyond .* 48 x 32"):
            GaussianBlur(kernel).sample_program(Draws(0, [1], 0), SIZE)


def test_pil_blur_draws_a_uniform_radius() -> None:
    program = program_of(PILGaussianBlur((0.1, 2.0), p=0.5))
    blurred = program[:, 0, 0] == ops.BOX_BLUR
    assert abs(blurred.mean() - 0.5) < 5 * np.sqrt(0.25 / len(IDS))
    # box_radius is monotonic, so it is undone by looking up
    grid = np.linspace(0.1, 2.0, 20_001)
    radius = np.interp(program[blurred, 0, 1], box_radius(grid), grid)
    assert is_uniform(radius, 0.1, 2.0)


def test_a_radius_of_zero_is_nothing() -> None:
    assert (program_of(PILGaussianBlur(0)) == 0).all()


def test_box_radii_stay_below_the_kernels_limit() -> None:
    radii = box_radius(np.linspace(0, MAX_RADIUS, 100_001))
    assert radii.dtype == np.float32
    assert radii[0] == 0 and radii.max() < 16 and (np.diff(radii) >= -1e-5).all()


def box_blurred_three_times(image: np.ndarray, radius: np.float32, axis: int) -> np.ndarray:
    # Pillow's box blur of one axis in whole numbers, edges repeated
    inside = int(radius)
    edge = inside + 1
    weight = int((1 << 24) / (np.float32(radius) * np.float32(2) + np.float32(1)))
    rest = ((1 << 24) - (2 * inside + 1) * weight) // 2
    for _ in range(3):
        padded = np.moveaxis(image, axis, 0).astype(np.int64)
        padded = np.concatenate([padded[:1].repeat(edge, 0), padded, padded[-1:].repeat(edge, 0)])
        count = len(padded) - 2 * edge
        window = sum(padded[1 + shift : 1 + shift + count] for shift in range(2 * inside + 1))
        total = weight * window + rest * (padded[:count] + padded[2 * edge :])
        image = np.moveaxis((total + (1 << 23)) >> 24, 0, axis)
    return image


@pytest.mark.parametrize("radius", [0.1, 0.37, 0.9, 1.0, 1.4, 2.0, 2.449489, 3.3, 7.7, 16.0])
def test_the_box_radius_gives_pillows_bytes(radius: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 47, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    box = box_radius(np.array(radius))
    got = box_blurred_three_times(box_blurred_three_times(image, box, 1), box, 0)
    assert np.array_equal(got, expected)


def test_sharpness_is_applied_to_its_share() -> None:
    program = program_of(RandomAdjustSharpness(2, p=0.3))
    sharpened = program[:, 0, 0] == ops.SHARPNESS
    assert abs(sharpened.mean() - 0.3) < 5 * np.sqrt(0.21 / len(IDS))
    assert (program[sharpened, 0, 1] == 2).all() and (program[~sharpened] == 0).all()


@pytest.mark.parametrize("stage", [GaussianBlur(3, p=0.5), PILGaussianBlur(p=0.5), RandomAdjustSharpness(2)], ids=repr)
def test_a_sample_does_not_depend_on_its_batch(stage) -> None:
    whole = program_of(stage, IDS[:50])
    alone = np.concatenate([program_of(stage, IDS[i : i + 1]) for i in range(50)])
    assert np.array_equal(whole, alone)
    assert not np.array_equal(whole, program_of(stage, IDS[:50], name="other"))
    assert program_of(stage, []).shape == (0, 1, ops.OP_WIDTH)
    assert set(np.unique(program_of(stage)[:, 0, 0])) == {0.0, *stage.slots()[0]}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianBlur(4), ValueError, "kernel_size must be odd, got 4"),
        (lambda: GaussianBlur((3, 6)), ValueError, r"kernel_size must be odd, got \(3, 6\)"),
        (lambda: GaussianBlur(0), ValueError, "kernel_size must be 1 or more, got 0"),
        (lambda: GaussianBlur(-3), ValueError, "kernel_size must be 1 or more"),
        (lambda: GaussianBlur((3, 3, 3)), ValueError, r"kernel_size must be an odd int or two of them \(x, y\)"),
        (lambda: GaussianBlur(3.0), TypeError, "kernel_size must be an int"),
        (lambda: GaussianBlur(3, -1), ValueError, "sigma must be above 0, got -1"),
        (lambda: GaussianBlur(3, (0, 1)), ValueError, "sigma must be above 0, got"),
        (lambda: GaussianBlur(3, (2, 1)), ValueError, r"sigma must be \(low, high\) with low <= high, got \(2, 1\)"),
        (lambda: GaussianBlur(3, (1, 2, 3)), ValueError, r"sigma must be a number or \(low, high\)"),
        (lambda: GaussianBlur(3, "1"), TypeError, "sigma must be a finite number"),
        (lambda: GaussianBlur(3, p=1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: GaussianBlur(3, seed=0.5), TypeError, "seed must be an int or None"),
        (lambda: PILGaussianBlur(-0.1), ValueError, r"radius must be in \[0, 16\], got -0.1"),
        (lambda: PILGaussianBlur((0.1, 16.1)), ValueError, r"radius must be in \[0, 16\], got \(0.1, 16.1\)"),
        (lambda: PILGaussianBlur((2, 0.1)), ValueError, r"radius must be \(low, high\) with low <= high"),
        (lambda: PILGaussianBlur(p=-0.1), ValueError, r"p must be in \[0, 1\]"),
        (lambda: RandomAdjustSharpness(-1), ValueError, "sharpness_factor must be 0 or more, got -1"),
        (lambda: RandomAdjustSharpness("2"), TypeError, "sharpness_factor must be a finite number"),
        (lambda: RandomAdjustSharpness(2, 2), ValueError, r"p must be in \[0, 1\], got 2"),
    ],
)
def test_bad_parameters_are_refused_when_made(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
