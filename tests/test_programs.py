"""What a programs launch promises on every backend: dtypes, strides, rounding, nothing written beside, refusals."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from program_oracle import (
    BACKENDS,
    FLOAT,
    MEAN,
    STD,
    Run,
    as_floats,
    in_interpreter,
    jitter,
    mixed,
    noise,
    program_of,
)
from slipstream_kernels import ops
from slipstream_kernels.ops import ProgramFormat
from slipstream_kernels.programs_cpu import run_programs_cpu
from slipstream_kernels.reference import run_programs_reference


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


def test_bytes_are_the_float_results_rounded(run: Run) -> None:
    """round(x * 255), halves to even; within 1e-4 of a half, where float32 may not tell, one step either way."""
    image, program = noise(2, 4, 3, 21, 30), jitter(2, 4)
    formats = [ProgramFormat(dtype=torch.uint8), FLOAT]
    rounded, plain = run([image] * 2, [program] * 2, formats)
    wide = plain * 255
    step = (rounded.float() - wide.round().clamp(0, 255)).abs()
    tie = (wide - wide.floor() - 0.5).abs() <= 1e-4
    assert bool((step[~tie] == 0).all()) and bool((step <= 1).all())
    assert int(tie.sum()) < 0.01 * tie.numel()


def test_exact_halves_round_to_even_and_what_lies_outside_is_clamped(run: Run) -> None:
    """(x - mean) / std with std 2 halves bytes exactly; with std 1/4 they pass 0 and 255."""
    image = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    halves, wide = [ops.NORMALIZE, *[0.0] * 3, *[2.0] * 3], [ops.NORMALIZE, *[0.5] * 3, *[0.25] * 3]
    outputs = run([image] * 2, [program_of([halves]), program_of([wide])], [ProgramFormat()] * 2)
    x = image * torch.tensor(1 / 255)
    halved, widened = x / 2 * 255, (x - 0.5) / 0.25 * 255
    assert int((halved - halved.floor() == 0.5).sum()) > 100 and bool((widened < -1).any() & (widened > 256).any())
    for output, expected in zip(outputs, (halved, widened), strict=True):
        assert torch.equal(output, expected.round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_are_casts_of_the_float_result(run: Run, dtype: torch.dtype, channels_last: bool) -> None:
    image = noise(3, 3, 3, 20, 37)
    program = np.concatenate([jitter(3, 3), program_of([[ops.NORMALIZE, *MEAN, *STD]], 3)], 1)
    fmt = ProgramFormat(dtype=dtype, channels_last=channels_last)
    output, plain = run([image] * 2, [program] * 2, [fmt, FLOAT])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert output.dtype == dtype and output.is_contiguous(memory_format=layout)
    expected = (plain * 255).round().clamp(0, 255) if dtype == torch.uint8 else plain
    assert torch.equal(output, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_of_every_magnitude_are_torchs(run: Run, dtype: torch.dtype) -> None:
    """From below the least float16 to beyond the greatest, ties among them (a deviation is a power of two)."""
    powers = [2.0**power for power in range(-19, 31)]
    rows = [[ops.NORMALIZE, mean, mean, mean, std, std, std] for std in powers for mean in (0.0, 0.4999, 1.0)]
    program = np.concatenate([program_of([row]) for row in rows])
    image = noise(4, 1, 3, 16, 16).expand(len(rows), 3, 16, 16)
    if run is in_interpreter:
        image, program = image[::8], program[::8]
    output, plain = run([image] * 2, [program] * 2, [ProgramFormat(dtype=dtype), FLOAT])
    assert torch.equal(output, plain.to(dtype))


@pytest.mark.parametrize("floats", [False, True], ids=["bytes", "floats"])
def test_any_strides_are_read_in_place(run: Run, floats: bool) -> None:
    h = 8 if run is in_interpreter else 70  # several bands of the CPU kernel's
    image = noise(5, 4, 3, h, 26)
    image = as_floats(image, 5) if floats else image
    wide = image.repeat_interleave(2, 2).repeat_interleave(3, 3)[:, :, ::2, ::3]
    grey = image[:, :1].expand(4, 3, h, 26)
    views = {
        "channels last": (image.contiguous(memory_format=torch.channels_last), image),
        "every other pixel of a larger one": (wide, image),
        "rows and columns exchanged": (image.transpose(2, 3).contiguous().transpose(2, 3), image),
        "channels inside rows": (image.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3), image),
        "a part of a larger one": (image[:, :, 3:-1, 5:20], image[:, :, 3:-1, 5:20].contiguous()),
        "one grey channel": (grey, grey.contiguous()),
        "one image repeated": (image[:1].expand(4, 3, h, 26), image[:1].repeat(4, 1, 1, 1)),
    }
    program, count = jitter(5, 4), len(views)
    outputs = run([view for view, _ in views.values()], [program] * count, [FLOAT] * count)
    for name, output, (_, shown) in zip(views, outputs, views.values(), strict=True):
        # a contrast's sum may run in the order of the memory
        assert float((output - run([shown], [program], [FLOAT])[0]).abs().max()) <= 1e-6, name


@pytest.mark.parametrize("rows", [[[ops.NOTHING]], [[ops.NOTHING]] * 3], ids=["one row", "three rows"])
def test_an_empty_program_changes_no_byte(run: Run, rows: list[list[float]]) -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(6).reshape(2, 3, 16, 16)
    outputs = run([image, image], [program_of(rows, 2)] * 2, [ProgramFormat(), ProgramFormat(channels_last=True)])
    assert all(torch.equal(output, image) for output in outputs)


def test_no_images_and_no_crops(run: Run) -> None:
    image, nobody = noise(6, 1, 3, 4, 5), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    grey = program_of([[ops.GREY]])
    outputs = run([nobody, image], [grey[:0], grey], [FLOAT, FLOAT])
    assert outputs[0].shape == (0, 3, 8, 8)
    assert torch.equal(outputs[1], run([image], [grey], [FLOAT])[0])
    assert run([nobody], [grey[:0]], [ProgramFormat()])[0].dtype == torch.uint8
    assert run([], [], []) == []


@pytest.mark.parametrize("draw", [jitter, mixed], ids=["pixels", "neighbours"])
def test_every_element_is_written_and_nothing_beside(run: Run, draw: Callable[[int, int], np.ndarray]) -> None:
    """Outputs that lie inside larger memory: two runs over two poisons leave the same pixels and untouched borders."""
    dtypes = [torch.uint8, torch.float16, torch.float32, torch.float32]
    h = 4 if run is in_interpreter else 50  # several bands of the CPU kernel's
    image, program = noise(7, 2, 3, h, 35), draw(7, 2)
    formats = [ProgramFormat(dtype=dtype) for dtype in dtypes]
    results = []
    for poison in (85, 170):
        memory = [torch.full((2, 3, h + 9, 50), poison, dtype=dtype) for dtype in dtypes]
        memory[3] = memory[3].contiguous(memory_format=torch.channels_last)
        inner = [tensor[:, :, 4:-5, 9:44] for tensor in memory]
        run([image] * 4, [program] * 4, formats, out=inner)
        results.append([tensor.clone() for tensor in inner])
        for tensor in inner:
            tensor.fill_(poison)
        assert all(bool((tensor == poison).all()) for tensor in memory)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if draw is jitter:  # what quantizes may put single values a level off
        expected = run_programs_reference([image] * 4, [program] * 4, formats)
        steps = [(a.float() - b.float()).abs().max() for a, b in zip(results[0], expected, strict=True)]
        assert all(step <= most for step, most in zip(steps, (1, 1e-3, 1e-5, 1e-5), strict=True))


def test_an_image_does_not_depend_on_its_batch(run: Run) -> None:
    """Nor on the programs beside its own, which may have other operations and more of them."""
    size = (9, 17) if run is in_interpreter else (25, 31)
    image, program = noise(8, 5, 3, *size), mixed(8, 5)
    program[1:3, 4:] = 0
    program[3, 5:] = 0
    (whole,) = run([image], [program], [FLOAT])
    for index in (0, 2, 3):
        (alone,) = run([image[index : index + 1]], [program[index : index + 1]], [FLOAT])
        assert torch.equal(alone[0], whole[index])


def test_threads_do_not_change_a_bit() -> None:
    images = [noise(9, 5, 3, 40, 50), noise(10, 5, 3, 12, 9)]
    programs, formats = [mixed(9, 5), mixed(10, 5)], [FLOAT, ProgramFormat()]
    alone = run_programs_cpu(images, programs, formats)
    with ThreadPoolExecutor(3) as pool:
        shared = run_programs_cpu(images, programs, formats, pool=pool, num_threads=3)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def blur(across: int, down: int, sigma: float = 1.0) -> np.ndarray:
    return program_of([[ops.GAUSSIAN_BLUR, across, down, 1.0, sigma]], 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(image=torch.zeros(2, 3, 4, 4).half()), TypeError, r"images\[0\] must be uint8 or float32"),
        (dict(image=torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), ValueError, r"images\[0\] must be \[B, 3, h, w\]"),
        (dict(image=torch.zeros(3, 4, 4, dtype=torch.uint8)), ValueError, r"images\[0\] must be \[B, 3, h, w\]"),
        (dict(program=program_of([], 2)), ValueError, r"programs\[0\] must be float32 \[2, 1 or more, 16\], got"),
        (dict(program=program_of([[ops.GREY]], 3)), ValueError, r"programs\[0\] must be float32 \[2, 1 or more, 16\]"),
        (dict(program=program_of([[ops.GREY]], 2).astype(np.float64)), ValueError, r"programs\[0\] must be float32"),
        (dict(program=program_of([[ops.NUM_OPS]], 2)), ValueError, r"programs\[0\] holds an unknown operation"),
        (dict(program=blur(9, 3)), ValueError, r"kernel size 9 needs a crop side above 4 to reflect, got \[4, 4\]"),
        (dict(program=blur(3, 9)), ValueError, r"kernel size 9 needs a crop side above 4 to reflect, got \[4, 4\]"),
        (dict(program=blur(4, 3)), ValueError, r"programs\[0\]: a Gaussian blur's kernel size must be odd, got"),
        (dict(program=blur(3, -3)), ValueError, r"programs\[0\]: a Gaussian blur's kernel size must be odd, got"),
        (dict(program=blur(3, 3, 0.0)), ValueError, r"programs\[0\]: a Gaussian blur's sigma must be above 0, got"),
        (dict(program=program_of([[ops.BOX_BLUR, 16]], 2)), ValueError, r"radius must be in \[0, 16\), got \[16"),
        (dict(program=program_of([[ops.BOX_BLUR, np.nan]], 2)), ValueError, r"radius must be in \[0, 16\), got \[nan"),
        (dict(fmt=ProgramFormat(dtype=torch.int32)), TypeError, r"formats\[0\].dtype must be one of"),
        (dict(out=torch.zeros(2, 3, 4, 4)), ValueError, r"out\[0\] must be torch.uint8 \[2, 3, 4, 4\]"),
        (dict(out=torch.zeros(2, 3, 4, 5, dtype=torch.uint8)), ValueError, r"out\[0\] must be torch.uint8"),
    ],
)
def test_what_does_not_fit_is_refused(run: Run, change: dict, error: type[Exception], message: str) -> None:
    given = dict(
        image=torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        program=program_of([[ops.GREY]], 2),
        fmt=ProgramFormat(),
    )
    given |= change
    out = [given["out"]] if "out" in given else None
    with pytest.raises(error, match=message):
        run([given["image"]], [given["program"]], [given["fmt"]], out)


def test_lists_of_unlike_lengths_are_refused(run: Run) -> None:
    image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="images, programs and formats must be of one length, got 1, 1, 2"):
        run([image], [program_of([[ops.GREY]], 2)], [FLOAT, FLOAT])
    with pytest.raises(ValueError, match="out must hold 1 tensors, got 0"):
        run([image], [program_of([[ops.GREY]], 2)], [FLOAT], [])
