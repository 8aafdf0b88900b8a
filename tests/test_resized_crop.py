"""The crop launch on every backend: to the byte what Pillow gives, and nothing written that should not be."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import running_compiled
from crop_oracle import oracle, random_jobs
from gpu_copies import bring_back, formats_on_gpu, to_gpu
from PIL import Image
from slipstream_kernels.crop_jobs import OutputFormat, empty_outputs
from slipstream_kernels.crop_tables import pack_tables
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.reference import resized_crop_reference
from slipstream_kernels.resized_crop_cpu import resized_crop_cpu

Run = Callable[..., list[torch.Tensor]]


def _on_cpu(images, jobs, formats, out=None):
    return resized_crop_cpu(images, jobs, formats, out)


def _in_interpreter(images, jobs, formats, out=None):
    from slipstream_kernels.resized_crop import resized_crop

    return resized_crop(images, jobs, formats, out)


_compiled = running_compiled()(_in_interpreter)


def _on_gpu(images, jobs, formats, out=None):
    from slipstream_kernels.resized_crop import resized_crop

    moved = [to_gpu(images.image(index)) for index in range(len(images))]
    none = torch.empty(0, 3, 1, 1, dtype=torch.uint8, device="cuda")  # an empty list has no device
    there = None if out is None else [to_gpu(tensor) for tensor in out]
    result = resized_crop(RaggedBatch.from_images(moved or none), jobs, formats_on_gpu(formats), there)
    if out is not None and there is not None:
        bring_back(out, there)
    return [tensor.cpu() for tensor in result]


@pytest.fixture(
    params=[
        pytest.param(_on_cpu, id="cpu"),
        pytest.param(_in_interpreter, id="interpreter", marks=pytest.mark.interpret),
        pytest.param(_compiled, id="compiled"),
        pytest.param(_on_gpu, id="gpu", marks=pytest.mark.gpu),
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


def differing(output: torch.Tensor, images: list[np.ndarray], jobs: np.ndarray, size: tuple[int, int]) -> int:
    """Bytes in which a crop's output differs from the oracle, over the whole batch."""
    return sum(
        int((output[index].numpy() != oracle(image, jobs[index], size)).sum()) for index, image in enumerate(images)
    )


# Neither a multiple of the kernel's tile nor all smaller than it.
SMALL_SIZES = [(40, 50), (33, 20), (7, 37)]


def test_every_byte_is_pillows(run: Run, scenes: list[np.ndarray]) -> None:
    rounds = 1 if run is _in_interpreter else 40
    formats = [OutputFormat(size=size) for size in SMALL_SIZES]
    batch = RaggedBatch.from_arrays(scenes)
    for seed in range(rounds):
        jobs = random_jobs(np.random.default_rng(seed), scenes, SMALL_SIZES)
        for crop, output in enumerate(run(batch, jobs, formats)):
            assert differing(output, scenes, jobs[:, crop], SMALL_SIZES[crop]) == 0, f"round {seed}, crop {crop}"


def test_boxes_many_steps_long_are_pillows(run: Run, scenes: list[np.ndarray]) -> None:
    """Weights of up to 270 taps, several of the kernel's steps along both axes, in both filters."""
    image = np.tile(scenes[0], (2, 2, 1))
    jobs = np.array([[[3, 5, 450, 600, 7, 9, 0, 0, filter_, 0]] for filter_ in (0, 1)], np.int32)
    (output,) = run(RaggedBatch.from_arrays([image, image]), jobs, [OutputFormat(size=(7, 9))])
    assert differing(output, [image, image], jobs[:, 0], (7, 9)) == 0


def test_thousands_of_boxes_over_real_photos(photos: list[Path]) -> None:
    sizes = [(224, 224), (96, 96), (97, 131)]
    formats = [OutputFormat(size=size) for size in sizes]
    rng = np.random.default_rng(1)
    checked = 0
    with ThreadPoolExecutor(2) as pool:
        for begin in range(0, len(photos), 16):
            images = [np.asarray(Image.open(path).convert("RGB")) for path in photos[begin : begin + 16]]
            batch = RaggedBatch.from_arrays(images)
            for _ in range(6):
                jobs = random_jobs(rng, images, sizes)
                outputs = resized_crop_cpu(batch, jobs, formats, pool=pool, num_threads=2)
                for crop, output in enumerate(outputs):
                    assert differing(output, images, jobs[:, crop], sizes[crop]) == 0
                checked += jobs.shape[0] * jobs.shape[1]
    assert checked >= 18 * len(photos)


def test_a_few_boxes_over_real_photos_in_every_backend(run: Run, photos: list[Path]) -> None:
    images = [np.asarray(Image.open(path).convert("RGB")) for path in photos[:: len(photos) // 3][:2]]
    jobs = random_jobs(np.random.default_rng(2), images, [(48, 48)])
    (output,) = run(RaggedBatch.from_arrays(images), jobs, [OutputFormat(size=(48, 48))])
    assert differing(output, images, jobs[:, 0], (48, 48)) == 0


def strided_views(image: np.ndarray) -> dict[str, tuple[torch.Tensor | np.ndarray, np.ndarray]]:
    """Views of one image in many layouts, each with the [H, W, 3] pixels that it shows."""
    planar = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    wide = torch.from_numpy(np.repeat(np.repeat(image, 2, axis=0), 3, axis=1)).permute(2, 0, 1)[:, ::2, ::3]
    grey = torch.from_numpy(image[:, :, :1].copy()).permute(2, 0, 1)
    return {
        "planar": (planar, image),
        "every other pixel of a larger one": (wide, image),
        "rows and columns exchanged": (planar.transpose(1, 2), image.transpose(1, 0, 2)),
        "mirrored and upside down": (image[::-1, ::-1].transpose(2, 0, 1), image[::-1, ::-1]),
        "channels reversed": (image[:, :, ::-1].transpose(2, 0, 1), image[:, :, ::-1]),
        "one grey channel": (grey, np.repeat(image[:, :, :1], 3, axis=2)),
        "one pixel repeated": (planar[:, :1, :1].expand(3, 20, 30), np.broadcast_to(image[0, 0], (20, 30, 3))),
    }


def test_any_strides_are_read_in_place(run: Run, scenes: list[np.ndarray]) -> None:
    views = strided_views(scenes[3][:90])
    if run is _on_gpu:  # torch has no negative strides, so neither has anything on a GPU
        views = {name: (view, shown) for name, (view, shown) in views.items() if isinstance(view, torch.Tensor)}
    images = [np.ascontiguousarray(shown) for _, shown in views.values()]
    batch = RaggedBatch.from_images([view for view, _ in views.values()])
    jobs = random_jobs(np.random.default_rng(3), images, [(24, 35)])
    (output,) = run(batch, jobs, [OutputFormat(size=(24, 35))])
    for index, name in enumerate(views):
        assert (
            differing(output[index : index + 1], images[index : index + 1], jobs[index : index + 1, 0], (24, 35)) == 0
        ), name


def test_a_uniform_batch_is_the_list_of_its_images(scenes: list[np.ndarray]) -> None:
    images = torch.from_numpy(np.stack([scenes[0], scenes[0][::-1]])).permute(0, 3, 1, 2)
    jobs = random_jobs(np.random.default_rng(4), [scenes[0]] * 2, [(32, 40)])
    formats = [OutputFormat(size=(32, 40))]
    (whole,) = resized_crop_cpu(RaggedBatch.from_images(images), jobs, formats)
    (single,) = resized_crop_cpu(RaggedBatch.from_images(list(images)), jobs, formats)
    assert torch.equal(whole, single)
    assert differing(whole, [scenes[0], np.ascontiguousarray(scenes[0][::-1])], jobs[:, 0], (32, 40)) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_byte_goes_through_its_channels_table(
    run: Run, scenes: list[np.ndarray], dtype: torch.dtype, channels_last: bool
) -> None:
    table = torch.randint(0, 60000, (3, 256), generator=torch.Generator().manual_seed(5)).to(dtype)
    jobs = random_jobs(np.random.default_rng(6), scenes[:3], [(20, 37)] * 2)
    jobs[:, 1] = jobs[:, 0]
    formats = [OutputFormat(size=(20, 37)), OutputFormat(size=(20, 37), table=table, channels_last=channels_last)]
    plain, mapped = run(RaggedBatch.from_arrays(scenes[:3]), jobs, formats)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert mapped.dtype == dtype and mapped.is_contiguous(memory_format=layout)
    for channel in range(3):
        assert torch.equal(mapped[:, channel], table[channel][plain[:, channel].long()])


def test_every_element_is_written_and_nothing_beside(run: Run, scenes: list[np.ndarray]) -> None:
    """Outputs that lie inside larger memory: two runs over two poisons leave the same crops and untouched borders."""
    size = (21, 35)
    table = torch.arange(768).reshape(3, 256).to(torch.float32)
    formats = [OutputFormat(size=size), OutputFormat(size=size, table=table)]
    batch = RaggedBatch.from_arrays(scenes)
    jobs = random_jobs(np.random.default_rng(7), scenes, [size, size])
    results = []
    for poison in (85, 170):
        memory = [torch.full((len(scenes), 3, 30, 50), poison, dtype=fmt.dtype) for fmt in formats]
        inner = [tensor[:, :, 4:25, 9:44] for tensor in memory]
        run(batch, jobs, formats, out=inner)
        results.append([tensor.clone() for tensor in inner])
        for tensor in inner:
            tensor.fill_(poison)
        assert all(bool((tensor == poison).all()) for tensor in memory)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_reference_agrees(run: Run, scenes: list[np.ndarray]) -> None:
    sizes = [(12, 15), (30, 9)]
    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(8))
    formats = [OutputFormat(size=sizes[0], channels_last=True), OutputFormat(size=sizes[1], table=table)]
    jobs = random_jobs(np.random.default_rng(9), scenes[:4], sizes)
    batch = RaggedBatch.from_arrays(scenes[:4])
    for output, expected in zip(run(batch, jobs, formats), resized_crop_reference(batch, jobs, formats), strict=True):
        assert torch.equal(output, expected) and output.stride() == expected.stride()


def test_an_empty_batch_gives_empty_crops(run: Run) -> None:
    (output,) = run(RaggedBatch.from_images([]), np.zeros((0, 1, 10), np.int32), [OutputFormat(size=(8, 8))])
    assert output.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "change",
    [
        {0: -1},  # above the image
        {0: 20},  # below it: top + height > 240
        {3: 400},  # wider than the image
        {4: 5},  # a window larger than the full size
        {6: 1},  # a window that leaves the full size
        {2: 0},  # an empty box
        {8: 4},  # no such filter
        {8: -1},
        {9: 4},  # no such flip
        {9: -1},
    ],
)
def test_a_job_that_does_not_fit_is_refused(run: Run, scenes: list[np.ndarray], change: dict[int, int]) -> None:
    job = np.array([[[10, 10, 230, 200, 16, 16, 0, 0, 0, 0]]], np.int32)
    formats = [OutputFormat(size=(16, 16))]
    run(RaggedBatch.from_arrays(scenes[:1]), job, formats)
    for column, value in change.items():
        job[0, 0, column] = value
    with pytest.raises(ValueError, match=r"jobs\[0, 0\] does not fit"):
        run(RaggedBatch.from_arrays(scenes[:1]), job, formats)


def test_a_job_whose_rows_pass_an_int32_is_refused() -> None:
    tall = RaggedBatch.from_images([torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, 1 << 26, 1)])
    formats = [OutputFormat(size=(1, 31)), OutputFormat(size=(1, 32))]
    job = [0, 0, 1 << 26, 1, 1, 31, 0, 0, 0, 0]
    pack_tables(tall, np.array([[job]], np.int32), formats[:1])
    with pytest.raises(ValueError, match=r"jobs\[0, 1\] has 2147483648 pixels .* 67108864 rows by .* 32 columns"):
        pack_tables(tall, np.array([[job, [*job[:5], 32, *job[6:]]]], np.int32), formats)


def test_an_output_of_another_shape_is_refused(run: Run, scenes: list[np.ndarray]) -> None:
    if run is _on_gpu:
        pytest.skip("the same check, on the host")
    job = np.array([[[0, 0, 9, 9, 16, 16, 0, 0, 0, 0]]], np.int32)
    with pytest.raises(ValueError, match=r"out\[0\] must be torch.uint8 \[1, 3, 16, 16\]"):
        run(RaggedBatch.from_arrays(scenes[:1]), job, [OutputFormat(size=(16, 16))], out=[torch.empty(1, 3, 16, 16)])


def test_torchs_default_device_changes_nothing(run: Run, scenes: list[np.ndarray]) -> None:
    formats = [OutputFormat(size=(9, 7))]
    jobs = random_jobs(np.random.default_rng(2), scenes[:2], [(9, 7)])
    images = RaggedBatch.from_arrays(scenes[:2])
    expected = run(images, jobs, formats)[0]
    with torch.device("meta"):
        got = run(images, jobs, formats)[0]
    assert torch.equal(got, expected)


@pytest.mark.interpret
def test_threads_may_share_the_interpreter(scenes: list[np.ndarray]) -> None:
    images = RaggedBatch.from_arrays(scenes[:2])
    formats = [OutputFormat(size=(20, 24)), OutputFormat(size=(9, 7))]
    jobs = random_jobs(np.random.default_rng(1), scenes[:2], [fmt.size for fmt in formats])
    expected = _on_cpu(images, jobs, formats)
    with ThreadPoolExecutor(3) as pool:
        for crops in pool.map(lambda _: _in_interpreter(images, jobs, formats), range(6)):
            assert all(torch.equal(crop, right) for crop, right in zip(crops, expected, strict=True))


@pytest.mark.interpret
@pytest.mark.parametrize("crops", [1, 10])
def test_two_launches_whatever_the_number_of_crops(
    monkeypatch: pytest.MonkeyPatch, scenes: list[np.ndarray], crops: int
) -> None:
    import slipstream_kernels.resized_crop as module

    launches = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.kernel = getattr(module, name)
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **options):
                launches.append(self.name)
                return self.kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr("slipstream_kernels.launch.InterpretedFunction", Counted)
    for name in ("resize_weights_kernel", "resized_crop_kernel"):
        monkeypatch.setattr(module, name, Counted(name))
    sizes = [(8 + crop, 8) for crop in range(crops)]
    jobs = random_jobs(np.random.default_rng(10), scenes[4:], sizes)
    module.resized_crop(RaggedBatch.from_arrays(scenes[4:]), jobs, [OutputFormat(size=size) for size in sizes])
    assert launches == ["resize_weights_kernel", "resized_crop_kernel"]


def test_triton_on_cpu_tensors_says_how_to_run_there(scenes: list[np.ndarray]) -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    job = np.array([[[0, 0, 9, 9, 16, 16, 0, 0, 0, 0]]], np.int32)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _in_interpreter(RaggedBatch.from_arrays(scenes[:1]), job, [OutputFormat(size=(16, 16))])


def test_threads_do_not_change_a_byte(scenes: list[np.ndarray]) -> None:
    sizes = [(64, 64), (20, 30)]
    formats = [OutputFormat(size=size) for size in sizes]
    jobs = random_jobs(np.random.default_rng(11), scenes, sizes)
    batch = RaggedBatch.from_arrays(scenes)
    alone = resized_crop_cpu(batch, jobs, formats)
    with ThreadPoolExecutor(3) as pool:
        shared = resized_crop_cpu(
            batch, jobs, formats, out=empty_outputs(len(batch), formats, batch.device), pool=pool, num_threads=3
        )
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_an_image_view_shows_the_images_own_pixels(scenes: list[np.ndarray]) -> None:
    batch = RaggedBatch.from_arrays([scenes[1]])
    view = batch.image(0)
    del batch
    assert np.array_equal(view.numpy(), scenes[1].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4), TypeError, "images must be uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError, r"images must be \[B, 3, H, W\]"),
        ([torch.zeros(4, 4, dtype=torch.uint8)], ValueError, r"images\[0\] must be \[3, H, W\]"),
        ([torch.zeros(3, 0, 4, dtype=torch.uint8)], ValueError, r"images\[0\] must be"),
        (["photo.jpg"], TypeError, r"images\[0\] must be a torch.Tensor"),
    ],
)
def test_images_of_the_wrong_kind_are_refused(images, error, message) -> None:
    with pytest.raises(error, match=message):
        RaggedBatch.from_images(images)
