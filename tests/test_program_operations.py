"""Each operation of a program on every backend, and any order of them: torchvision's functionals, to a tolerance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from program_oracle import (
    AFFINE,
    BACKENDS,
    FILL,
    FLOAT,
    MEAN,
    OPERATIONS,
    PERSPECTIVE,
    STD,
    TOLERANCES,
    Run,
    as_floats,
    batch_of,
    compiled,
    holds,
    in_interpreter,
    near_a_jump,
    noise,
    program_of,
    warp_row,
)
from slipstream_kernels import ops
from slipstream_kernels.ops import OP_WIDTH
from slipstream_kernels.programs_cpu import run_programs_cpu
from slipstream_kernels.reference import run_programs_reference
from slipstream_kernels.reference_programs import operation_reference


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


def check_operation(run: Run, name: str, images: list[torch.Tensor]) -> None:
    row, expected_of = OPERATIONS[name]
    images = [image for image in images if holds(row, image.shape[2:])]
    outputs = run(images, [program_of([row])] * len(images), [FLOAT] * len(images))
    values = left_out = 0
    for image, output in zip(images, outputs, strict=True):
        x = tv.to_dtype(image, torch.float32, scale=True)
        kept = ~near_a_jump(x, row)
        difference = (output - expected_of(x)).abs()[kept]
        assert difference.numel() == 0 or float(difference.max()) <= TOLERANCES[name], tuple(image.shape)
        values += kept.numel()
        left_out += int((~kept).sum())
    assert left_out < 0.001 * values


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(run: Run, scenes: list[np.ndarray], name: str) -> None:
    size = 24 if run is in_interpreter else 150 if run is compiled else 500
    images = [batch_of(scene[:size, :size]) for scene in scenes]
    check_operation(run, name, images)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions_on_floats(run: Run, scenes: list[np.ndarray], name: str) -> None:
    size = 24 if run is in_interpreter else 90 if run is compiled else 200
    check_operation(run, name, [as_floats(batch_of(scene[:size, :size]), 1) for scene in scenes])


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions_on_photos(run: Run, photos: list[Path], name: str) -> None:
    size = 20 if run is in_interpreter else 120 if run is compiled else 224
    images = [np.asarray(Image.open(path).convert("RGB"))[100:, 100:][:size, :size] for path in photos[:3]]
    check_operation(run, name, [batch_of(image) for image in images])


@pytest.mark.parametrize("shift", [-0.5, -0.26, 1e-4, 0.1, 0.4, 0.5])
def test_the_hue_of_every_kind_of_pixel_is_torchvisions(run: Run, shift: float) -> None:
    """Channels in every order, equal in pairs, equal in all, zero and full."""
    levels = torch.tensor([0, 1, 2, 127, 128, 254, 255], dtype=torch.uint8)
    image = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 7, 49)
    (output,) = run([image], [program_of([[ops.HUE, shift]])], [FLOAT])
    expected = tv.adjust_hue(tv.to_dtype(image, torch.float32, scale=True), shift)
    assert float((output - expected).abs().max()) <= TOLERANCES["hue"]


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 254, 255])
def test_a_threshold_at_a_bytes_own_value_falls_as_torchvisions_does(run: Run, threshold: int) -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    (output,) = run([image], [program_of([[ops.SOLARIZE, threshold / 255]])], [FLOAT])
    assert torch.equal(output, tv.solarize(tv.to_dtype(image, torch.float32, scale=True), threshold / 255))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0])
def test_factors_that_clamp_and_that_change_nothing(run: Run, name: str, factor: float) -> None:
    image = noise(1, 1, 3, 15, 17)
    code = {"brightness": ops.BRIGHTNESS, "contrast": ops.CONTRAST, "saturation": ops.SATURATION}[name]
    (output,) = run([image], [program_of([[code, factor]])], [FLOAT])
    expected = getattr(tv, f"adjust_{name}")(tv.to_dtype(image, torch.float32, scale=True), factor)
    assert float((output - expected).abs().max()) <= TOLERANCES[name]


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_channels_of_one_level_and_of_two(run: Run, name: str) -> None:
    """What has no range to stretch is left alone; an image with few pixels beside its brightest is not equalized."""
    image = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    image[:, 0] = 77
    image[:, 1, :, ::2] = 255
    image[:, 2, 3, 4] = 9
    row, expected_of = OPERATIONS[name]
    (output,) = run([image], [program_of([row])], [FLOAT])
    assert torch.equal(output, expected_of(tv.to_dtype(image, torch.float32, scale=True)))


@pytest.mark.parametrize("name", ["contrast", "autocontrast", "equalize"])
def test_a_whole_images_reading_comes_after_what_stands_before_it(run: Run, name: str) -> None:
    """And each of two in one program has its own."""
    image = noise(12, 1, 3, 20, 31)
    row, expected_of = OPERATIONS[name]
    (output,) = run([image], [program_of([[ops.INVERT], row, [ops.SOLARIZE_ADD, 0.4, 0.25], row])], [FLOAT])
    x = expected_of(1 - tv.to_dtype(image, torch.float32, scale=True))
    x = expected_of(torch.where(x < 0.4, (x + 0.25).clamp(0, 1), x))
    assert float((output - x).abs().max()) <= TOLERANCES["program"]


RANGES = {
    ops.BRIGHTNESS: (0.6, 1.4),
    ops.ADD_BRIGHTNESS: (-0.2, 0.2),
    ops.CONTRAST: (0.6, 1.4),
    ops.SATURATION: (0.6, 1.4),
    ops.HUE: (-0.5, 0.5),
    ops.SOLARIZE: (0.0, 1.0),
    ops.SHARPNESS: (0.3, 1.4),
    ops.BOX_BLUR: (0.0, 3.0),
}
ORDERED = [code for code in range(ops.NUM_OPS) if code != ops.NORMALIZE]


def random_row(rng: np.random.Generator, code: int, size: tuple[int, ...]) -> list[float]:
    """An operation's row, its parameters drawn for an image of this size (h, w)."""
    height, width = size
    if code in RANGES:
        return [code, rng.uniform(*RANGES[code])]
    if code == ops.POSTERIZE:
        return [code, 2.0 ** rng.integers(1, 6)]
    if code == ops.SOLARIZE_ADD:
        return [code, rng.uniform(0, 1), rng.uniform(-0.3, 0.3)]
    if code == ops.GAUSSIAN_BLUR:
        across, down = (2 * int(rng.integers(0, min(side, 6))) + 1 for side in (width, height))
        return [code, across, down, *rng.uniform(0.1, 2, 2)]
    if code == ops.WARP:
        coefficients = rng.normal((AFFINE, PERSPECTIVE)[rng.integers(0, 2)], [0.05] * 6 + [0] * 2)
        return warp_row(tuple(coefficients), bool(rng.integers(0, 2)), FILL if rng.integers(0, 2) else None)
    if code == ops.ERASE:
        return [code, *map(float, [*rng.integers(-3, size), *rng.integers(0, size), *rng.uniform(0, 1, 3)])]
    return [code]


def random_program(rng: np.random.Generator, image: torch.Tensor, length: int) -> np.ndarray:
    """Up to `length` operations in any order, float32 [length, 16]: no value of the image comes near a jump.

    A value at a jump may land on either side, and an operation after it would carry that into other pixels, so that
    none could be compared; a jump is drawn until no value is near it, or becomes NOTHING.
    """
    program = np.zeros((length, OP_WIDTH), np.float32)
    x = image * torch.tensor(1 / 255)
    for row in program[: rng.integers(0, length + 1)]:
        # a jump is rarely far from every value but the bytes that it begins with
        code = rng.choice([ops.EQUALIZE, ops.BOX_BLUR] if row is program[0] and rng.random() < 0.2 else ORDERED)
        for _ in range(20):
            drawn = random_row(rng, code, image.shape[1:])
            candidate = program_of([drawn])[0, 0]
            if not near_a_jump(x, candidate).any():
                row[:] = candidate
                break
        x = operation_reference(x, int(row[0]), row[1:].tolist())
    if rng.integers(0, 2):
        program[-1] = program_of([[ops.NORMALIZE, *MEAN, *STD]])[0, 0]
    return program


def test_random_programs_are_the_references(run: Run) -> None:
    """Every image its own operations in its own order, over crops of unlike sizes, counts and lengths."""
    seen = np.zeros(ops.NUM_OPS, int)
    for seed in range(1 if run is in_interpreter else 20):
        rng = np.random.default_rng(seed)
        images = [noise(seed, 6, 3, 19, 33), noise(seed + 1, 6, 3, 8, 8), noise(seed + 2, 3, 3, 1, 40)]
        programs = [
            np.stack([random_program(rng, image, length) for image in batch])
            for batch, length in zip(images, (8, 5, 6), strict=True)
        ]
        formats = [FLOAT] * 3
        expected = run_programs_reference(images, programs, formats)
        for output, wanted, program in zip(run(images, programs, formats), expected, programs, strict=True):
            # a division by a deviation of 0.22 makes differences as much larger
            scale = np.where((program[..., 0] == ops.NORMALIZE).any(1), min(STD), 1.0)
            difference = (output - wanted).abs().amax((1, 2, 3)).numpy() * scale
            assert difference.max() <= TOLERANCES["program"], f"seed {seed}"
            seen += np.bincount(program[..., 0].astype(int).ravel(), minlength=ops.NUM_OPS)
    assert run is in_interpreter or seen.min() > 8, seen


def test_a_large_image_has_torchvisions_contrast() -> None:
    """Two megapixels, nearly white: where a plain float32 sum would lose the mean's last digits."""
    image = noise(11, 1, 3, 1200, 1700) // 16 + 240
    (output,) = run_programs_cpu([image], [program_of([[ops.CONTRAST, 0.0]])], [FLOAT])
    x = image.double() / 255
    mean = (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).mean()
    assert float((output - mean).abs().max()) < 2e-7
