"""What a loader does with plans, batch stages and copies: the same as without a loader, whatever the batch size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from slipstream import (
    CutMix,
    DecodeError,
    MixUp,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    NamedCopies,
    Normalize,
    RandomGrayscale,
    RandomResizedCrop,
    ReadError,
    Resize,
    ResizedCrop,
    SlipstreamDataset,
    SlipstreamLoader,
)
from slipstream.batch_stage import batch_stage_keys
from slipstream.draws import Draws

FLOATS = [RandomResizedCrop(16), Normalize()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SlipstreamDataset:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(12):
        path = folder / f"class_{index % 3}" / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return SlipstreamDataset(local_dir=folder)


def make(dataset: SlipstreamDataset, stages, **options) -> SlipstreamLoader:
    options = {"batch_size": 4, "seed": 5, "device": "cpu", "verbose": False} | options
    return SlipstreamLoader(dataset, pipelines={"image": stages}, **options)


def test_the_plan_of_a_batch_makes_it_again(dataset: SlipstreamDataset) -> None:
    stages = [RandomResizedCrop(16), RandomGrayscale(0.5)]
    with make(dataset, stages, return_plan=True) as loader, make(dataset, stages) as plain:
        for batch, other in zip(loader, plain, strict=True):
            plan = batch["_plan"]["image"]
            decoded = [dataset_image(dataset, index) for index in batch["_indices"].tolist()]
            assert torch.equal(loader.pipelines["image"](decoded, plan=plan)["image"], batch["image"])
            assert torch.equal(batch["image"], other["image"]) and "_plan" not in other


def dataset_image(dataset: SlipstreamDataset, index: int) -> torch.Tensor:
    from slipstream.decode_pillow import decode_with_pillow

    return torch.from_numpy(decode_with_pillow(np.frombuffer(dataset[index]["image"], np.uint8))).permute(2, 0, 1)


def test_mixing_is_the_stages_on_the_finished_batch(dataset: SlipstreamDataset) -> None:
    stages = [MixUp(num_classes=3, alpha=0.4), CutMix(num_classes=3)]
    with make(dataset, FLOATS, batch_stages=stages) as mixed, make(dataset, FLOATS) as plain:
        for batch, other in zip(mixed, plain, strict=True):
            assert batch["label"].shape == (4, 3) and batch["label"].dtype == torch.float32
            assert torch.allclose(batch["label"].sum(1), torch.ones(4))
            assert not torch.equal(batch["image"], other["image"])
            assert other["label"].dtype == torch.int64


def test_what_mixing_drew_is_in_the_plan(dataset: SlipstreamDataset) -> None:
    stage = MixUp(num_classes=3, alpha=0.4)
    with (
        make(dataset, FLOATS, batch_stages=[stage], return_plan=True) as mixed,
        make(dataset, FLOATS) as plain,
    ):
        batch, other = next(iter(mixed)), next(iter(plain))
    (params,) = batch["_plan"]["_batch_stages"]
    again = stage.apply(other, params)
    assert torch.equal(again["image"], batch["image"]) and torch.equal(again["label"], batch["label"])


def test_mixing_is_drawn_anew_in_each_epoch(dataset: SlipstreamDataset) -> None:
    stage = MixUp(num_classes=3, alpha=1.0)
    (key,) = batch_stage_keys([stage], 5)
    with make(dataset, FLOATS, batch_stages=[stage], return_plan=True) as loader:
        for epoch in (0, 1):
            for batch in loader:
                (params,) = batch["_plan"]["_batch_stages"]
                draws = Draws(key, batch["_indices"].numpy(), epoch)
                assert np.array_equal(params["lam"], stage.sample_params(draws, [(16, 16)])["lam"])


def test_the_mixing_number_is_the_samples_whatever_the_batch(dataset: SlipstreamDataset) -> None:
    def own_shares(batch_size: int) -> dict[int, float]:
        shares = {}
        with (
            make(dataset, FLOATS, batch_stages=[MixUp(num_classes=3)], batch_size=batch_size, shuffle=True) as loader,
            make(dataset, FLOATS, batch_size=batch_size, shuffle=True) as plain,
        ):
            for batch, other in zip(loader, plain, strict=True):
                labels = other["label"]
                alike = labels == labels.roll(1)
                for row, index in enumerate(batch["_indices"].tolist()):
                    if not alike[row]:
                        shares[index] = float(batch["label"][row, labels[row]])
        return shares

    two, five = own_shares(2), own_shares(5)
    both = two.keys() & five.keys()
    assert len(both) >= 4 and all(two[index] == five[index] for index in both)


def test_copies_by_name(dataset: SlipstreamDataset) -> None:
    stages = [
        RandomResizedCrop(16),
        NamedCopies(["plain", "grey"]),
        MultiCropPipeline({"grey": [RandomGrayscale(1.0)]}),
    ]
    with make(dataset, stages) as loader, make(dataset, RandomResizedCrop(16)) as single:
        batch, other = next(iter(loader)), next(iter(single))
    assert torch.equal(batch["plain"], other["image"]) and "image" not in batch
    assert torch.equal(batch["grey"], RandomGrayscale(1.0)(other["image"]))


def test_it_explains_each_field(dataset: SlipstreamDataset) -> None:
    with make(dataset, FLOATS) as loader:
        assert loader.explain().startswith("image: 1 crop, at most 2 launches")
    with SlipstreamLoader(dataset, 4, device="cpu", verbose=False) as loader:
        assert "no pipelines" in loader.explain()


class BoxedSource:
    """Images in memory, each with a box."""

    def __init__(self, boxes: list[object]) -> None:
        rng = np.random.default_rng(1)
        self.pictures = [rng.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in boxes]
        self.boxes = boxes
        self.fields = {"image": "image", "box": "array"}

    def __len__(self) -> int:
        return len(self.boxes)

    def read(self, ids, field="image"):
        files = []
        for index in ids:
            stream = io.BytesIO()
            Image.fromarray(self.pictures[index]).save(stream, "PNG")
            files.append(np.frombuffer(stream.getvalue(), np.uint8))
        return files

    def values(self, ids, field):
        return [self.boxes[index] for index in ids]

    def describe(self, sample_id):
        return f"memory:{sample_id}"

    def close(self) -> None:
        pass


def test_boxes_come_from_a_field() -> None:
    boxes = [np.array([index, 2, 20 + index, 30]) for index in range(5)]
    source = BoxedSource([*boxes])
    crops = MultiRandomResizedCrop({"face": ResizedCrop(16, "box"), "all": Resize((10, 12))}, return_boxes=True)
    with make(SlipstreamDataset(source), crops, batch_size=5) as loader:
        batch = next(iter(loader))
    assert torch.equal(batch["face_box"], torch.from_numpy(np.stack(boxes)).int())
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in source.pictures]
    assert torch.equal(batch["face"], ResizedCrop(16)(images, boxes=np.stack(boxes)))


@pytest.mark.parametrize(
    ("box", "error", "message"),
    [
        (np.array([0, 0, 41, 10]), DecodeError, r"sample 1 \(memory:1\): .*must lie inside"),
        ([1, 2, 3], ValueError, r"box must be a box \(top, left, height, width\) .* got \[1, 2, 3\] for sample 1"),
        (np.array([0.5, 0, 4, 4]), ValueError, r"four whole numbers, got array\(\[0.5, .* for sample 1"),
    ],
)
def test_a_box_that_cannot_be_is_named(box, error, message: str) -> None:
    source = BoxedSource([np.array([0, 0, 9, 9]), box])
    # what is no box is wrong in the data set's making: no policy hides it
    for policy in ("raise",) if error is DecodeError else ("raise", "replace", "skip"):
        with make(SlipstreamDataset(source), ResizedCrop(16, "box"), batch_size=2, on_error=policy) as loader:
            batches = iter(loader)
            with pytest.raises(error, match=message):
                next(batches)


class DamagedBoxedSource(BoxedSource):
    """Sample 2's image cannot be decoded, sample 3's box cannot be read."""

    def read(self, ids, field="image"):
        files = super().read(ids, field)
        return [np.zeros(9, np.uint8) if index == 2 else data for index, data in zip(ids, files, strict=True)]

    def values(self, ids, field):
        if 3 in ids:
            raise ReadError([(3, "memory:3", "torn")])
        return super().values(ids, field)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_boxes_keep_their_tensor_where_samples_are_replaced(dtype: torch.dtype, as_tensors: bool) -> None:
    boxes = [torch.tensor([1, 2, 9, side], dtype=dtype) for side in (9, 60, 9, 9)]  # 60: beyond the image
    source = DamagedBoxedSource([box if as_tensors else box.numpy() for box in boxes])
    with make(SlipstreamDataset(source), ResizedCrop(16, "box"), batch_size=4, on_error="replace") as loader:
        batch = next(iter(loader))
    assert batch["_valid"].tolist() == [True, False, False, False]
    assert batch["box"].dtype == dtype
    assert batch["box"].tolist() == [[1, 2, 9, 9], *[[0, 0, 1, 1]] * 3]


def test_bad_input_is_named_when_the_loader_is_made(dataset: SlipstreamDataset) -> None:
    def refused(error, message, **options) -> None:
        with pytest.raises(error, match=message):
            make(dataset, options.pop("stages", FLOATS), **options)

    refused(TypeError, r"batch_stages\[0\] must be a MixUp", batch_stages=[Normalize()])
    refused(TypeError, "batch_stages must be a list", batch_stages=MixUp())
    refused(ValueError, r"batch_stages\[0\].label must be a field", batch_stages=[MixUp(label="target")])
    refused(ValueError, r"batch_stages\[0\].crops names 'b'", batch_stages=[MixUp(crops=["b"])])
    copies = [MultiRandomResizedCrop({"a": dict(size=8), "b": dict(size=8)}), MultiCropPipeline({"a": [Normalize()]})]
    message = r"batch_stages\[0\]: MixUp mixes float images, got torch\.uint8 for 'b'"
    refused(TypeError, message, stages=copies, batch_stages=[MixUp(num_classes=3)])
    refused(TypeError, message, stages=copies, batch_stages=[MixUp(num_classes=3, crops=["b"])])
    make(dataset, copies, batch_stages=[MixUp(num_classes=3, crops=["a"])]).shutdown()
    refused(ValueError, "boxes must be a field that is read, one of", stages=ResizedCrop(8, "box"))
    refused(TypeError, "return_plan must be True or False", return_plan=1)
    copies = [MultiRandomResizedCrop({"label": dict(size=8)})]
    refused(ValueError, r"gives 'label', which is also a field", stages=copies)


def test_a_batch_that_cannot_be_mixed_says_why(dataset: SlipstreamDataset) -> None:
    def epoch(stages, classes: int) -> None:
        with make(dataset, stages, batch_stages=[MixUp(num_classes=classes)]) as loader:
            list(loader)

    def own(images):  # whose dtype only the batch tells
        return images

    with pytest.raises(TypeError, match=r"^MixUp mixes float images, got torch\.uint8 for 'image'"):
        epoch([RandomResizedCrop(16), own], 3)
    with pytest.raises(ValueError, match=r"label must be in \[0, 2\), got 2 at batch index"):
        epoch(FLOATS, 2)
