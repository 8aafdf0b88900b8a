"""Colour stages: their laws, whole chains against torchvision v2, and the same crops on every way to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream_kernels import ops
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from slipstream import (
    ColorJitter,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomInvert,
    RandomPosterize,
    RandomResizedCrop,
    RandomSolarize,
    SlipstreamDataset,
    SlipstreamLoader,
    ToDtype,
)
from slipstream.draws import Draws, stream_key
from slipstream.pipeline import Pipeline
from slipstream.stage_color import RandomAutocontrast, RandomEqualize

IDS = np.arange(20_000)
DINO = [
    RandomHorizontalFlip(),
    ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
    RandomGrayscale(0.2),
    RandomSolarize(128, p=0.2),
    Normalize(),
]


def program_of(stage, count: int = len(IDS), seed: int = 0) -> np.ndarray:
    return stage.sample_program(Draws(stream_key(seed, "test"), IDS[:count], 0), (8, 8))


def by_torchvision(image: torch.Tensor, program: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """One uint8 [3, h, w] image through its program with torchvision's functionals, and where it is near a jump."""
    image = functional.to_dtype(image, torch.float32, scale=True)
    near = torch.zeros(image.shape[1:], dtype=torch.bool)
    for code, a, *rest in program.tolist():
        if code == ops.BRIGHTNESS:
            image = functional.adjust_brightness(image, a)
        elif code == ops.ADD_BRIGHTNESS:
            image = (image + a).clamp(0, 1)
        elif code == ops.CONTRAST:
            image = functional.adjust_contrast(image, a)
        elif code == ops.SATURATION:
            image = functional.adjust_saturation(image, a)
        elif code == ops.HUE:
            image = functional.adjust_hue(image, a)
        elif code == ops.GREY:
            image = functional.rgb_to_grayscale(image, 3)
        elif code == ops.SOLARIZE:
            near |= ((image - a).abs() < 1e-5).any(0)
            image = functional.solarize(image, a)
        elif code == ops.POSTERIZE:
            steps = image * a
            near |= ((steps - steps.round()).abs() < 1e-5 * a).any(0)
            image = functional.posterize(image, int(a).bit_length() - 1)
        elif code == ops.INVERT:
            image = functional.invert(image)
        elif code == ops.NORMALIZE:
            image = functional.normalize(image, [a, *rest[:2]], rest[2:5])
    return image, near


def images_of(scenes: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes[:4]]


def test_a_whole_chain_is_torchvisions(scenes: list[np.ndarray]) -> None:
    images, ids = images_of(scenes) * 6, np.arange(24)
    pipeline = Pipeline([RandomResizedCrop(64), *DINO], seed=1)
    cut = _run(Pipeline([RandomResizedCrop(64), RandomHorizontalFlip()], seed=1), images, ids)
    out, plan = _run(pipeline, images, ids), pipeline.draw(_sizes(images), ids, 0)
    left_out = 0
    for row in range(len(ids)):
        expected, near = by_torchvision(cut[row], plan.steps[""][0][row])
        left_out += int(near.sum())
        # 1e-5 in [0, 1] is 1e-5 / 0.224 once normalised
        assert (out[row] - expected).abs()[:, ~near].max() <= 1e-5 / 0.224
    assert left_out < 1e-3 * len(ids) * 64 * 64


def _sizes(images: list[torch.Tensor]) -> np.ndarray:
    return np.array([image.shape[1:] for image in images], np.int32)


def _run(pipeline: Pipeline, images: list[torch.Tensor], ids: np.ndarray, backend: str = "cpu") -> torch.Tensor:
    from slipstream_kernels.ragged import RaggedBatch

    batch = RaggedBatch.from_images(images)
    plan = pipeline.draw(batch.sizes, ids, 0)
    return pipeline.run(batch, pipeline.prepare(batch, plan, backend), backend)[0]


def test_jitter_draws_torchvisions_law() -> None:
    program = program_of(ColorJitter(0.4, 0.3, (0.5, 0.9), 0.1, p=0.8))
    applied = (program[:, :, 0] != 0).any(1)
    assert abs(applied.mean() - 0.8) < 0.015  # five standard deviations
    program = program[applied]
    assert (np.sort(program[:, :, 0], axis=1) == [1, 3, 4, 5]).all()
    for code, (low, high) in {1: (0.6, 1.4), 3: (0.7, 1.3), 4: (0.5, 0.9), 5: (-0.1, 0.1)}.items():
        amount = program[program[:, :, 0] == code][:, 1]
        assert low <= amount.min() and amount.max() <= high
        assert abs(amount.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * len(amount))
    _, counts = np.unique(program[:, :, 0], axis=0, return_counts=True)
    assert len(counts) == 24
    expected = len(program) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 1e-3


@pytest.mark.parametrize("amount", [0.4, 1.0, 1.7, (0.3, 0.6), [1.0, 2.5]])
def test_the_ranges_of_factors_are_torchvisions(amount) -> None:
    ours, theirs = ColorJitter(amount, amount, amount), v2.ColorJitter(amount, amount, amount)
    for name in ("brightness", "contrast", "saturation"):
        assert getattr(ours, name) == pytest.approx(tuple(getattr(theirs, name)))
    assert ColorJitter(1.0, additive_brightness=True).brightness == (-1.0, 1.0)
    with pytest.raises(ValueError, match=r"brightness must be \(low, high\) with -1 <= low <= high, got 1.5"):
        ColorJitter(1.5, additive_brightness=True)


def test_fixed_order_and_additive_brightness() -> None:
    program = program_of(ColorJitter(0.4, 0.4, 0.2, 0.1, order="fixed", additive_brightness=True), 1000)
    assert (program[:, :, 0] == [2, 3, 4, 5]).all()
    assert -0.4 <= program[:, 0, 1].min() < -0.35 and 0.35 < program[:, 0, 1].max() <= 0.4


def test_an_amount_of_zero_is_no_operation() -> None:
    assert (program_of(ColorJitter(hue=0.1), 100)[:, :, 0].sum(1) == ops.HUE).all()
    assert (program_of(ColorJitter(), 100) == 0).all()


@pytest.mark.parametrize(
    ("stage", "code", "parameter"),
    [
        (RandomGrayscale(0.3), ops.GREY, 0),
        (RandomSolarize(128, p=0.3), ops.SOLARIZE, np.float32(128) * np.float32(1 / 255)),
        (RandomPosterize(4, p=0.3), ops.POSTERIZE, 16),
        (RandomInvert(0.3), ops.INVERT, 0),
        (RandomAutocontrast(0.3), ops.AUTOCONTRAST, 0),
        (RandomEqualize(0.3), ops.EQUALIZE, 0),
    ],
)
def test_p_is_the_share_of_samples(stage, code, parameter) -> None:
    program = program_of(stage)
    applied = program[:, 0, 0] == code
    assert abs(applied.mean() - 0.3) < 0.0165
    assert (program[applied][:, 0, 1] == parameter).all() and (program[~applied] == 0).all()
    assert stage.slots() == ((code,),)
    assert program_of(stage, 0).shape == (0, 1, ops.OP_WIDTH)


def test_stages_of_a_crop_draw_independently() -> None:
    pipeline = Pipeline([RandomResizedCrop(8), RandomGrayscale(0.5), RandomGrayscale(0.5), RandomInvert(0.5)])
    rows = pipeline.programs[0].chain.sample_steps(IDS, 0, (8, 8))[0][:, :, 0] != 0
    correlation = np.corrcoef(rows.T.astype(float))
    assert np.abs(correlation - np.eye(3)).max() < 5 / np.sqrt(len(IDS))


def test_an_explicit_seed_yokes_stages() -> None:
    crops = MultiRandomResizedCrop({"a": dict(size=8), "b": dict(size=8), "c": dict(size=8)})
    shared = ColorJitter(0.4, 0.4, 0.2, 0.1, seed=5)
    pipeline = Pipeline(
        [crops, MultiCropPipeline({"a": [shared], "b": [shared], "c": [ColorJitter(0.4, 0.4, 0.2, 0.1)]})]
    )
    a, b, c = (program.chain.sample_steps(IDS[:50], 0, (8, 8))[0] for program in pipeline.programs)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_gradients_are_refused_and_not_lost() -> None:
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    jitter = ColorJitter(0.4, seed=0)
    with pytest.raises(ValueError, match=r"images must not require gradients.*detach\(\)"):
        jitter(images)
    with pytest.raises(ValueError, match=r"crops\['a'\] must not require gradients"):
        MultiCropPipeline({"a": [jitter]})({"a": images})
    expected = jitter(images.detach(), sample_ids=range(2))
    with torch.no_grad():
        assert torch.equal(jitter(images, sample_ids=range(2)), expected)
    assert Normalize()(images).requires_grad and RandomHorizontalFlip()(images).requires_grad


def test_a_stage_by_itself_gives_the_pipelines_crops(scenes: list[np.ndarray]) -> None:
    images, ids = images_of(scenes), np.array([5, 9, 2, 77])
    stages = {"a": DINO[:4], "b": [ColorJitter(0.4, 0.4, 0.2, 0.1), ToDtype(torch.bfloat16, scale=True)]}
    crops = {"a": dict(size=40), "b": dict(size=24)}
    pipeline = Pipeline([MultiRandomResizedCrop(crops), MultiCropPipeline(stages)], seed=3)
    from slipstream_kernels.ragged import RaggedBatch

    batch = RaggedBatch.from_images(images)
    plan = pipeline.draw(batch.sizes, ids, 0)
    together = pipeline.run(batch, pipeline.prepare(batch, plan, "cpu"), "cpu")
    apart = MultiCropPipeline(stages, seed=3)(
        MultiRandomResizedCrop(crops, seed=3)(images, sample_ids=ids), sample_ids=ids
    )
    assert together[0].dtype == torch.uint8 and together[1].dtype == torch.bfloat16
    for crop, name in zip(together, "ab", strict=True):
        assert torch.equal(crop, apart[name])


def test_a_sample_does_not_depend_on_its_batch_or_the_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{index}.jpg")
    data = SlipstreamDataset(local_dir=tmp_path)

    def epoch(**options) -> dict[int, torch.Tensor]:
        stages = [RandomResizedCrop(24), *DINO]
        with SlipstreamLoader(
            data, pipelines={"image": stages}, seed=7, device="cpu", verbose=False, **options
        ) as loader:
            return {
                i: crop for batch in loader for i, crop in zip(batch["_indices"].tolist(), batch["image"], strict=True)
            }

    expected = epoch(batch_size=1)
    for options in (dict(batch_size=3), dict(batch_size=10, shuffle=True, num_threads=3)):
        got = epoch(**options)
        assert sorted(got) == list(range(10)) and all(torch.equal(got[i], expected[i]) for i in got)


def test_uint8_in_uint8_out_rounds_once(scenes: list[np.ndarray]) -> None:
    image = torch.from_numpy(scenes[0]).permute(2, 0, 1)[None]
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    as_bytes = jitter(image, sample_ids=[3])
    floats = Pipeline([RandomResizedCrop(8), jitter, ToDtype(torch.float32, scale=True)])
    assert floats.programs[0].chain.steps[0].dtype == torch.float32
    expected, _ = by_torchvision(image[0], program_of_call(jitter, 3))
    assert as_bytes.dtype == torch.uint8
    assert ((as_bytes[0] - (expected * 255)).abs() <= 0.5 + 255e-5).all()


def program_of_call(stage, sample_id: int) -> np.ndarray:
    pipeline = Pipeline([RandomResizedCrop(8), stage])
    return pipeline.programs[0].chain.sample_steps(np.array([sample_id]), 0, (64, 64))[0][0]


@pytest.mark.interpret
def test_the_interpreter_agrees_with_the_cpu(scenes: list[np.ndarray]) -> None:
    images, ids = images_of(scenes), np.arange(4)
    pipeline = Pipeline([RandomResizedCrop(24), *DINO], seed=2)
    difference = (_run(pipeline, images, ids) - _run(pipeline, images, ids, "triton")).abs()
    assert difference.max() <= 1e-5 / 0.224


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ColorJitter(-0.1), ValueError, "brightness must be 0 or more, got -0.1"),
        (lambda: ColorJitter(contrast=(1.2, 0.8)), ValueError, r"contrast must be \(low, high\)"),
        (lambda: ColorJitter(saturation=(-0.5, 1)), ValueError, "saturation must be"),
        (lambda: ColorJitter(hue=0.6), ValueError, r"hue must be in \[0, 0.5\]"),
        (lambda: ColorJitter(hue=(-0.7, 0.1)), ValueError, "hue must be"),
        (lambda: ColorJitter("0.4"), TypeError, "brightness must be a finite number"),  # type: ignore[arg-type]
        (lambda: ColorJitter(0.4, order="shuffled"), ValueError, "order must be one of 'random', 'fixed'"),
        (lambda: ColorJitter(p=1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: RandomGrayscale(-1), ValueError, r"p must be in \[0, 1\]"),
        (lambda: RandomSolarize(300), ValueError, r"threshold must be in \[0, 256\]"),
        (lambda: RandomPosterize(9), ValueError, r"bits must be in \[0, 8\], got 9"),
        (lambda: RandomPosterize(2.5), TypeError, "bits must be an int"),  # type: ignore[arg-type]
        (lambda: RandomAutocontrast(1.1), ValueError, r"p must be in \[0, 1\], got 1.1"),
        (lambda: RandomEqualize(p="0.5"), TypeError, "p must be a finite number"),  # type: ignore[arg-type]
        (
            lambda: Pipeline([RandomResizedCrop(8), Normalize(), ColorJitter(0.4)]),
            TypeError,
            "ColorJitter takes images in .* before Normalize",
        ),
        (
            lambda: Pipeline([RandomResizedCrop(8), ToDtype(torch.float32), ColorJitter(0.4)]),
            TypeError,
            "needs scale=True",
        ),
    ],
)
def test_bad_parameters_are_refused_when_made(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_solarize_threshold_is_the_bytes_own_value() -> None:
    """torchvision's on bytes, at every threshold: a byte that is the threshold is inverted, the one below it not."""
    image = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    for threshold in range(256):
        got = RandomSolarize(threshold, 1.0)(image, sample_ids=[0])
        assert torch.equal(got, functional.solarize(image, threshold)), threshold
    assert torch.equal(RandomSolarize(256, 1.0)(image, sample_ids=[0]), image)


def test_the_plan_says_in_words_what_a_sample_gets(scenes: list[np.ndarray]) -> None:
    pipeline = Pipeline(
        [MultiRandomResizedCrop({"a": dict(size=8), "b": dict(size=8)}), MultiCropPipeline({"a": DINO})]
    )
    plan = pipeline.draw(_sizes(images_of(scenes)), np.arange(4), 0)
    text = plan.describe(1)
    assert text.startswith("sample 1, epoch 0\n  a: box ") and "\n  b: box " in text and "normalize" in text
    assert ("mirrored" in text) == bool(plan.flips["a"][1])
