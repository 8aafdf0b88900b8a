"""Blurs, sharpness, warps and erasing on every backend: at every size they can have, alone and in a chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter
from program_oracle import (
    AFFINE,
    BACKENDS,
    FILL,
    FLOAT,
    MEAN,
    PERSPECTIVE,
    STD,
    TOLERANCES,
    Run,
    as_floats,
    batch_of,
    compiled,
    in_interpreter,
    near_a_jump,
    noise,
    program_of,
    warp_row,
    warped,
)
from slipstream_kernels import ops
from slipstream_kernels.ops import ProgramFormat
from slipstream_kernels.reference import run_programs_reference
from torchvision.transforms import InterpolationMode


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


def box_radius(sigma: float) -> float:
    """The radius of the three box blurs that make Pillow's GaussianBlur(sigma): BoxBlur.c, its floats float32."""
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(3)
    length = np.float32(np.sqrt(12.0 * float(variance) + 1.0))
    reach = np.float32(np.floor((float(length) - 1.0) / 2.0))
    part = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance)
    return float(reach + part / (6 * (variance - (reach + 1) * (reach + 1))))


def blurred_by_pillow(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def check_box_blur(run: Run, images: list[np.ndarray], sigmas: list[float]) -> None:
    batches = [batch_of(image).expand(len(sigmas), -1, -1, -1) for image in images]
    program = np.concatenate([program_of([[ops.BOX_BLUR, box_radius(sigma)]]) for sigma in sigmas])
    formats = [ProgramFormat()] * len(images)
    for image, output in zip(images, run(batches, [program] * len(images), formats), strict=True):
        for sigma, pixels in zip(sigmas, output, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), blurred_by_pillow(image, sigma)), (
                image.shape,
                sigma,
            )


def test_a_box_blur_is_pillows_to_the_byte(run: Run, scenes: list[np.ndarray]) -> None:
    """Radii 0.1 to 5, on images down to a pixel, far smaller than the blur."""
    small = run is in_interpreter
    images = [scene[:12, :20] if small else scene[:50, :90] if run is compiled else scene for scene in scenes]
    images += [scenes[0][:h, :w] for h, w in ([(2, 3)] if small else [(2, 3), (5, 4), (3, 90), (97, 2)])]
    sigmas = [0.1, 1.3, 5.0] if small else [*np.linspace(0.1, 2.0, 20), 2.5, 3.1, 3.7, 4.4, 5.0]
    sigmas = sigmas[::5] if run is compiled else sigmas
    check_box_blur(run, images[4:] if small else images, [float(sigma) for sigma in sigmas])


def test_a_box_blur_is_pillows_on_photos(run: Run, photos: list[Path]) -> None:
    size = 16 if run is in_interpreter else 100 if run is compiled else 224
    images = [np.asarray(Image.open(path).convert("RGB"))[100:, 100:][:size, :size] for path in photos[:6]]
    check_box_blur(run, images[:1] if run is in_interpreter else images, [0.3, 1.0, 1.7, 2.0])


def test_a_box_blur_of_floats_is_that_of_their_bytes(run: Run) -> None:
    """Halves to even, as when a crop is stored; and its values are bytes again."""
    image = as_floats(noise(1, 1, 3, 13, 21), 1)
    (output,) = run([image], [program_of([[ops.BOX_BLUR, box_radius(1.2)]])], [FLOAT])
    pixels = (image * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert torch.equal(output, batch_of(blurred_by_pillow(pixels, 1.2)) * torch.tensor(1 / 255))


@pytest.mark.parametrize(
    ("kernel", "sigma"),
    [((1, 1), (0.5, 0.5)), ((3, 3), (0.1, 0.1)), ((9, 9), (0.1, 2.0)), ((23, 23), (2.0, 1.1)), ((7, 31), (40.0, 5.0))],
)
def test_gaussian_blurs_of_every_kernel_are_torchvisions(run: Run, kernel: tuple, sigma: tuple) -> None:
    image = noise(2, 2, 3, 16, 33) if run is in_interpreter else noise(2, 2, 3, 41, 75)
    (output,) = run([image], [program_of([[ops.GAUSSIAN_BLUR, *kernel, *sigma]], 2)], [FLOAT])
    for dtype, tolerance in ((torch.float32, "gaussian_blur"), (torch.float64, "gaussian_blur_float64")):
        expected = tv.gaussian_blur(tv.to_dtype(image, dtype, scale=True), list(kernel), list(sigma))
        assert float((output - expected).abs().max()) <= TOLERANCES[tolerance]


@pytest.mark.parametrize(
    ("size", "kernel"), [((5, 9), (17, 9)), ((1, 6), (11, 1)), ((12, 1), (1, 23)), ((1, 1), (1, 1))]
)
def test_the_largest_kernels_an_image_can_reflect(run: Run, size: tuple, kernel: tuple) -> None:
    image = noise(3, 1, 3, *size)
    (output,) = run([image], [program_of([[ops.GAUSSIAN_BLUR, *kernel, 1.5, 2.5]])], [FLOAT])
    expected = tv.gaussian_blur(tv.to_dtype(image, torch.float32, scale=True), list(kernel), [1.5, 2.5])
    assert float((output - expected).abs().max()) <= TOLERANCES["gaussian_blur"]


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.9])
def test_sharpness_of_every_factor_and_size_is_torchvisions(run: Run, factor: float) -> None:
    """Images without an inside are left alone."""
    images = [noise(4, 1, 3, *size) for size in [(13, 34), (3, 3), (2, 9), (9, 2), (1, 1)]]
    outputs = run(images, [program_of([[ops.SHARPNESS, factor]])] * 5, [FLOAT] * 5)
    for image, output in zip(images, outputs, strict=True):
        expected = tv.adjust_sharpness(tv.to_dtype(image, torch.float32, scale=True), factor)
        assert float((output - expected).abs().max()) <= TOLERANCES["sharpness"]


@pytest.mark.parametrize("nearest", [True, False], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [None, FILL])
@pytest.mark.parametrize("coefficients", [AFFINE, PERSPECTIVE], ids=["affine", "perspective"])
def test_warps_are_torchvisions(run: Run, coefficients: tuple, nearest: bool, fill: tuple | None) -> None:
    image = noise(5, 1, 3, 11, 18) if run is in_interpreter else noise(5, 1, 3, 90, 131)
    row = warp_row(coefficients, nearest, fill)
    (output,) = run([image], [program_of([row])], [FLOAT])
    x = tv.to_dtype(image, torch.float32, scale=True)
    left_out = near_a_jump(x, row)
    difference = (output - warped(x, coefficients, nearest, fill)).abs()[~left_out]
    assert float(difference.max()) <= TOLERANCES["warp_nearest" if nearest else "warp_bilinear"]
    assert int(left_out.sum()) < 0.001 * left_out.numel()


@pytest.mark.parametrize("nearest", [True, False], ids=["nearest", "bilinear"])
def test_a_rotation_about_the_centre_is_torchvisions(run: Run, nearest: bool) -> None:
    """Its places go another way there, through affine_grid."""
    image = noise(6, 1, 3, 20, 27)
    cos, sin = np.cos(np.deg2rad(33.0)), np.sin(np.deg2rad(33.0))
    x0, y0 = 13.5, 10.0
    row = warp_row((cos, -sin, x0 - cos * x0 + sin * y0, sin, cos, y0 - sin * x0 - cos * y0, 0, 0), nearest, FILL)
    (output,) = run([image], [program_of([row])], [FLOAT])
    x = tv.to_dtype(image, torch.float32, scale=True)
    mode = InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR
    kept = ~near_a_jump(x, row)
    difference = (output - tv.rotate(x, 33.0, mode, fill=list(FILL))).abs()[kept]
    assert float(difference.max()) <= TOLERANCES["warp_nearest" if nearest else "warp_bilinear"]


def test_warps_to_the_pixel(run: Run) -> None:
    """No warp at all, a shift by whole pixels, by half a one (nearest: to even), and out of the image."""
    image = noise(7, 1, 3, 9, 14)
    x = tv.to_dtype(image, torch.float32, scale=True)

    def shifted(columns: float, nearest: bool) -> torch.Tensor:
        return run([image], [program_of([warp_row((1, 0, columns, 0, 1, 0, 0, 0), nearest, FILL)])], [FLOAT])[0]

    fill = torch.tensor(FILL).view(1, 3, 1, 1)
    for nearest in (True, False):
        assert float((shifted(0, nearest) - x).abs().max()) <= 1.2e-7
        moved = shifted(3, nearest)
        assert float((moved[..., :-3] - x[..., 3:]).abs().max()) <= 1.2e-7
        assert torch.equal(moved[..., -3:], fill.expand(1, 3, 9, 3))
        assert torch.equal(shifted(99, nearest), fill.expand_as(x)) and torch.equal(
            shifted(-1e30, nearest), fill.expand_as(x)
        )
    half = shifted(0.5, True)  # 0.5, 1.5, 2.5 ... to 0, 2, 2, 4, 4 ...
    assert torch.equal(half[..., :-1], x[..., [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12]])
    assert torch.equal(half[..., -1:], fill.expand(1, 3, 9, 1))
    between = (x[..., :-1] + x[..., 1:]) / 2
    assert float((shifted(0.5, False)[..., :-1] - between).abs().max()) <= 1.2e-7


def test_a_place_that_is_no_number_is_filled(run: Run) -> None:
    """At x = 3.5 the divisor of this perspective is zero, and so are its dividends."""
    image = noise(8, 1, 3, 4, 8)
    row = warp_row((1 / 3.5, 0, -1, 1 / 3.5, 0, -1, -1 / 3.5, 0), False, FILL)
    (output,) = run([image], [program_of([row])], [FLOAT])
    assert bool(((output >= 0) & (output <= 1)).all())


@pytest.mark.parametrize("box", [(-3, -2, 8, 7), (4, 20, 9, 99), (0, 0, 11, 23), (5, 5, 0, 3), (40, 40, 3, 3)])
def test_a_box_that_leaves_its_image_erases_what_is_inside(run: Run, box: tuple) -> None:
    image = noise(9, 1, 3, 11, 23)
    (output,) = run([image], [program_of([[ops.ERASE, *box, *FILL]])], [FLOAT])
    expected = tv.to_dtype(image, torch.float32, scale=True)
    top, left, height, width = box
    inside = expected[:, :, max(top, 0) : top + height, max(left, 0) : left + width]
    inside[:] = torch.tensor(FILL).view(1, 3, 1, 1)
    assert torch.equal(output, expected)


def erased_by_noise(box: tuple, key: int) -> list[float]:
    return [ops.ERASE, *box, 0, 0, 0, 1, *((key >> 16 * piece) & 0xFFFF for piece in range(4))]


def test_noise_is_its_keys(run: Run) -> None:
    """The reference's numbers to 1e-5 (logarithm and cosine are good to 1e-7 of their results, 5 at the most): of every
    key, wherever the box lies and whichever pixels are in it."""
    image = noise(10, 4, 3, 13, 19)
    boxes = [(0, 0, 13, 19), (3, 5, 4, 6), (3, 5, 4, 6), (-1, 2, 50, 5)]
    keys = [0x0123456789ABCDEF, 0x0123456789ABCDEF, 0x0123456789ABCDEE, 0xFFFFFFFFFFFFFFFF]
    program = np.concatenate([program_of([erased_by_noise(*drawn)]) for drawn in zip(boxes, keys, strict=True)])
    (output,) = run([image], [program], [FLOAT])
    (expected,) = run_programs_reference([image], [program], [FLOAT])
    assert float((output - expected).abs().max()) <= 1e-5
    assert torch.equal(output[0, :, 3:7, 5:11], output[1, :, 3:7, 5:11])
    assert bool((output[1, :, 3:7, 5:11] != output[2, :, 3:7, 5:11]).all())


def test_noise_is_normal_and_independent(run: Run) -> None:
    """Moments of n numbers within four of their standard errors, and no correlation between channels, neighbours and
    keys one apart."""
    if run is in_interpreter:
        pytest.skip("some thousand pixels an image")
    side = 150
    program = np.concatenate(
        [program_of([erased_by_noise((0, 0, side, side), key)]) for key in (1, 2, 1 << 32, 1 << 48)]
    )
    (output,) = run([torch.zeros(4, 3, side, side, dtype=torch.uint8)], [program], [FLOAT])
    z = output.double()
    error = z.numel() ** -0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4 * variance**0.5 * error, power
    pairs = [(z[:, 0], z[:, 1]), (z[:, 1], z[:, 2]), (z[..., 1:], z[..., :-1]), (z[..., 1:, :], z[..., :-1, :])]
    pairs += [(z[0], z[other]) for other in (1, 2, 3)]
    for first, second in pairs:
        assert abs(float((first * second).mean())) < 4 * first.numel() ** -0.5


def test_erasing_after_normalize_keeps_its_values(run: Run) -> None:
    image = noise(11, 1, 3, 8, 9)
    rows = [[ops.NORMALIZE, *MEAN, *STD], [ops.ERASE, 1, 2, 3, 4, -2.0, 3.0, 0.5], erased_by_noise((5, 0, 2, 9), 7)]
    (output,) = run([image], [program_of(rows)], [FLOAT])
    x = tv.normalize(tv.to_dtype(image, torch.float32, scale=True), list(MEAN), list(STD))
    assert torch.equal(output[..., 1:4, 2:6], torch.tensor([-2.0, 3.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 3, 4))
    assert torch.equal(output[..., 7:, :], x[..., 7:, :]) and bool((output[..., 5:7, :] < -0.5).any())


def test_a_whole_chain_is_torchvisions_on_photos(run: Run, photos: list[Path]) -> None:
    """DINOv2's second crop: jitter, grey or not, blur, solarize, normalize."""
    size = 16 if run is in_interpreter else 224
    rows = [[ops.BRIGHTNESS, 1.2], [ops.CONTRAST, 0.7], [ops.SATURATION, 1.15], [ops.HUE, 0.07], [ops.NOTHING]]
    rows += [[ops.GAUSSIAN_BLUR, 9, 9, 1.4, 1.4], [ops.SOLARIZE, 128 / 255], [ops.NORMALIZE, *MEAN, *STD]]
    left_out = values = 0
    for path in photos[:1] if run is in_interpreter else photos[:4]:
        image = batch_of(np.asarray(Image.open(path).convert("RGB"))[100:, 100:][:size, :size])
        (output,) = run([image], [program_of(rows)], [FLOAT])
        x = tv.adjust_contrast(tv.adjust_brightness(tv.to_dtype(image, torch.float32, scale=True), 1.2), 0.7)
        x = tv.gaussian_blur(tv.adjust_hue(tv.adjust_saturation(x, 1.15), 0.07), [9, 9], [1.4, 1.4])
        near = near_a_jump(x, rows[6])
        x = tv.normalize(tv.solarize(x, 128 / 255), list(MEAN), list(STD))
        assert float((output - x).abs()[~near].max()) * min(STD) <= TOLERANCES["gaussian_blur"]
        left_out, values = left_out + int(near.sum()), values + near.numel()
    assert left_out < 0.001 * values
