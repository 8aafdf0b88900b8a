import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from litdata import StreamingDataset
from PIL import Image

from slipstream.dataset import SlipstreamDataset
from slipstream.pack import pack


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 8, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    for number in range(100):
        path = tmp_path / "photos" / f"class{number % 3}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return tmp_path / "photos"


def test_packed_samples_equal_the_folders_for_us_and_for_litdata(photos, tmp_path, monkeypatch):
    # A path that exists as seen from the working directory is still a path, not the file's content.
    monkeypatch.chdir(photos)
    assert pack(".", tmp_path / "new" / "set", chunk_bytes="20KB", progress=False) == 100
    folder = list(SlipstreamDataset(local_dir=photos))
    packed = SlipstreamDataset(local_dir=tmp_path / "new" / "set")
    assert len(list((tmp_path / "new" / "set").glob("chunk-*.bin"))) > 2
    assert dict(packed.fields) == {"image": "image", "label": "int", "path": "str"}
    assert list(packed) == folder
    theirs = [{**sample, "image": bytes(sample["image"])} for sample in StreamingDataset(str(tmp_path / "new" / "set"))]
    assert theirs == folder
    assert os.listdir(tmp_path / "new") == ["set"]


def test_a_flat_folder_is_packed_without_labels(photos, tmp_path):
    assert pack(photos / "class1", tmp_path / "set", progress=False) == 33
    assert SlipstreamDataset(tmp_path / "set")[0] == {"image": jpeg(1), "path": "001.jpg"}


def test_the_number_of_threads_changes_nothing_and_none_stays(photos, tmp_path, capsys):
    threads = threading.active_count()
    pack(photos, tmp_path / "one", num_workers=1, chunk_bytes=20_000)
    assert "100/100" in capsys.readouterr().err
    pack(photos, tmp_path / "four", num_workers=4, chunk_bytes=20_000, progress=False)
    assert capsys.readouterr().err == ""
    assert threading.active_count() == threads
    for path in (tmp_path / "one").glob("chunk-*"):
        assert path.read_bytes() == (tmp_path / "four" / path.name).read_bytes()


def test_a_folder_with_files_is_not_written_to(photos, tmp_path):
    (tmp_path / "set").mkdir()
    pack(photos, tmp_path / "set", progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    with pytest.raises(FileExistsError, match=r"dst '.*set' is not an empty folder"):
        pack(photos, tmp_path / "set")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        pack(photos, tmp_path / "file")


def test_a_failure_leaves_nothing_behind(photos, tmp_path):
    (photos / "class2" / "098.jpg").unlink()
    (photos / "class2" / "098.jpg").symlink_to("nowhere")
    with pytest.raises(RuntimeError, match=r"class2/098\.jpg"):
        pack(photos, tmp_path / "set", progress=False)
    assert os.listdir(tmp_path) == ["photos"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_workers": 0}, ValueError, "num_workers must be a whole number >= 1, got 0"),
        ({"format": "webp"}, ValueError, "format must be one of 'same', got 'webp'"),
        ({"chunk_bytes": "64 potatoes"}, ValueError, "chunk_bytes must be a number of bytes or a text such as '64MB'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be > 0 and at most 2GB, got 0"),
        ({"chunk_bytes": "5GB"}, ValueError, "at most 2GB, got '5GB'"),
        ({"src": "none"}, FileNotFoundError, "none"),
    ],
)
def test_bad_arguments(photos, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        pack(**{"src": photos, "dst": tmp_path / "set", **arguments})
    assert not Path(tmp_path / "set").exists()
