import io
import logging
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from source_readers import check_other_readers
from tar_samples import jpeg, sample, write, write_set

from slipstream import source_tar_index
from slipstream.dataset import SlipstreamDataset
from slipstream.loader import SlipstreamLoader
from slipstream.source import ReadError, Source
from slipstream.source_folder import FolderSource
from slipstream.source_shards import expand_braces
from slipstream.source_tar import open_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    return write_set(tmp_path / "shards")


def test_members_of_one_key_are_a_sample_with_fields_by_extension(shards):
    dataset = SlipstreamDataset(shards)
    assert isinstance(dataset.source, Source)
    assert dict(dataset.fields) == {
        "image": "image",
        "label": "int",
        "json": "json",
        "txt": "str",
        "emb.npy": "bytes",
        "key": "str",
    }
    assert list(dataset) == [
        {"image": jpeg(n), "label": n % 3, "json": {"n": n}, "txt": f"ü{n}", "emb.npy": bytes([n]), "key": key}
        for n, key in ((n, f"train/{n:05d}") for n in range(12))
    ]
    assert repr(dataset.source).startswith(f"TarSource('{shards}', 12 samples, fields=['image', ")


def test_read_gives_read_only_views_over_the_shards_in_the_order_asked_for(shards):
    source = open_tar(shards)
    ids = np.random.default_rng(0).integers(0, 12, 100)
    views = source.read(ids)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(shards) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert len(ranges) == 3
    for sample_id, view in zip(ids, views, strict=True):
        assert view.tobytes() == jpeg(sample_id)
        assert not view.flags.writeable
        assert any(a <= view.ctypes.data and view.ctypes.data + len(view) <= b for a, b in ranges)
    source.close()
    assert views[0].tobytes() == jpeg(ids[0])
    assert source.read([11, 0])[1].tobytes() == jpeg(0)
    assert source.read([]) == []
    assert source.read([2], "label")[0].tobytes() == b"2"
    for bad, error in (([12], IndexError), ([0.5], TypeError)):
        with pytest.raises(error):
            source.read(bad)
    with pytest.raises(KeyError, match="'mask' does not exist; the source has 'image'"):
        source.read([0], "mask")
    with pytest.raises(ValueError, match="'key' has no bytes"):
        source.read([0], "key")


@pytest.mark.parametrize("place", ["{}", "{}/*.tar", "{}/train-{{000..002}}.tar", "{}/train-{{000,00{{1,2}}}}.tar"])
def test_a_folder_a_glob_and_brace_lists_name_the_same_shards(shards, place):
    (shards / ".hidden.tar").write_bytes(b"")
    (shards / "README.md").write_text("")
    dataset = SlipstreamDataset(local_dir=place.format(shards))
    assert [s["image"] for s in dataset] == [jpeg(n) for n in range(12)]


def test_brace_lists_keep_their_order(shards):
    source = open_tar(f"{shards}/train-{{002,000}}.tar")
    assert source.values([0, 7], "key") == ["train/00005", "train/00000"]
    assert SlipstreamDataset(shards / "train-001.tar")[0]["label"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"]),
        ("{a,b}c{1..3}", ["ac1", "ac2", "ac3", "bc1", "bc2", "bc3"]),
        ("{008..010}", ["008", "009", "010"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..1}", ["2", "1"]),
        ("{a,b{1,2}}", ["a", "b1", "b2"]),
        ("{,x}y", ["y", "xy"]),
        ("{x}{a,b}", ["{x}a", "{x}b"]),
        ("{a,b", ["{a,b"]),
        ("{a,{b}c", ["{a,{b}c"]),
    ],
)
def test_braces_as_in_a_shell(text, expected):
    assert expand_braces(text) == expected


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, tar_format):
    keys = ["d" * 90 + "/" + "n" * 90, "./short", "ü/ö", "p" * 96]
    if tar_format != tarfile.USTAR_FORMAT:
        keys += ["x" * 300 + "/" + "y" * 200]
    write(tmp_path / "a.tar", [(f"{key}.jpg", jpeg(n)) for n, key in enumerate(keys)], tar_format)
    source = open_tar(tmp_path / "a.tar")
    assert source.values(range(len(keys)), "key") == keys
    assert source.values(range(len(keys)), "image") == [jpeg(n) for n in range(len(keys))]


def test_what_is_no_member_of_a_sample_is_left_out_as_webdataset_does(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x.y")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("README", "._00.jpg", "00.jpg", "00.JSON", ".hidden"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    source = open_tar(tmp_path / "a.tar")
    assert dict(source.fields) == {"image": "image", "json": "json", "key": "str"}
    assert source.values([0], "key") == ["00"]
    assert source.read([0])[0].shape == (0,)


def test_images_of_several_extensions_are_one_field_unless_a_sample_has_two(tmp_path):
    png = b"\x89PNG-like"
    write(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("1.png", png), ("2.jpeg", jpeg(2)), ("2.seg.png", png)])
    source = open_tar(tmp_path / "a.tar")
    assert dict(source.fields) == {"image": "image", "seg.png": "image", "key": "str"}
    assert source.values(range(3), "image") == [jpeg(0), png, jpeg(2)]
    write(tmp_path / "b.tar", [("0.jpg", jpeg(0)), ("0.png", png)])
    source = open_tar(tmp_path / "b.tar")
    assert dict(source.fields) == {"jpg": "image", "png": "image", "key": "str"}
    assert source.values([0], "png") == [png]


def test_a_missing_field_names_sample_and_shard(tmp_path):
    shard = write(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("0.cls", b"1"), ("1.jpg", jpeg(1)), ("2.cls", b"x")])
    source = open_tar(shard)
    assert source.values([0, 1], "image") == [jpeg(0), jpeg(1)]
    with pytest.raises(ReadError, match=rf"sample 1 \({shard} key '1'\): it has no 'label' member") as caught:
        source.read([0, 1, 2], "label")
    assert [failure[0] for failure in caught.value.failures] == [1]
    with pytest.raises(ReadError, match=r"sample 2 \(.* key '2'\): field 'label': invalid literal .*x"):
        source.values([0, 2], "label")
    assert source.describe(2) == f"{shard} key '2'"
    assert source.describe(3) == f"no sample 3 in {shard}"


def test_broken_text_and_json_name_their_sample(tmp_path):
    write(tmp_path / "a.tar", [("0.txt", b"\xff"), ("0.json", b"[" * 100_000)])
    source = open_tar(tmp_path / "a.tar")
    for field in ("txt", "json"):
        with pytest.raises(ReadError, match=rf"key '0'\): field '{field}'"):
            source.values([0], field)


def special(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("1.jpg")
    info.type, info.linkname = kind, "0.jpg"
    return info


def negative_size(data: bytes) -> bytes:
    header = bytearray(data[1536:2048])
    header[124:136] = (2**96 - 2048).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:1536] + bytes(header) + data[2048:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:700], "is cut off: '0.jpg' at offset 0 has 600 bytes, the shard ends at 700"),
        (lambda data: data[:2100], "is cut off: '1.jpg' at offset 1536 has 600 bytes, the shard ends at 2100"),
        (lambda data: data[:1700], "is cut off at offset 1536"),
        (lambda data: data[:1536], "is cut off at offset 1536: the zeros that end a tar are missing"),
        (lambda data: data[:3072], "is cut off at offset 3072"),
        (lambda data: data[:3000], "is damaged or cut off at offset 3072"),
        (negative_size, "is damaged at offset 1536: '1.jpg' has -2048 bytes"),
        (lambda data: data[:1540] + b"?" + data[1541:], "is damaged at offset 1536: there is no valid header"),
        (lambda data: data + data, "goes on after its end at offset 3072"),
        (lambda data: b"", "is no tar: empty file"),
        (lambda data: b"x" * 3000, "is no tar"),
        (lambda data: b"\x1f\x8b" + data, "is a compressed tar under the name of a plain one"),
    ],
)
def test_a_tar_that_is_cut_off_or_damaged_names_shard_and_offset(tmp_path, change, message):
    whole = write(tmp_path / "a.tar", [("0.jpg", b"a" * 600), ("1.jpg", b"b" * 600)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(change(whole))
    with pytest.raises(ValueError, match=message) as caught:
        open_tar(tmp_path / "a.tar")
    assert str(tmp_path / "a.tar") in str(caught.value)


def test_links_and_sparse_members_are_refused(tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.addfile(special(kind))
        with pytest.raises(ValueError, match=r"a\.tar: '1\.jpg' at offset 0 is a link or a device"):
            open_tar(tmp_path / "a.tar")
    info = tarfile.TarInfo("1.jpg")
    info.pax_headers = {"GNU.sparse.size": "1000", "GNU.sparse.name": "1.jpg", "GNU.sparse.numblocks": "0"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"a\.tar: '1\.jpg' at offset 0 is sparse"):
        open_tar(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.jpg", "1.jpg", "0.cls"], "key '0' at offset .* was met before"),
        (["0.jpg", "0.cls", "0.jpg"], "key '0' has two members 'jpg'"),
        (["0.jpg", "0.JPG"], "key '0' has two members 'jpg'"),
        (["0.jpg", "0.key"], "members .key would be a second field 'key'"),
        (["0.cls", "0.label"], "members .label would be a second field 'label'"),
        ([f"0.{n}" for n in range(65)], "more than 64 fields, such as '64' of '0.64'"),
        (["README"], "hold no sample"),
        ([], "hold no sample"),
    ],
)
def test_names_that_make_no_samples_are_refused(tmp_path, names, message):
    write(tmp_path / "a.tar", [(name, b"1") for name in names])
    with pytest.raises(ValueError, match=message) as caught:
        open_tar(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_one_key_in_two_shards_is_two_samples(tmp_path):
    for shard in "ab":
        write(tmp_path / f"{shard}.tar", [("0.txt", shard.encode())])
    assert open_tar(tmp_path).values([0, 1], "txt") == ["a", "b"]


def test_what_is_no_shard_is_refused(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.tar file"):
        open_tar(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*train-003\.tar"):
        SlipstreamDataset(f"{shards}/train-{{000..003}}.tar")
    with pytest.raises(FileNotFoundError, match="there is no"):
        SlipstreamDataset(f"{shards}/none-*.tar")
    (shards / "x.jpg").write_bytes(jpeg(0))
    with pytest.raises(ValueError, match=r"holds .*: give the shards as a glob"):
        SlipstreamDataset(shards)
    assert len(SlipstreamDataset(f"{shards}/*.tar")) == 12
    with pytest.raises(ValueError, match=r"takes in .*x\.jpg, which is no \.tar file"):
        open_tar(f"{shards}/*")
    (shards / "x.jpg").rename(shards / "x.tar.gz")
    for place in (shards, shards / "x.tar.gz", f"{shards}/*.tar*"):
        with pytest.raises(ValueError, match=r"x\.tar\.gz is a compressed tar"):
            open_tar(place)
    with pytest.raises(ValueError, match=r"x\.tar\.gz is a compressed tar"):
        SlipstreamDataset(shards / "x.tar.gz")
    (tmp_path / "packed").mkdir()
    (shards / "x.tar.gz").rename(tmp_path / "packed" / "x.tgz")
    with pytest.raises(ValueError, match=r"x\.tgz is a compressed tar"):
        SlipstreamDataset(tmp_path / "packed")


def scanned(monkeypatch) -> list[str]:
    scans = []
    scan = source_tar_index.scan

    def counted(path, place):
        scans.append(os.path.basename(place))
        return scan(path, place)

    monkeypatch.setattr(source_tar_index, "scan", counted)
    return scans


def test_the_index_is_kept_and_only_what_changed_is_scanned_again(shards, cache, monkeypatch):
    scans = scanned(monkeypatch)
    first = list(SlipstreamDataset(shards))
    assert sorted(scans) == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert list(SlipstreamDataset(shards)) == first
    assert len(scans) == 3
    write(shards / "train-001.tar", sample(100) + sample(101))
    source = open_tar(shards)
    assert scans[3:] == ["train-001.tar"]
    assert source.values([4, 5, 6], "image") == [jpeg(100), jpeg(101), jpeg(5)]
    # The same size and another time.
    os.utime(shards / "train-000.tar", ns=(1, 1))
    assert len(open_tar(shards)) == 13
    assert scans[4:] == ["train-000.tar"]
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".npz"]


def test_a_damaged_index_is_made_again(shards, cache, monkeypatch, caplog):
    open_tar(shards)
    files = list(cache.rglob("*.npz"))
    assert len(files) == 4
    for damage in (lambda data: data[:-30], lambda data: b"", lambda data: data[:150] + b"xxxx" + data[154:]):
        for file in files:
            file.write_bytes(damage(file.read_bytes()))
        with caplog.at_level(logging.WARNING):
            assert open_tar(shards).values([11], "image") == [jpeg(11)]
        assert "is damaged" in caplog.text
        caplog.clear()


def test_a_cache_that_cannot_be_written_only_costs_the_scan(shards, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    source = open_tar(shards, cache_dir=tmp_path / "file" / "below")
    assert source.values([11], "image") == [jpeg(11)]
    assert "cannot be kept" in caplog.text


def test_a_shard_that_changed_under_an_open_set_is_an_error(shards):
    source = open_tar(shards)
    write(shards / "train-001.tar", sample(100))
    with pytest.raises(ReadError, match=r"sample 4 \(.*train-001\.tar sample 0\): .*has changed since") as caught:
        source.read([3, 4, 5])
    assert len(caught.value.failures) == 1
    source.close()
    (shards / "train-002.tar").unlink()
    with pytest.raises(ReadError, match=r"sample 5 .*train-002\.tar"):
        source.read([5])
    assert source.describe(5).endswith("train-002.tar sample 0")


def test_the_index_of_thousands_of_samples_stays_small(tmp_path, monkeypatch):
    count = 8_000
    for shard in range(4):
        members = []
        for n in range(shard, count, 4):
            members += [(f"{n:08d}.jpg", b"j" * (n % 700)), (f"{n:08d}.cls", b"7")]
        write(tmp_path / f"{shard}.tar", members, tarfile.USTAR_FORMAT)
    open_tar(tmp_path)
    tracemalloc.start()
    source = open_tar(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 16 * 2 * count + 100_000
    assert len(pickle.dumps(source)) < 16 * 2 * count
    assert len(source) == count
    ids = np.random.default_rng(0).integers(0, count, 1000)
    numbers = ids % (count // 4) * 4 + ids // (count // 4)
    assert [len(view) for view in source.read(ids)] == (numbers % 700).tolist()
    assert source.values(ids, "key") == [f"{n:08d}" for n in numbers]
    assert set(source.values(ids, "label")) == {7}


def test_the_loader_yields_what_it_yields_from_a_folder_of_the_same_files(tmp_path):
    for n in range(24):
        path = tmp_path / "folder" / f"class{n % 2}" / f"{n:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(n, (40 + n, 50)))
    folder = FolderSource(tmp_path / "folder")
    for shard in range(3):
        members = []
        for n in range(8 * shard, 8 * shard + 8):
            key = folder.values([n], "path")[0].removesuffix(".jpg")
            members += [
                (f"{key}.jpg", folder.values([n], "image")[0]),
                (f"{key}.cls", str(folder.values([n], "label")[0]).encode()),
            ]
        write(tmp_path / "tars" / f"{shard}.tar", members)
    batches = []
    for place in ("folder", "tars"):
        loader = SlipstreamLoader(
            SlipstreamDataset(tmp_path / place), batch_size=5, shuffle=True, seed=3, device="cpu", verbose=False
        )
        batches.append(list(loader))
    for a, b in zip(*batches, strict=True):
        assert [key + ".jpg" for key in b["key"]] == a["path"]
        for name in a.keys() & b.keys():
            if name == "image":
                assert all((x == y).all() for x, y in zip(a[name], b[name], strict=True))
            elif hasattr(a[name], "shape"):
                assert (a[name] == b[name]).all()
        assert {"image", "label", "_indices"} <= a.keys() & b.keys()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_and_threads_read_the_same(shards, method):
    source = open_tar(shards)
    assert source.read([0])[0].tobytes() == jpeg(0)
    check_other_readers(source, source, method, [jpeg(number) for number in range(12)])
