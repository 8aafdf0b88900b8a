"""Automatic augmentation: torchvision's tables by value, timm's magnitudes, and the laws of what is picked."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (wrong parameters are given on purpose)

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from slipstream_kernels import ops
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import _auto_augment, functional

from slipstream.draws import Draws, stream_key
from slipstream.stage_auto import (
    OPERATIONS,
    TIMM_OPERATIONS,
    RandAugment,
    TimmRandAugment,
    TrivialAugmentWide,
    operation_table,
)

IDS = np.arange(20_000)
SIZE = (40, 56)
BYTE = np.float32(1 / 255)


def program_of(stage, ids=IDS, size=SIZE, seed: int = 0, name: str = "test") -> np.ndarray:
    return stage.sample_program(Draws(stream_key(seed, name), ids, 0), size)


class Recorder:
    """Stands for torchvision's functionals and keeps what they are called with."""

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name):
        def call(image, **options):
            self.calls.append((name, options))
            return image

        return call


def call_of(transform, name: str, magnitude: float, monkeypatch) -> tuple[str, dict] | None:
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(_auto_augment, "F", recorder)
        transform._apply_image_or_video_transform(
            torch.zeros(3, *SIZE), name, magnitude, InterpolationMode.BILINEAR, {"others": None}
        )
    assert len(recorder.calls) <= 1
    return recorder.calls[0] if recorder.calls else None


COORDINATES = torch.stack(
    [*torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SIZE), indexing="ij"), torch.ones(SIZE)]
)


def check_warp(row: np.ndarray, name: str, options: dict) -> None:
    """torchvision, run on an image of its own coordinates (y, x, 1), says where it reads."""
    found = getattr(functional, name)(COORDINATES, **options).numpy()
    a, b, c, d, e, f = row[1:7].astype(float) if row[0] else (1, 0, 0, 0, 1, 0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    inside = found[2] > 1 - 1e-9
    assert inside.sum() > 20 and (row[7:9] == 0).all()
    assert np.abs(d * x + e * y + f - 0.5 - found[0])[inside].max() < 1e-4
    assert np.abs(a * x + b * y + c - 0.5 - found[1])[inside].max() < 1e-4


PLAIN = {"autocontrast": ops.AUTOCONTRAST, "equalize": ops.EQUALIZE}
AMOUNTS = {  # torchvision's functional: our operation, its argument, and our parameter of it
    "adjust_brightness": (ops.BRIGHTNESS, "brightness_factor", float),
    "adjust_saturation": (ops.SATURATION, "saturation_factor", float),
    "adjust_contrast": (ops.CONTRAST, "contrast_factor", float),
    "adjust_sharpness": (ops.SHARPNESS, "sharpness_factor", float),
    "posterize": (ops.POSTERIZE, "bits", lambda bits: 2.0**bits),
    "solarize": (ops.SOLARIZE, "threshold", float),
}


@pytest.mark.parametrize("bins", [31, 10, 5, 2])
@pytest.mark.parametrize(("kind", "transform"), [("rand", v2.RandAugment()), ("wide", v2.TrivialAugmentWide())])
def test_every_operation_and_bin_is_torchvisions(kind: str, transform, bins: int, monkeypatch) -> None:
    space = transform._AUGMENTATION_SPACE
    assert sorted(space) == sorted(OPERATIONS)
    table = operation_table(kind, bins, SIZE, "bilinear", None)
    assert table.shape == (14, bins, 2, ops.OP_WIDTH) and table.dtype == np.float32
    for index, name in enumerate(OPERATIONS):
        magnitudes, signed = space[name][0](bins, *SIZE), space[name][1]
        for each in range(bins):
            for sign in (0, 1):
                row = table[index, each, sign]
                magnitude = 0.0 if magnitudes is None else float(magnitudes[each])
                call = call_of(transform, name, -magnitude if signed and sign else magnitude, monkeypatch)
                if call is None:
                    assert name == "Identity" and (row == 0).all()
                elif call[0] in AMOUNTS:
                    code, argument, parameter = AMOUNTS[call[0]]
                    assert row[:2].tolist() == [code, np.float32(parameter(call[1][argument]))]
                    assert (row[2:] == 0).all()
                elif call[0] in PLAIN:
                    assert row[0] == PLAIN[call[0]] and (row[1:] == 0).all()
                else:
                    check_warp(row, *call)


def test_the_table_carries_interpolation_and_fill() -> None:
    turned = OPERATIONS.index("Rotate")
    for interpolation, fill, tail in [
        ("nearest", None, [ops.NEAREST, 0, 0, 0, 0]),
        ("bilinear", (0.25, 0.5, 1.0), [ops.BILINEAR, 0.25, 0.5, 1, 1]),
    ]:
        row = operation_table("wide", 31, SIZE, interpolation, fill)[turned, 9, 0]
        assert row[0] == ops.WARP and row[9:14].tolist() == tail
    stage = TrivialAugmentWide(fill=0.5)
    filled = program_of(stage)[:, 0]
    assert (filled[filled[:, 0] == ops.WARP, 10:14] == [0.5, 0.5, 0.5, 1]).all()


def test_rand_augment_picks_operations_and_signs_alike_and_independently() -> None:
    stage = RandAugment(3, 9)
    program = program_of(stage)
    table = operation_table("rand", 31, SIZE, "nearest", None)[:, 9]
    assert program.shape == (len(IDS), 3, ops.OP_WIDTH) and program.dtype == np.float32
    distinct, place = np.unique(table.reshape(28, -1), axis=0, return_inverse=True)
    share = np.bincount(place.ravel()) / 28
    picked = (program[:, :, None] == distinct).all(3)
    assert (picked.sum(2) == 1).all()
    assert (np.abs(picked.mean(0) - share) < 5 * np.sqrt(share * (1 - share) / len(IDS))).all()
    pairs = picked[:, 0].astype(float).T @ picked[:, 1] / len(IDS)
    expected = np.outer(share, share)
    assert (np.abs(pairs - expected) < 5 * np.sqrt(expected / len(IDS))).all()


def test_trivial_augment_picks_operations_magnitudes_and_signs_alike() -> None:
    program = program_of(TrivialAugmentWide(), np.arange(100_000))[:, 0]
    shares = {code: (program[:, 0] == code).mean() for code in (ops.EQUALIZE, ops.POSTERIZE, ops.SATURATION)}
    for share in shares.values():
        assert abs(share - 1 / 14) < 5 * np.sqrt(1 / 14 / 100_000)
    factor = program[program[:, 0] == ops.SATURATION, 1]
    values, counts = np.unique(factor, return_counts=True)
    assert len(values) == 61 and np.allclose(values, 1 + 0.99 * np.linspace(-1, 1, 61))
    expected = np.where(values == 1, 2, 1) / 62
    counts = counts / len(factor)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected / len(factor))).all()


TIMM_AT = [  # level, rotate, bits kept, solarize at, added, factor away from 1, shear, share of a side
    (9.0, 27.0, 1, 26, 99, 0.81, 0.27, 0.405),
    (10.0, 30.0, 0, 0, 110, 0.9, 0.3, 0.45),
    (5.0, 15.0, 2, 128, 55, 0.45, 0.15, 0.225),
    (7.6, 22.8, 1, 62, 83, 0.684, 0.228, 0.342),
    (0.0, 0.0, 4, 256, 0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("at", TIMM_AT, ids=lambda at: f"level {at[0]}")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_timms_magnitudes(at: tuple, sign: float) -> None:
    level, degrees, bits, threshold, added, away, shear, share = at
    stage = TimmRandAugment(fill=None)

    def row_of(name: str) -> np.ndarray:
        return stage._rows(name, np.array([level / 10]), np.array([sign]), SIZE)[0, 0]

    assert row_of("AutoContrast")[0] == ops.AUTOCONTRAST and row_of("Equalize")[0] == ops.EQUALIZE
    assert row_of("Invert")[0] == ops.INVERT
    for name, code in dict(
        Color=ops.SATURATION, Contrast=ops.CONTRAST, Brightness=ops.BRIGHTNESS, Sharpness=ops.SHARPNESS
    ).items():
        assert row_of(name)[:2].tolist() == [code, np.float32(max(0.1, 1 + sign * away))]
    assert row_of("Posterize")[:2].tolist() == [ops.POSTERIZE, 2**bits]
    assert row_of("Solarize")[:2].tolist() == [ops.SOLARIZE, np.float32(threshold) * BYTE]
    assert row_of("SolarizeAdd")[:3].tolist() == [ops.SOLARIZE_ADD, 128 * BYTE, np.float32(added) * BYTE]
    # Pillow's AFFINE data, and its rotation, which is counter-clockwise
    maps = {
        "ShearX": (1, sign * shear, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, sign * shear, 1, 0),
        "TranslateXRel": (1, 0, sign * share * SIZE[1], 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, sign * share * SIZE[0]),
    }
    for name, expected in maps.items():
        row = row_of(name)
        assert np.allclose(row[1:7], expected, atol=1e-6) if level else (row == 0).all()
    if level:
        check_warp(row_of("Rotate"), "rotate", dict(angle=sign * degrees, interpolation=InterpolationMode.BILINEAR))


def test_timms_other_operations_grow_weaker_or_have_no_sign() -> None:
    stage = TimmRandAugment(increasing=False)
    for level, bits, threshold, factor in [(9.0, 3, 230, 1.72), (10.0, 4, 256, 1.9), (0.0, 0, 0, 0.1)]:
        for sign in (1.0, -1.0):
            rows = [
                stage._rows(name, np.array([level / 10]), np.array([sign]), SIZE)[0, 0, 1]
                for name in ("Posterize", "Solarize", "Color")
            ]
            assert np.allclose(rows, [2**bits, np.float32(threshold) * BYTE, factor], rtol=1e-6)


def test_timm_applies_half_of_its_operations_at_normal_magnitudes() -> None:
    assert len(TIMM_OPERATIONS) == 15
    program = program_of(TimmRandAugment(9.0, 0.5, num_ops=2, p=0.5), np.arange(200_000)).reshape(-1, ops.OP_WIDTH)
    count = len(program)
    some = program[:, 0] != 0
    assert abs(some.mean() - 0.5) < 5 * np.sqrt(0.25 / count)
    codes, counts = np.unique(program[some, 0], return_counts=True)
    assert sorted(codes) == sorted(TimmRandAugment().slots()[0])
    shares = np.where(codes == ops.WARP, 5, 1) / 15
    assert (np.abs(counts / some.sum() - shares) < 5 * np.sqrt(shares * (1 - shares) / some.sum())).all()

    factor = program[program[:, 0] == ops.SATURATION, 1].astype(float)
    assert abs((factor > 1).mean() - 0.5) < 5 * np.sqrt(0.25 / len(factor))
    level = np.abs(factor - 1) / 0.09
    top = level > 10 - 1e-4
    expected = norm.sf(2)
    assert abs(top.mean() - expected) < 5 * np.sqrt(expected / len(level)) and level.max() < 10 + 1e-4
    inside = norm.cdf((level[~top] - 9) / 0.5) / norm.cdf(2)
    assert kstest(inside, "uniform").pvalue > 1e-5


def test_timm_at_a_fixed_magnitude() -> None:
    program = program_of(TimmRandAugment(5, 0, p=1.0, fill=(0.1, 0.2, 0.3)))[:, 0]
    factor = program[program[:, 0] == ops.CONTRAST, 1]
    assert set(np.unique(factor)) == {np.float32(1.45), np.float32(0.55)}
    warps = program[program[:, 0] == ops.WARP]
    assert np.allclose(warps[:, 9:14], [ops.BILINEAR, 0.1, 0.2, 0.3, 1])


STAGES = [RandAugment(2, 15), TrivialAugmentWide(), TimmRandAugment()]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_a_sample_does_not_depend_on_its_batch(stage) -> None:
    whole = program_of(stage, IDS[:50])
    alone = np.concatenate([program_of(stage, IDS[i : i + 1]) for i in range(50)])
    assert np.array_equal(whole, alone) and whole.dtype == np.float32
    assert not np.array_equal(whole, program_of(stage, IDS[:50], name="other"))
    assert program_of(stage, []).shape == (0, *whole.shape[1:])
    assert len(stage.slots()) == whole.shape[1]
    for index, allowed in enumerate(stage.slots()):
        assert set(program_of(stage)[:, index, 0].astype(int)) == {ops.NOTHING, *allowed}
    whole[:] = -1  # a copy of the table's rows: what is drawn next is as it was
    assert np.array_equal(program_of(stage, IDS[:50]), alone)


def test_shifts_follow_the_crops_size_and_are_cut_to_whole_pixels() -> None:
    for size, shifts in [((331, 662), (150, 300)), ((33, 66), (14, 29))]:  # 150 / 331 of a side
        row = program_of(RandAugment(1, 30), size=size)[:, 0]
        shifted = row[(row[:, 0] == ops.WARP) & (row[:, [1, 2, 4, 5]] == [1, 0, 0, 1]).all(1)]
        assert {tuple(pair) for pair in shifted[:, [3, 6]].tolist()} == {
            (shifts[1], 0),
            (-shifts[1], 0),
            (0, shifts[0]),
            (0, -shifts[0]),
        }


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandAugment(0), ValueError, "num_ops must be 1 or more, got 0"),
        (lambda: RandAugment(2.0), TypeError, "num_ops must be an int"),
        (lambda: RandAugment(2, 31), ValueError, r"magnitude must be below num_magnitude_bins \(31\), got 31"),
        (lambda: RandAugment(2, -1), ValueError, "magnitude must be 0 or more"),
        (lambda: RandAugment(2, 0, 1), ValueError, "num_magnitude_bins must be 2 or more, got 1"),
        (
            lambda: RandAugment(interpolation="bicubic"),
            ValueError,
            "interpolation must be one of 'nearest', 'bilinear'",
        ),
        (lambda: RandAugment(fill=128), ValueError, r"fill must be in \[0, 1\]"),
        (lambda: TrivialAugmentWide(0), ValueError, "num_magnitude_bins must be 2 or more"),
        (lambda: TrivialAugmentWide(fill="x"), TypeError, "fill must be a finite number"),
        (lambda: TimmRandAugment(11), ValueError, r"magnitude must be in \[0, 10\], got 11"),
        (lambda: TimmRandAugment(9, -0.5), ValueError, "magnitude_std must be 0 or more, got -0.5"),
        (lambda: TimmRandAugment(9, float("inf")), ValueError, "magnitude_std must be a finite number"),
        (lambda: TimmRandAugment(num_ops=0), ValueError, "num_ops must be 1 or more"),
        (lambda: TimmRandAugment(increasing=1), TypeError, "increasing must be True or False"),
        (lambda: TimmRandAugment(p=1.1), ValueError, r"p must be in \[0, 1\]"),
        (lambda: TimmRandAugment(interpolation="bicubic"), ValueError, "interpolation must be one of"),
        (lambda: TimmRandAugment(seed=2.5), TypeError, "seed must be an int or None"),
    ],
)
def test_bad_parameters_are_refused_when_made(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
