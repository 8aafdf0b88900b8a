"""What bad arguments of a loader get: an error when it is made, naming the argument, the value and what is allowed."""

# What is written here is wrong on purpose.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
import pytest
from test_loader import MemorySource, dataset, jpeg, make, pictures, two_fields  # noqa: F401  (three are fixtures)

from slipstream import MultiCropPipeline, MultiRandomResizedCrop, Normalize, RandomResizedCrop, SlipstreamDataset


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(batch_size=0), ValueError, "batch_size must be 1 or more, got 0"),
        (dict(batch_size="8"), TypeError, "batch_size must be an int"),
        (dict(shuffle=1), TypeError, "shuffle must be True, False or"),
        (dict(seed=0.5), TypeError, "seed must be an int"),
        (dict(prefetch=0), ValueError, "prefetch must be 1 or more"),
        (dict(num_threads=0), ValueError, "num_threads must be 1 or more"),
        (dict(device="tpu"), ValueError, "device must be"),
        (dict(device="meta"), ValueError, "device must be"),
        (dict(backend="cuda"), ValueError, "backend must be one of None, 'triton', 'cpu'"),
        (dict(backend="triton"), RuntimeError, "TRITON_INTERPRET=1"),
        (dict(exclude_fields=["pth"]), ValueError, "exclude_fields names 'pth'.*'path'"),
        (dict(exclude_fields="path"), TypeError, "exclude_fields must be a list"),
        (dict(exclude_fields=[["path"]]), ValueError, r"exclude_fields names \['path'\], the dataset has 'image', "),
        (dict(exclude_fields=None), TypeError, "exclude_fields must be a list of field names, got None"),
        (dict(exclude_fields=["image"]), ValueError, "pipelines names 'image', which exclude_fields leaves out"),
        (dict(pipelines={"img": RandomResizedCrop(8)}), ValueError, r"pipelines names 'img'.*\['image'\]"),
        (
            dict(pipelines={"label": RandomResizedCrop(8)}),
            ValueError,
            r"pipelines names 'label' \(a field of int, not of files such as JPEG's\), the",
        ),
        (dict(pipelines=[RandomResizedCrop(8)]), TypeError, "pipelines must be a dict"),
        (dict(pipelines=[]), TypeError, r"pipelines must be a dict of image field -> stages, got \[\]"),
        (dict(pipelines={"image": []}), TypeError, "must begin with a crop stage"),
        (dict(pipelines={"image": [Normalize()]}), TypeError, "must begin with a crop stage"),
        (
            dict(pipelines={"image": MultiRandomResizedCrop({"label": dict(size=8)})}),
            ValueError,
            "'label', which is also a field",
        ),
        (dict(pipelines={"image": MultiRandomResizedCrop({"_indices": dict(size=8)})}), ValueError, "'_indices'"),
        (dict(pipelines={"image": MultiRandomResizedCrop({"_valid": dict(size=8)})}), ValueError, "'_valid'"),
        (
            dict(pipelines={"image": [MultiRandomResizedCrop({"a": dict(size=8)}), MultiCropPipeline({"b": []})]}),
            ValueError,
            r"names 'b'; allowed are \['a'\]",
        ),
    ],
)
def test_bad_arguments_are_refused_when_the_loader_is_made(make, change, error, message) -> None:  # noqa: F811
    options = {"batch_size": 4, "pipelines": {"image": RandomResizedCrop(8)}, **change}
    with pytest.raises(error, match=message):
        make(**options)


def test_a_field_that_the_batch_would_overwrite_is_refused(make, pictures: list[np.ndarray]) -> None:  # noqa: F811
    samples = [{"image": jpeg(pictures[0]), "_indices": 7, "_valid": 8, "_plan": 9}]
    data = SlipstreamDataset(
        MemorySource(samples, {"image": "image", "_indices": "int", "_valid": "int", "_plan": "int"})
    )
    with pytest.raises(ValueError, match=r"has a field '_indices', .* exclude_fields=\['_indices'\]"):
        make(data=data)
    (batch,) = make(data=data, exclude_fields=["_indices"])
    assert batch["_valid"].tolist() == [8] and batch["_plan"].tolist() == [9] and batch["_indices"].tolist() == [0]
    for name, options in (
        ("_valid", {"on_error": "replace"}),
        ("_valid", {"tail": "pad"}),
        ("_plan", {"return_plan": True}),
    ):
        with pytest.raises(ValueError, match=f"has a field '{name}'"):
            make(data=data, exclude_fields=["_indices"], **options)


def test_crops_of_one_name_in_two_fields_are_refused(make, pictures: list[np.ndarray]) -> None:  # noqa: F811
    crops = MultiRandomResizedCrop({"a": dict(size=8)})
    with pytest.raises(ValueError, match=r"pipelines\['mask'\] gives 'a'"):
        make(data=two_fields(pictures), pipelines={"image": crops, "mask": crops})


def test_a_crop_named_as_an_image_field_that_stays_is_refused(make, pictures: list[np.ndarray]) -> None:  # noqa: F811
    crops = MultiRandomResizedCrop({"mask": dict(size=8)})
    with pytest.raises(
        ValueError, match=r"pipelines\['image'\] gives 'mask', which is also a field: name it otherwise"
    ):
        make(data=two_fields(pictures), pipelines={"image": crops})
    # where the mask's own crops have other names, or the mask is not read, the name is free
    others = {"image": crops, "mask": MultiRandomResizedCrop({"of_mask": dict(size=8)})}
    assert list(next(iter(make(data=two_fields(pictures), pipelines=others)))) == ["mask", "of_mask", "_indices"]
    make(data=two_fields(pictures), pipelines={"image": crops}, exclude_fields=["mask"])


def test_what_is_no_dataset_is_refused(make) -> None:  # noqa: F811
    with pytest.raises(TypeError, match="dataset must be a SlipstreamDataset"):
        make(data=[1, 2, 3])


def test_an_epoch_that_no_key_can_hold_is_refused_where_it_is_set(make) -> None:  # noqa: F811
    loader = make()
    loader.set_epoch(np.int64(2**32 - 1))
    with pytest.raises(ValueError, match=r"epoch must be in \[0, 2\*\*32\), got 4294967296"):
        loader.set_epoch(2**32)
