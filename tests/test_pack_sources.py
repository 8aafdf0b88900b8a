"""Every kind of source, packed: the fields, their kinds and values, and what litdata itself reads of them."""

from __future__ import annotations

import datetime
import json
import tarfile
from collections import OrderedDict
from typing import Any

import boto3
import numpy as np
import pytest
import tar_samples
import torch
from litdata import StreamingDataset
from litdata.streaming.writer import BinaryWriter
from litdata.types import Text
from litdata_samples import photos, plain, write
from moto.server import ThreadedMotoServer
from pack_sets import files_in, jpeg, write_images
from test_source_unpack import zstd_codec  # noqa: F401  (a fixture)

from slipstream.dataset import SlipstreamDataset
from slipstream.pack import pack
from slipstream.source import ReadError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))


def same(mine: Any, other: Any) -> bool:
    if isinstance(other, (np.ndarray, torch.Tensor)):
        return type(mine) is type(other) and mine.dtype == other.dtype and np.array_equal(mine, other, equal_nan=True)
    if isinstance(other, dict):
        return (
            isinstance(mine, dict) and list(mine) == list(other) and all(same(mine[key], other[key]) for key in other)
        )
    return type(mine) is type(other) and (mine == other or (mine != mine and other != other))


def check(src: Any, dst: Any, *, json_fields: tuple[str, ...] = (), **options: Any) -> SlipstreamDataset:
    """Pack with one thread and with three; compare with the source, as we read it and as litdata does."""
    given = src if isinstance(src, SlipstreamDataset) else SlipstreamDataset(src)
    done = pack(src, dst / "packed", chunk_bytes=4_000, num_workers=3, progress=False, **options)
    pack(src, dst / "again", chunk_bytes=4_000, num_workers=1, progress=False, **options)
    assert files_in(dst / "packed") == files_in(dst / "again")
    packed = SlipstreamDataset(dst / "packed")
    assert done.whole and len(packed) == len(given) == done.samples
    assert dict(packed.fields) == {**given.fields, **dict.fromkeys(json_fields, "json")}
    theirs = StreamingDataset(str(dst / "packed"))
    for mine, other, third in zip(packed, given, theirs, strict=True):
        assert same(mine, other)
        assert same({field: bytes(v) if isinstance(v, memoryview) else v for field, v in third.items()}, other)
    return packed


def test_folder(tmp_path):
    check(write_images(tmp_path / "photos", 30), tmp_path)


@pytest.mark.parametrize("place", ["{}", "{}/*.tar", "{}/train-{{001,000,002}}.tar"])
def test_tars(tmp_path, place):
    tar_samples.write_set(tmp_path / "shards")
    packed = check(place.format(tmp_path / "shards"), tmp_path)
    assert packed.fields == {
        "image": "image", "label": "int", "key": "str", "json": "json", "txt": "str", "emb.npy": "bytes"
    }  # fmt: skip


def test_tars_of_several_images_and_a_missing_member(tmp_path):
    members = [member for n in range(20) for member in tar_samples.sample(n) if member[0] != "train/00007.txt"]
    members = [
        pair
        for name, data in members
        for pair in ([(name, data)] + [(name[:-3] + "seg.png", jpeg(3))] * (name[-3:] == "jpg"))
    ]
    tar_samples.write(tmp_path / "a.tar", members)
    with pytest.raises(ReadError, match=r"sample 7 \(.*a\.tar key 'train/00007'\): it has no 'txt' member"):
        pack(tmp_path / "a.tar", tmp_path / "set")
    done = pack(tmp_path / "a.tar", tmp_path / "set", exclude_fields=["txt", "key"])
    packed = SlipstreamDataset(tmp_path / "set")
    assert done.samples == 20 and dict(packed.fields) == {
        "image": "image", "seg.png": "image", "label": "int", "json": "json", "emb.npy": "bytes"
    }  # fmt: skip
    assert packed[7]["image"] == tar_samples.jpeg(7)


def columns() -> dict[str, list[Any]]:
    return {
        "image": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(23)],
        "label": [n % 3 for n in range(23)],
        "fine": [None if n == 17 else n for n in range(23)],
        "weight": [n / 7 for n in range(23)],
        "score": [None if n == 5 else n / 3 for n in range(23)],
        "clean": [n % 2 == 0 for n in range(23)],
        "sure": [None if n == 22 else n % 2 == 0 for n in range(23)],
        "title": [f"ü {n}" for n in range(23)],
        "caption": [None if n == 20 else f'say "{n}"\n' for n in range(23)],
        "row": [list(range(n)) for n in range(23)],
        "grid": [[[n, 1.5], [2.5, -n]] for n in range(23)],
        "words": [["a"] * (n % 3) for n in range(23)],
        "info": [{"n": n, "deep": [{"x": None if n == 3 else 0.1}]} for n in range(23)],
    }


@pytest.mark.parametrize("kind", ["parquet", "bare parquet", "arrow"])
def test_tables(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    types = {"label": pa.int32(), "row": pa.list_(pa.int16()), "grid": pa.list_(pa.list_(pa.float32()))}
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns().items()})
    if kind == "arrow":
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    else:
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, write_statistics=kind == "parquet")
    packed = check(tmp_path / f"a.{kind.split()[-1]}", tmp_path, json_fields=("fine", "score", "sure", "caption"))
    assert [sample["caption"] for sample in packed] == columns()["caption"]
    assert packed[6]["row"].tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.fields["label"] == "int" and packed.fields["title"] == "str"


def test_columns_that_cannot_be_stored_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def write_columns(**values):
        table = pa.table({"image": pa.array([jpeg(n) for n in range(5)]), **values})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        return tmp_path / "a.parquet"

    now = datetime.datetime(2026, 11, 23)
    src = write_columns(when=pa.array([now] * 5))
    for on_error in ("raise", "skip"):
        message = (
            r"sample 0 .*'when' is datetime\.datetime\(2026.* cannot be stored as json .*exclude_fields=\['when'\]"
        )
        with pytest.raises(ReadError, match=message):
            pack(src, tmp_path / "set", on_error=on_error)
    assert pack(src, tmp_path / "set", exclude_fields=["when"]).samples == 5
    src = write_columns(n=pa.array([1, 2, 2**63, 4, 5], pa.uint64()))
    with pytest.raises(
        ReadError, match=r"1 sample.*\n.*sample 2 .* row group 1 row 0\): field 'n' is 9223372036854775808"
    ):
        pack(src, tmp_path / "big")
    done = pack(src, tmp_path / "big", on_error="skip")
    assert [number for number, _, _ in done.skipped] == [2]
    src = write_columns(row=pa.array([[1], None, [2], [3], [4]]))
    with pytest.raises(ReadError, match=r"field 'row' is None, which cannot be stored as numpy"):
        pack(src, tmp_path / "none")
    src = write_columns(pairs=pa.array([[("a", 1)]] * 5, pa.map_(pa.string(), pa.int64())))
    with pytest.raises(ReadError, match=r"'pairs' is \[\('a', 1\)\], which .* \(it would come back as \[\[.a.,1\]\]\)"):
        pack(src, tmp_path / "none")
    src = write_columns(odd=pa.array([{"x": float("nan")}] * 5))
    with pytest.raises(ReadError, match=r"'odd' is \{'x': nan\}, .* \(Out of range float"):
        pack(src, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def leaves(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": jpeg(n),
            "label": np.int64(n) if n % 2 else np.int64(-n),
            "meta": {"path": Text(text=f"{n}.jpg"), "score": n / 3, "good": n % 2 == 0},
            "box": rng.integers(0, 9, 4).astype(np.int16),
            "grid": rng.random((2, 1 + n % 3), np.float32),
            "codes": torch.arange(3 + n % 2),
            "plane": torch.full((2, 2), n / 2),
            "note": None,
        }
        for n in range(count)
    ]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # litdata's own reading of tensors
@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "compression_level": "batch"}])
def test_litdata_leaves_stay_as_they_are(tmp_path, zstd_codec, options):  # noqa: F811
    old = write(tmp_path / "old", leaves(23), **options)
    packed = check_leaves(old, tmp_path / "new")
    assert packed.fields["label"] == "pickle" and packed[3]["label"] == 3
    theirs = StreamingDataset(str(tmp_path / "new"))[4]
    assert theirs["meta"] == {"path": "4.jpg", "score": 4 / 3, "good": True}
    assert theirs["box"].dtype == np.int16 and theirs["note"] is None and theirs["label"] == -4


def check_leaves(old: Any, new: Any, **options: Any) -> SlipstreamDataset:
    given = old if isinstance(old, SlipstreamDataset) else SlipstreamDataset(old)
    pack(old, new, chunk_bytes=3_000, progress=False, **options)
    packed = SlipstreamDataset(new)
    assert packed.source.formats == given.source.formats and packed.source.spec == given.source.spec
    for field in given.fields:
        mine, other = (s.source.read(range(len(given)), field) for s in (packed, given))
        assert list(map(bytes, mine)) == list(map(bytes, other))
    return packed


def test_litdata_rows_of_arrow_tables_tuples_and_leaves_left_out(tmp_path):
    # With pyarrow installed litdata stores such samples as Arrow tables.
    write(tmp_path / "rows", photos(23))
    assert check_leaves(tmp_path / "rows", tmp_path / "a")[3]["path"] == "class/3.jpg"
    write(tmp_path / "tuples", [(jpeg(n), n, [n / 2]) for n in range(9)])
    check_leaves(tmp_path / "tuples", tmp_path / "b")
    assert tuple(StreamingDataset(str(tmp_path / "b"))[4])[1:] == (4, [2.0])
    write(tmp_path / "bare", [jpeg(n) for n in range(9)])
    assert check_leaves(tmp_path / "bare", tmp_path / "c").fields == {"data": "image"}
    write(tmp_path / "old", leaves(9))
    pack(tmp_path / "old", tmp_path / "d", exclude_fields=["meta.score", "note", "label"], progress=False)
    packed = SlipstreamDataset(tmp_path / "d")
    assert list(packed.fields) == ["image", "meta.path", "meta.good", "box", "grid", "codes", "plane"]
    assert StreamingDataset(str(tmp_path / "d"))[4]["meta.path"] == "4.jpg" == packed[4]["meta.path"]


def test_a_none_that_litdata_cannot_store_is_an_error_that_names_the_field(tmp_path):
    samples = [{**sample, "label": n if n != 5 else None} for n, sample in enumerate(photos(9))]
    write(tmp_path / "old", samples)
    with pytest.raises(ReadError, match=r"sample 5 .*'label' is None, .* as int; exclude_fields=\['label'\] leaves it"):
        pack(tmp_path / "old", tmp_path / "a", progress=False)
    pack(tmp_path / "old", tmp_path / "b", exclude_fields=["label"], progress=False)
    assert StreamingDataset(str(tmp_path / "b"))[5]["path"] == "class/5.jpg"


def test_a_pickle_is_carried_over_and_not_run(tmp_path):
    class Loud:
        def __reduce__(self):
            return print, ("run",)

    writer = BinaryWriter(str(tmp_path / "old"), chunk_size=2)
    for n in range(5):
        writer[n] = {"image": jpeg(n), "what": Loud()}
    writer.done()
    writer.merge()
    check_leaves(tmp_path / "old", tmp_path / "new")


def test_a_dataset_with_indices_keeps_their_order_and_repeats(tmp_path):
    write_images(tmp_path / "photos", 30)
    ids = [29, 3, 3, 11, *range(20)]
    packed = check(SlipstreamDataset(tmp_path / "photos", indices=ids), tmp_path)
    assert len(packed) == 24
    bad = tmp_path / "photos" / "class0" / "009.jpg"  # sample 3
    bad.unlink()
    bad.symlink_to("nowhere")
    done = pack(SlipstreamDataset(tmp_path / "photos", indices=ids), tmp_path / "less", on_error="skip")
    assert [number for number, _, _ in done.skipped] == [3, 3, 3]
    assert done.samples == 21


class Own:
    """A source of one's own, whose arrays and text are not all fit to be stored."""

    def __init__(self, **values: Any) -> None:
        self.fields = OrderedDict(image="image", label="int", mask="array", vector="tensor", name="str")
        self._values: dict[str, Any] = values

    def __len__(self) -> int:
        return 9

    def read(self, ids, field="image"):
        return [np.frombuffer(jpeg(n), np.uint8) for n in ids]

    def values(self, ids, field):
        usual = {
            "image": jpeg,
            "label": lambda n: np.int32(n),
            "mask": lambda n: np.full((n, 2), n % 2 == 0),
            "vector": lambda n: torch.full((n,), 0.5, dtype=torch.bfloat16).float(),
            "name": lambda n: f"{n}",
        }
        return [self._values.get(field, usual[field])(int(n)) for n in ids]

    def describe(self, sample_id: int) -> str:
        return f"own {sample_id}"

    def close(self) -> None:
        raise AssertionError("a source that was given is not ours to close")


def test_a_source_of_ones_own(tmp_path):
    pack(Own(), tmp_path / "set", chunk_bytes=2_000, progress=False)
    packed = SlipstreamDataset(tmp_path / "set")
    assert dict(packed.fields) == dict(Own().fields)
    for n, sample in enumerate(packed):
        assert sample["image"] == jpeg(n) and sample["label"] == n and sample["name"] == str(n)
        assert same(sample["mask"], np.full((n, 2), n % 2 == 0))
        assert same(sample["vector"], torch.full((n,), 0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask": lambda n: np.array([object()])}, r"field 'mask' is array.*\(it is of type object\)"),
        ({"mask": lambda n: np.zeros(3, ">f4")}, r"field 'mask' .* cannot be stored as numpy"),
        ({"mask": lambda n: [1, 2]}, r"field 'mask' is \[1, 2\].*\(it is of type list\)"),
        ({"vector": lambda n: "no"}, "field 'vector' is 'no', which cannot be stored as tensor"),
        ({"name": lambda n: b"bytes"}, r"field 'name' is b'bytes', .*\(it is of type bytes\)"),
        ({"name": lambda n: "\udcff"}, r"field 'name' is '\\udcff', which cannot be stored as str \('utf-8' codec"),
        ({"label": lambda n: 1.5}, r"field 'label' is 1.5, which cannot be stored as int"),
        ({"label": lambda n: None}, "field 'label' is None"),
    ],
)
def test_values_that_cannot_be_stored_are_named(tmp_path, values, message):
    with pytest.raises(ReadError, match=r"sample 0 \(own 0\): " + message):
        pack(Own(**values), tmp_path / "set")


def test_fields_of_kinds_that_cannot_be_stored_are_named(tmp_path):
    source = Own()
    source.fields = OrderedDict(image="image", what="pickle")
    with pytest.raises(ValueError, match=r"field 'what' is of kind 'pickle', .* exclude_fields=\['what'\]"):
        pack(source, tmp_path / "set")
    assert pack(source, tmp_path / "set", exclude_fields=["what"]).samples == 9


def test_s3(tmp_path, monkeypatch):
    write(tmp_path / "litdata", plain(photos(23)))
    tar_samples.write_set(tmp_path / "tars")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        options = {
            "endpoint_url": "http://{}:{}".format(*server.get_host_and_port()),
            "region_name": "us-east-1",
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
        }
        client = boto3.client("s3", **options)
        client.create_bucket(Bucket="sets")
        for kind in ("litdata", "tars"):
            for path in (tmp_path / kind).iterdir():
                client.upload_file(str(path), "sets", f"{kind}/{path.name}")
        client.close()
        check_leaves(SlipstreamDataset("s3://sets/litdata", storage_options=options), tmp_path / "new")
        for kind in ("litdata", "tars"):
            (tmp_path / kind).rename(tmp_path / f"local-{kind}")
        given = SlipstreamDataset("s3://sets/tars/train-{000..002}.tar", storage_options=options)
        check(given, tmp_path)
        for name, value in options.items():
            monkeypatch.setenv(
                {"endpoint_url": "AWS_ENDPOINT_URL", "region_name": "AWS_DEFAULT_REGION"}.get(name, name.upper()), value
            )
        assert pack("s3://sets/tars/*.tar", tmp_path / "by name", progress=False).samples == 12
    finally:
        server.stop()


def test_names_that_are_no_text_are_bad_samples(tmp_path):
    write_images(tmp_path / "photos", 6)
    (tmp_path / "photos" / "class1" / "\udcff.jpg").write_bytes(jpeg(9))
    with pytest.raises(ReadError, match=r"field 'path' is 'class1/\\udcff\.jpg', which cannot be stored as str"):
        pack(tmp_path / "photos", tmp_path / "set")
    done = pack(tmp_path / "photos", tmp_path / "set", on_error="skip")
    assert done.samples == 6 and done.skipped[0][1].endswith("\udcff.jpg")
    assert json.loads((tmp_path / "set" / "skipped.json").read_text())[0]["path"] == done.skipped[0][1]
    assert pack(tmp_path / "photos", tmp_path / "all", exclude_fields=["path"]).samples == 7


def test_long_tar_headers_keep_their_keys(tmp_path):
    members = [(f"{'d' * 120}/{n:03}.jpg", jpeg(n)) for n in range(5)]
    tar_samples.write(tmp_path / "a.tar", members, tarfile.GNU_FORMAT)
    assert check(tmp_path / "a.tar", tmp_path)[3]["key"] == f"{'d' * 120}/003"
