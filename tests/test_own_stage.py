"""Stages of the user's own, in a chain and alone; copies of one crop under several names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream import (
    ColorJitter,
    GaussianBlur,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    NamedCopies,
    Normalize,
    Pipeline,
    RandomApply,
    RandomEqualize,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    Resize,
    ToDtype,
)

IDS = np.array([5, 9, 2, 77])


class RandomShade:
    """Darken each image by a factor of its own."""

    def sample_params(self, draws) -> np.ndarray:
        return draws.uniform(0)[:, 0, 0].astype(np.float32)

    def apply(self, images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return (images.float() * params.view(-1, 1, 1, 1)).to(images.dtype)


class SeveralNumbers(RandomShade):
    def sample_params(self, draws) -> dict[str, np.ndarray]:
        return {"factor": draws.uniform(0)[:, 0, 0].astype(np.float32), "shift": draws.words(1)[:, 0, 0] % 3}

    def apply(self, images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        assert params["shift"].shape == (len(images),)
        return super().apply(images, params["factor"])


@pytest.fixture
def images(scenes: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes[:4]]


def half(images: torch.Tensor) -> torch.Tensor:
    return images // 2


def test_a_function_gets_the_bytes_of_its_place(images: list[torch.Tensor]) -> None:
    cut = Pipeline([RandomResizedCrop(24), RandomGrayscale(0.5)])(images, sample_ids=IDS)["image"]
    got = Pipeline([RandomResizedCrop(24), RandomGrayscale(0.5), half])(images, sample_ids=IDS)["image"]
    assert got.dtype == torch.uint8 and torch.equal(got, cut // 2)
    first = Pipeline([RandomResizedCrop(24), half, RandomGrayscale(1.0)])(images, sample_ids=IDS)["image"]
    plain = Pipeline(RandomResizedCrop(24))(images, sample_ids=IDS)["image"]
    assert torch.equal(first, RandomGrayscale(1.0)(plain // 2))


def test_what_comes_after_takes_its_dtype(images: list[torch.Tensor]) -> None:
    def floats(images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        return images.to(torch.bfloat16)

    stages = [RandomResizedCrop(24), ToDtype(torch.float32, scale=True), floats, RandomGrayscale(1.0)]
    got = Pipeline(stages)(images, sample_ids=IDS)["image"]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[:, 0], got[:, 1])
    assert Pipeline([*stages, Normalize(dtype=torch.float32)])(images, sample_ids=IDS)["image"].dtype == torch.float32
    assert Pipeline([RandomResizedCrop(24), half, Normalize()])(images, sample_ids=IDS)["image"].dtype == torch.float32


@pytest.mark.parametrize("stage", [RandomShade(), SeveralNumbers()])
def test_a_class_is_drawn_by_sample(images: list[torch.Tensor], stage) -> None:
    pipeline = Pipeline([RandomResizedCrop(24), stage], seed=3)
    whole = pipeline(images, sample_ids=IDS)["image"]
    alone = pipeline(images[2:3], sample_ids=IDS[2:3])["image"]
    assert torch.equal(whole[2:3], alone)
    assert not torch.equal(whole, Pipeline([RandomResizedCrop(24), stage], seed=4)(images, sample_ids=IDS)["image"])
    plain = Pipeline(RandomResizedCrop(24), seed=3)(images, sample_ids=IDS)["image"]
    assert not torch.equal(whole, plain)


def test_a_flip_before_it_rides_and_one_after_it_does_not(images: list[torch.Tensor]) -> None:
    def left_half_black(images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[..., : images.shape[-1] // 2] = 0
        return images

    flip = RandomHorizontalFlip(1.0)
    before = Pipeline([RandomResizedCrop(24), flip, left_half_black])(images, sample_ids=IDS)["image"]
    after = Pipeline([RandomResizedCrop(24), left_half_black, flip])(images, sample_ids=IDS)["image"]
    assert (before[..., :12] == 0).all() and before[..., 12:].any()
    assert (after[..., 12:] == 0).all() and after[..., :12].any()


def test_float64_goes_on_as_float32(images: list[torch.Tensor]) -> None:
    def doubles(images: torch.Tensor) -> torch.Tensor:
        return images * np.float64(0.5) / 255.0

    class Doubles(RandomShade):
        def sample_params(self, draws) -> np.ndarray:
            return draws.uniform(0)[:, 0, 0]  # float64, which images take on

        def apply(self, images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
            return images * params.view(-1, 1, 1, 1) / 255.0

    for own in (doubles, Doubles()):
        for stages in ([Normalize()], [RandomGrayscale(1.0)], [ColorJitter(0.4), Normalize(dtype=torch.bfloat16)]):
            got = Pipeline([RandomResizedCrop(24), own, *stages])(images, sample_ids=IDS)["image"]
            assert got.dtype == (torch.bfloat16 if len(stages) == 2 else torch.float32)
    assert RandomGrayscale(1.0)(torch.rand(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float32


def test_what_a_stage_after_it_cannot_take_is_named(images: list[torch.Tensor]) -> None:
    for own, error, message in (
        (lambda images: images.int(), TypeError, r"ColorJitter, Normalize takes uint8 images, or float .* torch.int32"),
        (lambda images: images[:, :1], ValueError, r"takes images \[B, 3, h, w\], got shape \[4, 1, 24, 24\]"),
    ):
        with pytest.raises(error, match=message):
            Pipeline([RandomResizedCrop(24), own, ColorJitter(0.4), Normalize()])(images, sample_ids=IDS)


def test_a_stage_that_is_drawn_for_a_size_refuses_another(images: list[torch.Tensor]) -> None:
    """A flip to the right of what is there would show nothing; what has no place takes any size."""

    def left_half(images: torch.Tensor) -> torch.Tensor:
        return images[..., :12]

    for stage in (RandomHorizontalFlip(1.0), RandomErasing(1.0), RandomApply([RandomErasing()])):
        with pytest.raises(
            ValueError, match=r"was drawn for crops of 24 x 24 \(height x width\), got 24 x 12: a stage"
        ):
            Pipeline([RandomResizedCrop(24), left_half, stage])(images, sample_ids=IDS)
    free = [left_half, ColorJitter(0.4), RandomEqualize(), GaussianBlur(5), Normalize()]
    assert Pipeline([RandomResizedCrop(24), *free])(images, sample_ids=IDS)["image"].shape == (4, 3, 24, 12)


def test_bad_ones_are_named(images: list[torch.Tensor]) -> None:
    class Short(RandomShade):
        def sample_params(self, draws) -> np.ndarray:
            return np.zeros(1, np.float32)

    def nothing(images):
        return None

    def first(images):
        return images[0]

    def crops_of(stage):
        return Pipeline([RandomResizedCrop(24), stage])(images, sample_ids=IDS)

    with pytest.raises(TypeError, match=r"Short.sample_params must give an array with one row for each of the 4 samp"):
        crops_of(Short())
    with pytest.raises(TypeError, match=r"nothing must give a tensor \[4, ...\], got NoneType"):
        crops_of(nothing)
    with pytest.raises(ValueError, match=r"first must give a tensor \[4, ...\], got shape \[3, 24, 24\]"):
        crops_of(first)
    with pytest.raises(TypeError, match=r"pipelines\['image'\]\[1\] must be a stage"):
        crops_of(RandomShade)


def test_it_works_on_named_crops_without_a_loader(images: list[torch.Tensor]) -> None:
    """Beside stages of ours or by itself, in any epoch."""
    crops = {"a": dict(size=16), "b": dict(size=8), "c": dict(size=12), "d": dict(size=12)}
    stages = {"a": [RandomShade(), Normalize()], "b": [half], "c": [RandomShade(), RandomGrayscale(0.5)]}
    stages["d"] = [RandomHorizontalFlip(), RandomVerticalFlip(), RandomGrayscale(0.5), half]
    pipeline, before = Pipeline([MultiRandomResizedCrop(crops), MultiCropPipeline(stages)], seed=3), None
    for epoch in (0, 2):
        given = dict(sample_ids=IDS, epoch=epoch)
        together = pipeline(images, **given)
        cut = MultiRandomResizedCrop(crops, seed=3)(images, **given)
        apart = MultiCropPipeline(stages, seed=3)(cut, **given)
        assert all(torch.equal(together[name], apart[name]) for name in crops)
        assert before is None or not torch.equal(before, together["a"])
        before = together["a"]


def test_its_last_one_may_give_no_images() -> None:
    """Vectors, say: in a pipeline, and on named crops."""
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    stages = MultiCropPipeline({"a": [RandomHorizontalFlip(), lambda batch: batch.flatten(1)]})
    apart = stages({"a": images}, sample_ids=IDS)["a"]
    together = Pipeline([MultiRandomResizedCrop({"a": Resize((5, 6))}), stages])(images, sample_ids=IDS)["a"]
    assert torch.equal(apart, together)
    assert apart.shape == (4, 90)


COPIES = [
    RandomResizedCrop(24),
    RandomHorizontalFlip(),
    NamedCopies(["plain", "grey", "jittered", "normalised"]),
    MultiCropPipeline(
        {
            "grey": [RandomGrayscale(1.0)],
            "jittered": [RandomHorizontalFlip(1.0), ColorJitter(0.4, 0.4, 0.2, 0.1)],
            "normalised": [Normalize()],
        }
    ),
]


def test_copies_are_of_one_cut(images: list[torch.Tensor]) -> None:
    plain = Pipeline(COPIES[:2])(images, sample_ids=IDS)["image"]
    copies = Pipeline(COPIES)(images, sample_ids=IDS)
    assert list(copies) == ["plain", "grey", "jittered", "normalised"]
    assert torch.equal(copies["plain"], plain)
    assert torch.equal(copies["grey"], RandomGrayscale(1.0)(plain))
    assert torch.equal(copies["normalised"], Normalize()(plain))
    flipped = MultiCropPipeline({"jittered": COPIES[3].pipelines["jittered"]})({"jittered": plain}, sample_ids=IDS)
    assert torch.equal(copies["jittered"], flipped["jittered"])


def test_copies_do_not_share_memory(images: list[torch.Tensor]) -> None:
    copies = Pipeline([RandomResizedCrop(24), NamedCopies(["a", "b"])])(images, sample_ids=IDS)
    expected = copies["b"].clone()
    copies["a"].zero_()
    assert torch.equal(copies["b"], expected) and expected.any()


def test_a_function_that_works_in_place_spoils_no_copy(images: list[torch.Tensor]) -> None:
    def darken(images: torch.Tensor) -> torch.Tensor:
        return images.zero_()

    own = MultiCropPipeline({"a": [darken], "c": [RandomGrayscale(1.0)]})
    copies = Pipeline([RandomResizedCrop(24), NamedCopies(["a", "b", "c"]), own])(images, sample_ids=IDS)
    assert not copies["a"].any() and copies["b"].any() and copies["c"].any()


SCALE = ToDtype(torch.float32, scale=True)
BF16 = ToDtype(torch.bfloat16)


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        ([], [ColorJitter(0.4), Normalize(), BF16]),
        ([RandomGrayscale(0.5)], [RandomGrayscale(0.5), Normalize(), BF16]),
        ([Normalize()], [RandomErasing(1.0), BF16]),
        ([ColorJitter(0.4), Normalize()], [BF16]),
        ([SCALE], [ColorJitter(0.4), BF16]),
        ([half], [Normalize(), RandomErasing(1.0), BF16]),
    ],
)
def test_a_copys_stages_take_what_the_shared_ones_give(images: list[torch.Tensor], shared: list, own: list) -> None:
    """And the same stages in one list without copies, or called on what the shared ones gave, take it too."""
    copied = [RandomResizedCrop(24), *shared, NamedCopies(["a", "b"]), MultiCropPipeline({"a": own})]
    found = Pipeline(copied)(images, sample_ids=IDS)
    assert found["a"].dtype == torch.bfloat16
    assert Pipeline([RandomResizedCrop(24), *shared, *own])(images, sample_ids=IDS)["image"].dtype == torch.bfloat16
    apart = MultiCropPipeline({"a": own})({"a": found["b"]}, sample_ids=IDS)
    assert torch.equal(apart["a"], found["a"])


def test_what_a_copys_stage_cannot_take_is_refused_when_the_pipeline_is_made() -> None:
    for shared, own, message in (
        ([Normalize()], ColorJitter(0.4), r"crop 'a': ColorJitter takes images in \[0, 1\]: put it before Normalize"),
        ([ColorJitter(0.4), Normalize()], GaussianBlur(3), "crop 'a': GaussianBlur takes images in"),
        ([Normalize()], ToDtype(torch.uint8), r"crop 'a': ToDtype\(uint8\) takes uint8 images, got torch.float32"),
        ([SCALE], ToDtype(torch.uint8), r"ToDtype\(uint8\) takes uint8 images"),
        ([half, Normalize()], ToDtype(torch.uint8), r"ToDtype\(uint8\) takes uint8 images"),
        ([ToDtype(torch.float32)], RandomGrayscale(), "RandomGrayscale takes images in"),  # of 0 to 255
    ):
        with pytest.raises(TypeError, match=message):
            Pipeline([RandomResizedCrop(8), *shared, NamedCopies(["a", "b"]), MultiCropPipeline({"a": [own]})])


def test_stages_that_fit_nowhere_are_refused_when_they_are_named() -> None:
    """What fits on bytes, or on floats, or may fit after a function is left to the pipeline."""
    for stages in ([Normalize(), ColorJitter(0.4)], [RandomGrayscale(), Normalize(), GaussianBlur(3)]):
        with pytest.raises(TypeError, match=r"pipelines\['a'\]: .* takes images in \[0, 1\]: put it before Normalize"):
            MultiCropPipeline({"b": [], "a": stages})
    fitting = [[ColorJitter(0.4), BF16], [ToDtype(torch.float32)], [ToDtype(torch.uint8)], [Normalize(), half, SCALE]]
    assert len(MultiCropPipeline(dict(zip("abcd", fitting, strict=True))).pipelines) == 4


def test_copies_that_cannot_be(images: list[torch.Tensor]) -> None:
    named = MultiRandomResizedCrop({"a": dict(size=8)})
    with pytest.raises(ValueError, match=r"pipelines\['image'\]\[1\]: NamedCopies takes the one crop of a stage"):
        Pipeline([named, NamedCopies(["b"])])
    with pytest.raises(ValueError, match=r"names 'c'; allowed are \['a', 'b'\]"):
        Pipeline([RandomResizedCrop(8), NamedCopies(["a", "b"]), MultiCropPipeline({"c": []})])
    for names, error in (([], ValueError), (["a", "a"], ValueError), ("ab", TypeError), ([1], TypeError)):
        with pytest.raises(error, match="names must be"):
            NamedCopies(names)
