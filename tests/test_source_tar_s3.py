import os
import pickle
import threading
from collections import Counter

import numpy as np
import pytest
from botocore.config import Config
from faulty_proxy import FAULTS, FaultyProxy
from s3_store import bucket_in, upload
from tar_samples import jpeg, sample, write, write_set

from slipstream.dataset import SlipstreamDataset
from slipstream.source import ReadError
from slipstream.source_locks import sweep
from slipstream.source_s3 import S3Origin
from slipstream.source_tar import open_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    return write_set(tmp_path / "shards")


@pytest.fixture
def bucket(server, shards):
    with bucket_in(server, "shards") as client:
        upload(client, shards, "shards", "set")
        client.put_object(Bucket="shards", Key="set/below/train-009.tar", Body=b"no part of the set")
        yield client


def fetched(monkeypatch) -> Counter:
    counts = Counter()
    fetch = S3Origin.fetch

    def counted(self, name, path, on_bytes=None):
        counts[name] += 1
        fetch(self, name, path, on_bytes)

    monkeypatch.setattr(S3Origin, "fetch", counted)
    return counts


@pytest.mark.parametrize("url", ["s3://shards/set", "s3://shards/set/*.tar", "s3://shards/set/train-{000..002}.tar"])
def test_shards_in_s3_are_fetched_once(bucket, options, cache, monkeypatch, url):
    counts = fetched(monkeypatch)
    dataset = SlipstreamDataset(url, storage_options=options)
    assert [s["image"] for s in dataset] == [jpeg(n) for n in range(12)]
    assert dataset[4]["key"] == "train/00004"
    assert dataset.source.describe(4) == "s3://shards/set/train-001.tar key 'train/00004'"
    assert [s["image"] for s in SlipstreamDataset(url, storage_options=options)] == [jpeg(n) for n in range(12)]
    assert counts == {f"train-{n:03d}.tar": 1 for n in range(3)}
    assert sorted(path.name[9:] for path in cache.rglob("*.tar")) == [f"train-{n:03d}.tar" for n in range(3)]
    assert not [path for path in cache.rglob("*") if path.suffix in (".part", ".lock")]
    assert len(SlipstreamDataset("s3://shards/set/train-002.tar", storage_options=options)) == 7


def test_shards_missing_from_the_cache_come_back_when_they_are_needed(bucket, options, cache, monkeypatch):
    open_tar("s3://shards/set/", storage_options=options)
    for path in cache.rglob("*.tar"):
        path.unlink()
    counts = fetched(monkeypatch)
    source = open_tar("s3://shards/set/", storage_options=options)
    assert not counts
    assert source.describe(4) == "s3://shards/set/train-001.tar sample 0"
    assert not counts
    assert source.read([4])[0].tobytes() == jpeg(4)
    source.prefetch([0, 4, 11], progress=False)
    source.prefetch([0, 4, 11])
    assert counts == {f"train-{n:03d}.tar": 1 for n in range(3)}
    assert pickle.loads(pickle.dumps(source)).values([7], "image") == [jpeg(7)]


def test_half_a_shard_in_the_cache_is_fetched_again(bucket, options, cache):
    open_tar("s3://shards/set", storage_options=options)
    file = next(cache.rglob("*-train-001.tar"))
    file.write_bytes(file.read_bytes()[:-512])
    assert open_tar("s3://shards/set", storage_options=options).read([4])[0].tobytes() == jpeg(4)


def test_an_object_that_changes_is_noticed(bucket, options, cache, tmp_path):
    source = open_tar("s3://shards/set", storage_options=options)
    for path in cache.rglob("*.tar"):
        path.unlink()
    newer = write(tmp_path / "new.tar", sample(100)).read_bytes()
    bucket.put_object(Bucket="shards", Key="set/train-001.tar", Body=newer)
    with pytest.raises(ReadError, match=r"sample 4 \(s3://shards/set/train-001.tar sample 0\): .*has changed since"):
        source.read([4])
    assert not list(cache.rglob("*-train-001.tar"))
    again = open_tar("s3://shards/set", storage_options=options)
    assert again.values([4], "image") == [jpeg(100)]
    bucket.delete_object(Bucket="shards", Key="set/train-000.tar")
    with pytest.raises(ReadError, match=r"s3://shards/set/train-000.tar does not exist"):
        source.read([0])


def test_threads_and_sources_fetch_a_shard_once(bucket, options, monkeypatch):
    counts = fetched(monkeypatch)
    lengths = []
    threads = [
        threading.Thread(target=lambda: lengths.append(len(open_tar("s3://shards/set", storage_options=options))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [12] * 4
    assert counts == {f"train-{n:03d}.tar": 1 for n in range(3)}


def test_readers_that_meet_one_missing_shard_fetch_it_once(bucket, options, cache, monkeypatch):
    sources = [open_tar("s3://shards/set", storage_options=options) for _ in range(2)]
    for path in cache.rglob("*.tar"):
        path.unlink()
    counts = fetched(monkeypatch)
    barrier = threading.Barrier(6)
    results = []

    def work(number):
        barrier.wait()
        results.append(sources[number % 2].values([11], "image") == [jpeg(11)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6
    assert counts == {"train-002.tar": 1}


def test_a_shard_that_comes_short_is_not_kept(bucket, options, cache, monkeypatch):
    fetch = S3Origin.fetch

    def short(self, name, path, on_bytes=None):
        fetch(self, name, path, on_bytes)
        os.truncate(path, os.stat(path).st_size - 512)

    monkeypatch.setattr(S3Origin, "fetch", short)
    with pytest.raises(ValueError, match=r"s3://shards/set/train-00\d\.tar gave \d+ bytes of \d+"):
        open_tar("s3://shards/set", storage_options=options)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def through(proxy: FaultyProxy, options: dict, tries: int = 4) -> dict:
    config = Config(retries={"mode": "standard", "total_max_attempts": tries})
    return {**options, "endpoint_url": proxy.url, "config": config}


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("seed", [0, 2, 5, 6, 10])
def test_random_faults_are_survived_and_nothing_wrong_is_cached(bucket, server, options, shards, cache, seed):
    with FaultyProxy(server, faults=FAULTS, rate=0.4, seed=seed) as proxy:
        source = open_tar("s3://shards/set", storage_options=through(proxy, options, tries=6))
        assert source.values(range(12), "image") == [jpeg(n) for n in range(12)]
        assert sum(fault != "" for _, _, fault in proxy.requests) >= 2
        source.close()
    kept = {path.name[9:]: path.read_bytes() for path in cache.rglob("*.tar")}
    assert kept == {path.name: path.read_bytes() for path in shards.iterdir()}


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("method", "name"), [("GET", "shards"), ("HEAD", "train-001.tar"), ("GET", "train-001.tar")])
def test_a_listing_a_question_and_a_shard_are_asked_for_again(bucket, server, options, method, name, fault):
    with FaultyProxy(server, script={(method, name): [fault, "", fault]}) as proxy:
        source = open_tar("s3://shards/set", storage_options=through(proxy, options))
        assert source.values(range(12), "image") == [jpeg(n) for n in range(12)]
        source.close()


@pytest.mark.usefixtures("short_waits")
def test_no_credentials_are_in_the_error_of_a_listing(bucket, server, options):
    with FaultyProxy(server, script={("GET", "shards"): ["404*"]}) as proxy:
        with pytest.raises(FileNotFoundError, match="s3://shards/set/ does not exist") as caught:
            open_tar("s3://shards/set", storage_options=through(proxy, options))
        assert proxy.count("GET", "shards") == 3
    error: BaseException | None = caught.value
    while error is not None:  # a tracker of errors shows what is behind one too
        assert options["aws_access_key_id"] not in str(error)
        error = error.__context__


def test_what_is_not_in_s3_is_named(bucket, options):
    with pytest.raises(FileNotFoundError, match="s3://shards/none holds neither LitData chunks nor tars"):
        SlipstreamDataset("s3://shards/none", storage_options=options)
    with pytest.raises(FileNotFoundError, match=r"there is no train-009\.tar"):
        SlipstreamDataset("s3://shards/set/train-{000,009}.tar", storage_options=options)
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        open_tar("s3://nobody/x", storage_options=options)
    with pytest.raises(ValueError, match="a pattern may stand after the last '/' only"):
        open_tar("s3://shards/{set,b}/x.tar", storage_options=options)
    with pytest.raises(ValueError, match="credentials go into storage_options") as caught:
        SlipstreamDataset("s3://AKIAME:very-secret@shards/{set,b}/x.tar")
    assert "very-secret" not in str(caught.value)
    with pytest.raises(ValueError, match="gs:// is not supported"):
        open_tar("gs://shards/set")
    bucket.put_object(Bucket="shards", Key="set/x.tar.zst", Body=b"")
    with pytest.raises(ValueError, match=r"x\.tar\.zst is a compressed tar"):
        open_tar("s3://shards/set", storage_options=options)


def test_a_broken_shard_in_s3_is_named_and_the_index_not_kept(bucket, options, cache):
    whole = bucket.get_object(Bucket="shards", Key="set/train-002.tar")["Body"].read()
    bucket.put_object(Bucket="shards", Key="set/train-002.tar", Body=whole[:3000])
    with pytest.raises(ValueError, match=r"s3://shards/set/train-002\.tar is cut off") as caught:
        open_tar("s3://shards/set", storage_options=options)
    assert "secret" not in str(caught.value)
    bucket.put_object(Bucket="shards", Key="set/train-002.tar", Body=whole)
    assert len(open_tar("s3://shards/set", storage_options=options)) == 12


def test_who_opens_another_set_leaves_the_index_that_is_being_written(tmp_path, monkeypatch):
    """It sweeps the folder that they share of what killed processes left."""
    savez, swept = np.savez, []

    def save_while_another_opens(file, **arrays):
        savez(file, **arrays)
        sweep(os.path.dirname(file.name))
        swept.append(file.name)

    monkeypatch.setattr(np, "savez", save_while_another_opens)
    (tmp_path / "set").mkdir()
    assert len(open_tar(write_set(tmp_path / "set"), cache_dir=tmp_path / "cache")) == 12
    assert len(swept) == 4  # of each shard, and of the whole
