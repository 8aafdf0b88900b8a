"""The crop launch on planes of YUV 4:2:0, on every backend: to the byte the crop of the RGB that they stand for."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch
from compiled import running_compiled
from crop_oracle import oracle, random_jobs
from gpu_copies import formats_on_gpu
from slipstream_kernels.crop_jobs import FILTER, FLIP, OutputFormat
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.reference import resized_crop_reference
from slipstream_kernels.resized_crop_cpu import resized_crop_cpu
from slipstream_kernels.yuv420 import chroma_size, rgb_of_planes

Images = list[tuple[np.ndarray, ...]]
# Every parity, thin and tiny ones, and rows longer than a step of any kernel.
SIZES = [(66, 150), (61, 79), (40, 33), (33, 140), (3, 90), (75, 2), (1, 1), (1, 64), (64, 1), (2, 3)]


def _on_cpu(images, jobs, formats, out=None):
    return resized_crop_cpu(images, jobs, formats, out)


def _with_triton(images, jobs, formats, out=None):
    from slipstream_kernels.resized_crop import resized_crop

    return resized_crop(images, jobs, formats, out)


_compiled = running_compiled()(_with_triton)


def _on_gpu(images, jobs, formats, out=None):
    moved = [tuple(torch.from_numpy(plane).cuda() for plane in planes) for planes in images.owners]
    return [crop.cpu() for crop in _with_triton(RaggedBatch.from_planes(moved), jobs, formats_on_gpu(formats))]


@pytest.fixture(
    params=[
        pytest.param(_on_cpu, id="cpu"),
        pytest.param(_with_triton, id="interpreter", marks=pytest.mark.interpret),
        pytest.param(_compiled, id="compiled"),
        pytest.param(_on_gpu, id="gpu", marks=pytest.mark.gpu),
    ]
)
def run(request: pytest.FixtureRequest):
    return request.param


def noise(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> Images:
    """Planes of these images: noise, of which many colours lie outside RGB."""
    return [
        tuple(rng.integers(0, 256, shape).astype(np.uint8) for shape in (size, *[chroma_size(*size)] * 2))
        for size in sizes
    ]


def as_rgb(images: Images) -> list[np.ndarray]:
    return [rgb_of_planes(*map(torch.from_numpy, planes)).permute(1, 2, 0).numpy() for planes in images]


def test_every_byte_is_pillows(run) -> None:
    images = noise(np.random.default_rng(0), SIZES)
    pixels, batch = as_rgb(images), RaggedBatch.from_planes(images)
    sizes = [(40, 50), (9, 37)]
    formats = [OutputFormat(size=size) for size in sizes]
    for seed in range(1 if run is _with_triton else 40):
        jobs = random_jobs(np.random.default_rng(seed), pixels, sizes)
        for crop, output in enumerate(run(batch, jobs, formats)):
            for index, image in enumerate(pixels):
                expected = oracle(image, jobs[index, crop], sizes[crop])
                assert np.array_equal(output[index].numpy(), expected), f"seed {seed}, image {index}, crop {crop}"


def test_every_filter_and_flip_is_the_references(run) -> None:
    rng = np.random.default_rng(1)
    images = noise(rng, SIZES[:4] + SIZES[5:7])
    sizes = [(21, 34), (9, 40), (33, 8)]
    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(8))
    formats = [OutputFormat(size=sizes[0], channels_last=True), OutputFormat(size=sizes[1], table=table)]
    formats.append(OutputFormat(size=sizes[2], table=table.to(torch.bfloat16)))
    batch = RaggedBatch.from_planes(images)
    for _ in range(1 if run is _with_triton else 4):
        jobs = random_jobs(rng, as_rgb(images), sizes)
        jobs[..., FILTER] = rng.permutation(np.arange(18) % 4).reshape(6, 3)
        jobs[..., FLIP] = rng.permutation(np.arange(18) % 4).reshape(6, 3)
        for output, expected in zip(
            run(batch, jobs, formats), resized_crop_reference(batch, jobs, formats), strict=True
        ):
            assert torch.equal(output, expected)


def test_every_place_of_a_small_box(run) -> None:
    """Boxes that begin and end at each parity and border, of 1 to 4 pixels a side: nothing but the law decides."""
    (planes,) = images = noise(np.random.default_rng(2), [(6, 7)])
    (pixels,) = as_rgb(images)
    for h, w in ((2, 3),) if run is _with_triton else ((1, 1), (2, 3), (4, 2)):
        places = [(y, x) for y in range(7 - h) for x in range(8 - w)]
        jobs = np.array([[[y, x, h, w, h, w, 0, 0, 0, 0]] for y, x in places], np.int32)
        (output,) = run(RaggedBatch.from_planes([planes] * len(jobs)), jobs, [OutputFormat(size=(h, w))])
        for cut, (y, x) in zip(output, places, strict=True):
            assert np.array_equal(cut.permute(1, 2, 0), pixels[y : y + h, x : x + w]), (y, x, h, w)


def test_planes_and_rgb_share_a_batch(run, scenes: list[np.ndarray]) -> None:
    if run is _on_gpu:
        pytest.skip("what is mixed is the tables, which the interpreter reads too")
    images = noise(np.random.default_rng(3), SIZES[:3])
    planes, rgb = RaggedBatch.from_planes(images), RaggedBatch.from_arrays(scenes[1:3])
    grey = RaggedBatch.from_arrays([scenes[0][:50, :, :1]])
    mixed = planes.with_rows(np.array([1]), rgb.rows(np.array([0]))).with_rows(np.array([0]), grey)
    pixels = [np.repeat(scenes[0][:50, :, :1], 3, axis=2), scenes[1], as_rgb(images)[2]]
    jobs = random_jobs(np.random.default_rng(4), pixels, [(24, 35)])
    (output,) = run(mixed, jobs, [OutputFormat(size=(24, 35))])
    for index, image in enumerate(pixels):
        assert np.array_equal(output[index].numpy(), oracle(image, jobs[index, 0], (24, 35))), index


def test_rows_of_planes_may_lie_apart(run) -> None:
    if run is _on_gpu:
        pytest.skip("the copy on the GPU has none")
    images = noise(np.random.default_rng(5), SIZES[:3])
    wide = [tuple(np.pad(plane, ((1, 2), (3, 4)))[1:-2, 3:-4] for plane in planes) for planes in images]
    upside_down = [tuple(plane[::-1] for plane in planes) for planes in images]
    jobs = random_jobs(np.random.default_rng(6), as_rgb(images), [(24, 35)])
    formats = [OutputFormat(size=(24, 35))]
    for views in (wide, upside_down):
        copies = [tuple(np.ascontiguousarray(plane) for plane in planes) for planes in views]
        (one,), (other,) = (run(RaggedBatch.from_planes(each), jobs, formats) for each in (views, copies))
        assert torch.equal(one, other)


def test_every_element_is_written_and_nothing_beside(run) -> None:
    if run is _on_gpu:
        pytest.skip("outputs are the RGB kernel's, tested in test_resized_crop.py")
    images = noise(np.random.default_rng(7), SIZES[3:7] if run is _with_triton else SIZES)
    jobs = random_jobs(np.random.default_rng(8), as_rgb(images), [(21, 35)])
    results = []
    for poison in (85, 170):
        memory = torch.full((len(images), 3, 30, 50), poison, dtype=torch.uint8)
        inner = memory[:, :, 4:25, 9:44]
        run(RaggedBatch.from_planes(images), jobs, [OutputFormat(size=(21, 35))], out=[inner])
        results.append(inner.clone())
        inner.fill_(poison)
        assert bool((memory == poison).all())
    assert torch.equal(*results)


def test_no_byte_beyond_the_planes_is_read() -> None:
    """Planes between two pages that may not be read: one that is ends the process."""
    page, room = mmap.PAGESIZE, 5 * mmap.PAGESIZE  # SIZES[0] takes 4 pages
    whole = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
    for guard in (0, page + room):
        address = ctypes.c_void_p(int(whole.ctypes.data) + guard)
        assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(page), 0) == 0
    inside = whole[page : page + room]
    for images in ([planes] for planes in noise(np.random.default_rng(9), SIZES)):
        flat = np.concatenate([plane.ravel() for plane in images[0]])
        jobs = random_jobs(np.random.default_rng(10), as_rgb(images), [(15, 30)] * 4)
        formats = [OutputFormat(size=(15, 30))] * 4
        expected = resized_crop_cpu(RaggedBatch.from_planes(images), jobs, formats)
        for start in (0, room - len(flat)):
            inside[start : start + len(flat)] = flat
            views, place = [], start
            for plane in images[0]:
                views.append(inside[place : place + plane.size].reshape(plane.shape))
                place += plane.size
            outputs = resized_crop_cpu(RaggedBatch.from_planes([tuple(views)]), jobs, formats)
            assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
