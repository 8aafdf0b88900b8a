"""Plans: in words, saved, loaded, and replayed to the same bytes."""

from __future__ import annotations

import io
from pathlib import Path

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
    PILGaussianBlur,
    Pipeline,
    Plan,
    RandAugment,
    RandomAdjustSharpness,
    RandomAffine,
    RandomApply,
    RandomAutocontrast,
    RandomChoice,
    RandomEqualize,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomInvert,
    RandomOrder,
    RandomPerspective,
    RandomPosterize,
    RandomResizedCrop,
    RandomRotation,
    RandomSolarize,
    RandomVerticalFlip,
    TimmRandAugment,
    TrivialAugmentWide,
)


class RandomShade:
    def sample_params(self, draws) -> dict[str, np.ndarray]:
        return {"factor": draws.uniform(0)[:, 0, 0].astype(np.float32)}

    def apply(self, images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        return (images * params["factor"].view(-1, 1, 1, 1)).to(images.dtype)


def invert(images: torch.Tensor) -> torch.Tensor:
    return 255 - images


NAMED = [
    MultiRandomResizedCrop({"a": dict(size=24), "b": dict(size=16, seed=3), "c": dict(size=8)}, return_boxes=True),
    MultiCropPipeline(
        {
            "a": [RandomHorizontalFlip(), RandomVerticalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1), Normalize()],
            "b": [RandomShade(), invert, RandomGrayscale(0.5)],
        }
    ),
]
COPIES = [
    RandomResizedCrop(16),
    NamedCopies(["a", "b"]),
    MultiCropPipeline({"a": [RandomHorizontalFlip(), ColorJitter(0.4)]}),
]


@pytest.fixture
def images(scenes: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes[:4]]


@pytest.mark.parametrize("stages", [NAMED, COPIES], ids=["named", "copies"])
def test_a_loaded_plan_gives_the_same_bytes(stages, images: list[torch.Tensor], tmp_path: Path) -> None:
    pipeline = Pipeline(stages, seed=11)
    plan = pipeline.plan(images, epoch=4)  # ids from torch's generator: only the plan knows them
    expected = pipeline(images, plan=plan)
    plan.save(tmp_path / "plan.npz")
    loaded = Plan.load(tmp_path / "plan.npz")
    got = Pipeline(stages, seed=12)(images, plan=loaded)  # nothing is drawn any more
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert loaded.describe(1) == plan.describe(1)
    assert any(not torch.equal(expected[name], other) for name, other in pipeline(images).items())


def test_it_is_what_a_call_draws(images: list[torch.Tensor]) -> None:
    pipeline, ids = Pipeline(NAMED, seed=11), np.array([4, 1, 2, 3])
    plan = pipeline.plan(images, sample_ids=ids, epoch=2)
    drawn, replayed = pipeline(images, sample_ids=ids, epoch=2), pipeline(images, plan=plan)
    assert all(torch.equal(drawn[name], replayed[name]) for name in drawn)


def test_it_is_saved_to_an_open_file_and_holds_nothing_pickled(images: list[torch.Tensor]) -> None:
    plan = Pipeline(NAMED).plan(images)
    file = io.BytesIO()
    plan.save(file)
    with np.load(io.BytesIO(file.getvalue()), allow_pickle=False) as arrays:
        assert {"outline", "jobs", "boxes", "sample_ids"} <= set(arrays.files)
    assert Plan.load(io.BytesIO(file.getvalue())).crops == ("a", "b", "c")


def test_what_is_no_plan_is_refused(images: list[torch.Tensor], tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:100])
    for name in ("other.npz", "text.npz", "torn.npz"):
        with pytest.raises(ValueError, match=f"{name} is no plan that Plan.save wrote"):
            Plan.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "nowhere.npz")
    pipeline = Pipeline(NAMED)
    with pytest.raises(ValueError, match="plan must be of 3 images, got one of 4"):
        pipeline(images[:3], plan=pipeline.plan(images))
    with pytest.raises(ValueError, match="plan must be of this pipeline's crops"):
        pipeline(images, plan=Pipeline(COPIES).plan(images))
    unflipped = Pipeline([*COPIES[:2], MultiCropPipeline({"a": [ColorJitter(0.4)]})])
    with pytest.raises(ValueError, match="plan must be of this pipeline's crops"):
        Pipeline(COPIES)(images, plan=unflipped.plan(images))
    plan = Pipeline(RandomResizedCrop(32)).plan(images)
    with pytest.raises(ValueError, match=r"plan must be of crops of \(16, 24\), got \(32, 32\)"):
        Pipeline(RandomResizedCrop((16, 24)))(images, plan=plan)  # it would show a corner of each


def test_it_says_in_words_what_a_sample_gets(images: list[torch.Tensor]) -> None:
    pipeline = Pipeline(NAMED, seed=1)
    plan = pipeline.plan(images, sample_ids=np.arange(4), epoch=7)
    lines = plan.describe(2).splitlines()
    assert lines[0] == "sample 2, epoch 7"
    top, left, height, width = plan.boxes[2, 0].tolist()
    assert lines[1].startswith(f"  a: box {height} x {width} at ({top}, {left}) -> 24 x 24 bilinear")
    assert ("mirrored" in lines[1]) == bool(plan.flips["a"][2] & 1)
    assert ("upside down" in lines[1]) == bool(plan.flips["a"][2] & 2)
    assert lines[1].endswith("normalize") and "hue" in lines[1] and "factor" in lines[2]
    assert len({plan.describe(index) for index in range(4)}) == 4


def test_it_says_which_copies_are_flipped(images: list[torch.Tensor]) -> None:
    plan = Pipeline(COPIES, seed=1).plan(images, sample_ids=np.arange(4))
    assert set(plan.flips["a"].tolist()) == {0, 1}
    for index, bit in enumerate(plan.flips["a"].tolist()):
        _, _, a, b = plan.describe(index).splitlines()
        assert a.startswith("  a: mirrored, brightness x " if bit else "  a: brightness x ") and b == "  b: as cut"


def test_it_says_what_a_stage_of_ones_own_drew_whatever_its_shape(images: list[torch.Tensor]) -> None:
    """Three axes as a program has, and even its width."""

    class Table:
        def __init__(self, width: int) -> None:
            self.width = width

        def sample_params(self, draws) -> np.ndarray:
            return draws.uniform(0, 4).reshape(-1, 1, 16)[:, :, : self.width].astype(np.float32)

        def apply(self, images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
            return images

    for width in (4, 16):
        plan = Pipeline([RandomResizedCrop(16), Table(width)]).plan(images, sample_ids=np.arange(4))
        assert plan.describe(3).endswith(f"own {plan.steps[''][0][3].tolist()}")


def test_copies_are_drawn_anew_in_each_epoch() -> None:
    """Flips of their own, and all else; what they share is the crop."""
    pipeline, sizes, ids = Pipeline(COPIES, seed=1), np.full((64, 2), 40, np.int32), np.arange(64)
    first, second = (pipeline.draw(sizes, ids, epoch) for epoch in (0, 1))
    assert not np.array_equal(first.flips["a"], second.flips["a"])
    assert not np.array_equal(first.steps["a"][0], second.steps["a"][0])


DRAWN = [
    *(RandomHorizontalFlip(), RandomVerticalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1), RandomGrayscale(0.5)),
    *(GaussianBlur(3), PILGaussianBlur(), RandomSolarize(128), RandomPosterize(4), RandomAutocontrast()),
    *(RandomEqualize(), RandomAdjustSharpness(2.0), RandomInvert(), RandomErasing(value="random"), RandAugment()),
    *(TrivialAugmentWide(), TimmRandAugment(), RandomRotation(30), RandomAffine(30), RandomPerspective()),
    RandomApply([RandomInvert(1.0)]),
    RandomApply([ColorJitter(0.4)], 1.0),
    RandomApply([ColorJitter(0.4, seed=7)], 1.0),
    RandomChoice([RandomInvert(1.0), RandomGrayscale(1.0)]),
    RandomOrder([RandomInvert(1.0), RandomGrayscale(1.0)]),
    RandomShade(),
]


@pytest.mark.parametrize("stage", DRAWN, ids=lambda stage: type(stage).__name__)
def test_every_stage_is_drawn_by_sample_and_epoch_alone(stage) -> None:
    """Anew in each epoch and for each sample, and the same in any batch."""
    pipeline = Pipeline([RandomResizedCrop(16), stage], seed=1)

    def drawn(ids: np.ndarray, epoch: int) -> np.ndarray:
        plan = pipeline.draw(np.full((len(ids), 2), 40, np.int32), ids, epoch)
        if plan.flips:
            return plan.flips[""]
        (step,) = plan.steps[""]
        return step["factor"] if isinstance(step, dict) else step

    ids = np.arange(64)
    first = drawn(ids, 0)
    assert not np.array_equal(first, drawn(ids, 1)) and not np.array_equal(first, drawn(ids + 64, 0))
    assert np.array_equal(drawn(ids[::-2], 1), drawn(ids, 1)[::-2])
