"""Filters without antialias, and flips, of the crop launch: one law on every backend."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import running_compiled
from crop_oracle import random_jobs
from PIL import Image
from slipstream_kernels.crop_jobs import BICUBIC, BILINEAR, FILTER, FLIP, NO_ANTIALIAS, OutputFormat, tap_counts
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.reference import resized_crop_reference
from slipstream_kernels.resized_crop_cpu import resize_weights, resized_crop_cpu


def _on_cpu(images, jobs, formats):
    return resized_crop_cpu(images, jobs, formats)


def _with_triton(images, jobs, formats):
    from slipstream_kernels.resized_crop import resized_crop

    return resized_crop(images, jobs, formats)


_compiled = running_compiled()(_with_triton)


def _on_gpu(images, jobs, formats):
    moved = [images.image(index).cuda() for index in range(len(images))]
    return [crop.cpu() for crop in _with_triton(RaggedBatch.from_images(moved), jobs, formats)]


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


def keys_weight(x: float) -> float:
    """Keys' cubic of a = -0.5, as his paper writes it."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def matrix_without_antialias(length: int, full: int, bicubic: bool) -> np.ndarray:
    """TensorFlow's resize with half-pixel centres, float64 [full, length]: weights inside the image, renormalised."""
    weight = keys_weight if bicubic else lambda x: max(1 - abs(x), 0.0)
    centres = (np.arange(full) + 0.5) * (length / full) - 0.5
    rows = np.array([[weight(source - centre) for source in range(length)] for centre in centres])
    return rows / rows.sum(1, keepdims=True)


def exact_resize(image: np.ndarray, job: np.ndarray) -> np.ndarray:
    """A job of (box, full size, filter) on an image [H, W, 3], never rounded, each pass clamped: float64 [3, h, w]."""
    top, left, height, width, full_h, full_w = (int(value) for value in job[:6])
    box = image[top : top + height, left : left + width].transpose(2, 0, 1).astype(np.float64)
    bicubic = bool(job[FILTER] & BICUBIC)
    across = (box @ matrix_without_antialias(width, full_w, bicubic).T).clip(0, 255)
    return (matrix_without_antialias(height, full_h, bicubic) @ across).clip(0, 255)


def plain_jobs(rng: np.random.Generator, images: list[np.ndarray], size: tuple[int, int], kind: int) -> np.ndarray:
    """Upright whole-window jobs of random boxes with this filter."""
    jobs = random_jobs(rng, images, [size])
    jobs[..., 4:6], jobs[..., 6:8], jobs[..., FLIP], jobs[..., FILTER] = size, 0, 0, kind
    return jobs


def test_every_filter_and_flip_is_the_references(run, scenes: list[np.ndarray]) -> None:
    sizes = [(21, 34), (9, 40)]
    formats = [OutputFormat(size=size) for size in sizes]
    batch = RaggedBatch.from_arrays(scenes)
    for seed in range(1 if run is _with_triton else 4):
        rng = np.random.default_rng(seed)
        jobs = random_jobs(rng, scenes, sizes)
        jobs[..., FILTER] = rng.permutation(np.arange(16) % 4).reshape(8, 2)
        jobs[..., FLIP] = rng.permutation(np.arange(16) % 4).reshape(8, 2)
        expected = resized_crop_reference(batch, jobs, formats)
        for crop, (output, right) in enumerate(zip(run(batch, jobs, formats), expected, strict=True)):
            assert torch.equal(output, right), f"seed {seed}, crop {crop}"


@pytest.mark.parametrize("kind", [BILINEAR, BICUBIC])
def test_without_antialias_is_the_formula_in_float64(scenes: list[np.ndarray], kind: int) -> None:
    """The horizontal pass is rounded to a byte, which the vertical one's weights may add to: half a byte for each."""
    size = (30, 41)
    batch = RaggedBatch.from_arrays(scenes)
    worst = 0.0
    for seed in range(4):
        jobs = plain_jobs(np.random.default_rng(seed), scenes, size, kind + NO_ANTIALIAS)
        (output,) = resized_crop_cpu(batch, jobs, [OutputFormat(size=size)])
        for image, job, found in zip(scenes, jobs[:, 0], output.numpy(), strict=True):
            worst = max(worst, np.abs(found - exact_resize(image, job)).max())
    # absolute weights of a pixel sum to 1 (triangle) or at most 1.25 (Keys), more where some of them fall outside
    assert 0.5 < worst < (1.001 if kind == BILINEAR else 1.3)


def test_without_antialias_differs_from_with_it_only_where_the_box_shrinks(scenes: list[np.ndarray]) -> None:
    image = scenes[0]
    batch = RaggedBatch.from_arrays([image])
    for kind in (BILINEAR, BICUBIC):
        for box, differs in (((20, 30), False), ((40, 48), False), ((90, 48), True), ((40, 200), True)):
            job = np.array([[[5, 6, *box, 40, 48, 0, 0, kind, 0]]], np.int32)
            bare = job.copy()
            bare[..., FILTER] += NO_ANTIALIAS
            (one,), (other,) = (resized_crop_cpu(batch, each, [OutputFormat(size=(40, 48))]) for each in (job, bare))
            assert torch.equal(one, other) is not differs, (kind, box)


def test_without_antialias_bilinear_is_torchs_interpolate(photos: list[Path]) -> None:
    """torch's bilinear without antialias has the same law, in float32. Its bicubic has a = -0.75, so is another one."""
    size = (96, 80)
    images = [np.asarray(Image.open(path).convert("RGB")) for path in photos[:6]]
    batch = RaggedBatch.from_arrays(images)
    for kind, mode, most in ((BILINEAR, "bilinear", 1.001), (BICUBIC, "bicubic", 80.0)):
        jobs = plain_jobs(np.random.default_rng(3), images, size, kind + NO_ANTIALIAS)
        (output,) = resized_crop_cpu(batch, jobs, [OutputFormat(size=size)])
        differences = []
        for index, job in enumerate(jobs[:, 0]):
            top, left, height, width = (int(value) for value in job[:4])
            box = batch.image(index)[:, top : top + height, left : left + width].float()[None]
            theirs = torch.nn.functional.interpolate(box, size, mode=mode, antialias=False).clamp(0, 255)[0]
            differences.append((output[index] - theirs).abs())
        found = torch.stack(differences)
        assert found.max() < most
        assert (found.mean() < 0.4) == (kind == BILINEAR)


@pytest.mark.parametrize("kind", [BILINEAR, BICUBIC, BILINEAR + NO_ANTIALIAS, BICUBIC + NO_ANTIALIAS])
def test_a_vertical_flip_reverses_the_rows(run, scenes: list[np.ndarray], kind: int) -> None:
    sizes = [(37, 33), (8, 50)]
    images = scenes[6:] if run is _with_triton else scenes
    formats = [OutputFormat(size=sizes[0], channels_last=True), OutputFormat(size=sizes[1])]
    batch = RaggedBatch.from_arrays(images)
    jobs = random_jobs(np.random.default_rng(5), images, sizes)
    jobs[..., FILTER], jobs[..., FLIP] = kind, 0
    upright = run(batch, jobs, formats)
    for flip, dims in ((1, (3,)), (2, (2,)), (3, (2, 3))):
        jobs[..., FLIP] = flip
        for one, other in zip(upright, run(batch, jobs, formats), strict=True):
            assert torch.equal(other, one.flip(dims)), flip


def test_a_job_has_as_many_taps_as_its_filter_needs() -> None:
    rng = np.random.default_rng(6)
    for _ in range(200):
        length, full, kind = int(rng.integers(1, 900)), int(rng.integers(1, 300)), int(rng.integers(0, 4))
        job = np.array([[[0, 0, length, length, full, full, 0, 0, kind, 0]]], np.int32)
        taps = int(tap_counts(job)[0, 0, 0])
        _, count, weights = resize_weights(length, full, 0, full, kind)
        assert weights.shape == (full, taps)
        assert count.max() <= taps
        if kind & NO_ANTIALIAS:
            assert taps == (5 if kind & BICUBIC else 3)
        else:
            assert taps == math.ceil((1 + (kind & BICUBIC)) * max(length / full, 1.0)) * 2 + 1
