"""What inspect says is what was written, what it cannot decode is what the list of hostile files says."""

import csv
import json
from pathlib import Path

import boto3
import numpy as np
import pytest
from decode_samples import encode, picture
from moto.server import ThreadedMotoServer
from PIL import Image

from slipstream import inspection
from slipstream.decode import Decoder
from slipstream.demo import make_photographs
from slipstream.inspection import inspect_source
from slipstream.pack import pack
from slipstream.source_folder import FolderSource
from slipstream.source_litdata import open_litdata


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def without_tables(data: np.ndarray) -> np.ndarray:
    """A JPEG with a good header, and which no decoder can read."""
    whole = bytes(data)
    first, frame = whole.index(b"\xff\xdb"), whole.index(b"\xff\xc0")
    return np.frombuffer(whole[:first] + whole[frame:], np.uint8)


IMAGES = {
    "00.jpg": encode(picture(0, (40, 30)), subsampling="4:2:0"),
    "01.jpg": encode(picture(1, (50, 30)), subsampling="4:2:0", progressive=True),
    "02.jpg": encode(picture(2, (60, 40)), subsampling="4:4:4", exif=exif(6)),
    "03.jpg": encode(picture(3, (70, 40)).convert("L")),
    "04.jpg": encode(Image.new("RGB", (80, 2000)), "PNG"),
    "05.jpg": encode(picture(5), "GIF"),
    "06.jpg": encode(picture(6, (90, 60)), subsampling="4:2:2", exif=exif(8)),
    "07.jpg": without_tables(encode(picture(7, (90, 60)))),
    "08.jpg": np.frombuffer(b"not an image", np.uint8),
}
BAD = [7, 8]


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, data in IMAGES.items():
        (folder / name).write_bytes(data.tobytes())
    return folder


def test_counts_what_was_written(folder):
    found = inspect_source(FolderSource(folder))
    sizes = [len(data) for data in IMAGES.values()]
    assert (found.samples, found.looked_at, found.undecodable, found.unreadable) == (9, 9, None, ())
    assert found.bytes is not None
    assert (found.bytes.total, found.bytes.mean) == (sum(sizes), np.mean(sizes))
    assert found.bytes.quantiles[::3] == (min(sizes), sorted(sizes)[4], max(sizes))
    assert found.height is not None
    assert found.width is not None
    assert found.megapixels is not None
    assert found.height.quantiles[::3] == (30, 40, 2000)
    assert found.width.quantiles[::3] == (40, 70, 90)
    assert found.megapixels.quantiles[-1] == 0.16
    assert found.formats == {"jpeg": 6, "unknown": 2, "png": 1}
    assert found.chroma == {"4:2:0": 3, "4:2:2": 1, "4:4:4": 1, "grey": 1}
    assert found.coding == {"baseline": 5, "progressive": 1}
    assert found.channels == {3: 6, 1: 1}
    assert found.orientations == {6: 1, 8: 1}
    assert [(i, Path(path).name) for i, path, _ in found.bad_headers] == [(5, "05.jpg"), (8, "08.jpg")]


def test_the_text_has_every_number_within_reach(folder):
    text = inspect_source(FolderSource(folder), decode=True).text()
    for line in ("9 samples, all looked at", "jpeg 6 (66.7%); unknown 2 (22.2%)", "2 samples could not be decoded:"):
        assert line in text
    for name in ("4:2:0 3 (50.0%)", "progressive 1 (16.7%)", "6 1 (50.0%); 8 1 (50.0%)", f"({folder}/07.jpg): "):
        assert name in text
    assert "--decode" not in text
    assert "2 samples have no header that can be read" in inspect_source(FolderSource(folder)).text()


def test_decodes_in_batches_and_each_of_a_failed_batch_alone_once(folder, monkeypatch):
    # with a good header and of the right length, so that DALI gets it
    whole = bytes(encode(picture(7, (90, 60)), "WEBP"))
    first = whole.index(b"VP8 ") + 18
    (folder / "07.jpg").write_bytes(whole[:first] + b"\xff" * (len(whole) - first))
    calls = []
    decode, alone = Decoder.decode, Decoder._decode_each_alone
    monkeypatch.setattr(Decoder, "decode", lambda self, *args: calls.append(list(args[1])) or decode(self, *args))

    def counted(self, encoded, decoders, *rest):
        calls.append(("alone", sorted(decoders)))
        return alone(self, encoded, decoders, *rest)

    monkeypatch.setattr(Decoder, "_decode_each_alone", counted)
    monkeypatch.setattr(inspection, "_BATCH_IMAGES", 4)
    source = FolderSource(folder)
    found = inspect_source(source, decode=True)
    assert found.undecodable is not None
    assert [(i, path) for i, path, _ in found.undecodable] == [(i, source.describe(i)) for i in BAD]
    assert all(reason for _, _, reason in found.undecodable)
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], ("alone", [0, 1, 2, 3]), [8], ("alone", [0])]
    calls.clear()
    monkeypatch.setattr(inspection, "_BATCH_PIXELS", 5000)
    inspect_source(source, decode=True)
    assert [ids for ids in calls if "alone" not in ids] == [[0, 1], *([i] for i in range(2, 9))]


def test_too_many_pixels_are_named_and_not_decoded(folder):
    found = inspect_source(FolderSource(folder), decode=True, max_pixels=100_000)
    assert found.undecodable is not None
    assert [i for i, _, _ in found.undecodable] == [4, *BAD]
    assert "160000 pixels, max_pixels is 100000" in found.undecodable[0][2]


def test_a_limit_looks_at_a_random_subset_by_seed(folder, monkeypatch):
    looked = []
    read = FolderSource.read
    monkeypatch.setattr(
        FolderSource, "read", lambda self, ids, field="image": looked.append(list(ids)) or read(self, ids, field)
    )
    source = FolderSource(folder)
    for seed in (0, 0, 1, 2, 3):
        found = inspect_source(source, limit=4, seed=seed)
        assert (found.samples, found.looked_at) == (9, 4)
        assert f"9 samples, 4 of them looked at (a random subset, seed {seed})" in found.text()
    assert looked[0] == looked[1] == sorted(set(looked[0]))
    assert len({tuple(ids) for ids in looked}) > 2
    assert {len(ids) for ids in looked} == {4}
    assert inspect_source(source, limit=100).looked_at == 9


def test_samples_that_cannot_be_read_are_named_and_the_others_counted(folder):
    source = FolderSource(folder)
    (folder / "03.jpg").unlink()
    (folder / "06.jpg").unlink()
    found = inspect_source(source, decode=True)
    assert [(i, path) for i, path, _ in found.unreadable] == [(i, source.describe(i)) for i in (3, 6)]
    assert sum(found.formats.values()) == 7
    assert found.undecodable is not None
    assert [i for i, _, _ in found.undecodable] == BAD
    assert "2 samples could not be read:\n  sample 3 (" in found.text()


def test_nothing_to_count_is_no_error(folder):
    source = FolderSource(folder)
    for name in IMAGES:
        (folder / name).unlink()
    found = inspect_source(source, decode=True)
    assert len(found.unreadable) == 9
    assert (found.bytes, found.height, found.formats, found.undecodable) == (None, None, {}, ())
    assert "9 samples could not be read" in found.text()


def test_chunks_here_and_in_s3_say_what_the_folder_says(folder, tmp_path):
    expected = inspect_source(FolderSource(folder), decode=True).as_dict()
    pack(folder, tmp_path / "set", chunk_bytes="8KB", progress=False)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        options = {"endpoint_url": "http://{}:{}".format(*server.get_host_and_port()), "region_name": "us-east-1"}
        options |= {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        client = boto3.client("s3", **options)
        client.create_bucket(Bucket="photos")
        for path in (tmp_path / "set").iterdir():
            client.upload_file(str(path), "photos", f"val/{path.name}")
        client.close()
        sources = [
            open_litdata(tmp_path / "set", in_place=True),
            open_litdata("s3://photos/val", cache_dir=tmp_path / "cache", storage_options=options),
        ]
        for source in sources:
            found = inspect_source(source, decode=True).as_dict()
            places = [f"path {Path(path).name!r}" for _, path, _ in expected["undecodable"]]
            assert [path.split(", ")[1] for _, path, _ in found["undecodable"]] == places
            for key in ("bad_headers", "undecodable"):
                assert [(i, why) for i, _, why in found.pop(key)] == [(i, why) for i, _, why in expected[key]]
            assert found == {key: value for key, value in expected.items() if key in found}
            source.close()
    finally:
        server.stop()


def test_many_failures_and_many_values_are_cut_in_the_text_only(folder, monkeypatch):
    monkeypatch.setattr(inspection, "_SHOWN_FAILURES", 1)
    monkeypatch.setattr(inspection, "_SHOWN_VALUES", 2)
    found = inspect_source(FolderSource(folder), decode=True)
    assert "... and 1 more: --json names them all" in found.text()
    assert "4:2:0 3 (50.0%); 4:2:2 1 (16.7%); 2 others" in found.text()
    assert len(json.loads(json.dumps(found.as_dict()))["undecodable"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be 1 or more, got 0"),
        ({"field": "label"}, r"field must be one of the source's image fields \['image'\], got 'label'"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        inspect_source(FolderSource(folder), **options)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (999_999, "999,999"), (1_000_000, "1M"), (12_345_678, "12.3M"), (3.2e9, "3.2G"), (5e12, "5T")],
)
def test_large_numbers_stay_short(value, expected):
    assert inspection._short(value, 0) == expected
    assert inspection._short(4294.836, 2) == "4,295"


def test_the_hostile_files_decode_or_not_as_their_list_says():
    folder = Path(__file__).resolve().parents[2] / "shared" / "hostile"
    if not folder.is_dir():
        pytest.skip("../shared/hostile is not here")
    with open(folder / "MANIFEST.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    source = FolderSource(folder)
    found = inspect_source(source, decode=True)
    names = [str(Path(source.describe(i)).relative_to(folder)) for i in range(len(source))]
    assert found.looked_at == len(names) > 400
    assert found.undecodable is not None
    refused = {names[i] for i, _, _ in found.undecodable}
    for name in names:
        row = rows[name]
        if row["expect"] in ("ok", "ok_not_jpeg", "bomb"):
            assert (name in refused) == (row["expect"] == "bomb"), name
        elif row["expect"] == "reject" and row["sof"] != "SOF3-lossless":  # DALI takes some that Pillow does not know
            assert name in refused
    partial = {name for name in names if rows[name]["expect"] == "partial"}
    # Pillow is stricter than DALI where only a few blocks of the scan are wrong.
    assert len(partial & refused) >= 0.9 * len(partial)


def test_packaged_photographs_decode(tmp_path):
    found = inspect_source(open_litdata(make_photographs(tmp_path / "set"), in_place=True), decode=True)
    assert (found.samples, found.formats, found.undecodable, found.bad_headers) == (8, {"jpeg": 8}, (), ())
    assert sum(found.chroma.values()) == sum(found.coding.values()) == 8
