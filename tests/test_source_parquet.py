import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_readers import check_other_readers

from slipstream.dataset import SlipstreamDataset
from slipstream.loader import SlipstreamLoader
from slipstream.source import ReadError, Source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from slipstream import source_parquet  # noqa: E402
from slipstream.source_arrow import open_arrow  # noqa: E402
from slipstream.source_arrow_values import BytesColumn  # noqa: E402
from slipstream.source_parquet import open_parquet  # noqa: E402

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def jpeg(number: int, size: tuple[int, int] = (9, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def table(numbers) -> pa.Table:
    numbers = list(numbers)
    return pa.table(
        {
            "image": pa.array([{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in numbers], IMAGE),
            "label": pa.array([n % 3 for n in numbers], pa.int64()),
        }
    )


def write_parquet(path: Path, data: pa.Table, rows: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data, path, row_group_size=rows)
    return path


def write_arrow(path: Path, data: pa.Table, rows: int = 4, opened=pa.ipc.new_stream) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=rows)
    return path


def write_saved(folder: Path, tables: list[pa.Table]) -> Path:
    """Lay out a folder as datasets' save_to_disk does."""
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, data in zip(names, tables, strict=True):
        write_arrow(folder / name, data)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture
def parquet(tmp_path):
    for number, numbers in enumerate([range(10), range(10, 11), range(11, 23)]):
        write_parquet(tmp_path / "parquet" / f"train-{number:05d}-of-00003.parquet", table(numbers))
    return tmp_path / "parquet"


@pytest.fixture
def saved(tmp_path):
    return write_saved(tmp_path / "saved", [table(range(10)), table(range(10, 11)), table(range(11, 23))])


@pytest.fixture(params=["parquet", "saved"])
def folder(request):
    return request.getfixturevalue(request.param)


def test_rows_are_samples(folder):
    dataset = SlipstreamDataset(folder)
    assert isinstance(dataset.source, Source)
    assert dict(dataset.fields) == {"image": "image", "label": "int"}
    assert list(dataset) == [{"image": jpeg(n), "label": n % 3} for n in range(23)]
    ids = np.random.default_rng(0).integers(0, 23, 100)
    views = dataset.source.read(ids)
    assert [view.tobytes() for view in views] == [jpeg(n) for n in ids]
    assert all(view.dtype == np.uint8 and not view.flags.writeable for view in views)
    assert dataset.source.values(ids, "label") == [n % 3 for n in ids]
    assert dataset.source.read([]) == []
    dataset.source.close()
    assert views[0].tobytes() == jpeg(ids[0])
    assert dataset.source.values([22], "image") == [jpeg(22)]
    assert repr(dataset.source) == f"TableSource({str(folder)!r}, 23 samples, fields=['image', 'label'])"


def test_bad_ids_and_fields_are_named(folder):
    source = SlipstreamDataset(folder).source
    for bad, error in (([23], IndexError), ([-1], IndexError), ([0.5], TypeError)):
        with pytest.raises(error):
            source.read(bad)
    with pytest.raises(KeyError, match="'mask' does not exist; the source has 'image', 'label'"):
        source.values([0], "mask")
    with pytest.raises(ValueError, match="field 'label' is no bytes, but int"):
        source.read([0], "label")


def test_describe_names_file_row_group_and_row(parquet, saved):
    source = open_parquet(parquet)
    assert source.describe(9) == f"{parquet}/train-00000-of-00003.parquet row group 2 row 1"
    assert source.describe(22) == f"{parquet}/train-00002-of-00003.parquet row group 2 row 3"
    assert source.describe(23) == f"no sample 23 in {parquet}"
    assert open_arrow(saved).describe(10) == f"{saved}/data-00001-of-00003.arrow row group 0 row 0"


def test_bytes_of_arrow_files_are_views_over_maps(saved):
    source = open_arrow(saved)
    views = source.read(range(23))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(saved) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert all(any(a <= view.ctypes.data and view.ctypes.data + len(view) <= b for a, b in ranges) for view in views)
    assert not [name for name in os.listdir("/proc/self/fd") if str(saved) in os.path.realpath(f"/proc/self/fd/{name}")]
    source.close()
    assert views[22].tobytes() == jpeg(22)
    del views, source
    assert str(saved) not in Path("/proc/self/maps").read_text()


def test_files_a_glob_and_a_brace_list(parquet, saved, tmp_path):
    name = "-of-00003.parquet"
    assert len(SlipstreamDataset(f"{parquet}/*.parquet")) == 23
    assert SlipstreamDataset(f"{parquet}/train-{{00002,00000}}{name}")[0]["image"] == jpeg(11)
    assert SlipstreamDataset(parquet / f"train-00001{name}")[0]["image"] == jpeg(10)
    assert len(SlipstreamDataset(f"{saved}/*.arrow")) == 23
    file = write_arrow(tmp_path / "whole.arrow", table(range(9)), opened=pa.ipc.new_file)
    assert [s["image"] for s in SlipstreamDataset(file)] == [jpeg(n) for n in range(9)]


def column_types() -> pa.Table:
    return pa.table(
        {
            "raw": pa.array([jpeg(0), jpeg(1)], pa.binary()),
            "large": pa.array([jpeg(2), jpeg(3)], pa.large_binary()),
            "other": pa.array([b"no image", b""], pa.binary()),
            "late": pa.array([None, jpeg(4)], pa.binary()),
            "n": pa.array([1, -2], pa.int32()),
            "x": pa.array([0.5, None], pa.float32()),
            "yes": pa.array([True, False]),
            "text": pa.array(["ü", ""]),
            "kind": pa.array(["cat", "dog"]).dictionary_encode(),
            "row": pa.array([[1, 2], [3]], pa.list_(pa.int16())),
            "grid": pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.float32()))),
            "box": pa.array([[0.5, 1], [2, 3]], pa.list_(pa.float64(), 2)),
            "words": pa.array([["a"], []], pa.list_(pa.string())),
            "info": pa.array([{"a": 1}, {"a": 2}]),
        }
    )


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_columns_become_fields_of_their_kinds(tmp_path, write):
    data = column_types()
    write(tmp_path / ("a.parquet" if write is write_parquet else "a.arrow"), data)
    source = SlipstreamDataset(tmp_path).source
    assert dict(source.fields) == {
        "raw": "image",
        "large": "image",
        "other": "bytes",
        "late": "image",
        "n": "int",
        "x": "float",
        "yes": "bool",
        "text": "str",
        "kind": "str",
        "row": "array",
        "grid": "array",
        "box": "array",
        "words": "json",
        "info": "json",
    }
    for field in data.column_names:
        if field == "late":
            continue
        for mine, other in zip(source.values([1, 0], field), reversed(data[field].to_pylist()), strict=True):
            if source.fields[field] == "array":
                assert mine.dtype == {"row": np.int16, "grid": np.float32, "box": np.float64}[field]
                np.testing.assert_array_equal(mine, other)
                mine[...] = 0
            else:
                assert mine == other and type(mine) is type(other)
    assert source.values([1], "late") == [jpeg(4)]
    assert source.read([1], "other")[0].shape == (0,)
    with pytest.raises(ReadError, match=r"sample 0 \(.* row group 0 row 0\): field 'late': 'late' is missing"):
        source.read([0, 1], "late")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(2), pa.binary_view(), IMAGE])
def test_bytes_of_slices_and_chunks(kind):
    data = [b"ab", None, b"cd", b"ef", None, b"gh"]
    rows = [{"bytes": one, "path": None} if one else None for one in data] if kind is IMAGE else data
    array = pa.array(rows, kind)
    for column in (array, pa.chunked_array([array[:1], array[1:1], array[1:]]), array.slice(2, 3), array[5:]):
        expected = data if len(column) == 6 else data[2:5] if len(column) == 3 else data[5:]
        assert [one if one is None else one.tobytes() for one in BytesColumn(column)] == expected


def test_an_image_stored_as_a_path_only_is_named(tmp_path):
    rows = [{"bytes": jpeg(0), "path": None}, {"bytes": None, "path": "/else/1.jpg"}, None]
    write_parquet(tmp_path / "a.parquet", pa.table({"image": pa.array(rows, IMAGE)}))
    source = open_parquet(tmp_path)
    assert source.values([0], "image") == [jpeg(0)]
    with pytest.raises(ReadError, match=r"sample 1 .*only the path '/else/1.jpg'") as caught:
        source.read([0, 1, 2])
    assert [failure[0] for failure in caught.value.failures] == [1, 2]


def test_ragged_lists_are_named(tmp_path):
    data = pa.table({"grid": pa.array([[[1, 2]], [[1], [2, 3]]], pa.list_(pa.list_(pa.int64())))})
    write_parquet(tmp_path / "a.parquet", data)
    source = open_parquet(tmp_path)
    assert source.values([0], "grid")[0].tolist() == [[1, 2]]
    with pytest.raises(ReadError, match=r"sample 1 .*field 'grid'"):
        source.values([1], "grid")


def test_row_groups_are_read_once_a_batch_and_kept_within_bounds(parquet, monkeypatch):
    reads = []
    read = source_parquet.ParquetFiles._read
    monkeypatch.setattr(source_parquet.ParquetFiles, "_read", lambda self, *key: reads.append(key) or read(self, *key))
    source = open_parquet(parquet)
    ids = np.random.default_rng(0).permutation(23)
    source.read(ids)
    source.read(ids)
    assert len(reads) == len(set(reads)) == 3 + 1 + 3
    source.close()
    reads.clear()
    # Room for one row group or so.
    monkeypatch.setattr(source_parquet, "_KEPT_BYTES", 5000)
    assert [view.tobytes() for view in source.read(ids)] == [jpeg(n) for n in ids]
    held = source._files._columns.values()
    assert 1 <= len(held) < 7 and sum(column.nbytes for column in held) <= 5000
    assert len(reads) == 7


def test_what_is_no_set_is_refused(parquet, saved, tmp_path):
    write_parquet(parquet / "z.parquet", table(range(3)).rename_columns(["image", "class"]))
    with pytest.raises(ValueError, match=r"z\.parquet has the columns .*class: int64, .* has .*label: int64"):
        open_parquet(parquet)
    (parquet / "z.parquet").write_bytes((parquet / "train-00000-of-00003.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"z\.parquet is damaged or no Parquet file"):
        SlipstreamDataset(parquet)
    write_parquet(tmp_path / "none" / "a.parquet", table([]))
    with pytest.raises(ValueError, match="none: the files hold no rows"):
        open_parquet(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet file"):
        open_parquet(tmp_path)
    file = saved / "data-00001-of-00003.arrow"
    whole = file.read_bytes()
    for cut in (8, 200, len(whole) - 10):
        file.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"data-00001-of-00003\.arrow is (cut off at|damaged)"):
            SlipstreamDataset(saved)
    file.write_bytes(whole)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(ValueError, match=r"state\.json: file name '\.\./x\.arrow' must be a plain one"):
        SlipstreamDataset(saved)
    (saved / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{}]}')
    with pytest.raises(ValueError, match="flatten_indices"):
        SlipstreamDataset(saved)
    (saved / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="none that `datasets` wrote"):
        SlipstreamDataset(saved)
    (saved / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match="give the folder of one of its splits"):
        SlipstreamDataset(saved)


def test_a_damaged_row_group_names_its_samples_only(parquet):
    file = parquet / "train-00000-of-00003.parquet"
    whole = file.read_bytes()
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)

    def damage(start):
        file.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])

    damage(4)
    with pytest.raises(ValueError, match=r"train-00000-of-00003\.parquet: column 'image' is damaged"):
        open_parquet(parquet)
    damage(column.dictionary_page_offset or column.data_page_offset)
    source = open_parquet(parquet)
    with pytest.raises(ReadError, match=r"sample 4 \(.*row group 1 row 0\): column 'image' is damaged") as caught:
        source.read(range(12))
    assert [failure[0] for failure in caught.value.failures] == [4, 5, 6, 7]
    assert source.values([8], "image") == [jpeg(8)]


def test_wrong_offsets_in_an_arrow_file_do_not_lead_out_of_it(saved):
    file = saved / "data-00001-of-00003.arrow"
    data = file.read_bytes()
    size = len(jpeg(10))
    place = data.rindex(np.array([0, size], "<i4").tobytes())
    file.write_bytes(data[: place + 4] + np.array([2**30], "<i4").tobytes() + data[place + 8 :])
    with pytest.raises(ReadError, match=r"sample 10 .*data-00001-of-00003.arrow is damaged"):
        open_arrow(saved).read([9, 10])


def test_a_name_that_is_no_text_is_named(tmp_path):
    file = write_arrow(tmp_path / "a.arrow", table(range(3)))
    file.write_bytes(file.read_bytes().replace(b"label", b"l\xffbel"))
    with pytest.raises(ValueError, match=r"a\.arrow is damaged: .* can't decode byte 0xff"):
        open_arrow(file)


def test_a_file_that_changed_under_an_open_set_is_an_error(folder):
    source = SlipstreamDataset(folder).source
    source.close()
    file = next(path for path in folder.iterdir() if "00001-of" in path.name)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ReadError, match=r"sample 10 .*has changed since the set was opened"):
        source.read([9, 10, 11])


def test_without_pyarrow_the_message_says_what_to_install(parquet, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("source_parquet", "source_arrow", "source_table", "source_arrow_values"):
        monkeypatch.delitem(sys.modules, f"slipstream.{name}", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"need pyarrow: pip install pyarrow$"):
        SlipstreamDataset(parquet)


class _Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "pyarrow":
            raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")


def test_the_loader_yields_what_it_yields_from_a_folder_of_the_same_files(tmp_path):
    for n in range(12):
        path = tmp_path / "images" / f"{n:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(n, (40 + n, 50)))
    rows = [{"bytes": jpeg(n, (40 + n, 50)), "path": f"{n:02d}.jpg"} for n in range(12)]
    data = pa.table({"image": pa.array(rows, IMAGE), "label": range(12)})
    write_parquet(tmp_path / "tables" / "a.parquet", data)
    write_saved(tmp_path / "saved", [data])
    batches = []
    for name in ("images", "tables", "saved"):
        dataset = SlipstreamDataset(tmp_path / name)
        loader = SlipstreamLoader(dataset, batch_size=5, shuffle=True, seed=3, device="cpu", verbose=False)
        batches.append(list(loader))
    for images, *others in zip(*batches, strict=True):
        for other in others:
            assert [f"{n:02d}.jpg" for n in other["label"].tolist()] == images["path"]
            assert (other["_indices"] == images["_indices"]).all()
            assert all((x == y).all() for x, y in zip(images["image"], other["image"], strict=True))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_and_threads_read_the_same(folder, method):
    source = SlipstreamDataset(folder).source
    assert source.read([0])[0].tobytes() == jpeg(0)
    check_other_readers(source, pickle.loads(pickle.dumps(source)), method, [jpeg(number) for number in range(23)])
