"""Random erasing: torchvision's law of boxes, the values, and the noise's key."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (wrong parameters are given on purpose)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from slipstream_kernels import ops
from torchvision.transforms import v2

from slipstream.draws import Draws, stream_key
from slipstream.stage_erase import RandomErasing

IDS = np.arange(20_000)
CHANCE = 1e-5  # of a right law failing its test; the seeds are fixed


def program_of(stage, ids=IDS, size=(64, 96), seed: int = 0, name: str = "test") -> np.ndarray:
    return stage.sample_program(Draws(stream_key(seed, name), ids, 0), size)


def test_boxes_follow_torchvisions_law() -> None:
    # no box of these is refused, so the law of the first try is the law of all
    size, scale, ratio = (640, 960), (0.02, 0.33), (0.5, 1.5)
    row = program_of(RandomErasing(0.6, scale, ratio), size=size)[:, 0].astype(float)
    erased = row[:, 0] == ops.ERASE
    assert abs(erased.mean() - 0.6) < 5 * np.sqrt(0.24 / len(IDS)) and (row[~erased] == 0).all()
    top, left, height, width = row[erased, 1:5].T
    # a pixel more or less in a side moves these by less than the test can see
    share = (height * width / (640 * 960) - scale[0]) / (scale[1] - scale[0])
    logarithm = (np.log(height / width) - math.log(ratio[0])) / (math.log(ratio[1]) - math.log(ratio[0]))
    assert kstest(share, "uniform").pvalue > CHANCE and kstest(logarithm, "uniform").pvalue > CHANCE
    assert (row[erased, 5:] == 0).all()
    for place, side, whole in [(top, height, 640), (left, width, 960)]:
        assert (place >= 0).all() and (place + side <= whole).all() and (place == np.rint(place)).all()
        # every place in 0 ... whole - side alike
        assert kstest((place + 0.5) / (whole - side + 1), "uniform").pvalue > CHANCE
    assert np.abs(np.corrcoef([share, logarithm, top / (640 - height), left / (960 - width)]) - np.eye(4)).max() < (
        5 / np.sqrt(erased.sum())
    )


def test_refused_boxes_are_tried_again_as_torchvisions() -> None:
    # large and long boxes: many tries fail, and the mix that passes is compared with torchvision's own
    size, options = (20, 33), dict(scale=(0.3, 1.0), ratio=(0.2, 5.0))
    found = program_of(RandomErasing(1.0, **options), size=size)[:, 0]
    found = found[found[:, 0] != 0, 1:5]
    torch.manual_seed(0)
    theirs, image = v2.RandomErasing(1.0, **options), torch.zeros(3, *size)
    drawn = [theirs.make_params([image]) for _ in range(4000)]
    expected = np.array([[each["i"], each["j"], each["h"], each["w"]] for each in drawn if each["v"] is not None])
    assert (found[:, 2] < 20).all() and (found[:, 3] < 33).all()
    for ours, other in zip(found.T, expected.T, strict=True):
        spread = np.hypot(ours.std() / np.sqrt(len(ours)), other.std() / np.sqrt(len(other)))
        assert abs(ours.mean() - other.mean()) < 5 * spread
        assert abs(ours.std() - other.std()) < 0.05 * other.std()


def test_nothing_is_erased_where_none_of_ten_boxes_fits() -> None:
    assert (program_of(RandomErasing(1.0, (1, 1), (1, 1)), size=(32, 32)) == 0).all()
    assert (program_of(RandomErasing(1.0), size=(1, 1))[:, 0, 3:5] == 0).all()
    # one try fits with chance q = P(area <= 31.5^2 / 32^2 of one in [0.9, 1])
    q = (31.5**2 / 32**2 - 0.9) / 0.1
    missed = (program_of(RandomErasing(1.0, (0.9, 1), (1, 1)), size=(32, 32))[:, 0, 0] == 0).mean()
    expected = (1 - q) ** 10
    assert abs(missed - expected) < 5 * np.sqrt(expected * (1 - expected) / len(IDS))


@pytest.mark.parametrize(("value", "written"), [(0.25, [0.25] * 3), ((-2, 0.5, 3), [-2, 0.5, 3])])
def test_constants_are_written_as_given(value, written) -> None:
    row = program_of(RandomErasing(1.0, value=value))[:, 0]
    assert (row[:, 5:8] == np.float32(written)).all() and (row[:, 8:] == 0).all()


def test_a_random_colour_is_normal_and_one_for_the_box() -> None:
    row = program_of(RandomErasing(1.0, value="color"))[:, 0]
    assert (row[:, 0] == ops.ERASE).all() and (row[:, 8:] == 0).all()
    for channel in row[:, 5:8].T:
        assert kstest(channel, "norm").pvalue > CHANCE
    assert np.abs(np.corrcoef(row[:, 5:8].T) - np.eye(3)).max() < 5 / np.sqrt(len(IDS))


def test_noise_has_a_key_of_its_own_in_four_pieces() -> None:
    row = program_of(RandomErasing(1.0, value="random"))[:, 0]
    assert (row[:, 8] == 1).all() and (row[:, 5:8] == 0).all() and (row[:, 13:] == 0).all()
    pieces = row[:, 9:13].astype(np.uint64)
    assert (pieces == row[:, 9:13]).all() and pieces.max() < 2**16
    keys = (pieces << np.arange(0, 64, 16, dtype=np.uint64)).sum(1)
    words = Draws(stream_key(0, "test"), IDS, 0).words(11)[:, 0]
    assert (keys == words[:, 0].astype(np.uint64) + (words[:, 1].astype(np.uint64) << np.uint64(32))).all()
    assert len(np.unique(keys)) == len(IDS)


@pytest.mark.parametrize("value", [0, "random", "color"])
def test_a_sample_does_not_depend_on_its_batch(value) -> None:
    stage = RandomErasing(value=value)
    whole = program_of(stage, IDS[:50])
    assert whole.shape == (50, 1, ops.OP_WIDTH) and whole.dtype == np.float32
    alone = np.concatenate([program_of(stage, IDS[i : i + 1]) for i in range(50)])
    assert np.array_equal(whole, alone)
    assert not np.array_equal(whole, program_of(stage, IDS[:50], name="other"))
    assert program_of(stage, []).shape == (0, 1, ops.OP_WIDTH)
    assert stage.slots() == ((ops.ERASE,),)
    # what is written changes nothing of where
    assert np.array_equal(whole[:, 0, :5], program_of(RandomErasing(), IDS[:50])[:, 0, :5])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomErasing(1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: RandomErasing(scale=(-0.1, 0.3)), ValueError, "scale must satisfy 0 <= low <= high <= 1"),
        (lambda: RandomErasing(scale=(0.1, 1.3)), ValueError, "scale must satisfy"),
        (lambda: RandomErasing(scale=(0.3, 0.1)), ValueError, r"scale must satisfy .*, got \(0.3, 0.1\)"),
        (lambda: RandomErasing(scale=0.3), TypeError, r"scale must be two numbers \(low, high\), got 0.3"),
        (lambda: RandomErasing(ratio=(0, 3)), ValueError, "ratio must satisfy 0 < low <= high"),
        (lambda: RandomErasing(ratio=(3, 0.3)), ValueError, "ratio must satisfy 0 < low <= high"),
        (lambda: RandomErasing(value="pixel"), ValueError, "value must be .* 'random' or 'color', got 'pixel'"),
        (lambda: RandomErasing(value=(1, 2)), ValueError, "value must be three numbers"),
        (lambda: RandomErasing(value=None), TypeError, "value must be a finite number"),
        (lambda: RandomErasing(seed=1.0), TypeError, "seed must be an int or None"),
    ],
)
def test_bad_parameters_are_refused_when_made(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
