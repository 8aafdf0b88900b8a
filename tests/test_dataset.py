import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming.writer import BinaryWriter
from litdata.types import Text
from PIL import Image

from slipstream import RandomResizedCrop, SlipstreamLoader
from slipstream.dataset import SlipstreamDataset
from slipstream.decode import DecodeError
from slipstream.source_fields import PickleRefusedError
from slipstream.source_folder import FolderSource


def jpeg(number: int, size: tuple[int, int] = (9, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(folder: Path, samples: list) -> Path:
    writer = BinaryWriter(str(folder), chunk_size=4)
    for number, sample in enumerate(samples):
        writer[number] = sample
    writer.done()
    writer.merge()
    return folder


@pytest.fixture
def chunks(tmp_path):
    samples = [{"image": jpeg(i), "label": i, "path": Text(text=f"{i}.jpg")} for i in range(10)]
    return write(tmp_path / "chunks", samples)


@pytest.fixture
def photos(tmp_path):
    for number in range(6):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return tmp_path / "photos"


def test_samples_are_plain_values(chunks, photos):
    sample = SlipstreamDataset(local_dir=chunks)[3]
    assert sample == {"image": jpeg(3), "label": 3, "path": "3.jpg"}
    assert [type(value) for value in sample.values()] == [bytes, int, str]
    assert SlipstreamDataset(local_dir=photos)[3] == {"image": jpeg(1), "label": 1, "path": "class1/1.jpg"}


@pytest.mark.parametrize("convert", [str, Path, FolderSource])
def test_source_is_a_path_or_an_object(photos, convert):
    dataset = SlipstreamDataset(convert(photos))
    assert len(dataset) == 6
    assert dataset[5]["path"] == "class1/5.jpg"


def test_a_folder_with_an_index_is_litdata(chunks):
    assert SlipstreamDataset(chunks)[9]["label"] == 9


def test_negative_indices_count_from_the_end_and_iteration_stops(chunks):
    dataset = SlipstreamDataset(local_dir=chunks)
    assert dataset[-1] == dataset[9]
    assert dataset[np.int64(2)]["label"] == 2
    assert [sample["label"] for sample in dataset] == list(range(10))
    for index in (10, -11):
        with pytest.raises(IndexError, match=f"index {index} is out of range: the dataset has 10 samples"):
            dataset[index]
    with pytest.raises(TypeError, match=r"index must be an int, got slice\(1, 3, None\); indices= makes a subset"):
        dataset[1:3]
    with pytest.raises(TypeError, match=r"index must be an int, got 1\.0"):
        dataset[1.0]


@pytest.mark.parametrize("indices", [[7, 2, 2], (7, 2, 2), np.array([7, 2, 2], np.uint8), torch.tensor([7, 2, 2])])
def test_indices_give_a_subset_under_the_sources_ids(chunks, indices):
    dataset = SlipstreamDataset(local_dir=chunks, indices=indices)
    assert [sample["label"] for sample in dataset] == [7, 2, 2]
    assert dataset[-1]["label"] == 2
    assert dataset.sample_ids.dtype == np.int64
    assert dataset.sample_ids.tolist() == [7, 2, 2]
    with pytest.raises(IndexError):
        dataset[3]
    assert SlipstreamDataset(local_dir=chunks).sample_ids is None
    assert len(SlipstreamDataset(local_dir=chunks, indices=[])) == 0


def test_changing_the_given_indices_later_changes_nothing(chunks):
    given = np.arange(3)
    dataset = SlipstreamDataset(local_dir=chunks, indices=given)
    given[:] = 9
    assert dataset[0]["label"] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of source, remote_dir and local_dir, got none"),
        ({"local_dir": "{0}", "remote_dir": "{0}"}, ValueError, "got remote_dir and local_dir"),
        ({"local_dir": "{0}/none"}, FileNotFoundError, "local_dir '.*/none' does not exist"),
        ({"source": "{0}/none"}, FileNotFoundError, "^source '.*/none' does not exist"),
        ({"source": "{0}/index.json"}, NotADirectoryError, "^source '.*index.json' is not a folder"),
        ({"local_dir": "{0}", "decode_images": "no"}, TypeError, "decode_images must be True or False, got 'no'"),
        ({"local_dir": "{0}", "allow_pickle": "no"}, TypeError, "allow_pickle must be True or False, got 'no'"),
        ({"local_dir": "{0}/index.json"}, NotADirectoryError, "is not a folder"),
        ({"remote_dir": "{0}/none"}, FileNotFoundError, "remote_dir .*none' does not exist"),
        ({"remote_dir": "{1}"}, FileNotFoundError, "give a folder of images as local_dir"),
        ({"local_dir": "s3://bucket/x"}, ValueError, "give a URL as remote_dir"),
        ({"local_dir": "{0}", "storage_options": {"unsigned": True}}, ValueError, "storage_options apply to an s3://"),
        ({"remote_dir": "s3://a/b", "storage_options": ["key"]}, TypeError, "must be a dict of boto3's, got list$"),
        ({"local_dir": "{0}", "indices": [0, 10]}, IndexError, "indices: sample id 10 is out of range: .* 0 to 9"),
        ({"local_dir": "{0}", "indices": [-1]}, IndexError, "indices: sample id -1"),
        ({"local_dir": "{0}", "indices": [0.5]}, TypeError, r"indices must be a flat sequence of ints, got \[0.5\]"),
        ({"local_dir": "{0}", "indices": [True]}, TypeError, "indices must be"),
        ({"local_dir": "{0}", "max_pixels": 0}, ValueError, "max_pixels must be 1 or more, got 0"),
        ({"local_dir": "{0}", "max_pixels": 1.5}, TypeError, "max_pixels must be an int, got 1.5"),
        ({"local_dir": 7}, TypeError, "local_dir must be a path, got 7"),
        ({"remote_dir": b"/data"}, TypeError, "remote_dir must be a path, got b'/data'"),
        ({"local_dir": "{0}", "cache_dir": 7}, TypeError, "cache_dir must be a path, got 7"),
        ({"source": 7}, TypeError, "source must be a path, an s3:// URL or a Source, got int"),
        ({"source": [1, 2]}, TypeError, "got list"),
    ],
)
def test_bad_arguments_are_refused_when_the_dataset_is_made(chunks, photos, arguments, error, message):
    filled = {
        name: value.format(chunks, photos) if isinstance(value, str) else value for name, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        SlipstreamDataset(**filled)


def test_numpys_ints_are_as_good_as_pythons(photos):
    data = SlipstreamDataset(photos, max_pixels=np.int64(10**6), indices=[np.int32(1)])
    assert data.max_pixels == 10**6 and data[np.int64(0)] == SlipstreamDataset(photos)[1]


def test_options_of_paths_are_refused_beside_a_source_object(photos):
    with pytest.raises(ValueError, match="allow_pickle does not apply to a Source object"):
        SlipstreamDataset(FolderSource(photos), allow_pickle=True)


def test_decoded_images_are_pillows_and_may_be_written_to(photos):
    image = SlipstreamDataset(local_dir=photos, decode_images=True)[0]["image"]
    assert image.dtype == torch.uint8
    expected = np.asarray(Image.open(io.BytesIO(jpeg(0))).convert("RGB"))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    image.zero_()


def test_an_image_that_cannot_be_decoded_names_its_sample_and_file(photos):
    (photos / "class0" / "2.jpg").write_bytes(jpeg(2)[:100])
    (photos / "class0" / "4.jpg").write_bytes(b"")
    dataset = SlipstreamDataset(local_dir=photos, decode_images=True)
    for index in (1, 2):
        with pytest.raises(DecodeError, match=rf"sample {index} \(.*class0/{2 * index}\.jpg\)"):
            dataset[index]
    assert dataset[0]["image"].shape == (3, 9, 8)
    assert SlipstreamDataset(local_dir=photos)[2]["image"] == b""


def test_max_pixels_is_checked_before_decoding(photos):
    assert SlipstreamDataset(local_dir=photos, decode_images=True, max_pixels=72)[0]["image"].shape == (3, 9, 8)
    with pytest.raises(DecodeError, match="71"):
        SlipstreamDataset(local_dir=photos, decode_images=True, max_pixels=71)[0]


def test_pickled_datasets_and_loader_workers_read_the_same(chunks, photos):
    for folder in (chunks, photos):
        dataset = SlipstreamDataset(local_dir=folder, indices=[3, 1])
        first = list(dataset)
        assert list(pickle.loads(pickle.dumps(dataset))) == first
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)
        assert list(loader) == first


def test_a_loader_refuses_a_pickled_field_at_next_unless_it_is_excluded(tmp_path):
    data = SlipstreamDataset(write(tmp_path, [{"image": jpeg(n), "extra": {n}} for n in range(4)]))
    options = {"pipelines": {"image": RandomResizedCrop(8)}, "device": "cpu", "verbose": False}
    with SlipstreamLoader(data, 2, **options) as loader:
        batches = iter(loader)
        for _ in range(2):  # each batch by itself
            with pytest.raises(
                PickleRefusedError, match=r"field 'extra' .* exclude_fields=\['extra'\].*allow_pickle=True"
            ):
                next(batches)
    with SlipstreamLoader(data, 2, exclude_fields=["extra"], **options) as loader:
        assert [list(batch) for batch in loader] == [["image", "_indices"]] * 2
    trusted = SlipstreamDataset(tmp_path, allow_pickle=True)
    with SlipstreamLoader(trusted, 4, **options) as loader:
        assert next(iter(loader))["extra"] == [{0}, {1}, {2}, {3}]


def test_a_pickled_field_is_refused_when_it_is_read(tmp_path):
    write(tmp_path, [{"image": jpeg(0), "label": np.int64(4), "extra": np.zeros((), np.float32)}])
    dataset = SlipstreamDataset(local_dir=tmp_path)
    assert dataset.fields["label"] == "pickle"
    assert dataset.source.values([0], "label") == [4]
    with pytest.raises(ValueError, match=r"exclude_fields=\['extra'\]"):
        dataset[0]
    assert SlipstreamDataset(local_dir=tmp_path, allow_pickle=True)[0]["extra"] == 0


def test_repr_says_where_and_how_much(chunks):
    assert repr(SlipstreamDataset(chunks)) == (
        f"SlipstreamDataset(LitDataSource('{chunks}', 10 samples, fields=['image', 'label', 'path']))"
    )
    assert "2 of its samples" in repr(SlipstreamDataset(chunks, indices=[1, 2]))


@pytest.mark.parametrize("name", ["index.json", "train-00000-of-00002.parquet", "0000.tar", "data.arrow"])
def test_a_folder_of_sets_is_told_which_to_give(tmp_path, name):
    """The root of a Hugging Face repository holds data/*.parquet, one of packed splits train/ and val/."""
    for folder in ("docs", "train", "val"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ("notes.txt" if folder == "docs" else name)).touch()
    with pytest.raises(
        ValueError, match=rf"'docs' of .* holds no image file .*; give one set, such as {tmp_path}/train$"
    ):
        SlipstreamDataset(local_dir=tmp_path)
    (tmp_path / "train" / name).unlink()
    (tmp_path / "val" / name).unlink()
    with pytest.raises(ValueError, match=r"'docs' of .* holds no image file \([ .a-z]*\)$"):
        SlipstreamDataset(local_dir=tmp_path)
