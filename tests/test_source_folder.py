"""Folders of images: torchvision's samples in its order, and what cannot be read."""

import errno
import os
from pathlib import Path

import pytest
from litdata_samples import jpeg, maps_of

from slipstream.source import ReadError
from slipstream.source_folder import FolderSource


def test_folder_equals_torchvision_image_folder(tmp_path):
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    for number, name in enumerate(
        ["b/2.jpg", "b/10.JPG", "B/x.jpg", "a/z/1.png", "a/c.jpeg", "a/.h.jpg", "b/note.txt"]
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(number))
    (tmp_path / "root.jpg").write_bytes(jpeg(9))
    source = FolderSource(tmp_path)
    theirs = torchvision.datasets.ImageFolder(tmp_path)
    assert list(source.classes) == theirs.classes
    ids = range(len(theirs))
    pairs = list(zip(map(source.describe, ids), source.values(ids, "label"), strict=True))
    assert pairs == theirs.samples
    assert [str(tmp_path / path) for path in source.values(ids, "path")] == [path for path, _ in theirs.samples]
    assert [v.tobytes() for v in source.read(ids)] == [Path(path).read_bytes() for path, _ in theirs.samples]
    assert source.fields == {"image": "image", "label": "int", "path": "str"}


def test_flat_folder_has_no_label(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    source = FolderSource(tmp_path)
    assert source.fields == {"image": "image", "path": "str"}
    assert source.values([2, 0], "path") == ["2.jpg", "0.jpg"]
    with pytest.raises(KeyError, match="label"):
        source.values([0], "label")


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no image file"):
        FolderSource(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "full" / "2.jpg").write_bytes(b"")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="class folder 'bare'"):
        FolderSource(tmp_path)
    (tmp_path / "bare").rmdir()
    source = FolderSource(tmp_path)
    assert len(source.read([1])[0]) == 0
    (tmp_path / "full" / "1.jpg").unlink()
    with pytest.raises(ReadError, match=r"sample 0 \(.*full/1.jpg\): No such file"):
        source.read([1, 0])


def test_links_are_followed_and_none_is_lost_or_comes_again(tmp_path):
    for number, name in enumerate(["set/a/0.jpg", "set/b/0.jpg", "far/part/1.jpg", "far/2.jpg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(number))
    folder = tmp_path / "set"
    (folder / "c").symlink_to(tmp_path / "far")
    (folder / "a" / "more").symlink_to("../../far/part")
    (folder / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    source = FolderSource(folder)
    paths = ["a/0.jpg", "a/gone.jpg", "a/more/1.jpg", "b/0.jpg", "c/2.jpg", "c/part/1.jpg"]
    assert source.values(range(6), "path") == paths
    with pytest.raises(ReadError, match=r"sample 1 \(.*gone\.jpg\): No such file"):
        source.read(range(6))

    # torchvision takes a class folder on a disk that is not mounted for none, and gives all after it other labels
    for link, target, error, message in [
        ("aa", "nowhere", FileNotFoundError, "aa is a link to 'nowhere', which is not there"),
        ("b/part", "nowhere", FileNotFoundError, "b/part is a link to 'nowhere', which is not there"),
        ("b/loop", ".", ValueError, "b/loop is a link to a folder that holds it"),
        ("b/loop", "..", ValueError, "b/loop is a link to a folder that holds it"),
        ("d", ".", ValueError, "d/d is a link to a folder that holds it"),
    ]:
        (folder / link).symlink_to(target)
        with pytest.raises(error, match=message):
            FolderSource(folder)
        (folder / link).unlink()
    (folder / "b" / "to_a").symlink_to("../a")
    (folder / "a" / "to_b").symlink_to("../b")
    with pytest.raises(ValueError, match="a/to_b/to_a is a link to a folder that holds it"):
        FolderSource(folder)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "a" / "part").mkdir(parents=True)
    (tmp_path / "a" / "0.jpg").write_bytes(jpeg(0))
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("part"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match=r"Stale file handle.*a/part"):
        FolderSource(tmp_path)


def test_folder_batches_hold_no_descriptors(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03}.jpg").write_bytes(jpeg(number))
    source = FolderSource(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    views = source.read(range(300))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(maps_of(tmp_path)) == 300
    del views
    assert len(maps_of(tmp_path)) <= 64
    source.close()
    assert maps_of(tmp_path) == []
