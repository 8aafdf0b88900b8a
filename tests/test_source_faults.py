"""Reading from S3 through a network that fails: what passes is retried, what stays is named, nothing wrong is cached.

boto3's waits between its own tries and ours are cut short; one test looks at ours as they are.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import boto3
import numpy as np
import pytest
import zstandard
from botocore.config import Config
from faulty_proxy import FAULTS, FaultyProxy
from litdata.streaming.writer import BinaryWriter
from litdata.types import Text
from s3_store import KEYS, bucket_in, upload

from slipstream import source_s3
from slipstream.dataset import SlipstreamDataset
from slipstream.source import ReadError
from slipstream.source_index import parse_index
from slipstream.source_litdata import LitDataSource, open_litdata
from slipstream.source_s3 import S3Origin

pytestmark = pytest.mark.usefixtures("short_waits")

URL = "s3://photos/val"
COUNT = 30
CHUNKS = [f"chunk-0-{number}.bin" for number in range(8)]
BAD = "chunk-0-1.bin"
READER = """
import sys
from slipstream.source_litdata import open_litdata
endpoint, cache, step = sys.argv[1:]
options = {"endpoint_url": endpoint, "region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}
source = open_litdata("s3://photos/val", cache_dir=cache, storage_options=options)
ids = range(len(source))[:: int(step)]
print("ready", flush=True)
sys.stdin.readline()
print(*(hash(view.tobytes()) for view in source.read(ids)), flush=True)
"""


def image(number: int) -> bytes:
    return b"\xff\xd8\xff" + np.random.default_rng(number).bytes(3000 + number)


IMAGES = [image(number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    writer = BinaryWriter(str(folder), chunk_size=4)
    for number, data in enumerate(IMAGES):
        writer[number] = {"image": data, "label": number, "path": Text(text=f"{number}.jpg")}
    writer.done()
    writer.merge()
    return folder


@pytest.fixture(scope="module")
def store(server, folder):
    """A store that never fails, with the set in it; gives its endpoint."""
    with bucket_in(server, "photos") as client:
        upload(client, folder, "photos", "val")
        yield server


def options(proxy: FaultyProxy, tries: int = 4, **more) -> dict:
    config = Config(retries={"mode": "standard", "total_max_attempts": tries})
    return {"endpoint_url": proxy.url, "region_name": "us-east-1", "config": config, **KEYS, **more}


def opened(proxy: FaultyProxy, cache: Path, tries: int = 4) -> LitDataSource:
    return open_litdata(URL, cache_dir=cache, storage_options=options(proxy, tries))


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def images_of(source: LitDataSource, ids: Sequence[int] = range(COUNT)) -> list[bytes]:
    return [view.tobytes() for view in source.read(ids)]


def assert_only_right_files(cache: Path, folder: Path, names=CHUNKS) -> None:
    assert files(cache) == {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("seed", range(5))
def test_random_faults_are_survived_and_nothing_wrong_is_cached(store, folder, tmp_path, seed):
    with FaultyProxy(store, faults=FAULTS, rate=0.4, seed=seed) as proxy:
        source = opened(proxy, tmp_path, tries=6)
        assert images_of(source) == IMAGES
        assert_only_right_files(tmp_path, folder)
        assert sum(fault != "" for _, _, fault in proxy.requests) >= 4
        source.close()


@pytest.mark.parametrize("fault", [*FAULTS, "truncate break short"])
def test_a_chunk_is_fetched_again_after_each_fault(store, folder, tmp_path, fault):
    faults = fault.split()
    with FaultyProxy(store, script={("GET", BAD): faults}) as proxy:
        source = opened(proxy, tmp_path)
        assert images_of(source, [5]) == [IMAGES[5]]
        assert proxy.count("GET", BAD) == (1 if fault == "delay" else 1 + len(faults))
        assert_only_right_files(tmp_path, folder, [BAD])


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "short"])
def test_the_index_and_ranges_are_read_again_after_each_fault(store, tmp_path, fault):
    with FaultyProxy(store, script={("GET", "index.json"): [fault], ("GET", CHUNKS[0]): [fault, "", fault]}) as proxy:
        source = opened(proxy, tmp_path)
        assert IMAGES[0] in source._store.early_item(0)
        assert dict(source.fields)["image"] == "image"
        assert files(tmp_path) == {}


def test_a_range_is_cut_from_an_answer_that_is_whole(store, folder):
    with FaultyProxy(store, script={("GET", BAD): ["whole*"]}) as proxy:
        whole = (folder / BAD).read_bytes()
        origin = S3Origin(URL, options(proxy))
        assert origin.read(BAD, 100, 164) == whole[100:164]
        assert origin.read(BAD, 100) == whole[100:]
        assert origin.read(BAD) == whole


@pytest.mark.parametrize(
    ("method", "fault", "requests", "message"),
    [
        ("GET", "truncate*", 5, r"s3://photos/val/chunk-0-1\.bin"),
        ("GET", "break*", 5, r"s3://photos/val/chunk-0-1\.bin"),
        ("GET", "short*", 3, r"s3://photos/val/chunk-0-1\.bin has \d+ bytes, its index says \d+: it is cut off"),
        ("HEAD", "404*", 3, r"s3://photos/val/chunk-0-1\.bin does not exist"),
    ],
)
def test_a_fault_that_stays_is_named_after_a_bounded_number_of_tries(
    store, folder, tmp_path, method, fault, requests, message
):
    with FaultyProxy(store, script={(method, BAD): [fault]}) as proxy:
        source = opened(proxy, tmp_path, tries=2)
        with pytest.raises(ReadError, match=message) as caught:
            source.read([0, 5, 8])
        assert [failure[0] for failure in caught.value.failures] == [5]
        assert proxy.count(method, BAD) == requests
        assert_only_right_files(tmp_path, folder, [CHUNKS[0], CHUNKS[2]])
        proxy.script.clear()
        assert images_of(source, [5]) == [IMAGES[5]]


def test_the_waits_double_and_patience_ends_them(store, monkeypatch):
    waits = []
    monkeypatch.setattr(source_s3, "_FIRST_WAIT", 0.1)
    monkeypatch.setattr(source_s3.time, "sleep", waits.append)
    with FaultyProxy(store, script={("GET", BAD): ["truncate*"]}) as proxy:
        origin = S3Origin(URL, options(proxy))
        with pytest.raises(OSError, match=r"cannot read s3://photos/val/chunk-0-1\.bin: .*read.*expected"):
            origin.read(BAD)
        assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8])
        monkeypatch.setattr(source_s3, "_PATIENCE", -1.0)
        with pytest.raises(OSError, match="cannot read"):
            origin.read(BAD)
        assert proxy.count("GET", BAD) == 6


def test_a_fault_of_this_machine_is_no_reason_to_fetch_again(store, tmp_path):
    with FaultyProxy(store) as proxy:
        origin = S3Origin(URL, options(proxy))
        with pytest.raises(OSError, match="No such file or directory"):
            origin.fetch(BAD, str(tmp_path / "absent" / "x"))
        assert proxy.count("GET", BAD) <= 1


def test_a_half_written_chunk_is_not_read(store, folder, tmp_path):
    with FaultyProxy(store, script={("GET", BAD): ["stall"]}) as proxy:
        first, second = opened(proxy, tmp_path), opened(proxy, tmp_path)
        got: list[list[bytes]] = []
        readers = [threading.Thread(target=lambda s=s: got.append(images_of(s, [5]))) for s in (first, second)]
        readers[0].start()
        assert proxy.stalled.wait(20)
        readers[1].start()
        time.sleep(0.2)
        assert got == []
        assert BAD not in files(tmp_path)
        assert not second._store.is_ready(1)
        proxy.gate.set()
        for reader in readers:
            reader.join(20)
        assert got == [[IMAGES[5]]] * 2
        assert proxy.count("GET", BAD) == 1
        assert_only_right_files(tmp_path, folder, [BAD])


def reader(proxy: FaultyProxy, cache: Path, step: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", READER, proxy.url, str(cache), str(step)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_on_one_cache_fetch_each_chunk_once(store, folder, tmp_path):
    with FaultyProxy(store, script={("GET", name): ["delay"] for name in CHUNKS}) as proxy:
        processes = [reader(proxy, tmp_path, step) for step in (1, -1)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        printed = [process.communicate(timeout=60)[0].split() for process in processes]
        assert len(printed[0]) == COUNT
        assert printed[0] == printed[1][::-1]
        assert {name: proxy.count("GET", name) for name in CHUNKS} == dict.fromkeys(CHUNKS, 1)
        assert_only_right_files(tmp_path, folder)


def test_a_killed_process_leaves_nothing_that_is_read(store, folder, tmp_path):
    with FaultyProxy(store, script={("GET", BAD): ["stall"]}) as proxy:
        process = reader(proxy, tmp_path, 1)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert proxy.stalled.wait(30)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert BAD not in files(tmp_path)
        assert images_of(opened(proxy, tmp_path)) == IMAGES
        kept = files(tmp_path)
        assert {name: kept[name] for name in CHUNKS} == {name: (folder / name).read_bytes() for name in CHUNKS}


def replace(file: Path, data: bytes) -> None:
    beside = file.with_name("beside")
    beside.write_bytes(data)
    os.replace(beside, file)


@pytest.mark.parametrize("wrong", ["cut", "count", "empty"])
def test_a_wrong_cached_copy_is_fetched_again_once(store, folder, tmp_path, wrong, caplog):
    whole = (folder / BAD).read_bytes()
    with FaultyProxy(store) as proxy:
        assert images_of(opened(proxy, tmp_path)) == IMAGES
        (file,) = tmp_path.rglob(BAD)
        data = {"cut": whole[:-1], "count": b"\5\0\0\0" + whole[4:], "empty": b""}[wrong]
        replace(file, data)
        proxy.requests.clear()
        source = opened(proxy, tmp_path)
        assert images_of(source) == images_of(source) == IMAGES
        assert [proxy.count("GET", name) for name in CHUNKS] == [0, 1, 0, 0, 0, 0, 0, 0]
        assert_only_right_files(tmp_path, folder)
        assert f"cached chunk {file} h" in caplog.text


def test_a_wrong_chunk_in_the_store_is_not_cached(store, folder, tmp_path):
    data = (folder / BAD).read_bytes()
    client = boto3.client("s3", endpoint_url=store, region_name="us-east-1", **KEYS)
    client.put_object(Bucket="photos", Key=f"val/{BAD}", Body=b"\5\0\0\0" + data[4:])
    try:
        with FaultyProxy(store) as proxy:
            source = opened(proxy, tmp_path)
            with pytest.raises(
                ReadError, match=r"chunk s3://photos/val/chunk-0-1\.bin holds 5 samples, its index says 4"
            ):
                source.read([0, 5])
            assert_only_right_files(tmp_path, folder, [CHUNKS[0]])
    finally:
        client.put_object(Bucket="photos", Key=f"val/{BAD}", Body=data)
        client.close()


def test_a_compressed_chunk_that_is_cut_here_or_on_its_way_is_fetched_again(store, folder, tmp_path):
    index = json.loads((folder / "index.json").read_text())
    index["config"]["compression"] = "zstd"
    client = boto3.client("s3", endpoint_url=store, region_name="us-east-1", **KEYS)
    for entry in index["chunks"]:
        packed = zstandard.ZstdCompressor().compress((folder / entry["filename"]).read_bytes())
        client.put_object(Bucket="photos", Key=f"zstd/{entry['filename']}", Body=packed)
    client.put_object(Bucket="photos", Key="zstd/index.json", Body=json.dumps(index))
    client.close()
    with FaultyProxy(store, script={("GET", BAD): ["short", "truncate"]}) as proxy:
        given = {"cache_dir": tmp_path, "storage_options": options(proxy)}
        assert images_of(open_litdata("s3://photos/zstd", **given)) == IMAGES
        assert proxy.count("GET", BAD) == 3
        (file,) = tmp_path.rglob(f"{BAD}*")
        replace(file, file.read_bytes()[:-1])
        assert images_of(open_litdata("s3://photos/zstd", **given)) == IMAGES
        assert proxy.count("GET", BAD) == 4
        assert sorted(data for data in files(tmp_path).values()) == sorted(
            (folder / name).read_bytes() for name in CHUNKS
        )


# boto3's own DEBUG records hold signatures and headers by design; they are not ours, and off unless asked for.
_FOREIGN_LOGGERS = ("boto", "urllib3", "s3transfer", "werkzeug", "moto")


@pytest.mark.parametrize("given", ["options", "environment"])
def test_credentials_are_in_no_message_no_record_and_no_traceback(store, tmp_path, caplog, monkeypatch, given):
    caplog.set_level(logging.DEBUG)
    token = "session-token-very-secret"
    script = {("GET", "index.json"): ["404", "break"], ("GET", BAD): ["403*"], ("GET", CHUNKS[2]): ["truncate*"]}
    script |= {("HEAD", CHUNKS[3]): ["404*"], ("GET", CHUNKS[4]): ["short*"], ("GET", CHUNKS[5]): ["break*"]}
    script |= {("GET", CHUNKS[6]): ["503*"]}
    with FaultyProxy(store, script=script) as proxy:
        config = options(proxy, tries=2)
        config["endpoint_url"] = proxy.url.replace("//", "//someone:hunter2@")
        if given == "options":
            config["aws_session_token"] = token
        else:
            for name, value in (*KEYS.items(), ("aws_session_token", token)):
                monkeypatch.setenv(name.upper(), value)
                config.pop(name, None)
        dataset = SlipstreamDataset(URL, cache_dir=tmp_path, storage_options=config)
        texts = [repr(dataset), repr(dataset.source), dataset.source.describe(5)]
        with pytest.raises(ReadError) as caught:
            dataset.source.read(range(24))
        errors: list[BaseException] = [caught.value]
        assert {failure[0] // 4 for failure in caught.value.failures} == {1, 2, 3, 4, 5}
        for number in range(1, 7):
            if number == 6:
                monkeypatch.setattr(source_s3, "_PATIENCE", 0.1)
            with pytest.raises((OSError, ValueError)) as caught:
                dataset.source._store.path(number)  # pyright: ignore[reportAttributeAccessIssue]
            errors.append(caught.value)
        # The answer's text repeats the request's headers: the mask is what keeps them out, not luck.
        assert "Credential=***/" in str(errors[1])
    for error in errors:
        texts += [str(error), repr(error), *traceback.format_exception(error)]
        assert error.__cause__ is None
        assert error.__context__ is None
    ours = [record for record in caplog.records if not record.name.startswith(_FOREIGN_LOGGERS)]
    assert any(record.name == source_s3.__name__ for record in ours)
    texts += [record.getMessage() + str(record.__dict__) for record in ours]
    for text in texts:
        for secret in (*KEYS.values(), token, "hunter2", "someone"):
            assert secret not in text


def test_short_credentials_do_not_mangle_messages(store):
    with FaultyProxy(store, script={("GET", BAD): ["truncate*"]}) as proxy:
        given = options(proxy, aws_access_key_id="a", aws_secret_access_key="re")
        with pytest.raises(OSError, match=r"cannot read s3://photos/val/chunk-0-1\.bin: .* bytes read") as caught:
            S3Origin(URL, given).read(BAD)
        assert "***" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "a\0b", "..", ".", "", "..\\x", "x/../../y", 7, None])
def test_a_chunk_name_that_leaves_the_cache_is_refused_with_the_index(folder, name):
    index = json.loads((folder / "index.json").read_text())
    index["chunks"][3]["filename"] = name
    with pytest.raises(ValueError, match=r"s3://b/index\.json: chunk filename .* must be a plain file name"):
        parse_index(json.dumps(index), "s3://b/index.json")


def test_other_faults_do_not_make_a_404_final(store, folder, tmp_path):
    with FaultyProxy(store, script={("GET", BAD): ["break", "404", "break", "404"]}) as proxy:
        source = opened(proxy, tmp_path)
        assert images_of(source, [5]) == [IMAGES[5]]
        assert_only_right_files(tmp_path, folder, [BAD])
