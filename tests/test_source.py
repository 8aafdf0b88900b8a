import contextlib
import multiprocessing
import os
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from litdata.streaming.dataset import StreamingDataset
from litdata.streaming.serializers import JsonLeaf
from litdata_samples import edit_index, jpeg, maps_of, photos, plain, write
from PIL import Image

from slipstream.source import Kept, ReadError, map_file
from slipstream.source_fields import PickleRefusedError, plain_unpickle
from slipstream.source_litdata import open_litdata


@pytest.fixture
def photo_set(tmp_path):
    samples = photos(23)
    return write(tmp_path / "set", plain(samples)), samples


def test_read_gives_read_only_views_over_maps_in_the_order_asked_for(photo_set):
    folder, samples = photo_set
    source = open_litdata(folder, in_place=True)
    ids = np.random.default_rng(0).integers(0, 23, 200)
    views = source.read(ids)
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps_of(folder)]
    assert len(ranges) == 6
    for sample_id, view in zip(ids, views, strict=True):
        assert view.tobytes() == samples[sample_id]["image"]
        assert not view.flags.writeable
        assert any(a <= view.ctypes.data and view.ctypes.data + len(view) <= b for a, b in ranges)
    with pytest.raises(ValueError):
        views[0].flags.writeable = True
    assert source.values(ids, "label") == [samples[i]["label"] for i in ids]
    assert source.values(ids, "path") == [samples[i]["path"] for i in ids]
    assert source.read([]) == []
    assert dict(source.fields) == {"image": "image", "label": "int", "path": "str"}


@pytest.mark.parametrize("ids", [[23], [-1], [0, 5, 23], np.array([2**63], np.uint64)])
def test_an_id_that_does_not_exist_is_named(photo_set, ids):
    source = open_litdata(photo_set[0], in_place=True)
    with pytest.raises(IndexError, match=f"sample id {ids[-1]} is out of range: the source has ids 0 to 22"):
        source.read(ids)


def test_unfit_ids_and_fields_are_refused(photo_set):
    source = open_litdata(photo_set[0], in_place=True)
    for ids in ([1.5], [[1]], [True]):
        with pytest.raises(TypeError, match="flat sequence of ints"):
            source.read(ids)
    with pytest.raises(KeyError, match="'mask' does not exist; the source has 'image', 'label', 'path'"):
        source.read([0], "mask")


def test_values_equal_what_litdata_reads(tmp_path):
    rng = np.random.default_rng(1)
    samples = [
        {
            "n": i - 3,
            "x": i / 7,
            "yes": i % 2 == 0,
            "text": f"ü{i}",
            "raw": bytes([1, i]),
            "grid": rng.normal(size=(2, 3)).astype(np.float32),
            "line": rng.integers(0, 9, 4),
            "tensor": torch.full((2, 2), i),
            "row": torch.arange(i + 1, dtype=torch.float16),
            "list": [i, 2],
            "scalar": np.int64(i),
            "nothing": None,
        }
        for i in range(9)
    ]
    source = open_litdata(write(tmp_path, samples), in_place=True)
    theirs = list(StreamingDataset(str(tmp_path)))
    kinds = ["int", "float", "bool", "str", "bytes", "array", "array", "tensor", "tensor", "json", "pickle", "pickle"]
    assert list(source.fields.values()) == kinds
    for field in source.fields:
        for mine, other in zip(source.values(range(9), field), [sample[field] for sample in theirs], strict=True):
            expected = bytes(other) if field == "raw" else other
            np.testing.assert_array_equal(mine, expected)
            assert type(mine) is (int if field == "scalar" else type(expected))
    row = source.values([4], "row")[0]
    row[:] = 0


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        ((jpeg(0), 3), {"field_0": "image", "field_1": "int"}),
        (jpeg(0), {"data": "image"}),
        ({"image": jpeg(0), "size": {"w": 1, "h": 2}}, {"image": "image", "size.w": "int", "size.h": "int"}),
        ({"image": jpeg(0), "pair": (1, "x")}, {"image": "image", "pair.field_0": "int", "pair.field_1": "str"}),
        ({"image": b"not one", "mask": jpeg(1)}, {"image": "bytes", "mask": "image"}),
        ({"image": b"", "mask": jpeg(1)}, {"image": "bytes", "mask": "image"}),
        ({"image": Image.new("RGB", (3, 2))}, {"image": "pil"}),
    ],
)
def test_field_names_and_kinds(tmp_path, sample, names):
    source = open_litdata(write(tmp_path, [sample] * 5), in_place=True)
    assert dict(source.fields) == names and repr(source.fields) == repr(names)
    assert [len(source.read(range(5), name)) for name in names] == [5] * len(names)
    fetched = open_litdata(tmp_path, cache_dir=tmp_path / "cache")
    unread = {name: kind if kind in ("int", "str") else "not yet looked at" for name, kind in names.items()}
    assert repr(fetched.fields) == repr(unread)  # a repr fetches nothing
    assert dict(fetched.fields) == names and repr(fetched.fields) == repr(names)


def test_a_view_is_handed_out_with_its_first_and_last_page_read(tmp_path):
    """So that it is not whoever decodes who waits for the disk."""
    write(tmp_path, [bytes(24 << 20)] * 2, chunk_size=2)

    def resident() -> int:
        parts = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        ours = [part for part in parts if str(tmp_path) in part.partition("\n")[0]]
        return sum(int(number) for part in ours for number in re.findall(r"Rss:\s+(\d+) kB", part))

    (view,) = open_litdata(tmp_path, in_place=True).read([1], "data")
    before = resident()
    assert view[0] == view[-1] == 0 and resident() == before
    assert view[len(view) // 2] == 0 and resident() > before  # the measure sees a page that was not


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_names_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    folder = write(tmp_path / "set", [{"image": jpeg(0), "extra": Evil(mark)}])
    source = open_litdata(folder, in_place=True)
    assert source.fields["extra"] == "pickle"
    assert source.values([0], "image") == [jpeg(0)]
    with pytest.raises(PickleRefusedError, match=r"'extra'.*system.*exclude_fields=\['extra'\].*allow_pickle=True"):
        source.values([0], "extra")
    assert not mark.exists()
    assert open_litdata(folder, in_place=True, allow_pickle=True).values([0], "extra") == [0]
    assert mark.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_from_pickles(protocol):
    plain = [0, -(2**70), 1.5, 2j, True, None, "ü", b"\xff\0", (1, [2, {"a": (None,)}]), {"k": 1}]
    scalars = [np.int64(-3), np.uint8(7), np.float32(0.1), np.float64(0.1), np.bool_(True), np.complex64(1j)]
    scalars += [np.str_("ü"), np.bytes_(b"ab"), np.float16(2), np.array(5, ">i4")[()]]
    for value in plain:
        assert plain_unpickle(pickle.dumps(value, protocol), "x") == value
    for value in scalars:
        mine = plain_unpickle(pickle.dumps(value, protocol), "x")
        assert mine == value.item()
        assert type(mine) is type(value.item())


def test_a_none_between_numpys_numbers_is_read(tmp_path):
    """litdata wraps it in a class of its own before it pickles it."""
    labels = [np.int64(4), None, np.int64(5)]
    folder = write(tmp_path / "set", [{"image": jpeg(i), "label": label} for i, label in enumerate(labels)])
    source = open_litdata(folder, in_place=True)
    assert b"JsonLeaf" in source.read([1], "label")[0].tobytes()
    assert source.values(range(3), "label") == [4, None, 5]


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(JsonLeaf({1, 2})),
        pickle.dumps([JsonLeaf(1)]),
        pickle.dumps(np.zeros(3)),
        pickle.dumps(Path("x")),
        pickle.dumps(np.dtype("i4")),
        pickle.dumps(np.datetime64("2020-01-01")),
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i8'\ntRS'x'\ntR.",
        pickle.dumps({1, 2}),
        b"\x80",
        b"",
    ],
)
def test_everything_else_in_a_pickle_is_refused(data):
    with pytest.raises(PickleRefusedError, match="allow_pickle=True"):
        plain_unpickle(data, "x")


def test_an_encrypted_set_is_refused_when_it_is_opened(tmp_path):
    encryption = pytest.importorskip("litdata.utilities.encryption")
    write(tmp_path, plain(photos(3)), encryption=encryption.FernetEncryption("secret", level="sample"))
    with pytest.raises(ValueError, match=r"config\.encryption is set, and encrypted chunks cannot be read"):
        open_litdata(tmp_path, in_place=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("chunks"), "no list 'chunks'"),
        (lambda index: index.pop("config"), "no object 'config'"),
        (lambda index: index["chunks"].clear(), "lists no chunks"),
        (lambda index: index["chunks"].append(7), "a chunk is 7"),
        (lambda index: index["chunks"][0].update(filename="../chunk-0-0.bin"), "inside the set's own folder"),
        (lambda index: index["chunks"][0].update(filename="/etc/passwd"), "inside the set's own folder"),
        (lambda index: index["chunks"][0].update(filename=".."), "inside the set's own folder"),
        (lambda index: index["chunks"][0].update(filename="a\0b"), "inside the set's own folder"),
        (lambda index: index["chunks"][0].update(chunk_size=0), "chunk_size of chunk 'chunk-0-0.bin' is 0"),
        (lambda index: index["chunks"][0].update(chunk_bytes="1"), "chunk_bytes of chunk 'chunk-0-0.bin' is '1'"),
        (lambda index: index["chunks"][0].update(chunk_bytes=10**6), r"its index says 1000000: it is cut off"),
        (lambda index: index["chunks"][0].update(chunk_size=5), "holds 4 samples, its index says 5"),
        (lambda index: index["config"].update(item_loader="TokensLoader"), "item_loader is 'TokensLoader'"),
        (lambda index: index["config"].update(compression="lz4"), "compression is 'lz4'"),
        (lambda index: index["config"].update(data_format=None), "data_format is None"),
        (lambda index: index["config"].update(data_format=["int"]), "names 3 leaves"),
        (lambda index: index["config"].update(data_spec="[1, 2]"), "not a litdata tree specification"),
        (lambda index: index["config"].update(data_spec="gASVAA=="), "not a litdata tree specification"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_when_it_is_opened(tmp_path, change, message):
    edit_index(write(tmp_path, plain(photos(8))), change)
    with pytest.raises(ValueError, match=message):
        open_litdata(tmp_path, in_place=True)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"shards": []}', "\x00\x01"])
def test_a_foreign_index_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="not a LitData index"):
        open_litdata(tmp_path, in_place=True)


def test_short_and_missing_chunks_are_found_when_the_set_is_opened(photo_set):
    chunk = photo_set[0] / "chunk-0-3.bin"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"chunk-0-3.bin has {len(whole) - 1} bytes, its index says {len(whole)}"):
        open_litdata(photo_set[0], in_place=True)
    chunk.unlink()
    with pytest.raises(FileNotFoundError, match=r"chunk-0-3\.bin"):
        open_litdata(photo_set[0], in_place=True)


def test_offsets_that_lie_never_lead_outside_the_chunk(photo_set):
    folder, samples = photo_set
    chunk = folder / "chunk-0-1.bin"
    whole = chunk.read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(200):
        data = bytearray(whole)
        at = 4 * int(rng.integers(1, 6))
        data[at : at + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        if rng.random() < 0.5:
            start = int.from_bytes(whole[4:8], "little")
            data[start : start + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        chunk.write_bytes(data)
        source = open_litdata(folder, in_place=True)
        for sample_id in range(4, 8):
            with contextlib.suppress(ReadError):
                assert len(source.read([sample_id])[0]) <= len(whole)
        assert source.read([3, 8])[0].tobytes() == samples[3]["image"]


def test_read_error_names_every_bad_sample(photo_set):
    chunk = photo_set[0] / "chunk-0-1.bin"
    source = open_litdata(photo_set[0], in_place=True)
    chunk.unlink()
    with pytest.raises(ReadError, match=r"2 sample\(s\)") as caught:
        source.read([0, 5, 6, 9])
    assert [failure[0] for failure in caught.value.failures] == [5, 6]
    assert pickle.loads(pickle.dumps(caught.value)).failures == caught.value.failures


def test_describe_names_the_chunk_and_the_path_and_never_raises(photo_set):
    source = open_litdata(photo_set[0], in_place=True)
    assert source.describe(6) == f"{photo_set[0]}/chunk-0-1.bin item 2, path 'class/6.jpg'"
    assert "no sample 99" in source.describe(99)
    (photo_set[0] / "chunk-0-5.bin").unlink()
    assert source.describe(22) == f"{photo_set[0]}/chunk-0-5.bin item 2"


def test_views_outlive_eviction_and_close_and_maps_are_bounded(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 5000)
    kept = Kept(4)
    views = kept.get([str(tmp_path / f"{number}") for number in range(20)], map_file)
    assert len(kept) == 4
    slices = [view[1:3] for view in views]
    del views
    kept.close()
    assert [view.tolist() for view in slices] == [[number] * 2 for number in range(20)]
    assert len(maps_of(tmp_path)) == 20
    del slices[5:]
    assert len(maps_of(tmp_path)) == 5
    slices.clear()
    assert maps_of(tmp_path) == []


def test_least_recently_used_goes_first():
    kept, opened = Kept(2), []
    for key in "abacaba":
        kept.get([key], lambda key: opened.append(key) or key.upper())
    assert opened == ["a", "b", "c", "b"]


def test_a_missing_file_is_a_value_and_not_kept(tmp_path):
    kept = Kept(2)
    assert isinstance(kept.get([str(tmp_path / "none")], map_file)[0], FileNotFoundError)
    assert len(kept) == 0


def test_maps_hold_no_descriptors_and_dropped_sources_leave_nothing(photo_set):
    folder, _ = photo_set

    def use():
        source = open_litdata(folder, in_place=True)
        views = source.read(range(23))
        return len(os.listdir("/proc/self/fd")), len(maps_of(folder)), sum(map(len, views))

    first = use()
    before = len(os.listdir("/proc/self/fd"))
    assert [use() for _ in range(50)] == [first] * 50
    assert first[:2] == (before, 6)
    assert maps_of(folder) == []


def test_threads_read_at_once_through_a_small_cache(photo_set):
    folder, samples = photo_set
    source = open_litdata(folder, in_place=True)
    source._opened = Kept(2)
    errors = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(100):
            ids = rng.integers(0, 23, 8)
            if [view.tobytes() for view in source.read(ids)] != [samples[i]["image"] for i in ids]:
                errors.append(ids)
            if seed == 0:
                source.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_pickled_and_forked_copies_read(photo_set):
    folder, samples = photo_set
    source = open_litdata(folder, in_place=True)
    source.read([0])
    assert pickle.loads(pickle.dumps(source)).read([9])[0].tobytes() == samples[9]["image"]
    # A child is forked while another thread may hold the locks.
    with source._opened._lock, source.fields._lock:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(source.read([11])[0].tobytes()), daemon=True)
        child.start()
        child.join(20)
        assert child.exitcode == 0
    assert queue.get() == samples[11]["image"]
