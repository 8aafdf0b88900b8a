"""Damage that the fuzz test found read as another sample's, or as an error without a name."""

from __future__ import annotations

import shutil
import struct
import zipfile
from pathlib import Path

import pytest
from litdata_samples import edit_index, photos, plain
from litdata_samples import write as write_chunks
from tar_samples import write_set

from slipstream.source import ReadError
from slipstream.source_litdata import open_litdata
from slipstream.source_tar import open_tar

SAMPLES = plain(photos(6))
LEAVES = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_chunks(tmp_path / "set", SAMPLES, chunk_size=6)


def edit_chunk(folder: Path, at: int, change: int) -> None:
    """Add to the 32-bit number there."""
    (path,) = folder.glob("chunk*")
    data = bytearray(path.read_bytes())
    (value,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, value + change)
    path.write_bytes(data)


def refused(folder: Path, chunk_size: int = 6) -> list[int]:
    """Which samples are refused when read by themselves; the others are as they were written."""
    source = open_litdata(folder, in_place=True)
    found = {}
    for number, sample in enumerate(SAMPLES):
        try:
            assert source.read([number])[0].tobytes() == sample["image"]
        except ReadError as error:
            found[number] = error.failures
    for number, failures in found.items():
        ((failed, path, reason),) = failures
        assert failed == number and f"item {number % chunk_size}" in path and reason
    if found:
        with pytest.raises(ReadError) as caught:
            source.read(range(len(SAMPLES)))
        assert [number for number, _, _ in caught.value.failures] == list(found)
    return list(found)


def test_all_is_well_without_damage(folder: Path) -> None:
    assert refused(folder) == []


@pytest.mark.parametrize("change", [-1, 1, -8, 40])
@pytest.mark.parametrize("number", range(1, 6))
def test_an_offset_that_is_off_refuses_the_samples_on_both_sides(folder: Path, number: int, change: int) -> None:
    edit_chunk(folder, 4 + 4 * number, change)
    assert refused(folder) == [number - 1, number]


def test_an_offset_that_is_lost_refuses_the_whole_chunk(tmp_path: Path) -> None:
    """The offsets after it move up by one: each still begins at an item, but at the next one."""
    folder = write_chunks(tmp_path / "set", SAMPLES, chunk_size=3)
    path = max(folder.glob("chunk*"))
    data = bytearray(path.read_bytes())
    del data[4:8]
    data[4 + 4 * 3 : 4 + 4 * 3] = bytes(4)
    path.write_bytes(data)
    assert refused(folder, chunk_size=3) == [3, 4, 5]


@pytest.mark.parametrize("leaf", range(LEAVES))
@pytest.mark.parametrize("change", [-1, 1, -5])
def test_a_size_that_is_off_refuses_its_sample(folder: Path, leaf: int, change: int) -> None:
    """Whichever field it is of: nothing tells which number is the wrong one."""
    (path,) = folder.glob("chunk*")
    (start,) = struct.unpack_from("<I", path.read_bytes(), 4 + 4 * 2)
    edit_chunk(folder, start + 4 * leaf, change)
    assert refused(folder) == [2]


def test_an_index_with_one_chunk_under_two_numbers_is_refused(tmp_path: Path) -> None:
    folder = write_chunks(tmp_path / "set", SAMPLES, chunk_size=3)

    def double(index: dict) -> None:
        index["chunks"][1]["filename"] = index["chunks"][0]["filename"]

    edit_index(folder, double)
    with pytest.raises(ValueError, match=r"index.json lists the chunk 'chunk-0-0.bin' more than once"):
        open_litdata(folder, in_place=True)


@pytest.mark.parametrize(("key", "value"), [("chunk_size", 2**32), ("chunk_size", 2**63), ("chunk_bytes", 2**63)])
def test_numbers_that_no_chunk_can_have_are_refused(folder: Path, key: str, value: int) -> None:
    edit_index(folder, lambda index: index["chunks"][0].update({key: value}))
    with pytest.raises(ValueError, match=rf"index.json: {key} of chunk 'chunk-0-0.bin' is {value}; .* < 2\*\*"):
        open_litdata(folder, in_place=True)


@pytest.mark.parametrize("value", [1, 7])
def test_a_chunk_of_which_the_index_says_few_bytes_is_read(folder: Path, value: int) -> None:
    edit_index(folder, lambda index: index["chunks"][0].update(chunk_bytes=value))
    assert refused(folder) == []


@pytest.mark.parametrize(
    ("at", "value"),
    [(4, 255), (6, 1), (6, 32), (8, 99), (8, 8), (8, 14)],
    ids=["version", "encrypted", "patched", "no such packing", "deflate", "lzma"],
)
def test_a_damaged_index_of_tars_is_made_again_whatever_its_zip_says(tmp_path: Path, at: int, value: int) -> None:
    folder = write_set(tmp_path / "tars")
    source = open_tar(folder, cache_dir=tmp_path / "cache")
    expected = [view.tobytes() for view in source.read(range(len(source)))]
    files = list((tmp_path / "cache").rglob("*.npz"))
    for path in files:
        data = bytearray(path.read_bytes())
        for begin, further in ((b"PK\3\4", 0), (b"PK\1\2", 2)):  # of each array: before it, and in the list at the end
            place = data.find(begin)
            while place >= 0:
                data[place + at + further] = value
                place = data.find(begin, place + 4)
        path.write_bytes(data)
        assert not is_whole(path)
    again = open_tar(folder, cache_dir=tmp_path / "cache")
    assert [view.tobytes() for view in again.read(range(len(again)))] == expected
    assert all(map(is_whole, files))


def is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:
        return False


@pytest.mark.parametrize("in_place", [True, False])
def test_a_set_that_is_written_anew_under_an_open_one_is_an_error(tmp_path: Path, in_place: bool) -> None:
    """Else its samples would come under the ids of others, some of them twice."""
    folder = write_chunks(tmp_path / "set", plain(photos(12)))
    source = open_litdata(folder, in_place=in_place, cache_dir=tmp_path / "cache")
    first = source.read([0])[0].tobytes()
    shutil.rmtree(folder)
    write_chunks(folder, plain(photos(12))[::-1])
    with pytest.raises(
        ReadError, match=r"sample 5 .*chunk-0-1\.bin has changed since the set was opened: open it again"
    ):
        source.read([5])
    assert source.read([0])[0].tobytes() == first  # of the set that was opened
    again = open_litdata(folder, in_place=in_place, cache_dir=tmp_path / "cache")
    assert again.values([11], "path") == ["class/0.jpg"]
