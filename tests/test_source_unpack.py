"""Chunks that are compressed, or that litdata wrote as Arrow tables: unpacked into the cache, or refused."""

import struct
import sys

import pytest
import zstandard
from litdata.streaming import compression, framed_zstd
from litdata.streaming import writer as litdata_writer
from litdata_samples import edit_index, photos, plain, write

from slipstream import RandomResizedCrop, SlipstreamDataset, SlipstreamLoader
from slipstream.source import ReadError
from slipstream.source_litdata import open_litdata


@pytest.fixture
def zstd_codec(monkeypatch):
    """Give litdata's writer a zstd that is installed; the layout stays litdata's own."""

    class Codec(compression.Compressor):
        def compress(self, data):
            return zstandard.ZstdCompressor().compress(bytes(data))

        def decompress(self, data):
            return zstandard.ZstdDecompressor().decompress(data)

        @classmethod
        def register(cls, compressors):
            compressors["zstd"] = cls()

    Codec.register(compression._COMPRESSORS)
    monkeypatch.setattr(litdata_writer, "make_zstd_codec", lambda *_: Codec())
    monkeypatch.setattr(framed_zstd, "make_zstd_codec", lambda *_: Codec())
    yield
    del compression._COMPRESSORS["zstd"]


@pytest.mark.parametrize("level", ["chunk", "batch", "sample"])
def test_zstd_chunks_are_unpacked_into_the_cache(tmp_path, zstd_codec, level):
    samples = photos(23)
    options = {"compression": "zstd", "compression_level": level, "compression_batch_size": 3, "chunk_size": 10}
    folder = write(tmp_path / "set", plain(samples), **options)
    source = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert [view.tobytes() for view in source.read(range(23))] == [sample["image"] for sample in samples]
    assert source.values(range(23), "label") == [sample["label"] for sample in samples]
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert all(path.suffix == ".unpacked" for path in files)
    stamps = [path.stat().st_mtime_ns for path in files]
    again = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    assert again.read([22])[0].tobytes() == samples[22]["image"]
    assert [path.stat().st_mtime_ns for path in files] == stamps


@pytest.mark.parametrize("level", ["chunk", "batch", "sample"])
@pytest.mark.parametrize("harm", ["cut", "garble"])
def test_a_damaged_compressed_chunk_is_an_error_and_leaves_no_file(tmp_path, zstd_codec, level, harm):
    folder = write(tmp_path / "set", plain(photos(8)), compression="zstd", compression_level=level, chunk_size=8)
    chunk = next(folder.glob("chunk*"))
    data = bytearray(chunk.read_bytes())
    if harm == "cut":
        data = data[: len(data) * 2 // 3] + (b"" if level == "chunk" else bytes(len(data) - len(data) * 2 // 3))
    else:
        end = 38 if level == "sample" else 200
        data[8:end] = bytes(end - 8)
    chunk.write_bytes(data)
    source = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    with pytest.raises(ReadError, match="sample 5 "):
        source.read([5])
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_compressed_chunk_larger_than_its_index_says_is_refused(tmp_path, zstd_codec):
    folder = write(tmp_path / "set", plain(photos(8)), compression="zstd", compression_level="chunk", chunk_size=8)
    next(folder.glob("chunk*")).write_bytes(zstandard.ZstdCompressor().compress(bytes(50_000_000)))
    source = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    with pytest.raises(ReadError, match="its index says"):
        source.read([0])


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_rows_that_litdata_stored_as_an_arrow_table_are_unpacked(tmp_path, zstd_codec, compression):
    pytest.importorskip("pyarrow")
    samples = [
        {**sample, "x": 0.5, "yes": True, "boxes": [1, 2], "size": {"w": i}, "a.b": "dot"}
        for i, sample in enumerate(photos(7))
    ]
    folder = write(tmp_path / "set", samples, compression=compression)
    assert (folder / "chunk-0-0.bin").read_bytes().endswith(b"LDARW01\0")
    source = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    assert [view.tobytes() for view in source.read(range(7))] == [sample["image"] for sample in samples]
    for field in source.fields:
        expected = [sample["size"]["w"] if field == "size.w" else sample[field] for sample in samples]
        assert source.values(range(7), field) == expected
    assert source.fields["image"] == "image"


def test_what_some_rows_of_an_arrow_table_lack_is_none(tmp_path):
    """litdata's own reader gives None; the chunk's other fields and samples are as they were."""
    pytest.importorskip("pyarrow")
    named = tmp_path / "list.txt"  # litdata pickles a text that names a file
    named.touch()
    optional = {"n": 3, "x": 0.5, "yes": True, "text": "a", "size": {"w": 1}, "tags": ["b"], "data": b"c"}
    samples = [
        {
            **sample,
            "file": str(named),
            "late": i - 1 or None,
            "later": None if i < 2 else "z",
            **(optional if i % 2 else {}),
        }
        for i, sample in enumerate(photos(6), 1)
    ]
    folder = write(tmp_path / "set", samples)
    assert (folder / "chunk-0-0.bin").read_bytes().endswith(b"LDARW01\0")
    source = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    assert [source.fields[name] for name in ("file", "late", "later", "n")] == ["pickle", "pickle", "pickle", "int"]
    assert [view.tobytes() for view in source.read(range(6))] == [sample["image"] for sample in samples]
    for field in ("label", "file", "late", "later", "n", "x", "yes", "text", "tags"):
        assert source.values(range(6), field) == [sample.get(field) for sample in samples], field
    assert source.values(range(6), "size.w") == [1, None] * 3
    assert source.values(range(6), "data") == [b"c", b""] * 3  # all that bytes can say


def test_a_row_without_its_image_is_a_bad_sample(tmp_path):
    pytest.importorskip("pyarrow")
    samples = photos(4)
    samples[2]["image"] = None
    data = SlipstreamDataset(write(tmp_path / "set", samples), cache_dir=tmp_path / "cache")
    pipelines = {"image": RandomResizedCrop(8)}
    with SlipstreamLoader(data, 4, pipelines=pipelines, on_error="skip", device="cpu", verbose=False) as loader:
        (batch,) = loader
    assert batch["_indices"].tolist() == [0, 1, 3] and batch["label"].tolist() == [0, 1, 0]


def test_an_arrow_table_without_pyarrow_is_a_clear_error(tmp_path, monkeypatch):
    chunk = struct.pack("<III", 1, 12, 12) + b"table" + b"LDARW01\0"
    folder = write(tmp_path / "set", plain(photos(1)))
    (folder / "chunk-0-0.bin").write_bytes(chunk)
    edit_index(folder, lambda index: index["chunks"][0].update(chunk_bytes=len(chunk)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    with pytest.raises(ReadError, match="install pyarrow to read it"):
        source.read([0])


def test_a_plain_chunk_in_a_set_said_to_be_compressed_is_read(tmp_path):
    samples = photos(3)
    folder = write(tmp_path / "set", plain(samples))
    edit_index(folder, lambda index: index["config"].update(compression="zstd", compression_level="batch"))
    source = open_litdata(folder, in_place=True, cache_dir=tmp_path / "cache")
    assert source.read([2])[0].tobytes() == samples[2]["image"]
