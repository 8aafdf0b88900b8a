"""What a small file may cost: a second and 200 MB, whatever it says of itself; headers that lie cost nothing."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from decode_samples import MAX_PIXELS, encode, jpegs, make_decoder, picture
from PIL import Image
from process_memory import peak, resident

from slipstream.decode import DecodeError
from slipstream.decode_pillow import check_size, decode_with_pillow

SMALL = 100_000  # bytes
SECONDS, MEGABYTES = 1.0, 200.0
ADMITTED = 3160  # a side: its square is just below what headers may say without the bytes for it
REFUSED = 13_000


def lies(side: int) -> Iterator[tuple[str, bytes]]:
    """Small files whose headers say `side` by `side`."""
    size, little = side.to_bytes(2, "big") * 2, struct.pack("<ii", side, side)
    for name, options in {"baseline": {}, "progressive": {"progressive": True, "subsampling": 0}}.items():
        data = bytearray(bytes(encode(picture(), **options)))
        at = data.index(b"\xff\xc2" if options else b"\xff\xc0") + 5
        data[at : at + 4] = size
        yield f"jpeg, {name}", bytes(data)
        yield f"jpeg, {name}, cut", bytes(data[:-300])
        grey = bytearray(bytes(encode(picture().convert("CMYK"), **options)))
        at = grey.index(b"\xff\xc2" if options else b"\xff\xc0") + 5
        grey[at : at + 4] = size
        yield f"jpeg, {name}, CMYK", bytes(grey)
    for depth, colour in ((8, 2), (1, 0), (16, 6)):
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)),
            (b"IDAT", zlib.compress(bytes(1000))),
            (b"IEND", b""),
        )
        body = b"".join(
            struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
        )
        yield f"png, {depth} bits, kind {colour}", b"\x89PNG\r\n\x1a\n" + body
    data = bytearray(bytes(encode(picture(), "BMP")))
    data[18:26] = little
    yield "bmp", bytes(data)
    data = bytearray(bytes(encode(picture(), "WEBP")))
    data[26:30] = struct.pack("<HH", side, side)
    yield "webp, lossy", bytes(data)
    data = bytearray(bytes(encode(picture(), "WEBP", lossless=True)))
    (bits,) = struct.unpack("<I", data[21:25])
    data[21:25] = struct.pack("<I", bits & ~0xFFFFFFF | (side - 1) | (side - 1) << 14)
    yield "webp, lossless", bytes(data)
    data = bytearray(bytes(encode(picture(), "JPEG2000")))
    at, box = data.index(b"\xff\x4f\xff\x51"), data.index(b"ihdr")
    for place in (at + 8, at + 24, box + 4):  # the picture, its one tile, the box around it
        data[place : place + 8] = struct.pack(">II", side, side)
    yield "jpeg2000", bytes(data)
    data = bytearray(bytes(encode(picture().convert("P"), "GIF")))
    data[6:10] = struct.pack("<HH", side, side)
    yield "gif", bytes(data)
    yield "pnm", b"P6 %d %d 255\n" % (side, side) + bytes(999)
    for compression in ("raw", "tiff_deflate"):
        data = bytearray(bytes(encode(picture(), "TIFF", compression=compression)))
        (at,) = struct.unpack("<I", data[4:8])
        for entry in range(struct.unpack("<H", data[at : at + 2])[0]):
            place = at + 2 + 12 * entry
            if struct.unpack("<H", data[place : place + 2])[0] in (256, 257, 278):  # width, height, rows a strip
                data[place + 2 : place + 12] = struct.pack("<HIHH", 3, 1, side, 0)
        yield f"tiff, {compression}", bytes(data)


def files_of(what: str) -> list[tuple[str, bytes]]:
    if what != "hostile":
        return list(lies(int(what)))
    paths = (path for path in (SHARED / "hostile").rglob("*") if path.is_file() and path.suffix != ".csv")
    return [(path.name, path.read_bytes()) for path in sorted(paths)]


def measure(truncated: str) -> None:
    """In a child: decode each file by itself and print what it cost."""
    decoder = make_decoder(truncated=truncated)
    every = [*jpegs(2), *(encode(picture(), name) for name in ("PNG", "WEBP", "JPEG2000", "GIF", "TIFF"))]
    decoder.decode([*every, encode(picture().convert("CMYK"))], range(8), str)  # what is made once
    seen = 0
    run = decoder._pipeline.run

    def count(encoded, stream):
        nonlocal seen
        seen += 1
        return run(encoded, stream)

    decoder._pipeline.run = count
    for what in ("hostile", str(ADMITTED), str(REFUSED)):
        for name, data in files_of(what):
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes what is now
            seen, before, seconds, reason = 0, resident(), [], ""
            while len(seconds) < 3 and min(seconds, default=SECONDS) >= SECONDS:  # others may hold the cores
                begin = time.perf_counter()
                try:
                    decoder.decode([np.frombuffer(data, np.uint8)], [0], lambda _: "")
                except DecodeError as error:
                    reason = error.failures[0][2]
                seconds.append(time.perf_counter() - begin)
            cost = {"seconds": min(seconds), "megabytes": peak() - before, "dali": seen, "reason": reason}
            print("COST", json.dumps({"what": what, "name": name, "bytes": len(data)} | cost), flush=True)
    decoder.close()


@pytest.fixture(scope="module", params=["fail", "grey"])
def costs(request: pytest.FixtureRequest) -> list[dict]:
    """What each file cost, in a child of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs")
    command = [sys.executable, __file__, request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("COST")]


def of(costs: list[dict], what: str, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    found = [cost for cost in costs if cost["what"] == what]
    assert len(found) == len(files_of(what))
    if not found:
        pytest.skip("../shared/hostile is not here")
    most = max(found, key=lambda cost: cost["megabytes"])
    slowest = max(found, key=lambda cost: cost["seconds"])
    with capsys.disabled():
        print(f"\n{what}: {len(found)} files; most {most['megabytes']:.0f} MB ({most['name']}),", end="")
        print(f" slowest {slowest['seconds']:.2f} s ({slowest['name']})", end="")
    return found


def test_no_hostile_file_costs_more_than_a_small_one_may(costs: list[dict], capsys) -> None:
    for cost in of(costs, "hostile", capsys):
        if cost["bytes"] <= SMALL:
            assert cost["seconds"] < SECONDS and cost["megabytes"] < MEGABYTES, cost


def test_what_headers_may_say_without_the_bytes_for_it_is_bounded(costs: list[dict], capsys) -> None:
    for cost in of(costs, str(ADMITTED), capsys):
        assert cost["name"] == "pnm" or "cannot hold" not in cost["reason"]
        assert cost["seconds"] < SECONDS and cost["megabytes"] < MEGABYTES, cost


def test_lies_beyond_that_cost_nothing(costs: list[dict], capsys) -> None:
    for cost in of(costs, str(REFUSED), capsys):
        assert cost["reason"] and cost["seconds"] < 0.3 and cost["megabytes"] < 10, cost
        assert cost["dali"] == 0, cost
        if cost["name"] != "bmp":
            assert "cannot hold" in cost["reason"] and str(REFUSED) in cost["reason"], cost


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"optimize": True}),
        ("JPEG", {"progressive": True, "optimize": True}),
        ("JPEG", {"progressive": True, "optimize": True, "quality": 1}),
        ("PNG", {"optimize": True}),
        ("PNG", {"mode": "1", "compress_level": 9}),
        ("GIF", {"mode": "P"}),
        ("TIFF", {"mode": "1", "compression": "group4"}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {"mode": "1"}),
    ],
    ids=str,
)
def test_the_flattest_pictures_there_are_are_not_refused(format: str, options: dict) -> None:
    out = io.BytesIO()
    options = dict(options)
    side = 4096
    Image.new(options.pop("mode", "L"), (side, side)).save(out, format, **options)
    pixels = decode_with_pillow(np.frombuffer(out.getvalue(), np.uint8), max_pixels=MAX_PIXELS)
    assert pixels.shape == (side, side, 3)


def test_sizes_are_held_against_the_bytes_above_10_megapixels_only() -> None:
    for format in ("jpeg", "png", "webp", "unknown"):
        check_size(format, 4000, 2500, 1, MAX_PIXELS, truncated="grey")
        check_size(format, 4000, 2501, 10**6, MAX_PIXELS, truncated="grey")
    check_size("jpeg", 512 * 100, 1000, 100_000, None)
    with pytest.raises(
        ValueError, match="height 51200 and width 1000: 51200000 pixels, which 99999 bytes of jpeg cannot"
    ):
        check_size("jpeg", 512 * 100, 1000, 99_999, None)
    with pytest.raises(ValueError, match="12 pixels, max_pixels is 11"):
        check_size("jpeg", 3, 4, 10**6, 11)
    check_size("tiff", 10**5, 10**5, 1, None)
    with pytest.raises(ValueError, match="bytes of tiff cannot hold"):
        check_size("tiff", 10**5, 10**5, 1, None, truncated="grey")


if __name__ == "__main__":
    measure(sys.argv[1])
