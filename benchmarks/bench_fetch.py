"""Seconds that an epoch over a set in S3 takes with an empty cache, where every request is answered 0.1 s late.

The store is moto behind tests/faulty_proxy.py, in a process of its own on loopback. Each epoch is a process of its own,
with the code of one `--code NAME=CHECKOUT`; those of all checkouts are interleaved. Every sample must come once. Also
ranged GETs a second: boto3's, in one process, from a server that does nothing else (110 kB each).
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
KEYS = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": "wJalrXUtnFEMI-very-secret"}
SAMPLES, EACH, BATCH = 4096, 32, 64
CASES: list[tuple[Any, str | None]] = [
    (False, None),
    ("windowed", None),
    (True, None),
    (False, "8MB"),
    ("windowed:4", "20MB"),
]
GET_BYTES = 110_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", action="append", default=[], help="NAME=CHECKOUT; of an older one too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write benchmarks/results/OUT.json")
    arguments = parser.parse_args()
    codes = dict(each.split("=", 1) for each in arguments.code or [f"now={HERE.parents[1]}"])
    gets = [_ranged_gets(delay, threads) for delay in (0.0, 0.02) for threads in (1, 8, 16, 32)]
    for each in gets:
        print(each)
    epochs = []
    with tempfile.TemporaryDirectory() as folder:
        _write_set(Path(folder, "set"))
        with _served("--serve-set", str(Path(folder, "set"))) as url:
            for _ in range(arguments.repeats):
                for shuffle, limit in CASES:
                    for name, checkout in codes.items():
                        if limit is not None and "max_cache_size" not in _text(checkout, "dataset.py"):
                            continue
                        epochs.append({"code": name, **_epoch_of(checkout, url, shuffle, limit)})
                        print(epochs[-1])
    if arguments.out:
        import record

        commits = {name: _commit(checkout) for name, checkout in codes.items()}
        result = {"benchmark": "fetch", **record.circumstances(), "codes": commits}
        result |= {"delay_s": 0.1, "samples": SAMPLES, "epochs": epochs, "ranged_gets": gets}
        record.write(arguments.out, HERE.parent / "results", result)


def _commit(checkout: str) -> str:
    command = ["git", "-C", checkout, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _text(checkout: str, name: str) -> str:
    return Path(checkout, "slipstream", name).read_text()


def _epoch_of(checkout: str, url: str, shuffle: Any, limit: str | None) -> dict[str, Any]:
    path = os.pathsep.join([checkout, str(Path(checkout, "kernels"))])
    command = [sys.executable, str(HERE), "--epoch", url, json.dumps(shuffle), json.dumps(limit)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd="/", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def epoch(url: str, shuffle: Any, limit: str | None) -> dict[str, Any]:
    """One epoch with an empty cache, after a warm-up: seconds to its end, to the first batch, and between two."""
    from slipstream import RandomResizedCrop, SlipstreamDataset, SlipstreamLoader

    options = {"endpoint_url": url, "region_name": "us-east-1", **KEYS}
    crops = {"image": RandomResizedCrop(64)}
    for steps, order, more in [(2, False, {}), (None, shuffle, {"max_cache_size": limit} if limit else {})]:
        with tempfile.TemporaryDirectory() as cache:
            data = SlipstreamDataset("s3://bench/set", cache_dir=cache, storage_options=options, **more)
            with SlipstreamLoader(data, BATCH, shuffle=order, pipelines=crops, device="cpu", verbose=False) as loader:
                begin = time.perf_counter()
                times, ids = [begin], []
                for batch in loader:
                    times.append(time.perf_counter())
                    ids += batch["_indices"].tolist()
                    if len(times) - 1 == steps:
                        break
    assert sorted(ids) == list(range(SAMPLES))
    waits = [after - before for before, after in itertools.pairwise(times)]
    seconds = {"epoch_s": times[-1] - begin, "first_s": waits[0], "longest_wait_s": max(waits[1:])}
    return {"shuffle": shuffle, "max_cache_size": limit, **{name: round(value, 3) for name, value in seconds.items()}}


def _write_set(folder: Path) -> None:
    import numpy as np
    from litdata.streaming.writer import BinaryWriter
    from litdata.types import Text
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:256, 0:256]
    images = []
    for number in range(64):
        pixels = np.stack([x, y, (x + y + number) % 256], axis=2) + rng.normal(0, 12, (256, 256, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        images.append(file.getvalue())
    writer = BinaryWriter(str(folder), chunk_size=EACH)
    for number in range(SAMPLES):
        writer[number] = {"image": images[number % 64], "label": number % 3, "path": Text(text=f"{number}.jpg")}
    writer.done()
    writer.merge()


@contextmanager
def _served(*arguments: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(HERE), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def serve_set(folder: str) -> None:
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from faulty_proxy import FaultyProxy  # pyright: ignore[reportMissingImports]
    from moto.server import ThreadedMotoServer
    from s3_store import bucket_in, upload  # pyright: ignore[reportMissingImports]

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    with bucket_in(url, "bench") as client, FaultyProxy(url, faults=["delay"], rate=1.0) as proxy:
        upload(client, Path(folder), "bench", "set")
        print(proxy.url, flush=True)
        sys.stdin.read()


def _ranged_gets(delay: float, threads: int) -> dict[str, Any]:
    from slipstream.source_s3 import S3Origin

    count = 200 if threads == 1 else 1500
    with _served("--serve-ranges", str(delay)) as url:
        origin = S3Origin("s3://bench/set", {"endpoint_url": url, "region_name": "us-east-1", **KEYS})

        def get(number: int) -> None:
            start = number * 7_919_000 % (60 * 2**20)
            assert len(origin.read("x", start, start + GET_BYTES)) == GET_BYTES

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(get, range(2 * threads)))
            begin, cpu = time.perf_counter(), time.process_time()
            list(pool.map(get, range(count)))
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        origin.close()
    return {
        "delay_s": delay,
        "threads": threads,
        "per_s": round(count / seconds),
        "cpu_ms": round(1e3 * cpu / count, 2),
    }


class _Ranges(asyncio.Protocol):
    """Answers ranged GETs out of memory, as fast as Python does."""

    data, delay = os.urandom(64 * 2**20), 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport, self._got = transport, b""

    def data_received(self, data: bytes) -> None:
        self._got += data
        while (end := self._got.find(b"\r\n\r\n")) >= 0:
            found = re.search(rb"[Rr]ange: bytes=(\d+)-(\d+)", self._got[:end])
            self._got = self._got[end + 4 :]
            assert found is not None
            first, last = map(int, found.groups())
            head = (
                f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{len(self.data)}\r\n"
                f'ETag: "x"\r\nContent-Length: {last + 1 - first}\r\n\r\n'
            )
            answer = head.encode() + self.data[first : last + 1]
            asyncio.get_running_loop().call_later(self.delay, self._transport.write, answer)


async def serve_ranges(delay: float) -> None:
    _Ranges.delay = delay
    server = await asyncio.get_running_loop().create_server(_Ranges, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--epoch"]:
        print(json.dumps(epoch(sys.argv[2], *map(json.loads, sys.argv[3:]))))
    elif sys.argv[1:2] == ["--serve-set"]:
        serve_set(sys.argv[2])
    elif sys.argv[1:2] == ["--serve-ranges"]:
        asyncio.run(serve_ranges(float(sys.argv[2])))
    else:
        main()
