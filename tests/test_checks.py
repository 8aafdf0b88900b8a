"""What bad crops and stages get: when they are made, an error that names the field, the value and what is allowed."""

# What is written here is wrong on purpose.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from slipstream import (
    CenterCrop,
    GaussianBlur,
    MixUp,
    MultiCropPipeline,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    NamedCopies,
    Normalize,
    RandomApply,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToDtype,
    presets,
)
from slipstream.pipeline import Pipeline

NAN, INF = float("nan"), float("inf")
SIZE_KIND = "size must be an int or two ints (h, w), got "
NORMALIZE, FLIP = Normalize(), RandomHorizontalFlip()
NAMED = MultiRandomResizedCrop({"a": {"size": 8}, "b": {"size": 8}})


def named(**parameters: Any) -> MultiRandomResizedCrop:
    return MultiRandomResizedCrop({"local_0": parameters})


def crop(**parameters: Any) -> RandomResizedCrop:
    return RandomResizedCrop(**{"size": 8, **parameters})


# Each line: what a user writes, the error's type, and its message from the beginning.
BAD_CROPS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: crop(size=0), ValueError, "size must be 1 pixel or more, got 0"),
    (lambda: crop(size=-4), ValueError, "size must be 1 pixel or more, got -4"),
    (lambda: crop(size=(8, 0)), ValueError, "size must be 1 pixel or more, got (8, 0)"),
    (lambda: crop(size="224"), TypeError, SIZE_KIND + "'224'"),
    (lambda: crop(size=b"ab"), TypeError, SIZE_KIND + "b'ab'"),
    (lambda: crop(size=True), TypeError, SIZE_KIND + "True"),
    (lambda: crop(size=None), TypeError, SIZE_KIND + "None"),
    (lambda: crop(size=224.0), TypeError, SIZE_KIND + "224.0"),
    (lambda: crop(size=(224, "224")), TypeError, SIZE_KIND + "(224, '224')"),
    (lambda: crop(size=(8, 8, 3)), ValueError, SIZE_KIND + "(8, 8, 3)"),
    (lambda: crop(size=()), ValueError, SIZE_KIND + "()"),
    (lambda: crop(scale=(0.0, 1.0)), ValueError, "scale must satisfy 0 < low <= high <= 1, got (0.0, 1.0)"),
    (lambda: crop(scale=(0.4, 1.1)), ValueError, "scale must satisfy 0 < low <= high <= 1, got (0.4, 1.1)"),
    (lambda: crop(scale=[1.0, 0.4]), ValueError, "scale must satisfy 0 < low <= high <= 1, got [1.0, 0.4]"),
    (lambda: crop(scale=(-0.1, 1)), ValueError, "scale must satisfy 0 < low <= high <= 1, got (-0.1, 1)"),
    (lambda: crop(scale=(0.1, 0.2, 0.3)), ValueError, "scale must be two numbers (low, high), got (0.1, 0.2, 0.3)"),
    (lambda: crop(scale=0.4), TypeError, "scale must be two numbers (low, high), got 0.4"),
    (lambda: crop(scale="ab"), TypeError, "scale must be two numbers (low, high), got 'ab'"),
    (
        lambda: crop(scale=("0.4", "1")),
        TypeError,
        "scale must be two numbers (low, high), all finite, got ('0.4', '1')",
    ),
    (
        lambda: crop(scale=(True, True)),
        TypeError,
        "scale must be two numbers (low, high), all finite, got (True, True)",
    ),
    (lambda: crop(scale=(NAN, 1.0)), ValueError, "scale must be two numbers (low, high), all finite, got (nan, 1.0)"),
    (lambda: crop(ratio=(0, 1)), ValueError, "ratio must satisfy 0 < low <= high, got (0, 1)"),
    (lambda: crop(ratio=(4 / 3, 0.75)), ValueError, "ratio must satisfy 0 < low <= high, got (1.33333"),
    (lambda: crop(ratio=(0.75, INF)), ValueError, "ratio must be two numbers (low, high), all finite, got (0.75, inf)"),
    (lambda: crop(ratio=None), TypeError, "ratio must be two numbers (low, high), got None"),
    (
        lambda: crop(interpolation="nearest"),
        ValueError,
        "interpolation must be one of 'bilinear', 'bicubic', 'random', got 'nearest'",
    ),
    (lambda: crop(interpolation=2), ValueError, "interpolation must be one of 'bilinear', 'bicubic', 'random', got 2"),
    (
        lambda: crop(interpolation=["bilinear"]),
        ValueError,
        "interpolation must be one of 'bilinear', 'bicubic', 'random', got [",
    ),
    (lambda: crop(seed=1.5), TypeError, "seed must be an int or None, got 1.5"),
    (lambda: crop(seed="42"), TypeError, "seed must be an int or None, got '42'"),
    (lambda: crop(seed=True), TypeError, "seed must be an int or None, got True"),
    (lambda: crop(return_boxes=1), TypeError, "return_boxes must be True or False, got 1"),
    (
        lambda: crop(memory_format="channels_last"),
        ValueError,
        "memory_format must be one of torch.contiguous_format, torch",
    ),
    (
        lambda: crop(memory_format=torch.preserve_format),
        ValueError,
        "memory_format must be one of torch.contiguous_format",
    ),
    (lambda: crop(backend="cuda"), ValueError, "backend must be one of None, 'triton', 'cpu', got 'cuda'"),
    (lambda: crop(sise=8), TypeError, "RandomResizedCrop.__init__() got an unexpected keyword argument 'sise'"),
    (lambda: CenterCrop(0), ValueError, "size must be 1 pixel or more, got 0"),
    (lambda: CenterCrop(224, resize=200), ValueError, "resize must be at least the crop's size (224, 224), got 200"),
    (
        lambda: CenterCrop((8, 9), resize=(9, 8)),
        ValueError,
        "resize must be at least the crop's size (8, 9), got (9, 8)",
    ),
    (lambda: CenterCrop(224, resize="256"), TypeError, "resize must be an int or two ints (h, w), got '256'"),
    (lambda: CenterCrop(224, resize=0), ValueError, "resize must be 1 pixel or more, got 0"),
    (
        lambda: CenterCrop(8, interpolation="lanczos"),
        ValueError,
        "interpolation must be one of 'bilinear', 'bicubic', got",
    ),
    (lambda: CenterCrop(8, backend="dali"), ValueError, "backend must be one of None, 'triton', 'cpu', got 'dali'"),
    (lambda: MultiCropRandomResizedCrop(0), ValueError, "num_crops must be 1 or more, got 0"),
    (lambda: MultiCropRandomResizedCrop("2"), TypeError, "num_crops must be an int, got '2'"),
    (lambda: MultiCropRandomResizedCrop(2, 0), ValueError, "size must be 1 pixel or more, got 0"),
    (
        lambda: MultiCropRandomResizedCrop(2, scale=(2, 3)),
        ValueError,
        "scale must satisfy 0 < low <= high <= 1, got (2, 3)",
    ),
    (lambda: MultiCropRandomResizedCrop(seed=1.5), TypeError, "seed must be an int or None, got 1.5"),
    (lambda: MultiRandomResizedCrop({}), ValueError, "crops must name at least one crop, got {}"),
    (lambda: MultiRandomResizedCrop([{"size": 8}]), TypeError, "crops must be a dict of name -> parameters, got [{"),
    (lambda: MultiRandomResizedCrop({0: {"size": 8}}), TypeError, "crops must be named by non-empty strings, got 0"),
    (lambda: MultiRandomResizedCrop({"": {"size": 8}}), ValueError, "crops must be named by non-empty strings, got ''"),
    (
        lambda: MultiRandomResizedCrop({"a": 224}),
        TypeError,
        "crops['a'] must be a dict of parameters or a crop, got 224",
    ),
    (
        lambda: MultiRandomResizedCrop({"a": v2.RandomResizedCrop(8)}),
        TypeError,
        "crops['a'] must not be torchvision's RandomResizedCrop: use",
    ),
    (
        lambda: MultiRandomResizedCrop({"a": RandomResizedCrop}),
        TypeError,
        "crops['a'] must be a dict of parameters or a crop",
    ),
    (lambda: MultiRandomResizedCrop({"a": crop()}, seed=0.5), TypeError, "seed must be an int or None, got 0.5"),
    (
        lambda: MultiRandomResizedCrop({"a": crop()}, backend="gpu"),
        ValueError,
        "backend must be one of None, 'triton', 'cpu'",
    ),
    (lambda: MultiRandomResizedCrop({"a": crop()}, return_boxes=None), TypeError, "return_boxes must be True or False"),
    (
        lambda: MultiRandomResizedCrop({"a": crop(), "a_box": crop()}, return_boxes=True),
        ValueError,
        "crops must not name 'a_box', which return_boxes=True gives: name it otherwise",
    ),
    (
        lambda: MultiRandomResizedCrop({"a": crop(return_boxes=True)}),
        ValueError,
        "crops['a']: return_boxes and backend are arguments of MultiRandomResizedCrop",
    ),
    (
        lambda: named(sise=96),
        ValueError,
        "crops['local_0'] has an unknown parameter 'sise'; allowed are size, scale, ratio, interpolation, seed",
    ),
    (lambda: named(scale=(0.1, 0.4)), ValueError, "crops['local_0'] must have a size, got {'scale': (0.1, 0.4)}"),
    (lambda: named(size=0), ValueError, "crops['local_0']: size must be 1 pixel or more, got 0"),
    (lambda: named(size="96"), TypeError, "crops['local_0']: " + SIZE_KIND + "'96'"),
    (
        lambda: named(size=96, scale=(0.4, 0.05)),
        ValueError,
        "crops['local_0']: scale must satisfy 0 < low <= high <= 1, got",
    ),
    (
        lambda: named(size=96, interpolation="cubic"),
        ValueError,
        "crops['local_0']: interpolation must be one of 'bilinear'",
    ),
    (lambda: named(size=96, seed=1.5), TypeError, "crops['local_0']: seed must be an int or None, got 1.5"),
]
BAD_STAGES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: RandomHorizontalFlip(1.5), ValueError, "p must be in [0, 1], got 1.5"),
    (lambda: RandomHorizontalFlip(-0.1), ValueError, "p must be in [0, 1], got -0.1"),
    (lambda: RandomHorizontalFlip(NAN), ValueError, "p must be a finite number, got nan"),
    (lambda: RandomHorizontalFlip("0.5"), TypeError, "p must be a finite number, got '0.5'"),
    (lambda: RandomHorizontalFlip(True), TypeError, "p must be a finite number, got True"),
    (lambda: RandomHorizontalFlip(seed=1.5), TypeError, "seed must be an int or None, got 1.5"),
    (lambda: Normalize(std=(0.2, 0, 0.2)), ValueError, "std must not be zero in float32, got (0.2, 0.0, 0.2)"),
    (lambda: Normalize(std=(1e-50, 1, 1)), ValueError, "std must not be zero in float32, got (1e-50, 1.0, 1.0)"),
    (lambda: Normalize(mean=(0.5, 0.5)), ValueError, "mean must be three numbers, one a channel, got (0.5, 0.5)"),
    (lambda: Normalize(mean=0.5), TypeError, "mean must be three numbers, one a channel, got 0.5"),
    (
        lambda: Normalize(mean=(NAN, 0, 0)),
        ValueError,
        "mean must be three numbers, one a channel, all finite, got (nan, 0, 0)",
    ),
    (
        lambda: Normalize(std=("1", 1, 1)),
        TypeError,
        "std must be three numbers, one a channel, all finite, got ('1', 1, 1)",
    ),
    (
        lambda: Normalize(dtype=torch.uint8),
        ValueError,
        "dtype must be one of None, torch.float16, torch.bfloat16, torch.float32",
    ),
    (lambda: Normalize(dtype="float32"), ValueError, "dtype must be one of None, torch.float16"),
    (
        lambda: ToDtype(torch.int64),
        ValueError,
        "dtype must be one of torch.uint8, torch.float16, torch.bfloat16, torch.float32",
    ),
    (lambda: ToDtype(torch.float32, 1), TypeError, "scale must be True or False, got 1"),
    (
        lambda: MultiCropPipeline([NORMALIZE]),
        TypeError,
        "pipelines must be a dict of crop name -> stages, got [Normalize(",
    ),
    (lambda: MultiCropPipeline({"a": NORMALIZE}), TypeError, "pipelines['a'] must be a list of stages, got Normalize("),
    (lambda: MultiCropPipeline({"a": None}), TypeError, "pipelines['a'] must be a list of stages, got None"),
    (
        lambda: MultiCropPipeline({"a": [FLIP, Normalize]}),
        TypeError,
        "pipelines['a'][1] must be a stage (RandomHorizontalFlip, ColorJitter, Normalize, ...), a function on",
    ),
    (
        lambda: MultiCropPipeline({"a": [v2.RandomHorizontalFlip()]}),
        TypeError,
        "pipelines['a'][0] must not be torchvision's RandomHorizontalFlip: use slipstream's, which draw for",
    ),
    (lambda: MultiCropPipeline({"a": [NAMED]}), TypeError, "pipelines['a'][0] must be a stage (RandomHorizontalFlip,"),
    (lambda: MultiCropPipeline({"a": []}, seed=0.5), TypeError, "seed must be an int or None, got 0.5"),
]
FIRST = "pipelines['image'] must begin with a crop stage (RandomResizedCrop, CenterCrop, MultiRandomResizedCrop, "
BAD_PIPELINES: list[tuple[Any, type[Exception], str]] = [
    ([], TypeError, FIRST),
    (None, TypeError, FIRST),
    ("RandomResizedCrop", TypeError, FIRST),
    (
        [v2.RandomResizedCrop(8), NORMALIZE],
        TypeError,
        "pipelines['image'] must not be torchvision's RandomResizedCrop: ",
    ),
    (v2.Compose([v2.CenterCrop(8)]), TypeError, "pipelines['image'] must not be torchvision's Compose: "),
    (
        [crop(subset_of="global_0")],
        ValueError,
        "pipelines['image'][0]: subset_of='global_0' must name a crop beside this one",
    ),
    ([NORMALIZE, crop()], TypeError, FIRST),
    ([RandomResizedCrop], TypeError, FIRST),
    (NORMALIZE, TypeError, FIRST),
    (
        [crop(), Normalize],
        TypeError,
        "pipelines['image'][1] must be a stage (RandomHorizontalFlip, ColorJitter, Normalize, ...), a function on",
    ),
    (
        [crop(), crop()],
        TypeError,
        "pipelines['image'][1] must be a stage (RandomHorizontalFlip, ColorJitter, Normalize, ...), a function on",
    ),
    ([crop(), [NORMALIZE]], TypeError, "pipelines['image'][1] must be a stage"),
    ([NAMED, MultiCropPipeline({"c": []})], ValueError, "pipelines['image'][1] names 'c'; allowed are ['a', 'b']"),
    (
        [crop(), MultiCropPipeline({"a": [NORMALIZE]})],
        ValueError,
        "pipelines['image'][1] names the crops ['a'], but those of RandomResizedCrop have no names: give the",
    ),
    (
        [MultiCropRandomResizedCrop(2, 8), FLIP, MultiCropPipeline({"0": [NORMALIZE]})],
        ValueError,
        "pipelines['image'][2] names the crops ['0'], but those of MultiCropRandomResizedCrop have no names",
    ),
    (
        [NAMED, NORMALIZE, MultiCropPipeline({"b": [ToDtype(torch.uint8)]})],
        TypeError,
        "pipelines['image'], crop 'b': ToDtype(uint8) takes uint8 images, got torch.float32",
    ),
    (
        [crop(), FLIP, RandomApply([GaussianBlur(17)], p=0.001)],
        ValueError,
        "pipelines['image']: kernel_size 17 x 17 reaches beyond the reflection of a crop of 8 x 8",
    ),
    (
        [crop(), NamedCopies(["a", "b"]), MultiCropPipeline({"b": [GaussianBlur(17)]})],
        ValueError,
        "pipelines['image'], crop 'b': kernel_size 17 x 17 reaches beyond",
    ),
    (
        [crop(), NORMALIZE, ToDtype(torch.uint8)],
        TypeError,
        "pipelines['image']: ToDtype(uint8) takes uint8 images, got torch.float32",
    ),
]
UINT8 = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
BAD_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: crop()(UINT8.float()), TypeError, "images must be uint8, got torch.float32"),
    (lambda: crop()([UINT8[0].float()]), TypeError, "images[0] must be uint8, got torch.float32"),
    (lambda: crop()(UINT8[0]), ValueError, "images must be [B, 3, H, W] or a list of [3, H, W], got shape [3, 8, 8]"),
    (lambda: crop()([UINT8[0].permute(1, 2, 0)]), ValueError, "images[0] must be [3, H, W] (or [1, H, W])"),
    (lambda: crop()(Image.new("RGB", (9, 9))), TypeError, "images must be a tensor [B, 3, H, W] or a list of "),
    (lambda: crop()({"a": UINT8}), TypeError, "images must be a tensor [B, 3, H, W] or a list of [3, H, W], got dict"),
    (lambda: crop()(["photo.jpg"]), TypeError, "images[0] must be a torch.Tensor or numpy array, got str"),
    (
        lambda: crop()(UINT8, sample_ids=[1]),
        ValueError,
        "sample_ids must be one whole number for each of the 2 images, got",
    ),
    (
        lambda: crop()(UINT8, sample_ids=[1.0, 2.0]),
        TypeError,
        "sample_ids must be whole numbers in [0, 2**64), got dtype",
    ),
    (lambda: crop()(UINT8, sample_ids=[-1, 0]), ValueError, "sample_ids must be in [0, 2**64), got -1"),
    (lambda: crop()(UINT8, sample_ids=[0, 1], epoch=-1), ValueError, "epoch must be in [0, 4294967296), got -1"),
    (lambda: crop()(UINT8, sample_ids=[0, 1], epoch=0.5), TypeError, "epoch must be an int, got 0.5"),
    (
        lambda: crop(backend="triton")(UINT8),
        RuntimeError,
        'backend="triton" on CPU tensors needs Triton\'s interpreter: set TRITON_INTERPRET=1 before triton is imported',
    ),
    (lambda: FLIP(UINT8[0]), ValueError, "images must be [B, C, h, w], got shape [3, 8, 8]"),
    (lambda: FLIP([UINT8[0]]), TypeError, "images must be a tensor [B, C, h, w], got list"),
    (lambda: FLIP(UINT8, sample_ids=[0]), ValueError, "sample_ids must be one whole number for each of the 2 images"),
    (lambda: NORMALIZE(UINT8[:, :1]), ValueError, "images must be [..., 3, h, w], got shape [2, 1, 8, 8]"),
    (lambda: NORMALIZE(UINT8.permute(0, 2, 3, 1)), ValueError, "images must be [..., 3, h, w], got shape [2, 8, 8, 3]"),
    (lambda: NORMALIZE(UINT8.long()), TypeError, "Normalize takes uint8 or float images, got torch.int64"),
    (lambda: NORMALIZE(np.zeros((3, 8, 8))), TypeError, "images must be a tensor [..., 3, h, w], got ndarray"),
    (lambda: ToDtype(torch.float32)(UINT8.int()), TypeError, "ToDtype takes uint8 or float images, got torch.int32"),
    (lambda: ToDtype(torch.uint8)(UINT8.float()), TypeError, "ToDtype(uint8) takes uint8 images, got torch.float32"),
    (lambda: ToDtype(torch.float32)([UINT8]), TypeError, "images must be a tensor, got list"),
    (
        lambda: MultiCropPipeline({"global_2": [FLIP]})({"global_0": UINT8}),
        ValueError,
        "pipelines names the crop 'global_2', the crops given are ['global_0']",
    ),
    (
        lambda: MultiCropPipeline({"a": [FLIP]})([UINT8]),
        TypeError,
        "crops must be a dict of name -> [B, C, h, w], got list",
    ),
    (
        lambda: MultiCropPipeline({"a": [FLIP]})({"a": UINT8[0]}),
        ValueError,
        "crops['a'] must be [B, C, h, w], got shape",
    ),
    (
        lambda: MultiCropPipeline({"a": [FLIP], "b": [FLIP]})({"a": UINT8, "b": UINT8[:1]}),
        ValueError,
        "crops must be of the same images, got batches of {'a': 2, 'b': 1}",
    ),
]


def assert_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        make()
    assert type(caught.value) is error


@pytest.mark.parametrize(("make", "error", "message"), [*BAD_CROPS, *BAD_STAGES, *BAD_CALLS])
def test_bad_input_is_named_with_its_value_and_what_is_allowed(make, error, message) -> None:
    assert_refused(make, error, message)


@pytest.mark.parametrize(("stages", "error", "message"), BAD_PIPELINES)
def test_a_pipeline_that_cannot_be_is_refused_when_it_is_made(stages, error, message) -> None:
    assert_refused(lambda: Pipeline(stages), error, message)


def test_what_belongs_elsewhere_is_told_where() -> None:
    for stages in ([crop(), CenterCrop(8)], [crop(), NAMED], [NAMED, MultiCropPipeline({"a": [FLIP]}), crop()]):
        with pytest.raises(TypeError, match=r"a crop stage stands once, at the beginning of a field's pipeline$"):
            Pipeline(stages)
    for make in (lambda: Pipeline([crop(), MixUp(10)]), lambda: MultiCropPipeline({"a": [MixUp(10)]})):
        with pytest.raises(TypeError, match=r"it goes into the loader's batch_stages$"):
            make()


def test_a_long_value_does_not_hide_what_is_wrong() -> None:
    recipe = presets.dinov2()
    for make in (lambda: Pipeline(recipe[1:]), lambda: Pipeline([NAMED, recipe]), lambda: MultiCropPipeline(recipe)):
        with pytest.raises(TypeError) as caught:
            make()
        assert len(str(caught.value)) < 400 and str(caught.value).endswith("...")
