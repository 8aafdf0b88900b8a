"""How Triton runs programs in passes: which launches, over what, and that passes, batches and memory change no bit."""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from PIL import Image, ImageFilter
from program_oracle import AFFINE, FILL, FLOAT, batch_of, jitter, mixed, noise, program_of, warp_row
from slipstream_kernels import ops, programs
from slipstream_kernels._math import quotient_of
from slipstream_kernels.ops import ProgramFormat
from slipstream_kernels.programs import check_spans, count_launches, pack_programs, run_programs
from slipstream_kernels.schedule import join_programs, plan_launches
from slipstream_kernels.task_rows import rows_and_columns

from slipstream.stage_blur import box_radius

KERNELS = {
    "readings_kernel": "readings",
    "equalize_kernel": "equalize",
    "pixels_kernel": "pixels",
    "gaussian_blur_kernel": "blur",
    "box_blur_kernel": "box blur",
    "box_line_kernel": "box blur line",
}
JITTER = [[ops.BRIGHTNESS, 1.2], [ops.CONTRAST, 0.7], [ops.SATURATION, 1.3], [ops.HUE, 0.1]]
GAUSSIAN = [ops.GAUSSIAN_BLUR, 5, 7, 0.8, 1.4]
ERASE = [ops.ERASE, 2, 3, 4, 5, *[0.0] * 3, 1, 7, 7, 7, 7]
DINO = [*JITTER, [ops.GREY], GAUSSIAN, [ops.SOLARIZE, 0.5], [ops.NORMALIZE, *[0.5] * 3, *[0.25] * 3]]
NOTHING = [ops.NOTHING]
# Every kind of pass, in an order in which each follows another kind.
LONG = [
    *JITTER,
    GAUSSIAN,
    [ops.ERASE, 1, 2, 3, 4, 0.25, 0.5, 0.75],
    [ops.AUTOCONTRAST],
    [ops.EQUALIZE],
    [ops.SHARPNESS, 1.8],
    warp_row(AFFINE, False, FILL),
    [ops.BOX_BLUR, 0.6],
    [ops.CONTRAST, 1.4],
    [ops.BOX_BLUR, 2.2],
    [ops.POSTERIZE, 16],
    GAUSSIAN,
    ERASE,
]


@pytest.mark.parametrize(
    ("rows", "launches"),
    [
        ([NOTHING], ["pixels"]),
        ([[ops.GREY], [ops.INVERT], ERASE], ["pixels"]),
        (JITTER, ["readings", "pixels"]),
        ([*JITTER, *JITTER], ["readings", "pixels"] * 2),
        (DINO, ["readings", "pixels", "blur"]),
        ([[ops.EQUALIZE]], ["equalize", "pixels"]),
        ([GAUSSIAN, *JITTER], ["blur", "readings", "pixels"]),
        ([[ops.SHARPNESS, 2.0], [ops.GREY]], ["pixels"]),
        ([[ops.BOX_BLUR, 1.9]], ["box blur"]),
        ([[ops.BOX_BLUR, 2.0]], ["box blur line"] * 6),
    ],
)
def test_the_launches_of_a_program(rows: list[list[float]], launches: list[str]) -> None:
    """However many crops and images have it, and whichever rows are nothing."""
    for count, crops in ((1, 1), (5, 3)):
        spread = [row for one in rows for row in (NOTHING, one)]
        assert count_launches([program_of(spread, count)] * crops) == launches


def test_a_blur_that_some_images_skip_takes_one_launch_for_all() -> None:
    whole, blurred_only = program_of(DINO), program_of([GAUSSIAN])
    batch = [np.concatenate([whole, whole]), program_of([[ops.GREY]], 3), blurred_only, blurred_only[:0]]
    assert count_launches(batch) == ["readings", "pixels", "blur"]
    plan = plan_launches(join_programs(batch))
    assert [launch.images.tolist() for launch in plan.launches] == [[0, 1], [0, 1, 2, 3, 4], [0, 1, 5]]


def test_no_programs_take_no_launch() -> None:
    assert count_launches([]) == count_launches([program_of([NOTHING], 0)]) == []


class Recorder:
    """A kernel that notes its launches: its kind and its grid."""

    def __init__(self, kernel: Any, kind: str, notes: list[tuple[str, int]]) -> None:
        self.kernel, self.kind, self.notes = kernel, kind, notes

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.notes.append((self.kind, grid[0]))
        return self.kernel[grid]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for name, kind in KERNELS.items():
        recorder = Recorder(getattr(programs, name), kind, found)
        if name == "pixels_kernel":
            monkeypatch.setattr(programs, "check_device", lambda device, kernel: None)
        monkeypatch.setattr(programs, name, recorder)
    return found


@pytest.mark.usefixtures("triton_on_cpu")
def test_every_launch_is_counted_and_no_program_is_idle(notes: list[tuple[str, int]]) -> None:
    images = [noise(1, 3, 3, 20, 40), noise(2, 2, 3, 8, 12), noise(3, 4, 3, 8, 12)]
    batch = [program_of(LONG, 3), program_of(DINO, 2), program_of([[ops.GREY]], 4)]
    batch[0][1] = batch[0][2] = 0.0
    run_programs(images, batch, [FLOAT] * 3)
    assert [kind for kind, _ in notes] == count_launches(batch)
    assert len(notes) > 15
    # blocks of 512 pixels: two for each image of the first crop, one for the others'
    assert notes[:2] == [("readings", 2 + 2), ("pixels", 3 * 2 + 2 + 4)]
    # strips of 32 columns: two of the first crop's image, one of each of the second's
    assert notes[2] == ("blur", 2 + 2)
    assert dict(notes)["equalize"] == 3
    assert notes[-1] == ("blur", 2)


@pytest.mark.usefixtures("triton_on_cpu")
def test_dino_is_three_launches(notes: list[tuple[str, int]]) -> None:
    images = [noise(seed, 2, 3, 9, 9) for seed in range(5)]
    run_programs(images, [program_of(DINO, 2)] * 5, [FLOAT] * 5)
    assert [kind for kind, _ in notes] == ["readings", "pixels", "blur"]


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("size", [(17, 23), (70, 18), (5, 40)], ids=str)
def test_a_chain_is_its_operations_one_after_another(size: tuple[int, int]) -> None:
    """To the bit, over all its passes: what is written between them is what the next operation alone would be given."""
    (together,) = run_programs([noise(1, 1, 3, *size)], [program_of(LONG)], [FLOAT])
    image = noise(1, 1, 3, *size)
    for row in LONG:
        (image,) = run_programs([image], [program_of([row])], [FLOAT])
    assert torch.equal(together, image)


@pytest.mark.usefixtures("triton_on_cpu")
def test_tables_made_ahead_give_the_same_bits_each_time_they_are_used() -> None:
    """From shapes, strides and dtypes alone, for whatever memory the images turn out to have."""
    images = [noise(1, 1, 3, 4, 6), noise(2, 2, 3, 9, 5)[:, :, ::2], noise(3, 0, 3, 4, 4)]
    batch = [program_of(LONG[:9]), program_of(DINO, 2), program_of([[ops.GREY]], 0)]
    formats = [FLOAT, ProgramFormat(dtype=torch.float16, channels_last=True), FLOAT]
    shapes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in images]
    tables = pack_programs(shapes, batch, formats)
    for pixels in (images, [image.flip(3) for image in images]):
        chosen = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in images]
        for image, given in zip(chosen, pixels, strict=True):
            image.copy_(given)
        ahead, at_once = run_programs(chosen, tables, formats), run_programs(chosen, batch, formats)
        assert all(torch.equal(a, b) for a, b in zip(ahead, at_once, strict=True))
    for wrong, fmt in ((images[0].contiguous(memory_format=torch.channels_last), FLOAT), (images[0], formats[1])):
        with pytest.raises(ValueError, match="that the programs were packed for"):
            run_programs([wrong, *images[1:]], tables, [fmt, *formats[1:]])


@pytest.mark.usefixtures("triton_on_cpu")
def test_unlike_images_do_not_depend_on_their_batch() -> None:
    drawn = [mixed(1, 1), jitter(2, 1), program_of(LONG), program_of([GAUSSIAN, [ops.EQUALIZE]])]
    batch = join_programs(drawn)
    image = noise(4, len(batch), 3, 11, 19)
    fmt = ProgramFormat(dtype=torch.bfloat16, channels_last=True)
    (whole, other) = run_programs([image, image[:2, :, :7, :9]], [batch, batch[1:3]], [fmt, FLOAT])
    for index in range(len(batch)):
        (alone,) = run_programs([image[index : index + 1]], [batch[index : index + 1]], [fmt])
        assert torch.equal(alone[0], whole[index]), index
    (alone,) = run_programs([image[:2, :, :7, :9]], [batch[1:3]], [FLOAT])
    assert torch.equal(alone, other)


@pytest.mark.usefixtures("triton_on_cpu")
def test_what_memory_held_before_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes between passes, readings and outputs start as garbage: everything that is read was written."""
    empty = torch.empty
    batch, images = [program_of(LONG, 2), mixed(5, 3)], [noise(5, 2, 3, 19, 9), noise(6, 3, 3, 6, 30)]
    results = []
    for poison in (float("nan"), 3e38):

        def poisoned(*args: Any, poison: float = poison, **options: Any) -> torch.Tensor:
            tensor = empty(*args, **options)
            return tensor.fill_(poison) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, "empty", poisoned)
        results.append(run_programs(images, batch, [FLOAT] * 2))
        monkeypatch.setattr(torch, "empty", empty)
    for first, second in zip(*results, strict=True):
        assert bool(first.isfinite().all()) and torch.equal(first, second)


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("sigma", [2.3, 2.6, 9.0, 16.0])
def test_boxes_of_either_scheme_are_pillows(sigma: float) -> None:
    """To the byte on both sides of the radius from which a box takes six launches, on images smaller than it too."""
    pixels = np.random.default_rng(7).integers(0, 256, (70, 37, 3), dtype=np.uint8)
    images = [pixels, pixels[:9, :5], pixels[:1]]
    row = [ops.BOX_BLUR, float(box_radius(np.array(sigma)))]
    outputs = run_programs([batch_of(x) for x in images], [program_of([row])] * 3, [ProgramFormat()] * 3)
    for image, output in zip(images, outputs, strict=True):
        blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
        assert np.array_equal(output[0].permute(1, 2, 0).numpy(), blurred)


@triton.jit(do_not_specialize=["first", "width"])
def places_kernel(out, first, width, BLOCK: tl.constexpr):
    y, x = rows_and_columns(first, width, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), y)
    tl.store(out + BLOCK + tl.arange(0, BLOCK), x)


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("width", [1, 2, 3, 7, 96, 223, 224, 511, 513, 4099, 2**17 + 1, 2**18 - 1])
def test_a_pixels_row_and_column_need_no_division(width: int) -> None:
    out = torch.empty(2, 512, dtype=torch.int32)
    for first in (0, 512, width // 2, width - 1, 3 * width - 100, 5 * width):
        first = max(first, 0)
        places_kernel[(1,)](out, first, width, BLOCK=512)
        pixel = np.arange(first, first + 512)
        assert np.array_equal(out.numpy(), np.stack(np.divmod(pixel, width)))


@triton.jit
def quotients_kernel(out, x, d, reciprocal, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, quotient_of(tl.load(x + place), tl.load(d + place), tl.load(reciprocal + place)))


def test_quotients_by_a_reciprocal_are_ieees(triton_on_cpu: str) -> None:
    """Deviations of every size, among them those of all ones, whose reciprocals are the hardest."""
    if triton_on_cpu == "interpreter" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("this interpreter rounds a multiply-add twice")
    rng = np.random.default_rng(8)
    d = np.exp2(rng.uniform(-10, 6, 2**18)).astype(np.float32)
    d[::4] = (d[::4].view(np.int32) | 0x7FFFFF).view(np.float32)
    x = (rng.standard_normal(len(d)) * np.exp2(rng.integers(-20, 3, len(d)))).astype(np.float32)
    out = torch.empty(len(d))
    quotients_kernel[(len(d) // 1024,)](out, *map(torch.from_numpy, (x, d, np.float32(1) / d)), BLOCK=1024)
    assert np.array_equal(out.numpy(), x / d)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 1, 2**18), r"images\[0\] is 262144 pixels wide, allowed is less than 262144"),
        ((1, 3, 2**22, 1), r"images\[0\] is 4194304 pixels high, allowed is less than 4194304"),
        ((1, 3, 2**15, 2**15), r"images\[0\] or its output spans 1073741824 elements, allowed is less than 2\*\*30"),
    ],
)
def test_images_beyond_the_kernels_numbers_are_refused(shape: tuple[int, ...], message: str) -> None:
    image = torch.zeros(1, dtype=torch.uint8).expand(shape)
    with pytest.raises(ValueError, match=message):
        check_spans([image], [image])
