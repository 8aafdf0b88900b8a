"""Random filters, windows of the long side and crops within crops: their laws, their purity, what is refused."""

# A spec takes more than the settled types that its fields declare, and scipy declares none.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from crop_oracle import oracle
from scipy import stats
from torchvision.transforms import functional as v1_functional

from slipstream.crop import (
    CenterCrop,
    Crop,
    Geometry,
    ImageSizeError,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    RandomResizedCrop,
    RandomResizeShortCropLong,
    Resize,
    ResizedCrop,
    sample_geometry,
    seen_boxes,
)
from slipstream.draws import Draws, stream_key
from slipstream.pipeline import Pipeline
from slipstream.stage import Normalize

P_VALUE = 1e-3  # as in test_crop.py: fixed seeds, so what passes once passes always


def drawn(spec: Crop, sizes: Any, count: int | None = None, *, seed: int = 0, **more: Any) -> Geometry:
    """The geometry of these sizes [B, 2], or of `count` images of one size, for sample ids 0, 1, ..."""
    sizes = np.array(sizes, np.int32) if count is None else np.tile(np.array(sizes, np.int32), (count, 1))
    return sample_geometry(spec, sizes, Draws(stream_key(seed, "test"), np.arange(len(sizes)), 0), **more)


def inside(boxes: np.ndarray, parents: np.ndarray) -> bool:
    """Whether every box lies in its parent."""
    boxes, parents = boxes.astype(np.int64), parents.astype(np.int64)
    ends, parent_ends = (each[..., :2] + each[..., 2:] for each in (boxes, parents))
    return bool((boxes[..., :2] >= parents[..., :2]).all() and (ends <= parent_ends).all())


def test_a_random_filter_is_a_fair_coin_beside_the_box() -> None:
    plain = drawn(RandomResizedCrop(8), (375, 500), 40_000)
    coin = drawn(RandomResizedCrop(8, interpolation="random"), (375, 500), 40_000)
    assert np.array_equal(coin.box, plain.box)
    assert coin.filter.dtype == np.int32
    assert set(coin.filter.tolist()) == {0, 1}
    assert stats.binomtest(int(coin.filter.sum()), 40_000).pvalue > P_VALUE
    assert stats.binomtest(int((coin.filter[1:] != coin.filter[:-1]).sum()), 39_999).pvalue > P_VALUE
    for column in coin.box.T:
        assert abs(np.corrcoef(column, coin.filter)[0, 1]) < 5 / math.sqrt(40_000)


def test_a_random_filter_is_pure_in_its_key() -> None:
    spec = RandomResizedCrop(8, interpolation="random")
    first = drawn(spec, (30, 40), 64).filter
    assert first[:16].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0]  # frozen, as below
    assert np.array_equal(first[:7], drawn(spec, (300, 41), 7).filter)
    assert not np.array_equal(first, drawn(spec, (30, 40), 64, seed=1).filter)
    bare = drawn(RandomResizedCrop(8, interpolation="random", antialias=False), (30, 40), 64)
    assert np.array_equal(bare.filter, first + 2)
    many = MultiCropRandomResizedCrop(3, 8, interpolation="random", antialias=False)
    assert many.crops == (RandomResizedCrop(8, interpolation="random", antialias=False),) * 3


def test_a_random_filter_is_what_the_pixels_show(scenes: list[np.ndarray]) -> None:
    images = [torch.from_numpy(scenes[0]).permute(2, 0, 1)] * 12
    pipeline = Pipeline(RandomResizedCrop((9, 11), interpolation="random", seed=3, backend="cpu"))
    jobs = pipeline.plan(images, sample_ids=range(12)).jobs[:, 0]
    assert set(jobs[:, 8].tolist()) == {0, 1}
    for job, output in zip(jobs, pipeline(images, sample_ids=range(12))["image"], strict=True):
        assert np.array_equal(output.numpy(), oracle(scenes[0], job, (9, 11)))


@pytest.mark.parametrize("size", [224, 31])
def test_the_short_side_is_resized_by_torchvisions_law(size: int) -> None:
    sizes = np.random.default_rng(40).integers(1, 3000, (2000, 2))
    found = drawn(RandomResizeShortCropLong(size), sizes)
    expected = [v1_functional._compute_resized_output_size((int(h), int(w)), [size]) for h, w in sizes]
    assert found.full.tolist() == [list(each) for each in expected]
    assert (found.box == np.concatenate([np.zeros_like(sizes), sizes], axis=1)).all()
    room = found.full - size
    assert (found.origin >= 0).all() and (found.origin <= room).all()
    assert (room.min(1) == 0).all()
    seen = seen_boxes(found, (size, size))
    assert inside(seen, found.box)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_every_place_of_the_long_side_is_equally_likely(shape: tuple[int, int]) -> None:
    origin = drawn(RandomResizeShortCropLong(20), shape, 22_000).origin
    long = int(np.argmax(shape))
    assert (origin[:, 1 - long] == 0).all()
    counts = np.bincount(origin[:, long], minlength=11)
    assert len(counts) == 11
    assert stats.chisquare(counts).pvalue > P_VALUE
    assert abs(np.corrcoef(origin[1:, long], origin[:-1, long])[0, 1]) < 5 / math.sqrt(22_000)
    assert origin[:8, long].tolist() == [4, 9, 7, 6, 1, 1, 9, 2]  # frozen: a run that is repeated sees these again


def test_a_window_of_the_long_side_is_cut_from_the_resized_image(scenes: list[np.ndarray]) -> None:
    images = [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes]
    stage = RandomResizeShortCropLong(24, interpolation="bicubic", seed=1, return_boxes=True, backend="cpu")
    plan = Pipeline(stage).plan(images, sample_ids=range(8))
    result = stage(images, sample_ids=range(8))
    assert len({tuple(job[6:8]) for job in plan.jobs[:, 0].tolist()}) > 3
    for scene, job, output in zip(scenes, plan.jobs[:, 0], result["image"], strict=True):
        assert np.array_equal(output.numpy(), oracle(scene, job, (24, 24)))
    assert torch.equal(result["image_box"], torch.from_numpy(plan.boxes[:, 0]))


def test_a_square_image_leaves_nothing_to_draw_and_a_thin_one_is_named() -> None:
    assert (drawn(RandomResizeShortCropLong(24), (33, 33), 50).origin == 0).all()
    with pytest.raises(ImageSizeError, match=r"RandomResizeShortCropLong\(224\) needs images less thin.* index 1"):
        drawn(RandomResizeShortCropLong(224), [(40, 40), (1, 10**7)])


def test_a_subset_is_a_random_crop_of_its_parents_box() -> None:
    """Exactly: the box that RandomResizedCrop draws for an image of the parent's size, moved into the parent."""
    rng = np.random.default_rng(41)
    sizes = rng.integers(2, 2000, (3000, 2))
    sides = rng.integers(1, sizes + 1)
    within = np.concatenate([rng.integers(0, sizes - sides + 1), sides], axis=1).astype(np.int32)
    options = dict(scale=(0.05, 0.4), interpolation="random")
    found = drawn(RandomResizedCrop(8, subset_of="global_0", **options), sizes, within=within)
    alone = drawn(RandomResizedCrop(8, **options), sides)
    assert found.box.dtype == np.int32
    assert np.array_equal(found.box[:, 2:], alone.box[:, 2:])
    assert np.array_equal(found.box[:, :2], alone.box[:, :2] + within[:, :2])
    assert np.array_equal(found.filter, alone.filter)
    assert inside(found.box, within)


FAMILY = {
    "local_1": {"size": 8, "scale": (0.3, 0.6), "subset_of": "local_0"},
    "local_0": {"size": 8, "scale": (0.05, 0.4), "subset_of": "global_0"},
    "middle": CenterCrop(16, resize=20),
    "in_the_middle": {"size": 8, "subset_of": "middle"},
    "global_0": {"size": 16, "scale": (0.4, 1.0)},
    "strip": RandomResizeShortCropLong(16),
    "whole": Resize((16, 20)),
    "face": ResizedCrop(8, (1, 2, 20, 10)),
}


def test_subsets_of_subsets_lie_in_their_parents() -> None:
    stage = MultiRandomResizedCrop(FAMILY)
    assert set(stage.order) == set(FAMILY)
    assert stage.order.index("global_0") < stage.order.index("local_0") < stage.order.index("local_1")
    assert stage.order.index("middle") < stage.order.index("in_the_middle")
    sizes = np.random.default_rng(42).integers(30, 600, (500, 2)).astype(np.int32)
    plan = Pipeline(stage, seed=2).draw(sizes, np.arange(500), 0)
    boxes = dict(zip(plan.crops, plan.boxes.transpose(1, 0, 2), strict=True))
    assert plan.crops == tuple(FAMILY)
    for child, parent in (("local_1", "local_0"), ("local_0", "global_0"), ("in_the_middle", "middle")):
        assert inside(boxes[child], boxes[parent]), child
    fraction = boxes["local_0"][:, 2:].prod(1) / boxes["global_0"][:, 2:].prod(1)
    assert fraction.min() > 0.04 and fraction.max() < 0.42
    assert 0.2 < fraction.mean() < 0.25
    # the parents are drawn as if they had no children
    alone = Pipeline(MultiRandomResizedCrop({"global_0": FAMILY["global_0"]}), seed=2).draw(sizes, np.arange(500), 0)
    assert np.array_equal(alone.boxes[:, 0], boxes["global_0"])


def test_a_subset_of_a_centre_crop_lies_in_what_that_shows() -> None:
    stage = MultiRandomResizedCrop(FAMILY)
    sizes = np.random.default_rng(43).integers(30, 600, (500, 2))
    shown = seen_boxes(drawn(stage.crops["middle"], sizes), (16, 16))
    found = drawn(stage.crops["in_the_middle"], sizes, within=shown)
    assert inside(seen_boxes(found, (8, 8)), shown)


def test_a_crops_order_without_subsets_is_the_users() -> None:
    names = ("b", "a", "c")
    assert MultiRandomResizedCrop({name: {"size": 8} for name in names}).order == names


@pytest.mark.parametrize(
    ("crops", "error", "message"),
    [
        (
            {"a": {"size": 8, "subset_of": "b"}, "c": {"size": 8}},
            ValueError,
            r"crops\['a'\]: subset_of must name another crop beside it, one of \['c'\], got 'b'",
        ),
        (
            {"a": {"size": 8, "subset_of": "a"}, "c": {"size": 8}},
            ValueError,
            r"crops\['a'\]: subset_of must name another crop beside it, one of \['c'\], got 'a'",
        ),
        (
            {
                "d": {"size": 8, "subset_of": "a"},
                "a": {"size": 8, "subset_of": "b"},
                "b": {"size": 8, "subset_of": "a"},
            },
            ValueError,
            r"crops\['a'\]: subset_of must not lead back .*, got 'd' -> 'a' -> 'b' -> 'a'",
        ),
        ({"a": {"size": 8, "subset_of": 3}}, TypeError, r"crops\['a'\]: subset_of must be the name of a crop or None"),
        ({"a": ResizedCrop(8)}, ValueError, r"crops\['a'\]: boxes must be a field's name or \(top"),
        ({"a": Resize((8, 8), return_boxes=True)}, ValueError, r"crops\['a'\]: return_boxes and backend are arguments"),
        ({"a": {"size": 8, "antialias": "no"}}, TypeError, r"crops\['a'\]: antialias must be True or False"),
        ({"a": {"size": 8, "interpolation": "area"}}, ValueError, "one of 'bilinear', 'bicubic', 'random', got 'area'"),
    ],
)
def test_wrong_families_are_refused_when_made(crops: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiRandomResizedCrop(crops)


def test_wrong_random_crops_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size must be one int, for the crop is square, got \(8, 9\)"):
        RandomResizeShortCropLong((8, 9))
    with pytest.raises(ValueError, match="interpolation must be one of 'bilinear', 'bicubic', got 'random'"):
        RandomResizeShortCropLong(8, interpolation="random")
    assert RandomResizeShortCropLong((8, 8)) == RandomResizeShortCropLong(8)
    with pytest.raises(ValueError, match="subset_of='global_0' is for a crop beside that one"):
        drawn(RandomResizedCrop(8, subset_of="global_0"), (40, 40), 2)


def test_whatever_means_the_same_makes_the_same() -> None:
    """Lists, numpy's numbers and whole floats' ints are settled, so equal crops are equal."""
    plain = RandomResizedCrop(8, scale=(0.5, 1.0), ratio=(1.0, 2.0), seed=3)
    assert plain == RandomResizedCrop([8, 8], scale=[np.float32(0.5), 1], ratio=[1, 2], seed=np.int64(3))
    assert plain == RandomResizedCrop(np.int64(8), scale=(0.5, 1), ratio=(1, 2), seed=3)
    assert MultiRandomResizedCrop({"a": {"size": 8}}) == MultiRandomResizedCrop({"a": RandomResizedCrop(8)})
    assert Normalize([0, 0, 0], np.ones(3).tolist()) == Normalize((0.0, 0.0, 0.0), (1, 1, 1))
