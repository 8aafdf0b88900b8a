"""Warps: the map of each row against torchvision's functionals, on real parameters, and the laws of what is drawn."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (wrong parameters are given on purpose)

from __future__ import annotations

import numpy as np
import pytest
import torch
from slipstream_kernels import ops
from slipstream_kernels.ops import ProgramFormat
from slipstream_kernels.reference_programs import run_programs_reference
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from slipstream.draws import Draws, stream_key
from slipstream.stage_warp import (
    RandomAffine,
    RandomPerspective,
    RandomRotation,
    flip_rows,
    inverse_affine,
    inverse_perspective,
    warp_rows,
)

IDS = np.arange(20_000)
SIZES = [(24, 24), (25, 25), (24, 31), (33, 20), (21, 37)]
IDENTITY = [1, 0, 0, 0, 1, 0, 0, 0]


def draws_of(ids=IDS, seed: int = 0, name: str = "test") -> Draws:
    return Draws(stream_key(seed, name), ids, 0)


def places(parameters: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where each output pixel (x, y) is read, in pixels, float64 [2, h, w]."""
    a, b, c, d, e, f, g, h = parameters.astype(np.float64)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    under = g * x + h * y + 1
    return np.stack([(a * x + b * y + c) / under - 0.5, (d * x + e * y + f) / under - 0.5])


def check_places(parameters: np.ndarray, size: tuple[int, int], by_torchvision, tolerance: float) -> None:
    """torchvision, run on an image of its own coordinates, says where it reads: bilinear is exact on these inside."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    found = by_torchvision(torch.stack([x, y, torch.ones_like(x)]))
    inside = (found[2] > 1 - 1e-9).numpy()
    assert inside.sum() > 20
    assert np.abs(places(parameters, size) - found[:2].numpy())[:, inside].max() < tolerance


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("center", [None, (0, 0), (3.5, 17)])
def test_affine_maps_are_torchvisions(size: tuple[int, int], center) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        angle, shift, scale = rng.uniform(-180, 180), rng.integers(-6, 7, 2).tolist(), rng.uniform(0.6, 1.6)
        shear = rng.uniform(-30, 30, 2).tolist()
        if center is not None:  # else nothing of the image is left
            angle, shift = angle / 12, [2, 3]
        maps = inverse_affine(size, angle=angle, translate=tuple(shift), scale=scale, shear=tuple(shear), center=center)

        def by_torchvision(image, angle=angle, shift=shift, scale=scale, shear=shear):
            return functional.affine(
                image,
                angle=angle,
                translate=shift,
                scale=scale,
                shear=shear,
                interpolation=InterpolationMode.BILINEAR,
                center=None if center is None else list(center),
            )

        check_places(warp_rows(maps, "bilinear", None)[0, 0, 1:9], size, by_torchvision, 1e-4)


def test_affine_maps_take_a_number_or_one_for_each() -> None:
    angles, shifts = np.array([10.0, 20.0, -5.0]), np.array([1.0, 0.0, -3.0])
    together = inverse_affine((20, 30), angle=angles, translate=(shifts, 2.0), scale=1.5, shear=(5.0, 0.0))
    apart = [
        inverse_affine((20, 30), angle=a, translate=(t, 2.0), scale=1.5, shear=(5.0, 0.0))
        for a, t in zip(angles, shifts, strict=True)
    ]
    assert np.array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize("size", SIZES)
def test_perspective_maps_are_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    program = RandomPerspective(0.6, p=1).sample_program(draws_of(IDS[:20]), size)
    corners = RandomPerspective(0.6, p=1)._corners(draws_of(IDS[:20]), size).astype(int)
    start = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    for row, end in zip(program[:, 0], corners.tolist(), strict=True):

        def by_torchvision(image, end=end):
            return functional.perspective(image, start, end, interpolation=InterpolationMode.BILINEAR)

        check_places(row[1:9], size, by_torchvision, 1e-3)


@pytest.mark.parametrize("distortion_scale", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("size", [(24, 31), (33, 20), (7, 8)])
def test_corners_are_torchvisions_whole_numbers(distortion_scale: float, size: tuple[int, int]) -> None:
    corners = RandomPerspective(distortion_scale)._corners(draws_of(), size)
    for axis, side in enumerate(size[::-1]):
        bound = int(distortion_scale * (side // 2)) + 1
        for corner, far in enumerate([False, axis == 0, True, axis == 1]):
            values, counts = np.unique(corners[:, corner, axis], return_counts=True)
            assert values.tolist() == list(range(side - bound, side) if far else range(bound))
            share = 1 / bound
            assert np.abs(counts / len(IDS) - share).max() <= 5 * np.sqrt(share * (1 - share) / len(IDS))


def test_a_perspective_of_still_corners_is_nothing() -> None:
    assert (RandomPerspective(0, p=1).sample_program(draws_of(IDS[:5]), (224, 97)) == 0).all()


def test_corners_that_no_perspective_reaches_leave_the_sample_alone() -> None:
    for size in [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (4, 5)]:
        program = RandomPerspective(1.0, p=1).sample_program(draws_of(IDS[:2000]), size)
        assert np.isfinite(program).all()
        if min(size) == 1:
            assert (program == 0).all()


def test_a_map_exists_where_it_brings_every_corner_and_only_there() -> None:
    corners = np.random.default_rng(0).integers(0, 6, (20_000, 4, 2))
    maps, exists = inverse_perspective((5, 7), corners)
    sides = [np.delete(corners, i, 1) for i in range(4)]
    areas = np.stack([np.linalg.det(np.dstack([side, np.ones((len(side), 3))])) for side in sides], 1)
    proper = (np.abs(areas) > 0.5).all(1)
    # the few more are maps whose g and h would be without bound
    assert not (exists & ~proper).any() and (exists & proper).sum() > 0.98 * proper.sum()
    assert (maps[~exists] == IDENTITY).all()
    assert not np.signbit(maps[maps == 0]).any()
    x, y = corners[exists].astype(float).transpose(2, 1, 0)
    a, b, c, d, e, f, g, h = maps[exists].T
    under = g * x + h * y + 1
    assert np.allclose((a * x + b * y + c) / under, np.array([0, 6, 6, 0])[:, None])
    assert np.allclose((d * x + e * y + f) / under, np.array([0, 0, 4, 4])[:, None])


def run_rows(image: torch.Tensor, program: np.ndarray) -> torch.Tensor:
    formats = [ProgramFormat(dtype=torch.float32)]
    return run_programs_reference([image.expand(len(program), -1, -1, -1)], [program], formats)[0]


def check_pixels(found: torch.Tensor, expected: torch.Tensor, row: np.ndarray) -> None:
    difference = (found - expected).abs().amax(0).numpy()
    if row[9] == ops.BILINEAR:
        assert difference.max() < 1e-4
        return
    # a place halfway between two pixels rounds to either: whole lines of them where corners are whole numbers
    between = np.abs(places(row[1:9], difference.shape) % 1 - 0.5).min(0) < 1e-4
    assert between.mean() < 5e-2 and (difference[~between] == 0).all()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [None, 0, 0.5, (0.1, 0.9, 0.4)], ids=str)
@pytest.mark.parametrize("size", [(28, 28), (21, 34)])
def test_the_stages_rows_run_as_torchvision(interpolation: str, fill, size: tuple[int, int]) -> None:
    image = torch.rand((3, *size), generator=torch.Generator().manual_seed(0))
    draws, options = draws_of(IDS[:6]), dict(interpolation=interpolation, fill=fill)
    theirs = dict(interpolation=InterpolationMode(interpolation), fill=list(fill) if isinstance(fill, tuple) else fill)
    u = draws.uniform(0, 3)

    stages = [
        RandomRotation((-20, 70), center=(4, 9), **options),
        RandomAffine((-20, 70), (0.2, 0.3), (0.5, 1.5), (-10, 20, 5, 15), **options),
        RandomPerspective(0.5, 1.0, **options),
    ]
    programs = [stage.sample_program(draws, size) for stage in stages]
    found = [run_rows(image, program) for program in programs]
    corners = RandomPerspective(0.5)._corners(draws, size).astype(int).tolist()
    height, width = size
    start = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    for i in range(len(draws)):
        angle, x, y, scale = u[i, 1]
        expected = [
            functional.rotate(image, -20 + 90 * u[i, 0, 1], center=[4, 9], **theirs),
            functional.affine(
                image,
                angle=-20 + 90 * angle,
                translate=[round((2 * x - 1) * 0.2 * width), round((2 * y - 1) * 0.3 * height)],
                scale=0.5 + scale,
                shear=[-10 + 30 * u[i, 2, 0], 5 + 10 * u[i, 2, 1]],
                **theirs,
            ),
            functional.perspective(image, start, corners[i], **theirs),
        ]
        for ours, other, program in zip(found, expected, programs, strict=True):
            check_pixels(ours[i], other, program[i, 0])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(("angle", "turns", "size"), [(180, 2, (5, 8)), (90, 1, (6, 6)), (-90, 3, (7, 7))])
def test_quarter_turns_are_exact(interpolation: str, angle: float, turns: int, size: tuple[int, int]) -> None:
    image = torch.rand((3, *size), generator=torch.Generator().manual_seed(0))
    program = RandomRotation((angle, angle), interpolation).sample_program(draws_of([3]), size)
    assert torch.equal(run_rows(image, program)[0], torch.rot90(image, turns, (1, 2)))


@pytest.mark.parametrize("size", [(5, 8), (6, 3), (1, 1)])
def test_flips_are_exact(size: tuple[int, int]) -> None:
    image = torch.rand((3, *size), generator=torch.Generator().manual_seed(0))
    horizontal, vertical = np.array([False, True, False, True]), np.array([False, False, True, True])
    program = flip_rows(horizontal, vertical, size)
    assert program.shape == (4, 1, ops.OP_WIDTH) and program.dtype == np.float32
    assert (program[0] == 0).all() and (program[1:, 0, 9] == ops.NEAREST).all()
    expected = [image, image.flip(2), image.flip(1), image.flip(1, 2)]
    assert torch.equal(run_rows(image, program), torch.stack(expected))
    assert flip_rows(horizontal[:0], vertical[:0], size).shape == (0, 1, ops.OP_WIDTH)


def test_a_warp_that_changes_nothing_is_nothing() -> None:
    assert (RandomAffine(0).sample_program(draws_of(IDS[:9]), (224, 97)) == 0).all()
    assert (RandomRotation(0, "bilinear", fill=1).sample_program(draws_of(IDS[:9]), (96, 33)) == 0).all()


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    # mean and variance within five standard deviations of the law's, float32 rounding aside
    spread, count = high - low, len(values)
    inside = low - 1e-4 <= values.min() and values.max() <= high + 1e-4
    mean = abs(values.mean() - (low + high) / 2) < 5 * spread / np.sqrt(12 * count)
    variance = abs(values.var() - spread**2 / 12) < 5 * spread**2 * np.sqrt(1 / 180 / count)
    return bool(inside and mean and variance)


def test_rotations_are_uniform_in_the_angle() -> None:
    for degrees, low, high in [(30, -30, 30), ((10, 100), 10, 100)]:
        program = RandomRotation(degrees, p=0.8).sample_program(draws_of(), (32, 48))
        turned = program[:, 0, 0] == ops.WARP
        assert abs(turned.mean() - 0.8) < 5 * np.sqrt(0.16 / len(IDS)) and (program[~turned] == 0).all()
        # counter-clockwise: the inverse map of (x, y) is (cos x - sin y, sin x + cos y), y downwards
        angle = np.degrees(np.arctan2(-program[turned, 0, 2].astype(float), program[turned, 0, 1].astype(float)))
        assert is_uniform(angle, low, high)


def test_affine_draws_torchvisions_law() -> None:
    size = (40, 60)
    stage = RandomAffine(0, translate=(0.1, 0.25), scale=(0.5, 2.0), interpolation="bilinear", fill=(0.1, 0.2, 0.3))
    row = stage.sample_program(draws_of(), size)[:, 0].astype(float)
    assert (row[:, 0] == ops.WARP).all() and (row[:, 9] == ops.BILINEAR).all() and (row[:, 13] == 1).all()
    assert np.allclose(row[:, 10:13], [0.1, 0.2, 0.3])
    assert is_uniform(1 / row[:, 1], 0.5, 2.0) and (row[:, [2, 4, 7, 8]] == 0).all()
    # c = w/2 - (w/2 + shift) / scale
    for side, column, most in [(60, 3, 6), (40, 6, 10)]:
        shift = (side / 2 - row[:, column]) / row[:, 1] - side / 2
        assert np.abs(shift - np.rint(shift)).max() < 1e-3
        values, counts = np.unique(np.rint(shift), return_counts=True)
        assert values.tolist() == list(range(-most, most + 1))
        share = np.full(len(values), 1 / (2 * most))  # uniform, rounded: half a step at the ends
        share[[0, -1]] /= 2
        assert (np.abs(counts / len(IDS) - share) < 5 * np.sqrt(share * (1 - share) / len(IDS))).all()

    for shear, low, high in [(15, -15, 15), ((5, 25), 5, 25), ((5, 25, -40, 40), 5, 25)]:
        row = RandomAffine(0, shear=shear, center=(0, 0)).sample_program(draws_of(), size)[:, 0].astype(float)
        assert is_uniform(np.degrees(np.arctan(row[:, 2])), low, high)
        if len(np.atleast_1d(shear)) == 4:
            down = np.degrees(np.arctan(row[:, 4]))
            assert is_uniform(down, -40, 40)
            assert abs(np.corrcoef(row[:, 2], down)[0, 1]) < 5 / np.sqrt(len(IDS))
        else:
            assert (row[:, 4] == 0).all()


def test_no_fill_is_told_from_a_fill_of_zero() -> None:
    for fill, has_fill in [(None, 0), (0, 1)]:
        row = RandomRotation(10, fill=fill).sample_program(draws_of([1]), (8, 8))[0, 0]
        assert row[13] == has_fill and (row[10:13] == 0).all()


STAGES = [RandomRotation(40, p=0.5), RandomAffine(10, (0.1, 0.1), (0.8, 1.2), 5, p=0.5), RandomPerspective()]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_a_sample_does_not_depend_on_its_batch(stage) -> None:
    size = (30, 41)
    whole = stage.sample_program(draws_of(IDS[:50]), size)
    alone = np.concatenate([stage.sample_program(draws_of(IDS[i : i + 1]), size) for i in range(50)])
    assert np.array_equal(whole, alone)
    assert not np.array_equal(whole, stage.sample_program(draws_of(IDS[:50], name="other"), size))
    assert stage.sample_program(draws_of([]), size).shape == (0, 1, ops.OP_WIDTH)
    chosen = stage.sample_program(draws_of(), size)[:, 0, 0] == ops.WARP
    assert stage.slots() == ((ops.WARP,),)
    assert abs(chosen.mean() - 0.5) < 5 * np.sqrt(0.25 / len(IDS)) + 1e-3  # corners that happen not to move


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomRotation(-10), ValueError, r"degrees must be 0 or more, or \(low, high\), got -10"),
        (lambda: RandomRotation((30, 10)), ValueError, r"degrees must be \(low, high\) with low <= high"),
        (lambda: RandomRotation((1, 2, 3)), ValueError, r"degrees must be a number or \(low, high\)"),
        (lambda: RandomRotation("10"), TypeError, "degrees must be a finite number"),
        (lambda: RandomRotation(10, "bicubic"), ValueError, "interpolation must be one of 'nearest', 'bilinear'"),
        (lambda: RandomRotation(10, expand=True), TypeError, "expand"),
        (lambda: RandomRotation(10, center=(1, 2, 3)), ValueError, r"center must be two numbers \(x, y\) or None"),
        (lambda: RandomRotation(10, fill=128), ValueError, r"fill must be in \[0, 1\] .*, got 128"),
        (lambda: RandomRotation(10, fill=(0, 0)), ValueError, "fill must be three numbers, one a channel"),
        (lambda: RandomRotation(10, fill="red"), TypeError, "fill must be a finite number"),
        (lambda: RandomRotation(10, p=2), ValueError, r"p must be in \[0, 1\]"),
        (lambda: RandomAffine(10, translate=(0.1, 1.2)), ValueError, r"translate must be in \[0, 1\]"),
        (lambda: RandomAffine(10, translate=(-0.1, 0.2)), ValueError, r"translate must be in \[0, 1\]"),
        (lambda: RandomAffine(10, translate=0.1), TypeError, r"translate must be two numbers \(x, y\)"),
        (lambda: RandomAffine(10, scale=(0, 1)), ValueError, "scale must satisfy 0 < low <= high"),
        (lambda: RandomAffine(10, scale=(2, 1)), ValueError, "scale must satisfy 0 < low <= high"),
        (lambda: RandomAffine(10, shear=-5), ValueError, "shear must be 0 or more"),
        (lambda: RandomAffine(10, shear=(0, 90)), ValueError, r"shear must be within \(-90, 90\) degrees"),
        (lambda: RandomAffine(10, shear=(0, 1, 2, 1)), ValueError, r"shear must be \(low, high\) with low <= high"),
        (lambda: RandomAffine(10, shear=(0, 1, 2)), ValueError, "shear must be a number or"),
        (lambda: RandomPerspective(1.5), ValueError, r"distortion_scale must be in \[0, 1\], got 1.5"),
        (lambda: RandomPerspective(0.5, -1), ValueError, r"p must be in \[0, 1\]"),
        (lambda: RandomPerspective(seed="x"), TypeError, "seed must be an int or None"),
    ],
)
def test_bad_parameters_are_refused_when_made(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
