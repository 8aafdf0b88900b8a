"""The pixel-ops launch on every backend: torchvision's float functionals to a tolerance, and nothing written beside."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from slipstream_kernels import ops
from slipstream_kernels.ops import OP_WIDTH, ProgramFormat
from slipstream_kernels.programs_cpu import run_programs_cpu
from slipstream_kernels.reference import run_programs_reference
from slipstream_kernels.reference_programs import operation_reference

Run = Callable[..., list[torch.Tensor]]

FLOAT = ProgramFormat(dtype=torch.float32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN = 1e-5  # a value this near to a jump of SOLARIZE or POSTERIZE may land on either side of it

# Greatest absolute difference from torchvision for each operation, in [0, 1]. 6e-8 is half a step of float32 below 1.
TOLERANCES = {
    "nothing": 0.0,  # one multiplication, by the same number
    "brightness": 0.0,  # one more
    "add_brightness": 0.0,  # one addition
    "invert": 0.0,  # one subtraction
    "solarize": 0.0,  # a comparison and a subtraction
    "posterize": 0.0,  # a power of two takes nothing from a product
    "normalize": 0.0,  # a subtraction and an IEEE division
    "grey": 2.5e-7,  # torch fuses multiplications with additions: two steps
    "saturation": 1e-6,  # that, twice the factor of the grey and 1 - factor rounded from float64
    "contrast": 1e-5,  # torch's mean is a float32 sum of the whole image in an order of its own
    "hue": 2e-6,  # a hue is good to 1e-7 of a turn, which is 6e-7 of a channel, and torchvision rounds it eight times
    "program": 1e-5,  # each operation's own, times the factors (to 1.4) of those after it
}

OPERATIONS = {
    "nothing": ([ops.NOTHING], lambda x: x),
    "brightness": ([ops.BRIGHTNESS, 1.375], lambda x: tv.adjust_brightness(x, 1.375)),
    "add_brightness": ([ops.ADD_BRIGHTNESS, -0.125], lambda x: (x - 0.125).clamp(0, 1)),
    "contrast": ([ops.CONTRAST, 0.6], lambda x: tv.adjust_contrast(x, 0.6)),
    "saturation": ([ops.SATURATION, 1.4], lambda x: tv.adjust_saturation(x, 1.4)),
    "hue": ([ops.HUE, -0.1], lambda x: tv.adjust_hue(x, -0.1)),
    "grey": ([ops.GREY], lambda x: tv.rgb_to_grayscale(x, num_output_channels=3)),
    "solarize": ([ops.SOLARIZE, 0.3], lambda x: tv.solarize(x, 0.3)),
    "posterize": ([ops.POSTERIZE, 16], lambda x: tv.posterize(x, 4)),
    "invert": ([ops.INVERT], tv.invert),
    "normalize": ([ops.NORMALIZE, *MEAN, *STD], lambda x: tv.normalize(x, list(MEAN), list(STD))),
}


def _in_interpreter(images, programs, formats, out=None):

    from slipstream_kernels.programs import run_programs

    return run_programs(images, programs, formats, out)


def _on_gpu(images, programs, formats, out=None):

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        # strides survive: the whole of what they span is copied
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
        return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    on_gpu = None if out is None else [moved(tensor) for tensor in out]
    from slipstream_kernels.programs import run_programs

    result = run_programs([moved(image) for image in images], programs, formats, on_gpu)
    if out is not None and on_gpu is not None:
        for host, tensor in zip(out, on_gpu, strict=True):
            memory = torch.empty(0, dtype=host.dtype).set_(host.untyped_storage())
            memory.copy_(torch.empty(0, dtype=host.dtype, device="cuda").set_(tensor.untyped_storage()))
    return [tensor.cpu() for tensor in result]


@pytest.fixture(
    params=[
        pytest.param(run_programs_cpu, id="cpu"),
        pytest.param(_in_interpreter, id="interpreter", marks=pytest.mark.interpret),
        pytest.param(_on_gpu, id="gpu", marks=pytest.mark.gpu),
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


def batch_of(image: np.ndarray) -> torch.Tensor:
    """One image, uint8 [H, W, 3], as a batch of one."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def program_of(rows: list[list[float]], count: int = 1) -> np.ndarray:
    """The same operations for `count` images, float32 [count, K, 16]."""
    program = np.zeros((count, len(rows), OP_WIDTH), np.float32)
    for index, row in enumerate(rows):
        program[:, index, : len(row)] = row
    return program


def near_a_jump(x: torch.Tensor, code: int, amount: float) -> torch.Tensor:
    """Where a value before this operation is within MARGIN of a jump of it."""
    if code == ops.SOLARIZE:
        return (x - amount).abs() <= MARGIN
    if code == ops.POSTERIZE:
        level = (x * amount).round()
        return ((x - level / amount).abs() <= MARGIN) & (level > 0) & (level < amount)
    return torch.zeros_like(x, dtype=torch.bool)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def check_operation(run: Run, name: str, images: list[torch.Tensor]) -> None:
    row, expected_of = OPERATIONS[name]
    outputs = run(images, [program_of([row])] * len(images), [FLOAT] * len(images))
    values = left_out = 0
    for image, output in zip(images, outputs, strict=True):
        x = tv.to_dtype(image, torch.float32, scale=True)
        kept = ~near_a_jump(x, int(row[0]), row[1] if len(row) > 1 else 0.0)
        difference = (output - expected_of(x)).abs()[kept]
        assert difference.numel() == 0 or float(difference.max()) <= TOLERANCES[name], tuple(image.shape)
        values += kept.numel()
        left_out += int((~kept).sum())
    assert left_out < 0.001 * values


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(run: Run, scenes: list[np.ndarray], name: str) -> None:
    size = 24 if run is _in_interpreter else 500
    check_operation(run, name, [batch_of(scene[:size, :size]) for scene in scenes])


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions_on_photos(run: Run, photos: list[Path], name: str) -> None:
    size = 20 if run is _in_interpreter else 224
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


def random_program(rng: np.random.Generator, image: torch.Tensor, length: int) -> np.ndarray:
    """Up to `length` operations in any order, float32 [length, 16]: no value of the image comes near a jump.

    A value at a jump may land on either side, and the contrasts after it would carry that into every pixel, so that no
    pixel could be compared; a jump is drawn until no value is near it, or becomes NOTHING.
    """
    program = np.zeros((length, OP_WIDTH), np.float32)
    ranges = {
        ops.BRIGHTNESS: (0.6, 1.4),
        ops.ADD_BRIGHTNESS: (-0.2, 0.2),
        ops.CONTRAST: (0.6, 1.4),
        ops.SATURATION: (0.6, 1.4),
        ops.HUE: (-0.5, 0.5),
        ops.SOLARIZE: (0.0, 1.0),
    }
    x = image.to(torch.float32) * (1 / 255)
    for row in program[: rng.integers(0, length + 1)]:
        code = rng.choice([*ranges, ops.NOTHING, ops.GREY, ops.POSTERIZE, ops.INVERT])
        for _ in range(20):
            amount = rng.uniform(*ranges[code]) if code in ranges else 2.0 ** rng.integers(1, 6)
            if not near_a_jump(x, code, amount).any():
                row[:2] = code, amount
                break
        x = operation_reference(x, int(row[0]), row[1:].tolist())
    if rng.integers(0, 2):
        program[-1, :7] = [ops.NORMALIZE, *MEAN, *STD]
    return program


def test_random_programs_are_the_references(run: Run) -> None:
    """Every image its own operations in its own order, over crops of unlike sizes, counts and lengths."""
    seen = np.zeros(ops.NUM_OPS, int)
    for seed in range(1 if run is _in_interpreter else 30):
        rng = np.random.default_rng(seed)
        images = [noise(seed, 6, 3, 19, 33), noise(seed + 1, 4, 3, 8, 8), noise(seed + 2, 3, 3, 1, 40)]
        programs = [
            np.stack([random_program(rng, image, length) for image in batch])
            for batch, length in zip(images, (8, 3, 6), strict=True)
        ]
        formats = [ProgramFormat(dtype=torch.float32) for _ in range(3)]
        expected = run_programs_reference(images, programs, formats)
        for output, wanted, program in zip(run(images, programs, formats), expected, programs, strict=True):
            # a division by a deviation of 0.22 makes differences as much larger
            scale = np.where((program[..., 0] == ops.NORMALIZE).any(1), min(STD), 1.0)
            difference = (output - wanted).abs().amax((1, 2, 3)).numpy() * scale
            assert difference.max() <= TOLERANCES["program"], f"seed {seed}"
            seen += np.bincount(program[..., 0].astype(int).ravel(), minlength=ops.NUM_OPS)
    assert run is _in_interpreter or seen[: ops.NORMALIZE + 1].min() > 20


def jitter(seed: int, count: int) -> np.ndarray:
    """A colour jitter of its own for each image, float32 [count, 4, 16]."""
    rng = np.random.default_rng(seed)
    program = np.zeros((count, 4, OP_WIDTH), np.float32)
    for row in program:
        row[:, 0] = rng.permutation([ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION, ops.HUE])
        row[:, 1] = np.where(row[:, 0] == ops.HUE, rng.uniform(-0.2, 0.2, 4), rng.uniform(0.5, 1.5, 4))
    return program


def test_bytes_are_the_float_results_rounded(run: Run) -> None:
    """round(x * 255), halves to even; within 1e-4 of a half, where float32 may not tell, one step either way."""
    image, program = noise(2, 4, 3, 21, 30), jitter(2, 4)
    formats = [ProgramFormat(dtype=torch.uint8), FLOAT]
    as_bytes, as_floats = run([image] * 2, [program] * 2, formats)
    wide = as_floats * 255
    step = (as_bytes.float() - wide.round().clamp(0, 255)).abs()
    tie = (wide - wide.floor() - 0.5).abs() <= 1e-4
    assert bool((step[~tie] == 0).all()) and bool((step <= 1).all())
    assert int(tie.sum()) < 0.01 * tie.numel()


def test_exact_halves_round_to_even_and_what_lies_outside_is_clamped(run: Run) -> None:
    """(x - mean) / std with std 2 halves bytes exactly; with std 1/4 they pass 0 and 255."""
    image = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    halves, wide = [ops.NORMALIZE, 0, 0, 0, 2, 2, 2], [ops.NORMALIZE, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
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
    if run is _in_interpreter:
        image, program = image[::8], program[::8]
    output, plain = run([image] * 2, [program] * 2, [ProgramFormat(dtype=dtype), FLOAT])
    assert torch.equal(output, plain.to(dtype))


def test_any_strides_are_read_in_place(run: Run) -> None:
    h = 8 if run is _in_interpreter else 70  # several bands of the CPU kernel's
    image = noise(5, 4, 3, h, 26)
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


def test_every_element_is_written_and_nothing_beside(run: Run) -> None:
    """Outputs that lie inside larger memory: two runs over two poisons leave the same pixels and untouched borders."""
    dtypes = [torch.uint8, torch.float16, torch.float32, torch.float32]
    h = 4 if run is _in_interpreter else 50  # several bands of the CPU kernel's
    image, program = noise(7, 2, 3, h, 35), jitter(7, 2)
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
    expected = run_programs_reference([image] * 4, [program] * 4, formats)
    steps = [(a.float() - b.float()).abs().max() for a, b in zip(results[0], expected, strict=True)]
    assert all(step <= most for step, most in zip(steps, (1, 1e-3, 1e-5, 1e-5), strict=True))


def test_an_image_does_not_depend_on_its_batch(run: Run) -> None:
    image, program = noise(8, 5, 3, 25, 31), jitter(8, 5)
    (whole,) = run([image], [program], [FLOAT])
    for index in (0, 4):
        (alone,) = run([image[index : index + 1]], [program[index : index + 1]], [FLOAT])
        assert torch.equal(alone[0], whole[index])


def test_threads_do_not_change_a_bit() -> None:
    images = [noise(9, 5, 3, 40, 50), noise(10, 5, 3, 12, 9)]
    programs, formats = [jitter(9, 5), jitter(10, 5)], [FLOAT, ProgramFormat()]
    alone = run_programs_cpu(images, programs, formats)
    with ThreadPoolExecutor(3) as pool:
        shared = run_programs_cpu(images, programs, formats, pool=pool, num_threads=3)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_large_image_has_torchvisions_contrast() -> None:
    """Two megapixels, nearly white: where a plain float32 sum would lose the mean's last digits."""
    image = noise(11, 1, 3, 1200, 1700) // 16 + 240
    (output,) = run_programs_cpu([image], [program_of([[ops.CONTRAST, 0.0]])], [FLOAT])
    x = image.double() / 255
    mean = (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).mean()
    assert float((output - mean).abs().max()) < 2e-7


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
