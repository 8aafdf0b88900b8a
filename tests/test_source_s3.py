import gc
import io
import json
import multiprocessing
import os
import pickle
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from litdata.streaming.writer import BinaryWriter
from litdata.types import Text
from litdata_samples import write as write_samples
from PIL import Image
from s3_store import KEYS, bucket_in, upload

from slipstream.dataset import SlipstreamDataset
from slipstream.pack import pack
from slipstream.source import ReadError
from slipstream.source_litdata import open_litdata
from slipstream.source_s3 import S3Origin

SECRET = KEYS["aws_secret_access_key"]
URL = "s3://photos/val"


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 8, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(folder: Path, images: list[bytes]) -> None:
    writer = BinaryWriter(str(folder), chunk_size=4)
    for number, image in enumerate(images):
        writer[number] = {"image": image, "label": number, "path": Text(text=f"{number}.jpg")}
    writer.done()
    writer.merge()


@pytest.fixture
def bucket(server):
    with bucket_in(server, "photos") as client:
        yield client


@pytest.fixture
def images(bucket, tmp_path):
    images = [jpeg(number) for number in range(30)]
    write(tmp_path / "set", images)
    upload(bucket, tmp_path / "set", "photos", "val")
    return images


def cached(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_a_sample_fetches_its_own_chunk_only(images, options, tmp_path):
    cache = tmp_path / "cache"
    dataset = SlipstreamDataset(remote_dir=URL + "/", cache_dir=cache, storage_options=options)
    assert len(dataset) == 30
    assert dict(dataset.fields) == {"image": "image", "label": "int", "path": "str"}
    assert cached(cache) == []
    assert dataset[7] == {"image": images[7], "label": 7, "path": "7.jpg"}
    assert cached(cache) == ["chunk-0-1.bin"]
    assert [dataset[i]["image"] for i in range(30)] == images
    assert len(cached(cache)) == 8


def test_decoded_sample_fetches_its_own_chunk_only(images, options, tmp_path):
    dataset = SlipstreamDataset(URL, cache_dir=tmp_path / "cache", storage_options=options, decode_images=True)
    assert tuple(dataset[-1]["image"].shape) == (3, 9, 8)
    assert cached(tmp_path / "cache") == ["chunk-0-7.bin"]


def test_the_default_cache_folder(images, options, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "mine"))
    open_litdata(URL, storage_options=options).read([0])
    assert cached(tmp_path / "mine") == ["chunk-0-0.bin"]
    monkeypatch.delenv("SLIPSTREAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_litdata(URL, storage_options=options).read([0])
    assert cached(tmp_path / "xdg" / "slipstream") == ["chunk-0-0.bin"]
    monkeypatch.setenv("SLIPSTREAM_CACHE", "near")
    monkeypatch.chdir(tmp_path)
    source = open_litdata(URL, storage_options=options)
    monkeypatch.chdir(tmp_path / "mine")
    source.read([0])
    assert cached(tmp_path / "near") == ["chunk-0-0.bin"]


def test_prefetch_fetches_once_in_parallel_with_a_bar_and_leaves_no_thread(images, options, tmp_path, capsys):
    source = open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options)
    source.prefetch(range(20))
    assert "5 chunks" in capsys.readouterr().err
    assert len(cached(tmp_path / "cache")) == 5
    source.prefetch(range(30), progress=False)
    source.prefetch([0, 29])
    assert capsys.readouterr().err == ""
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("slipstream")] == []
    assert len(cached(tmp_path / "cache")) == 8
    with pytest.raises(IndexError):
        source.prefetch([30])


def test_threads_and_sources_never_fetch_a_chunk_twice(images, options, tmp_path, monkeypatch):
    fetched = Counter()
    fetch = S3Origin.fetch

    def counted(self, name, path, on_bytes=None):
        fetched[name] += 1
        fetch(self, name, path, on_bytes)

    monkeypatch.setattr(S3Origin, "fetch", counted)
    sources = [open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options) for _ in range(2)]
    results = []

    def work(seed):
        ids = np.random.default_rng(seed).permutation(30)
        views = sources[seed % 2].read(ids)
        results.append([view.tobytes() for view in views] == [images[i] for i in ids])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert fetched == {f"chunk-0-{i}.bin": 1 for i in range(8)}


def test_a_short_chunk_is_named_and_not_kept_and_the_others_are_read(images, bucket, options, tmp_path):
    whole = (tmp_path / "set" / "chunk-0-1.bin").read_bytes()
    bucket.put_object(Bucket="photos", Key="val/chunk-0-1.bin", Body=whole[:-1])
    source = open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options)
    with pytest.raises(ReadError, match=f"has {len(whole) - 1} bytes, its index says {len(whole)}") as caught:
        source.read([3, 4, 7, 8])
    assert [failure[0] for failure in caught.value.failures] == [4, 7]
    assert cached(tmp_path / "cache") == ["chunk-0-0.bin", "chunk-0-2.bin"]
    bucket.put_object(Bucket="photos", Key="val/chunk-0-1.bin", Body=whole)
    assert source.read([4])[0].tobytes() == images[4]


def test_a_missing_chunk_is_named(images, bucket, options, tmp_path):
    bucket.delete_object(Bucket="photos", Key="val/chunk-0-1.bin")
    source = open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options)
    with pytest.raises(ReadError, match=r"sample 5 .*s3://photos/val/chunk-0-1\.bin does not exist"):
        source.read([5])
    with pytest.raises(FileNotFoundError):
        source.prefetch([0, 5])


def test_a_set_written_anew_meets_no_old_chunk(images, bucket, options, tmp_path):
    open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options).read(range(30))
    newer = images[::-1]
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", newer)
    upload(bucket, tmp_path / "new", "photos", "val")
    source = open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options)
    assert [view.tobytes() for view in source.read(range(30))] == newer


def test_a_set_packed_anew_with_other_labels_meets_no_old_chunk(images, bucket, options, tmp_path):
    """Its files have the same names and sizes, and its index the same bytes."""
    for turn in range(2):
        write_samples(tmp_path / f"{turn}", [{"image": images[n], "label": (n + turn) % 3} for n in range(6)])
        pack(tmp_path / f"{turn}", tmp_path / f"packed{turn}", progress=False)
        upload(bucket, tmp_path / f"packed{turn}", "photos", "packed")
        dataset = SlipstreamDataset("s3://photos/packed", storage_options=options, cache_dir=tmp_path / "cache")
        assert [sample["label"] for sample in dataset] == [(n + turn) % 3 for n in range(6)]
        time.sleep(1.1)  # a store tells the second in which a file was written
    assert (tmp_path / "packed0" / "index.json").read_bytes() == (tmp_path / "packed1" / "index.json").read_bytes()


def test_a_half_written_cache_file_is_fetched_again(images, options, tmp_path):
    source = open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options)
    view = source.read([0])[0]
    file = next((tmp_path / "cache").rglob("chunk-0-0.bin"))
    short = file.with_name("short")
    short.write_bytes(file.read_bytes()[:-5])
    os.replace(short, file)
    again = open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=options)
    assert again.read([3])[0].tobytes() == images[3]
    assert view.tobytes() == images[0]


def test_secrets_are_in_no_message_and_no_repr(images, options, tmp_path):
    options = {**options, "endpoint_url": options["endpoint_url"].replace("//", "//user:hunter2@")}
    options["aws_session_token"] = "token-very-secret"
    dataset = SlipstreamDataset(URL, cache_dir=tmp_path, storage_options=options)
    texts = [repr(dataset), repr(dataset.source), repr(dataset.source._store.origin), dataset.source.describe(0)]
    no_server = {"endpoint_url": "http://user:hunter2@127.0.0.1:9", "config": Config(retries={"total_max_attempts": 1})}
    bad = [
        ("s3://nowhere/val", options),
        (URL + "/none", options),
        (URL, options | no_server),
        ("s3://AKIAEXAMPLE:hunter2@photos/val", options),
        (URL, options | {"region": SECRET}),
    ]
    for url, given in bad:
        with pytest.raises((OSError, ValueError)) as caught:
            SlipstreamDataset(remote_dir=url, cache_dir=tmp_path, storage_options=given)
        texts += [str(caught.value), repr(caught.value), str(caught.value.__cause__)]
    for text in texts:
        for secret in (SECRET, "hunter2", "AKIAEXAMPLE", "token-very-secret"):
            assert secret not in text


@pytest.mark.parametrize(
    ("url", "change", "error", "message"),
    [
        ("s3://photos/none", {}, FileNotFoundError, r"s3://photos/none/index\.json does not exist"),
        ("s3://nowhere/val", {}, FileNotFoundError, r"s3://nowhere/val/index\.json does not exist"),
        ("s3:///val", {}, ValueError, "s3://bucket/prefix"),
        ("gs://photos/val", {}, ValueError, "gs:// is not supported; allowed are s3://"),
        (URL, {"endpoint": "x"}, ValueError, "storage_options has 'endpoint'; allowed are region_name"),
    ],
)
def test_bad_places_and_options_are_refused_when_the_dataset_is_made(bucket, options, url, change, error, message):
    options = options if url.startswith("s3") else {}
    with pytest.raises(error, match=message):
        SlipstreamDataset(remote_dir=url, storage_options={**options, **change})


def test_a_foreign_index_is_refused(bucket, options):
    bucket.put_object(Bucket="photos", Key="val/index.json", Body=json.dumps({"shards": []}))
    with pytest.raises(ValueError, match=r"s3://photos/val/index\.json is not a LitData index"):
        SlipstreamDataset(remote_dir=URL, storage_options=options)


@pytest.mark.parametrize("spelling", ["unsigned", "config"])
def test_unsigned_requests_carry_no_credentials(images, bucket, server, tmp_path, monkeypatch, spelling):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    given = {"unsigned": True} if spelling == "unsigned" else {"config": Config(signature_version=UNSIGNED)}
    given["endpoint_url"] = server
    with pytest.raises(OSError, match=r"403.*\{'unsigned': True\} if the bucket is public"):
        open_litdata(URL, storage_options=given)
    for item in bucket.list_objects_v2(Bucket="photos")["Contents"]:
        bucket.put_object_acl(Bucket="photos", Key=item["Key"], ACL="public-read")
    source = open_litdata(URL, cache_dir=tmp_path / "cache", storage_options=given)
    client = source._store.origin._connect()
    seen = []
    client.meta.events.register("before-send.s3", lambda request, **_: seen.append(dict(request.headers)))
    assert source.read([0])[0].tobytes() == images[0]
    assert seen
    assert not any("authorization" in map(str.lower, headers) for headers in seen)


def test_pickled_and_forked_copies_fetch_for_themselves(images, options, tmp_path):
    source = open_litdata(URL, cache_dir=tmp_path / "a", storage_options=options)
    source.read([0])
    assert pickle.loads(pickle.dumps(source)).read([9])[0].tobytes() == images[9]
    client = source._store.origin._connect()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work():
        image = source.read([20])[0].tobytes()
        queue.put((image, source._store.origin._connect() is client))

    child = context.Process(target=work, daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    # Two processes on one connection would read each other's answers.
    assert queue.get() == (images[20], False)


def test_dropped_datasets_leave_no_descriptor_and_no_thread(images, options, tmp_path):
    def use(number):
        dataset = SlipstreamDataset(URL, cache_dir=tmp_path / str(number), storage_options=options)
        dataset.source.prefetch(range(30), progress=False)
        assert dataset[3]["label"] == 3

    counts = []
    gc.collect()
    # Dropping alone must do, not the collector that may run much later.
    gc.disable()
    for number in range(6):
        use(number)
        sockets = [name for name in os.listdir("/proc/self/fd") if "socket" in _target(name)]
        counts.append((len(sockets), sum(t.name.startswith("slipstream") for t in threading.enumerate())))
    gc.enable()
    # The server's own sockets live in this process too, and close a moment after the client's.
    assert counts[-1][0] <= counts[1][0] + 2
    assert counts[-1][1] == 0
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def test_a_slow_folder_as_remote_dir_is_copied_chunk_by_chunk(images, tmp_path):
    dataset = SlipstreamDataset(remote_dir=tmp_path / "set", cache_dir=tmp_path / "cache")
    assert dataset[29]["image"] == images[29]
    assert cached(tmp_path / "cache") == ["chunk-0-7.bin"]
    assert str(tmp_path / "cache") in Path("/proc/self/maps").read_text()
