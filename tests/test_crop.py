"""Boxes follow torchvision's law, are pure functions of their keys, and lie where the pixels' contract says."""

# A spec takes more than the settled types that its fields declare, and scipy declares none.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from crop_oracle import oracle
from PIL import Image
from scipy import stats
from torchvision.transforms import functional as v1_functional
from torchvision.transforms import v2

from slipstream import (
    CenterCrop,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    RandomResizedCrop,
)
from slipstream.crop import ImageSizeError, sample_boxes, sample_geometry, seen_boxes
from slipstream.crop_geometry import geometry_of
from slipstream.draws import Draws, stream_key
from slipstream.pipeline import Pipeline

# Every statistic here is computed on fixed seeds, so a test that passes once passes always; a right law fails such a
# bound for one choice of seeds in a thousand, a wrong one for about all.
P_VALUE = 1e-3


def boxes_of(spec: RandomResizedCrop, size: tuple[int, int], count: int, *, seed: int = 0) -> np.ndarray:
    """Boxes of that many samples of one size: int64 [count, 4]."""
    draws = Draws(stream_key(seed, "test"), np.arange(count), 0)
    return sample_boxes(spec, np.tile(np.array(size, np.int32), (count, 1)), draws).astype(np.int64)


def torchvision_boxes(spec: RandomResizedCrop, size: tuple[int, int], count: int) -> np.ndarray:
    """The same number of boxes from torchvision's make_params."""
    transform = v2.RandomResizedCrop(8, scale=spec.scale, ratio=spec.ratio)
    image = torch.empty((3, *size), dtype=torch.uint8, device="meta")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [transform.make_params([image]) for _ in range(count)]
    return np.array([[each[name] for name in ("top", "left", "height", "width")] for each in params])


def features(boxes: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A box's area fraction, log ratio, and place within the places that its size leaves."""
    top, left, height, width = boxes.astype(np.float64).T
    return {
        "area": height * width / (size[0] * size[1]),
        "log ratio": np.log(width / height),
        "top": (top + 0.5) / (size[0] - height + 1),
        "left": (left + 0.5) / (size[1] - width + 1),
    }


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (375, 500)),
        ({"scale": (0.4, 1.0)}, (500, 333)),
        ({"scale": (0.05, 0.4)}, (640, 480)),
        ({"scale": (0.2, 0.9), "ratio": (0.3, 4.0)}, (300, 450)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(options: dict, size: tuple[int, int]) -> None:
    spec = RandomResizedCrop(8, **options)
    ours = features(boxes_of(spec, size, 20_000), size)
    theirs = features(torchvision_boxes(spec, size, 4_000), size)
    for name, values in ours.items():
        assert stats.ks_2samp(values, theirs[name]).pvalue > P_VALUE, name


def test_area_and_ratio_are_uniform_where_every_try_fits() -> None:
    """Exactly the law, with 100,000 boxes: area uniform, ratio uniform in the logarithm, both places uniform."""
    size, scale, ratio = (20_000, 20_000), (0.05, 0.4), (3 / 4, 4 / 3)
    found = features(boxes_of(RandomResizedCrop(8, scale=scale, ratio=ratio), size, 100_000), size)
    ends = {"area": scale, "log ratio": tuple(map(math.log, ratio)), "top": (0, 1), "left": (0, 1)}
    for name, (low, high) in ends.items():
        assert stats.kstest(found[name], "uniform", (low, high - low)).pvalue > P_VALUE, name
    names = list(found)
    together = np.corrcoef([found[name] for name in names])
    assert np.abs(together - np.eye(4)).max() < 5 / math.sqrt(100_000)


def test_every_place_is_equally_likely_the_borders_too() -> None:
    boxes = boxes_of(RandomResizedCrop(8, scale=(0.25, 0.25), ratio=(1, 1)), (20, 20), 60_000)
    assert (boxes[:, 2:] == 10).all()
    counts = np.bincount(boxes[:, 0] * 11 + boxes[:, 1], minlength=121)
    assert len(counts) == 121
    assert stats.chisquare(counts).pvalue > P_VALUE


def test_as_many_boxes_fall_back_as_torchvisions() -> None:
    spec, size = RandomResizedCrop(8, scale=(0.4, 1.0)), (200, 500)
    fallback = [0, (500 - 267) // 2, 200, 267]
    ours = (boxes_of(spec, size, 20_000) == fallback).all(1)
    theirs = (torchvision_boxes(spec, size, 4_000) == fallback).all(1)
    assert 0.2 < ours.mean() < 0.8
    table = [[sample.sum(), (~sample).sum()] for sample in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > P_VALUE


def thin_images() -> Iterator[tuple[tuple[float, float], tuple[int, int]]]:
    rng = np.random.default_rng(3)
    for _ in range(60):
        short, long = int(rng.integers(1, 60)), int(rng.integers(200, 5000))
        yield (3 / 4, 4 / 3), (short, long)
        yield (3 / 4, 4 / 3), (long, short)
        side = int(rng.integers(3, 900))
        yield (2.0, 3.0), (side, side)  # the ratio asks for more width than there is
        yield (0.2, 0.5), (side, side)
    yield (1.2, 1.3), (40_000, 50_000)  # inside the range: the whole image


def test_the_fallback_is_torchvisions_box() -> None:
    """With the whole area asked for, no try fits these images, and what is left is not random."""
    for ratio, size in thin_images():
        spec = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=ratio)
        expected = torchvision_boxes(spec, size, 1)[0]
        assert (boxes_of(spec, size, 3) == expected).all(), (ratio, size)


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1e-3, 1e3), (5.0, 6.0), (1e-300, 1e300)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (1e-9, 1e-9), (1.0, 1.0)])
def test_every_box_lies_inside_its_image(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    rng = np.random.default_rng(4)
    awkward = [(1, 1), (1, 5000), (5000, 1), (2, 2), (1, 2), (3, 1), (65_535, 65_535), (1, 2**31 - 1)]
    sizes = np.concatenate([rng.integers(1, 40, (3000, 2)), rng.integers(1, 3000, (3000, 2)), awkward]).astype(np.int32)
    draws = Draws(stream_key(5, "test"), np.arange(len(sizes)), 0)
    with np.errstate(over="ignore", invalid="ignore"):  # an absurd ratio: its tries do not fit
        boxes = sample_boxes(RandomResizedCrop(8, scale=scale, ratio=ratio), sizes, draws)
    assert boxes.dtype == np.int32
    assert boxes.shape == (len(sizes), 4)
    wide = boxes.astype(np.int64)
    assert (wide[:, :2] >= 0).all()
    assert (wide[:, 2:] >= 1).all()
    assert (wide[:, :2] + wide[:, 2:] <= sizes).all()


SIZES = np.array([(375, 500), (500, 375), (333, 500), (64, 64), (1200, 900), (31, 700)], np.int32)

# (top, left, height, width) of samples 0 to 5 of the sizes above. They are written here so that nobody changes the law,
# the keys or the names of the streams unawares: every run that a user wants to repeat would draw other crops.
EXPLICIT_SEED_42 = [
    [33, 0, 286, 267],
    [59, 1, 361, 369],
    [18, 80, 297, 387],
    [6, 3, 39, 46],
    [261, 35, 928, 833],
    [0, 329, 31, 41],
]
LOADER_SEED_42 = [
    [133, 110, 224, 196],
    [11, 8, 262, 201],
    [83, 106, 220, 222],
    [6, 9, 47, 51],
    [512, 365, 558, 499],
    [0, 329, 31, 41],
]


def test_the_boxes_of_seed_42_are_frozen() -> None:
    crops = MultiRandomResizedCrop({"global_0": {"size": 8, "scale": (0.4, 1.0), "seed": 42}, "local_0": {"size": 8}})
    boxes = Pipeline(crops, seed=42).draw(SIZES, np.arange(6), 0).boxes
    assert boxes[:, 0].tolist() == EXPLICIT_SEED_42
    assert boxes[:, 1].tolist() == LOADER_SEED_42


def test_boxes_are_whole_numbers_pure_in_seed_sample_and_epoch() -> None:
    crops = MultiRandomResizedCrop({"a": {"size": 8}, "b": {"size": 8, "seed": 1}})
    pipeline = Pipeline(crops, seed=7)
    rng = np.random.default_rng(8)
    ids = rng.permutation(10**6)[:64]
    sizes = rng.integers(300, 500, (64, 2)).astype(np.int32)
    whole = pipeline.draw(sizes, ids, 3).boxes
    assert whole.dtype == np.int32
    assert np.array_equal(whole, Pipeline(crops, seed=7).draw(sizes, ids, 3).boxes)
    for batch_size in (1, 7):
        parts = [pipeline.draw(sizes[i : i + batch_size], ids[i : i + batch_size], 3) for i in range(0, 64, batch_size)]
        assert np.array_equal(whole, np.concatenate([part.boxes for part in parts]))
    order = rng.permutation(64)
    assert np.array_equal(whole[order], pipeline.draw(sizes[order], ids[order], 3).boxes)
    for other in (pipeline.draw(sizes, ids, 4), pipeline.draw(sizes, ids + 1, 3)):
        assert (other.boxes != whole).any(-1).mean() > 0.9
    other_seed = Pipeline(crops, seed=8).draw(sizes, ids, 3).boxes
    assert (other_seed[:, 0] != whole[:, 0]).any(-1).mean() > 0.9
    assert np.array_equal(other_seed[:, 1], whole[:, 1])  # its own seed, so the loader's changes nothing


def test_a_crops_boxes_do_not_depend_on_the_crops_beside_it() -> None:
    crops = {"a": {"size": 8}, "b": {"size": 16, "scale": (0.1, 0.2)}, "c": {"size": 8, "seed": 3}}
    ids = np.arange(len(SIZES))

    def boxes(*names: str) -> dict[str, np.ndarray]:
        plan = Pipeline(MultiRandomResizedCrop({name: crops[name] for name in names}), seed=1).draw(SIZES, ids, 0)
        return {name: plan.boxes[:, index] for index, name in enumerate(names)}

    beside = boxes("a", "b", "c")
    for names in (("a",), ("c", "a"), ("b", "c")):
        for name, found in boxes(*names).items():
            assert np.array_equal(found, beside[name])


def test_crops_are_yoked_by_an_explicit_seed_alone() -> None:
    ids = np.arange(len(SIZES))

    def boxes(stage, *, seed: int = 0, **options) -> np.ndarray:
        return Pipeline(stage, seed=seed, **options).draw(SIZES, ids, 0).boxes[:, 0]

    seeded = boxes(RandomResizedCrop(8, seed=5))
    for same in (
        boxes(RandomResizedCrop(64, seed=5, interpolation="bicubic"), seed=9),  # the output's size moves no box
        boxes(RandomResizedCrop(8, seed=5), field="mask", scope="mask"),
        boxes(MultiRandomResizedCrop({"a": {"size": 8, "seed": 5}})),
        boxes(MultiRandomResizedCrop({"b": RandomResizedCrop(8, seed=5)}, seed=1), scope="depth"),
    ):
        assert np.array_equal(seeded, same)
    unseeded = [
        boxes(RandomResizedCrop(8)),
        boxes(RandomResizedCrop(8), scope="mask"),
        boxes(MultiRandomResizedCrop({"a": {"size": 8}})),
        boxes(MultiRandomResizedCrop({"b": {"size": 8}})),
        boxes(MultiRandomResizedCrop({"a": {"size": 8}}, seed=5)),
        boxes(MultiCropRandomResizedCrop(1, 8)),
        boxes(RandomResizedCrop(8, seed=0)),
        seeded,
    ]
    for first, one in enumerate(unseeded):
        assert not any(np.array_equal(one, other) for other in unseeded[first + 1 :]), first


def test_a_multi_crops_seed_stands_in_for_the_loaders() -> None:
    for make in (
        lambda **o: MultiRandomResizedCrop({"a": {"size": 8}}, **o),
        lambda **o: MultiCropRandomResizedCrop(1, 8, **o),
    ):
        own, loaders = Pipeline(make(seed=6), seed=1), Pipeline(make(), seed=6)
        ids = np.arange(len(SIZES))
        assert np.array_equal(own.draw(SIZES, ids, 0).boxes, loaders.draw(SIZES, ids, 0).boxes)


def test_related_boxes_are_uncorrelated() -> None:
    """Neighbouring samples, sibling crops, consecutive epochs, seeds 42 and 43, and each beside the other's neighbour.

    The correlation of two independent columns of N numbers has a deviation of 1 / sqrt(N); of the 16 pairs of features
    in each comparison none may pass five deviations.
    """
    count, size = 30_000, (3000, 4000)
    names = {"a": {}, "b": {}, "seed 42": {"seed": 42}, "seed 43": {"seed": 43}}
    crops = MultiRandomResizedCrop({name: dict(size=8, scale=(0.05, 0.4), **more) for name, more in names.items()})
    pipeline = Pipeline(crops, seed=42)
    sizes = np.tile(np.array(size, np.int32), (count, 1))
    drawn = {}
    for epoch in (0, 1):
        boxes = pipeline.draw(sizes, np.arange(count), epoch).boxes
        for index, name in enumerate(names):
            drawn[name, epoch] = np.stack(list(features(boxes[:, index], size).values()))
    for first, one in drawn.items():
        for second, other in drawn.items():
            for lag in (0, 1, 2):
                if first == second and lag == 0:
                    continue
                across = np.corrcoef(one[:, : count - lag], other[:, lag:])[:4, 4:]
                assert np.abs(across).max() < 5 / math.sqrt(count - lag), (first, second, lag)


def two_pass(image: np.ndarray, full: tuple[int, int], size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """torchvision's center_crop of the image resized to `full` one axis after the other: uint8 [3, h, w]."""
    resample = Image.Resampling[interpolation.upper()]
    across = Image.fromarray(image).resize((full[1], image.shape[0]), resample)
    resized = np.asarray(across.resize((full[1], full[0]), resample))
    return v2.functional.center_crop(torch.from_numpy(resized.transpose(2, 0, 1).copy()), list(size))


def torchvision_full(image_size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    given = [resize] if isinstance(resize, int) else list(resize)
    height, width = v1_functional._compute_resized_output_size(image_size, given)
    return height, width


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "resize", "count"),
    [
        (224, 256, 8),
        (28, 32, 40),
        (32, 32, 20),
        ((21, 30), 33, 20),
        ((30, 21), (31, 44), 20),
        ((17, 1), 17, 10),
    ],
)
def test_centre_crop_is_torchvisions_resize_then_center_crop(size, resize, count: int, interpolation: str) -> None:
    rng = np.random.default_rng(9)
    shapes = [(256, 256), (375, 500), (500, 375), (257, 256), (100, 301)]
    shapes += [tuple(map(int, rng.integers(1, 420, 2))) for _ in range(count)]
    if count > 8:
        shapes += [(1, 1), (1, 60), (60, 1), (31, 32), (33, 33)]
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    crop = CenterCrop(size, resize=resize, interpolation=interpolation, backend="cpu")
    crops = crop([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    for image, shape, found in zip(images, shapes, crops, strict=True):
        assert torch.equal(found, two_pass(image, torchvision_full(shape, resize), crop.size, interpolation)), shape


def test_centre_crops_sizes_and_places_are_torchvisions() -> None:
    rng = np.random.default_rng(10)
    sizes = rng.integers(1, 5000, (4000, 2)).astype(np.int32)
    anchor = v2.functional._geometry._center_crop_compute_crop_anchor
    for size, resize in ((224, 256), ((99, 100), 131), ((97, 64), (98, 331)), (5, 5)):
        spec = CenterCrop(size, resize=resize)
        geometry = sample_geometry(spec, sizes, None)
        full = [torchvision_full((int(h), int(w)), resize) for h, w in sizes]
        assert geometry.full.tolist() == [list(each) for each in full]
        assert geometry.origin.tolist() == [list(anchor(*spec.size, *each)) for each in full]
        assert (geometry.box[:, :2] == 0).all()
        assert (geometry.box[:, 2:] == sizes).all()


def test_centre_crop_without_resize_is_a_window(scenes: list[np.ndarray]) -> None:
    image = torch.from_numpy(scenes[0]).permute(2, 0, 1)
    for size in (64, (239, 319), (240, 1)):
        crop = CenterCrop(size)
        assert torch.equal(crop([image])[0], v2.functional.center_crop(image, list(crop.size)))


def test_an_image_smaller_than_its_centre_crop_is_named() -> None:
    images = [torch.zeros(3, 40, 40, dtype=torch.uint8), torch.zeros(3, 31, 40, dtype=torch.uint8)]
    message = r"CenterCrop\(\(32, 32\)\) needs .*\(or give resize=\), got \(h, w\) = \(31, 40\) at batch index 1"
    with pytest.raises(ImageSizeError, match=message) as caught:
        CenterCrop(32)(images)
    assert caught.value.index == 1
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))  # one that cannot be made again ends a pool of processes
    assert (str(again), again.index) == (str(caught.value), 1)
    assert CenterCrop(32)(images[:1]).shape == (1, 3, 32, 32)
    with pytest.raises(ImageSizeError, match="resize=256 needs images less thin"):
        sample_geometry(CenterCrop(224, resize=256), np.array([[1, 10**7]], np.int32), None)


def test_resize_may_be_any_whole_number() -> None:
    assert CenterCrop(8, resize=np.int64(9)) == CenterCrop(8, resize=9)  # the short side, not both


def test_a_random_crop_is_its_box_resized(scenes: list[np.ndarray]) -> None:
    images = [torch.from_numpy(scene).permute(2, 0, 1) for scene in scenes]
    for interpolation, filter_ in (("bilinear", 0), ("bicubic", 1)):
        crop = RandomResizedCrop((20, 31), interpolation=interpolation, return_boxes=True, backend="cpu")
        result = crop(images, sample_ids=range(8))
        assert isinstance(result, dict)
        assert set(result) == {"image", "image_box"}
        for scene, box, pixels in zip(scenes, result["image_box"].tolist(), result["image"], strict=True):
            job = np.array([*box, 20, 31, 0, 0, filter_, 0])
            assert np.array_equal(pixels.numpy(), oracle(scene, job, (20, 31)))


def test_seen_boxes_of_random_crops_are_their_boxes() -> None:
    rng = np.random.default_rng(11)
    sizes = rng.integers(1, 3000, (2000, 2)).astype(np.int32)
    for size in (1, 7, 96, 224, 513):
        pipeline = Pipeline(RandomResizedCrop(size), seed=1)
        plan = pipeline.draw(sizes, np.arange(2000), 0)
        assert np.array_equal(plan.boxes[:, 0], plan.jobs[:, 0, :4])


def test_seen_boxes_of_centre_crops_are_what_the_window_shows() -> None:
    rng = np.random.default_rng(12)
    sizes = np.concatenate([rng.integers(1, 2000, (2000, 2)), rng.integers(1, 5, (50, 2))]).astype(np.int32)
    for size, resize in ((224, 256), (10, 100), ((3, 50), (400, 50))):
        spec = CenterCrop(size, resize=resize)
        geometry = sample_geometry(spec, sizes, None)
        seen = seen_boxes(geometry, spec.size)
        assert (seen[:, :2] >= 0).all()
        assert (seen[:, 2:] >= 1).all()
        assert (seen[:, :2] + seen[:, 2:] <= sizes).all()
        exact = geometry.origin * sizes / geometry.full
        assert np.abs(seen[:, :2] - exact).max() <= 1
        assert np.abs(seen[:, 2:] - np.array(spec.size) * sizes / geometry.full).max() <= 1
    same = geometry_of(box=np.array([[0, 0, 256, 320]]), full=(256, 320), origin=(16, 48), kind=0)
    assert seen_boxes(same, (224, 224)).tolist() == [[16, 48, 224, 224]]


def test_an_empty_batch_has_empty_boxes() -> None:
    result = MultiRandomResizedCrop({"a": {"size": 8}}, return_boxes=True)([], sample_ids=[])
    assert result["a"].shape == (0, 3, 8, 8)
    assert result["a_box"].shape == (0, 4)
