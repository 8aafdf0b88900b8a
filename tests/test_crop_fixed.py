"""Corner crops, whole images and given boxes are torchvision's, to the byte Pillow's; what does not fit is named."""

# A spec takes more than the settled types that its fields declare.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from crop_oracle import oracle
from slipstream_kernels.crop_jobs import FILTER, FLIP, OutputFormat
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.resized_crop_cpu import resized_crop_cpu
from torchvision.transforms import functional as v1_functional
from torchvision.transforms import v2

from slipstream.crop import (
    CenterCrop,
    CornerCrop,
    Crop,
    FiveCrop,
    Geometry,
    ImageSizeError,
    Resize,
    ResizedCrop,
    TenCrop,
    sample_geometry,
)
from slipstream.crop_fixed import CORNERS
from slipstream.pipeline import Pipeline
from slipstream.stage_flip import RandomHorizontalFlip

SHAPES = [(40, 53), (53, 40), (33, 33), (32, 91), (90, 31), (64, 47), (35, 32), (301, 100)]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Noise, uint8 [H, W, 3], of shapes whose spare room is odd and even."""
    rng = np.random.default_rng(30)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def jobs_of(geometry: Geometry) -> np.ndarray:
    """One crop's jobs, int32 [B, 1, 10]."""
    columns = [geometry.box, geometry.full, geometry.origin, geometry.filter[:, None], geometry.flip[:, None]]
    return np.concatenate(columns, axis=1)[:, None]


def cut(spec: Crop, images: list[np.ndarray], boxes: Any = None) -> torch.Tensor:
    """The spec's crops by the CPU kernel: uint8 [B, 3, h, w]."""
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    jobs = jobs_of(sample_geometry(spec, sizes, None, boxes=boxes))
    (output,) = resized_crop_cpu(RaggedBatch.from_arrays(images), jobs, [OutputFormat(size=spec.size)])
    return output


def resized(image: np.ndarray, full: tuple[int, int], kind: int) -> torch.Tensor:
    """Pillow's resize of the whole image in two one-axis passes: uint8 [3, h, w]."""
    job = np.array([0, 0, *image.shape[:2], *full, 0, 0, kind, 0])
    return torch.from_numpy(oracle(image, job, full).copy())


@pytest.mark.parametrize("vertical_flip", [False, True])
@pytest.mark.parametrize("size", [31, (30, 21), (17, 31), 1])
def test_ten_crops_are_torchvisions(images: list[np.ndarray], size: Any, vertical_flip: bool) -> None:
    """The middle of a flipped image is not the flipped middle where an odd number of pixels is left over."""
    ten, five = TenCrop(size, vertical_flip=vertical_flip), FiveCrop(size)
    assert len(ten.crops) == 10
    assert ten.crops[:5] == five.crops
    found = [cut(spec, images) for spec in ten.crops]
    for index, image in enumerate(images):
        expected = v2.functional.ten_crop(torch.from_numpy(image).permute(2, 0, 1), list(ten.size), vertical_flip)
        for crop, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(one[index], other), (index, crop)


@pytest.mark.parametrize(("interpolation", "kind"), [("bilinear", 0), ("bicubic", 1)])
@pytest.mark.parametrize("resize", [24, (29, 41)])
def test_corner_crops_of_a_resized_image_are_torchvisions(
    images: list[np.ndarray], resize: Any, interpolation: str, kind: int
) -> None:
    ten = TenCrop((20, 23), resize=resize, interpolation=interpolation)
    found = [cut(spec, images) for spec in ten.crops]
    for index, image in enumerate(images):
        given = [resize] if isinstance(resize, int) else list(resize)
        height, width = v1_functional._compute_resized_output_size(image.shape[:2], given)
        whole = resized(image, (height, width), kind)
        expected = v2.functional.ten_crop(whole, [20, 23])
        for crop, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(one[index], other), (index, crop)


def test_a_random_flip_turns_flipped_crops_back(images: list[np.ndarray]) -> None:
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    plain = TenCrop(16, resize=20)(tensors)
    flipped = Pipeline([TenCrop(16, resize=20), RandomHorizontalFlip(1.0)])(tensors)["image"]
    assert all(torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True))


def test_the_crops_of_a_list_keep_its_options() -> None:
    options = dict(
        resize=40,
        interpolation="bicubic",
        antialias=False,
        return_boxes=True,
        memory_format=torch.channels_last,
        backend="cpu",
    )
    for stage in (FiveCrop(32, **options), TenCrop(32, **options)):
        for crop, corner in zip(stage.crops, CORNERS * 2, strict=False):
            assert crop == CornerCrop(32, corner=corner, flip=crop.flip, **options)
    flips = [None] * 5 + ["vertical"] * 5
    assert [crop.flip for crop in TenCrop(8, vertical_flip=True).crops] == flips


def test_an_image_smaller_than_its_corner_crop_is_named() -> None:
    sizes = np.array([[40, 40], [40, 31]], np.int32)
    message = r"a corner crop of \(32, 32\) needs .*, got \(h, w\) = \(40, 31\) at batch index 1"
    for crop in (*FiveCrop(32).crops, *TenCrop(32).crops):
        with pytest.raises(ImageSizeError, match=message) as caught:
            sample_geometry(crop, sizes, None)
        assert caught.value.index == 1
        sample_geometry(CornerCrop(32, resize=32, corner=crop.corner), sizes, None)


@pytest.mark.parametrize(("interpolation", "kind"), [("bilinear", 0), ("bicubic", 1)])
def test_resize_is_the_whole_image_resized(images: list[np.ndarray], interpolation: str, kind: int) -> None:
    found = cut(Resize((37, 20), interpolation=interpolation), images)
    for image, output in zip(images, found, strict=True):
        assert torch.equal(output, resized(image, (37, 20), kind))


def test_resize_takes_no_single_number() -> None:
    with pytest.raises(TypeError, match=r"size must be \(h, w\), .*, got 256: give \(256, 256\), or CenterCrop\(256, "):
        Resize(256)
    assert Resize([3, 4]) == Resize((3, 4))


def random_boxes(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Boxes inside their images, at their borders as well, int64 [B, 4]."""
    sides = rng.integers(1, sizes + 1)
    return np.concatenate([rng.integers(0, sizes - sides + 1), sides], axis=1)


def test_a_given_box_is_cut_and_resized(images: list[np.ndarray]) -> None:
    sizes = np.array(SHAPES)
    boxes = random_boxes(np.random.default_rng(31), sizes)
    spec = ResizedCrop((20, 31), interpolation="bicubic")
    for given in (boxes, torch.from_numpy(boxes), boxes.tolist(), boxes.astype(np.uint16)):
        for image, box, output in zip(images, boxes, cut(spec, images, given), strict=True):
            job = np.array([*box, 20, 31, 0, 0, 1, 0])
            assert np.array_equal(output.numpy(), oracle(image, job, (20, 31)))
    fixed = cut(ResizedCrop((20, 31), (3, 4, 25, 19), interpolation="bicubic"), images)
    assert torch.equal(fixed, cut(spec, images, np.tile([3, 4, 25, 19], (len(images), 1))))


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (36, 0, 5, 5), (0, 49, 5, 5), (2**62, 0, 2**62, 5)],
)
def test_a_box_outside_its_image_is_named(images: list[np.ndarray], box: tuple[int, ...]) -> None:
    boxes = np.array([(0, 0, 40, 53), (35, 48, 5, 5), box])
    sizes = np.array([SHAPES[0]] * 3, np.int32)
    with pytest.raises(ImageSizeError) as caught:
        sample_geometry(ResizedCrop(8), sizes, None, boxes=boxes)
    assert caught.value.index == 2
    assert f"= {box} in an image of (h, w) = (40, 53) at batch index 2" in str(caught.value)
    sample_geometry(ResizedCrop(8), sizes[:2], None, boxes=boxes[:2])


def test_boxes_of_another_kind_are_refused() -> None:
    sizes = np.array([(40, 40)] * 3, np.int32)
    for boxes, error, message in (
        (None, ValueError, r"ResizedCrop\(\(8, 8\)\) needs boxes"),
        (np.zeros((3, 4)), TypeError, "boxes must be whole numbers, got float64"),
        (np.zeros((2, 4), int), ValueError, r"boxes must be \[3, 4\] .*, got shape \[2, 4\]"),
        (np.zeros((3, 5), int), ValueError, r"boxes must be \[3, 4\]"),
    ):
        with pytest.raises(error, match=message):
            sample_geometry(ResizedCrop(8, "face"), sizes, None, boxes=boxes)
    empty = sample_geometry(ResizedCrop(8), np.zeros((0, 2), np.int32), None, boxes=np.zeros((0, 4), np.int64))
    assert empty.box.shape == (0, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ResizedCrop(8, ""), TypeError, "boxes must be None, a field's name or"),
        (lambda: ResizedCrop(8, (1, 2, 3)), TypeError, "boxes must be None, a field's name or"),
        (lambda: ResizedCrop(8, (1, -2, 3, 4)), ValueError, "boxes' left must be 0 or more, got -2"),
        (lambda: ResizedCrop(8, (1, 2, 0, 4)), ValueError, "boxes' height must be 1 or more, got 0"),
        (lambda: ResizedCrop(8, (1, 2, 3, 4.5)), TypeError, "boxes' width must be an int, got 4.5"),
        (lambda: ResizedCrop(0), ValueError, "size must be 1 pixel or more"),
        (lambda: CornerCrop(8, corner="middle"), ValueError, "corner must be one of 'top_left'"),
        (lambda: CornerCrop(8, corner="center", flip="both"), ValueError, "flip must be one of None, 'horizontal'"),
        (lambda: FiveCrop(8, resize=7), ValueError, r"resize must be at least the crop's size \(8, 8\), got 7"),
        (lambda: TenCrop(8, vertical_flip=1), TypeError, "vertical_flip must be True or False, got 1"),
        (lambda: TenCrop(8, interpolation="random"), ValueError, "interpolation must be one of 'bilinear', 'bicubic'"),
        (lambda: Resize((8, 8), antialias=None), TypeError, "antialias must be True or False, got None"),
        (lambda: CenterCrop(8, antialias=0), TypeError, "antialias must be True or False, got 0"),
    ],
)
def test_wrong_parameters_are_refused_when_a_spec_is_made(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_antialias_and_interpolation_choose_the_jobs_filter(images: list[np.ndarray]) -> None:
    sizes = np.array(SHAPES, np.int32)
    filters = {("bilinear", True): 0, ("bicubic", True): 1, ("bilinear", False): 2, ("bicubic", False): 3}
    for (interpolation, antialias), kind in filters.items():
        options = dict(interpolation=interpolation, antialias=antialias)
        for spec in (
            CenterCrop(16, resize=20, **options),
            CornerCrop(16, corner="center", flip="vertical", **options),
            Resize((16, 16), **options),
            ResizedCrop(16, (0, 0, 20, 20), **options),
        ):
            jobs = jobs_of(sample_geometry(spec, sizes, None))
            assert (jobs[..., FILTER] == kind).all()
            assert (jobs[..., FLIP] == (2 if isinstance(spec, CornerCrop) else 0)).all()
    middle = cut(CornerCrop(16, resize=20, corner="center"), images)
    assert torch.equal(middle, cut(CenterCrop(16, resize=20), images))


def test_stages_called_alone_give_what_their_crops_are(images: list[np.ndarray]) -> None:
    given = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    ten = TenCrop(20, True, resize=24, return_boxes=True)
    result = ten(given)
    assert set(result) == {"image", *(f"image_{crop}_box" for crop in range(10))}
    for spec, output in zip(ten.crops, result["image"], strict=True):
        assert torch.equal(output, cut(spec, images))
    assert torch.equal(FiveCrop(20)(given)[3], cut(CornerCrop(20, corner="bottom_right"), images))
    boxes = random_boxes(np.random.default_rng(32), np.array(SHAPES))
    for spec in (ResizedCrop(9), ResizedCrop(9, "face")):
        assert torch.equal(spec(given, boxes=torch.from_numpy(boxes)), cut(spec, images, boxes))
    with pytest.raises(ValueError, match="boxes must be given once"):
        ResizedCrop(9, (0, 0, 3, 3))(given, boxes=boxes)
    with pytest.raises(ValueError, match="give the field 'face', or boxes="):
        ResizedCrop(9, "face")(given)
