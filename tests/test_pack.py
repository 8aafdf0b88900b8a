import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from litdata import StreamingDataset
from pack_sets import files_in, jpeg, write_images

from slipstream import checks
from slipstream import pack as module
from slipstream.dataset import SlipstreamDataset
from slipstream.pack import pack
from slipstream.pack_chunks import ChunkCutter
from slipstream.source import ReadError


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos")


def test_packed_samples_equal_the_folders_for_us_and_for_litdata(photos, tmp_path, monkeypatch):
    # A path that exists as seen from the working directory is still a path, not the file's content.
    monkeypatch.chdir(photos)
    done = pack(".", tmp_path / "new" / "set", chunk_bytes="20KB", progress=False)
    folder = list(SlipstreamDataset(local_dir=photos))
    packed = SlipstreamDataset(local_dir=tmp_path / "new" / "set")
    chunks = list((tmp_path / "new" / "set").glob("chunk-*.bin"))
    assert dict(packed.fields) == {"image": "image", "label": "int", "path": "str"}
    assert list(packed) == folder
    theirs = [{**sample, "image": bytes(sample["image"])} for sample in StreamingDataset(str(tmp_path / "new" / "set"))]
    assert theirs == folder
    assert os.listdir(tmp_path / "new") == ["set"]
    assert set(os.listdir(tmp_path / "new" / "set")) == {"index.json", "pack.json", *(path.name for path in chunks)}
    assert (done.whole, done.samples, done.packed, done.blocks_left, done.skipped) == (True, 100, 100, 0, ())
    assert (done.chunks, done.n_bytes) == (len(chunks), sum(path.stat().st_size for path in chunks))
    assert done.packed_bytes == done.n_bytes
    assert (done.rank, done.world_size, done.folder) == (0, 1, str(tmp_path / "new" / "set"))


def test_a_flat_folder_is_packed_without_labels(photos, tmp_path):
    assert pack(photos / "class1", tmp_path / "set", progress=False).samples == 33
    assert SlipstreamDataset(tmp_path / "set")[0] == {"image": jpeg(1), "path": "001.jpg"}


@pytest.mark.parametrize("chunk_bytes", [900, 5_000, "20KB", "64MB"])
def test_chunks_are_near_the_size_asked_for_and_never_above(photos, tmp_path, chunk_bytes):
    done = pack(photos, tmp_path / "set", chunk_bytes=chunk_bytes, progress=False)
    limit = checks.byte_count("chunk_bytes", chunk_bytes, most="2GB")
    chunks = json.loads((tmp_path / "set" / "index.json").read_text())["chunks"]
    for chunk in chunks:
        assert chunk["chunk_bytes"] == (tmp_path / "set" / chunk["filename"]).stat().st_size
        assert chunk["chunk_bytes"] <= limit or chunk["chunk_size"] == 1
    assert sum(chunk["chunk_size"] for chunk in chunks) == 100
    assert len(chunks) <= 1.5 * done.n_bytes / limit + 1 or limit == 900


def test_the_number_of_threads_changes_nothing_and_none_stays(photos, tmp_path, capsys):
    threads = threading.active_count()
    pack(photos, tmp_path / "one", num_workers=1, chunk_bytes=5_000)
    assert "100/100" in capsys.readouterr().err
    for workers in (2, 4, 32):
        pack(photos, tmp_path / str(workers), num_workers=workers, chunk_bytes=5_000, progress=False)
        assert capsys.readouterr().err == ""
        assert threading.active_count() == threads
        assert files_in(tmp_path / "one") == files_in(tmp_path / str(workers))
    assert len(files_in(tmp_path / "one")) > 15


def test_a_finished_set_is_left_as_it_is(photos, tmp_path):
    pack(photos, tmp_path / "set", chunk_bytes=5_000, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    done = pack(photos, tmp_path / "set", chunk_bytes=5_000, progress=False)
    assert (done.whole, done.samples, done.packed) == (True, 100, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before


def test_a_folder_with_other_things_is_not_written_to(photos, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "index.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"dst '.*set' is not an empty folder"):
        pack(photos, tmp_path / "set")
    assert files_in(tmp_path / "set") == {"index.json": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is not a folder"):
        pack(photos, tmp_path / "file")
    (tmp_path / "set" / "pack.json").write_text("mine too")
    with pytest.raises(FileExistsError, match=r"pack\.json is none that pack wrote"):
        pack(photos, tmp_path / "set")
    (tmp_path / "set" / "pack.json").write_text("{}")
    with pytest.raises(FileExistsError, match="another version of Slipstream"):
        pack(photos, tmp_path / "set")


def test_another_source_or_other_arguments_are_refused_and_named(photos, tmp_path):
    pack(photos, tmp_path / "set", chunk_bytes=5_000, progress=False)
    before = files_in(tmp_path / "set")
    with pytest.raises(FileExistsError, match=r"other arguments \(chunk_bytes was 5000 and is 6000\); give the same"):
        pack(photos, tmp_path / "set", chunk_bytes=6_000)
    with pytest.raises(FileExistsError, match=r"fields was .*'label'.* and is .*'path'"):
        pack(photos, tmp_path / "set", chunk_bytes=5_000, exclude_fields=["label"])
    (photos / "class2" / "098.jpg").rename(photos / "class2" / "099.jpg")
    with pytest.raises(FileExistsError, match=r"another source .*\(source was '\w+' and is '\w+'\)"):
        pack(photos, tmp_path / "set", chunk_bytes=5_000)
    with pytest.raises(FileExistsError, match="samples was 100 and is 34; source was "):
        pack(photos / "class0", tmp_path / "set", chunk_bytes=5_000, exclude_fields=[])
    assert files_in(tmp_path / "set") == before


def test_other_limits_of_images_encoded_anew_are_refused(photos, tmp_path):
    pack(photos, tmp_path / "set", format="yuv420", progress=False)
    with pytest.raises(FileExistsError, match="max_pixels was 178956970 and is 90"):
        pack(SlipstreamDataset(photos, max_pixels=90), tmp_path / "set", format="yuv420")
    # Of images that stay as they are it says nothing.
    for src in (photos, SlipstreamDataset(photos, max_pixels=90)):
        assert pack(src, tmp_path / "same", progress=False).samples == 100


def test_images_encoded_anew(photos, tmp_path, monkeypatch):
    def encode(data):
        if bytes(data) == jpeg(50):
            raise OSError("not that one")
        return bytes(data)[::-1]

    monkeypatch.setattr(module, "image_encoder", lambda name, **options: encode)
    with pytest.raises(ReadError, match=r"sample 83 \(.*class2/050\.jpg\): 'image': not that one"):
        pack(photos, tmp_path / "set", progress=False)
    done = pack(photos, tmp_path / "set", on_error="skip", chunk_bytes=5_000, progress=False)
    images = [jpeg(number)[::-1] for label in range(3) for number in range(label, 100, 3) if number != 50]
    assert SlipstreamDataset(tmp_path / "set").source.values(range(99), "image") == images
    assert done.skipped == ((83, str(photos / "class2" / "050.jpg"), "'image': not that one"),)
    with pytest.raises(ValueError, match=r"field must be one of the image fields \['image'\], got 'label'"):
        pack(photos, tmp_path / "other", field="label")
    with pytest.raises(ValueError, match=r"field must name the images to encode anew, one of \[\]"):
        pack(photos, tmp_path / "other", exclude_fields=["image"])


def test_chunk_ends_follow_from_sizes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of thousands of files
    rng = np.random.default_rng(0)
    for trial in range(40):
        limit = int(rng.integers(30, 400))
        sizes = rng.integers(0, limit * rng.choice([1, 2, 5]) // 2, 40)
        items = [(bytes([number]) * 2, np.full(size, number, np.uint8)) for number, size in enumerate(sizes)]
        ends = []
        for step in (1, 7, 40):
            folder = tmp_path / f"{trial}-{step}"
            (folder / "aside").mkdir(parents=True)
            cutter = ChunkCutter(str(folder), str(folder / "aside"), "c-", limit)
            for first in range(0, 40, step):
                cutter.add(items[first : first + step])
            cutter.finish()
            ends.append(files_in(folder))
            read = [parts for chunk in cutter.chunks for parts in _items_of(folder / chunk["filename"], chunk)]
            assert read == [b"".join(map(bytes, item)) for item in items]
            for chunk in cutter.chunks:
                assert chunk["chunk_bytes"] <= limit or chunk["chunk_size"] == 1
        assert ends[0] == ends[1] == ends[2]
        # All but the last two would take the next sample beyond the limit.
        for chunk, following in zip(cutter.chunks[:-3], cutter.chunks[1:], strict=False):
            first = len(_items_of(folder / following["filename"], following)[0])
            assert chunk["chunk_bytes"] + first + 4 > limit


def _items_of(path: Path, chunk: dict) -> list[bytes]:
    data = path.read_bytes()
    count, *offsets = np.frombuffer(data, "<u4", chunk["chunk_size"] + 2).tolist()
    assert (count, offsets[-1]) == (chunk["chunk_size"], len(data) == chunk["chunk_bytes"] and len(data))
    return [data[a:b] for a, b in itertools.pairwise(offsets)]


def test_what_is_left_makes_halves_and_no_small_rest(tmp_path):
    cutter = ChunkCutter(str(tmp_path), str(tmp_path), "c-", 8 + 100 * 14)
    cutter.add([(bytes(10),)] * 110)
    cutter.finish()
    assert [chunk["chunk_size"] for chunk in cutter.chunks] == [55, 55]


def test_a_bad_sample_ends_it_by_name_and_a_rerun_goes_on(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_RUN", 1)  # so that the look at some samples does not meet it
    bad = photos / "class2" / "050.jpg"
    content = bad.read_bytes()
    pack(photos, tmp_path / "expected", chunk_bytes=5_000, progress=False)
    bad.unlink()
    bad.symlink_to("nowhere")
    with pytest.raises(ReadError, match=rf"1 sample\(s\) could not be read\n  sample 83 \({bad}\): No such file"):
        pack(photos, tmp_path / "set", chunk_bytes=5_000, num_workers=1, progress=False)
    kept = {name: data for name, data in files_in(tmp_path / "set").items() if name.endswith(".bin")}
    assert len(kept) > 5
    assert "index.json" not in os.listdir(tmp_path / "set")
    with pytest.raises(
        FileNotFoundError, match="is not packed to the end: run the same pack again, or its other ranks"
    ):
        SlipstreamDataset(tmp_path / "set")
    bad.unlink()
    bad.write_bytes(content)
    done = pack(photos, tmp_path / "set", chunk_bytes=5_000, progress=False)
    assert 0 < done.packed < 50
    assert files_in(tmp_path / "set") == files_in(tmp_path / "expected")


def test_bad_samples_are_left_out_and_listed(photos, tmp_path, monkeypatch):
    bad = [photos / "class0" / "000.jpg", photos / "class1" / "052.jpg", photos / "class2" / "098.jpg"]
    for path in bad:
        path.unlink()
        path.symlink_to("nowhere")
    expected = [(0, str(bad[0]), "No such file or directory")]
    expected += [(34 + 17, str(bad[1]), "No such file or directory"), (99, str(bad[2]), "No such file or directory")]
    with pytest.raises(ReadError, match="3 sample"):
        pack(photos, tmp_path / "set", chunk_bytes=5_000)
    assert not (tmp_path / "set").exists()  # those looked at first have a bad one
    for workers in (1, 4):
        done = pack(photos, tmp_path / f"set{workers}", chunk_bytes=5_000, on_error="skip", num_workers=workers)
        assert (done.samples, done.packed, done.skipped) == (97, 97, tuple(expected))
    assert files_in(tmp_path / "set1") == files_in(tmp_path / "set4")
    listed = json.loads((tmp_path / "set1" / "skipped.json").read_text())
    assert [(each["sample_id"], each["path"], each["reason"]) for each in listed] == expected
    good = [n for label in range(3) for n in range(label, 100, 3) if n not in (0, 52, 98)]
    assert [sample["image"] for sample in SlipstreamDataset(tmp_path / "set1")] == [jpeg(number) for number in good]
    assert pack(photos, tmp_path / "set1", chunk_bytes=5_000, on_error="raise").skipped == tuple(expected)


def test_blocks_with_samples_left_out_are_not_enough_for_raise(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_RUN", 1)
    bad = photos / "class2" / "050.jpg"
    bad.unlink()
    bad.symlink_to("nowhere")
    done = pack(photos, tmp_path / "set", chunk_bytes=5_000, on_error="skip", rank=1, world_size=2, progress=False)
    assert not done.whole and done.skipped[0][0] == 83
    with pytest.raises(ReadError, match="sample 83"):
        pack(photos, tmp_path / "set", chunk_bytes=5_000, progress=False)
    done = pack(photos, tmp_path / "set", chunk_bytes=5_000, on_error="skip", progress=False)
    assert done.whole and done.samples == 99 and done.packed < 60


def test_a_set_of_bad_samples_only_is_an_error(photos, tmp_path):
    for path in photos.glob("*/*.jpg"):
        path.unlink()
        path.symlink_to("nowhere")
    with pytest.raises(ReadError, match=r"000\.jpg"):
        pack(photos, tmp_path / "set", on_error="skip")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_workers": 0}, ValueError, "num_workers must be 1 or more, got 0"),
        ({"num_workers": 1.5}, TypeError, "num_workers must be an int, got 1.5"),
        ({"format": "webp"}, ValueError, "format must be one of 'same', 'yuv420', got 'webp'"),
        ({"field": "image"}, ValueError, "format='same' keeps them all"),
        ({"short_side": 256}, ValueError, "short_side=256 needs format='yuv420'"),
        ({"apply_exif": True}, ValueError, "apply_exif=True needs format='yuv420'"),
        ({"format": "yuv420", "short_side": 0}, ValueError, "short_side must be 1 or more, got 0"),
        ({"format": "yuv420", "short_side": 25.5}, TypeError, "short_side must be an int, got 25.5"),
        ({"on_error": "replace"}, ValueError, "on_error must be one of 'raise', 'skip', got 'replace'"),
        ({"exclude_fields": ["depth"]}, ValueError, "exclude_fields has 'depth'; the source has 'image', "),
        ({"exclude_fields": "label"}, TypeError, "exclude_fields must be a list of field names, got 'label'"),
        ({"exclude_fields": ["image", "label", "path"]}, ValueError, "must leave a field"),
        ({"chunk_bytes": "64 potatoes"}, ValueError, "chunk_bytes must be a number of bytes or a text such as '64MB'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be > 0 and at most 2GB, got 0"),
        ({"chunk_bytes": "5GB"}, ValueError, "at most 2GB, got '5GB'"),
        ({"src": "none"}, FileNotFoundError, "none"),
        ({"dst": "s3://bucket/set"}, ValueError, "pack into one, then `aws s3 sync FOLDER s3://bucket/set`"),
        ({"rank": 3, "world_size": 3}, ValueError, "rank must be below world_size 3, got 3"),
        ({"rank": 0}, ValueError, "rank and world_size must be given together"),
    ],
)
def test_bad_arguments(photos, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        pack(**{"src": photos, "dst": tmp_path / "set", **arguments})
    assert not Path(tmp_path / "set").exists()


def test_a_folder_is_not_packed_into_itself(photos):
    for dst in (photos / "set", photos / "class0" / "set"):
        with pytest.raises(ValueError, match="must not lie in src"):
            pack(photos, dst)
    assert len(list(photos.iterdir())) == 3
