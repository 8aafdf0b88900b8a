"""The loader end to end on the CPU: exact crops, the same whatever the batching, fields, epochs and errors."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from crop_oracle import oracle
from PIL import Image

from slipstream import (
    CenterCrop,
    DecodeError,
    MultiCropPipeline,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    SlipstreamDataset,
    SlipstreamLoader,
)

CPU = torch.device("cpu")


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=92)
    return stream.getvalue()


class MemorySource:
    """A source that holds its samples in memory: what a user's own source looks like."""

    def __init__(self, samples: list[dict[str, object]], fields: dict[str, str]) -> None:
        self.samples = samples
        self.fields = fields

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, ids, field="image"):
        return [np.frombuffer(self.samples[i][field], np.uint8) for i in ids]

    def values(self, ids, field):
        return [self.samples[i][field] for i in ids]

    def describe(self, sample_id):
        return f"memory:{sample_id}"

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(90 + 13 * i % 60, 70 + 29 * i % 80) for i in range(23)]
    blocks = [rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), dtype=np.uint8) for h, w in sizes]
    return [block.repeat(8, 0).repeat(8, 1)[:h, :w] for block, (h, w) in zip(blocks, sizes, strict=True)]


@pytest.fixture
def dataset(pictures: list[np.ndarray]) -> SlipstreamDataset:
    samples = [
        {"image": jpeg(picture), "label": index % 5, "path": f"{index}.jpg", "score": index / 2}
        for index, picture in enumerate(pictures)
    ]
    return SlipstreamDataset(MemorySource(samples, {"image": "image", "label": "int", "path": "str", "score": "float"}))


@pytest.fixture
def make(dataset: SlipstreamDataset):
    """A maker of loaders that are shut down after the test."""
    loaders = []

    def make_loader(pipeline=None, *, data=dataset, batch_size=4, **options) -> SlipstreamLoader:
        pipelines = {} if pipeline is None else {"image": pipeline}
        options = {"device": "cpu", "verbose": False, "num_threads": 2, "pipelines": pipelines, **options}
        loaders.append(SlipstreamLoader(data, batch_size, **options))
        return loaders[-1]

    yield make_loader
    for loader in loaders:
        loader.shutdown()


def named(size: int = 32, **options) -> MultiRandomResizedCrop:
    return MultiRandomResizedCrop(
        {
            "global_0": dict(size=size, scale=(0.4, 1.0), seed=42),
            "global_1": dict(size=size, scale=(0.4, 1.0), seed=43),
            "local_0": dict(size=size // 2, scale=[0.05, 0.4]),
        },
        return_boxes=True,
        **options,
    )


def by_id(loader: SlipstreamLoader) -> dict[int, dict[str, torch.Tensor]]:
    """One epoch's tensors by sample id."""
    samples = {}
    for batch in loader:
        for row, sample_id in enumerate(batch["_indices"].tolist()):
            samples[sample_id] = {name: value[row] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return samples


def assert_same_samples(first: dict, second: dict, names: list[str]) -> None:
    assert sorted(first) == sorted(second)
    for sample_id, sample in first.items():
        for name in names:
            assert torch.equal(sample[name], second[sample_id][name]), (sample_id, name)


def test_what_the_readme_shows(make) -> None:
    pipeline = [named(), MultiCropPipeline({"global_0": [Normalize()], "local_0": []})]
    with make(pipeline, batch_size=8, shuffle=True, seed=42, exclude_fields=["path"]) as loader:
        assert len(loader) == 3
        batch = next(iter(loader))
    assert batch["global_0"].shape == (8, 3, 32, 32) and batch["global_0"].dtype == torch.float32
    assert batch["global_1"].dtype == batch["local_0"].dtype == torch.uint8
    assert batch["local_0"].shape == (8, 3, 16, 16)
    assert batch["label"].dtype == torch.int64 and batch["score"].dtype == torch.float32
    assert batch["_indices"].dtype == torch.int64 and len(set(batch["_indices"].tolist())) == 8
    assert torch.equal(batch["label"], batch["_indices"] % 5)
    assert "path" not in batch and "image" not in batch


def test_every_crop_of_every_photo_is_pillows(photos: list[Path]) -> None:
    """Decode and both resizes, to the byte: loader's crop == Image.open(f).convert("RGB").crop(...).resize(...)."""
    root = photos[0].parents[1] if photos[0].parent.name.startswith("n") else photos[0].parent
    folders = {path.relative_to(root.parent).parts[0] for path in photos}
    seen = 0
    for folder in sorted(folders):
        data = SlipstreamDataset(local_dir=root.parent / folder)
        crops = MultiRandomResizedCrop(
            {"a": dict(size=224), "b": dict(size=96, scale=(0.05, 0.4), interpolation="bicubic")}, return_boxes=True
        )
        with SlipstreamLoader(data, 16, pipelines={"image": crops}, device="cpu", verbose=False) as loader:
            for batch in loader:
                for row, path in enumerate(batch["path"]):
                    image = np.asarray(Image.open(root.parent / folder / path).convert("RGB"))
                    for name, size, bicubic in (("a", 224, 0), ("b", 96, 1)):
                        job = np.array([*batch[f"{name}_box"][row].tolist(), size, size, 0, 0, bicubic, 0])
                        assert np.array_equal(batch[name][row].numpy(), oracle(image, job, (size, size))), path
                    seen += 1
    assert seen == len(photos)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_sample_does_not_depend_on_its_batch(make, batch_size: int, shuffle: bool) -> None:
    names = ["global_0", "global_1", "local_0", "global_0_box", "local_0_box", "local_0_flip"]
    pipeline = [named(), MultiCropPipeline({"local_0": [RandomHorizontalFlip()]})]
    expected = by_id(make(pipeline, seed=9))
    assert_same_samples(expected, by_id(make(pipeline, seed=9, batch_size=batch_size, shuffle=shuffle)), names)


def test_a_crop_does_not_depend_on_the_other_crops(make) -> None:
    alone = MultiRandomResizedCrop({"local_0": dict(size=16, scale=(0.05, 0.4))})
    assert_same_samples(by_id(make(named(), seed=3)), by_id(make(alone, seed=3)), ["local_0"])


def test_a_crop_stages_own_backend_goes_before_the_loaders(make) -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        make(RandomResizedCrop(16, backend="triton"), backend="cpu")


@pytest.mark.interpret
def test_the_interpreter_gives_the_cpu_kernels_bytes(make, dataset: SlipstreamDataset) -> None:
    few = SlipstreamDataset(dataset.source, indices=range(3))
    pipeline = [
        named(16),
        MultiCropPipeline(
            {"global_0": [Normalize()], "local_0": [RandomHorizontalFlip(), Normalize(dtype=torch.bfloat16)]}
        ),
    ]
    names = ["global_0", "global_1", "local_0"]
    cpu = by_id(make(pipeline, data=few, backend="cpu", seed=1))
    assert_same_samples(cpu, by_id(make(pipeline, data=few, backend="triton", seed=1)), names)


def test_two_loaders_at_once_do_not_disturb_each_other(make) -> None:
    expected = list(make(named(), shuffle=True, seed=5))
    first, second = make(named(), shuffle=True, seed=5), make(named(), shuffle=True, seed=5)
    for a, b, c in zip(first, second, expected, strict=True):
        for name in ("_indices", "global_0", "local_0"):
            assert torch.equal(a[name], c[name]) and torch.equal(b[name], c[name])


def test_a_stage_by_itself_gives_the_loaders_crops(make, dataset: SlipstreamDataset) -> None:
    loader = make([named()], seed=11, shuffle=True)
    images = {
        row: torch.from_numpy(np.array(Image.open(io.BytesIO(dataset[row]["image"])))) for row in range(len(dataset))
    }
    for epoch in range(2):
        for batch in loader:
            ids = batch["_indices"]
            decoded = [images[row].permute(2, 0, 1) for row in ids.tolist()]
            crops = named(seed=11)(decoded, sample_ids=ids, epoch=epoch)
            for name in ("global_0", "global_1", "local_0", "local_0_box"):
                assert torch.equal(crops[name], batch[name])


def test_epochs_follow_each_other_and_can_be_set(make) -> None:
    loader = make(named(), shuffle=True, seed=2)
    epochs = [[batch["_indices"].tolist() for batch in loader] for _ in range(3)]
    assert sorted(itertools.chain(*epochs[0])) == sorted(itertools.chain(*epochs[1])) == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    loader.set_epoch(1)
    assert [batch["_indices"].tolist() for batch in loader] == epochs[1]
    assert [batch["_indices"].tolist() for batch in loader] == epochs[2]
    fresh = make(named(), shuffle=True, seed=2)
    iter(fresh)  # abandoned: it counts
    assert [batch["_indices"].tolist() for batch in fresh] == epochs[1]


def test_a_new_iterator_ends_the_old_one(make) -> None:
    loader = make(named())
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(RuntimeError, match="ended by a newer one"):
        next(old)
    assert len(list(new)) == len(loader)


def test_the_end_of_an_epoch_stays_the_end(make) -> None:
    iterator = iter(make(named(), batch_size=10))
    assert [len(batch["_indices"]) for batch in iterator] == [10, 10, 3]
    with pytest.raises(StopIteration):
        next(iterator)
    loader = make(named(), batch_size=10, drop_last=True)
    assert len(loader) == 2 and [len(batch["_indices"]) for batch in loader] == [10, 10]


def test_list_and_single_crops_go_under_the_fields_name(make) -> None:
    batch = next(iter(make(MultiCropRandomResizedCrop(num_crops=3, size=20, return_boxes=True))))
    assert [crop.shape for crop in batch["image"]] == [(4, 3, 20, 20)] * 3
    assert not torch.equal(batch["image"][0], batch["image"][1])
    assert batch["image_2_box"].shape == (4, 4) and batch["image_2_box"].dtype == torch.int32
    batch = next(iter(make([RandomResizedCrop(20, return_boxes=True), RandomHorizontalFlip(), Normalize()])))
    assert batch["image"].shape == (4, 3, 20, 20) and batch["image"].dtype == torch.float32
    assert batch["image_box"].shape == (4, 4) and batch["image_flip"].dtype == torch.bool
    batch = next(iter(make(CenterCrop(24, resize=32))))
    assert batch["image"].shape == (4, 3, 24, 24) and batch["image"].dtype == torch.uint8


def test_an_image_field_without_a_pipeline_is_decoded(make, dataset: SlipstreamDataset) -> None:
    batch = next(iter(make()))
    for row, image in enumerate(batch["image"]):
        expected = np.array(Image.open(io.BytesIO(dataset[row]["image"]))).transpose(2, 0, 1)
        assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), expected)


def test_decode_images_is_the_datasets_own_matter(make, dataset: SlipstreamDataset) -> None:
    decoded = SlipstreamDataset(dataset.source, decode_images=True)
    assert decoded[0]["image"].dtype == torch.uint8
    assert_same_samples(
        by_id(make(named(), seed=8)), by_id(make(named(), seed=8, data=decoded)), ["global_0", "local_0"]
    )


def test_batches_stay_as_they_are_while_others_are_made(make) -> None:
    batches = list(make())
    copies = [[image.clone() for image in batch["image"]] for batch in batches]
    list(make(batch_size=5))
    assert all(
        torch.equal(a, b)
        for batch, copy in zip(batches, copies, strict=True)
        for a, b in zip(batch["image"], copy, strict=True)
    )


def two_fields(pictures: list[np.ndarray]) -> SlipstreamDataset:
    samples = [{"image": jpeg(picture), "mask": jpeg(picture[:, ::-1])} for picture in pictures[:6]]
    return SlipstreamDataset(MemorySource(samples, {"image": "image", "mask": "image"}))


def test_two_image_fields_have_a_pipeline_each(make, pictures: list[np.ndarray]) -> None:
    pipelines = {
        "image": MultiRandomResizedCrop({"a": dict(size=16, seed=7), "b": dict(size=16)}, return_boxes=True),
        "mask": [RandomResizedCrop(16, seed=7, return_boxes=True)],
    }
    batch = next(iter(make(data=two_fields(pictures), pipelines=pipelines)))
    assert torch.equal(batch["a_box"], batch["mask_box"])  # one explicit seed: yoked, an image and its mask
    assert not torch.equal(batch["a_box"], batch["b_box"])
    same_names = {"image": RandomResizedCrop(16, return_boxes=True), "mask": RandomResizedCrop(16, return_boxes=True)}
    batch = next(iter(make(data=two_fields(pictures), pipelines=same_names)))
    assert not torch.equal(batch["image_box"], batch["mask_box"])  # the field's name is in the stream


def test_an_undecodable_sample_is_named_and_the_next_batch_comes(make, dataset: SlipstreamDataset) -> None:
    expected = by_id(make(named(), seed=4))
    dataset.source.samples[5]["image"] = b"\xff\xd8\xff\xe0 no jpeg at all"
    loader = make(named(), seed=4)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(DecodeError, match=r"sample 5 \(memory:5\)") as caught:
        next(iterator)
    assert [sample_id for sample_id, _, _ in caught.value.failures] == [5]
    rest = list(iterator)
    assert [batch["_indices"].tolist() for batch in rest] == [list(range(b, min(b + 4, 23))) for b in range(8, 23, 4)]
    for batch in rest:
        for row, sample_id in enumerate(batch["_indices"].tolist()):
            assert torch.equal(batch["global_0"][row], expected[sample_id]["global_0"])
    with pytest.raises(DecodeError):
        list(loader)  # the next epoch meets it again


def test_an_image_smaller_than_its_centre_crop_is_named(make) -> None:
    with pytest.raises(DecodeError, match=r"sample 0 \(memory:0\).*CenterCrop"):
        next(iter(make(CenterCrop(200))))


def test_an_error_of_the_source_is_raised_at_next(make, dataset: SlipstreamDataset, monkeypatch) -> None:
    def broken(ids, field):
        raise OSError("the disk is gone")

    monkeypatch.setattr(dataset.source, "values", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(make(named())))


def test_a_subset_draws_the_same_crops_for_the_same_samples(make, dataset: SlipstreamDataset) -> None:
    subset = SlipstreamDataset(dataset.source, indices=[20, 3, 11])
    whole, part = by_id(make(named(), seed=6)), by_id(make(named(), seed=6, data=subset))
    assert sorted(part) == [3, 11, 20]
    assert all(torch.equal(part[i]["local_0"], whole[i]["local_0"]) for i in part)


def test_an_empty_dataset_is_an_empty_epoch(make, dataset: SlipstreamDataset) -> None:
    loader = make(named(), data=SlipstreamDataset(dataset.source, indices=[]))
    assert len(loader) == 0 and list(loader) == []


def test_slipstream_device_sets_the_default(monkeypatch, dataset: SlipstreamDataset) -> None:
    monkeypatch.setenv("SLIPSTREAM_DEVICE", "cpu")
    with SlipstreamLoader(dataset, 2, verbose=False) as loader:
        assert loader.device == CPU
    monkeypatch.setenv("SLIPSTREAM_DEVICE", "gpu")
    with pytest.raises(ValueError, match="SLIPSTREAM_DEVICE"):
        SlipstreamLoader(dataset, 2, verbose=False)


def test_verbose_prints_one_line(make, capsys) -> None:
    make(named(), verbose=True)
    assert capsys.readouterr().out == "slipstream: 23 samples, batches of 4 on cpu\n"
