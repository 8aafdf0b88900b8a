"""Every way of coding a JPEG that its readers meet: each comes out as Pillow's pixels, on either way to them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import SHARED
from decode_samples import assert_equal, decode, encode, make_decoder, picture, pixels
from PIL import Image, ImageOps

from slipstream import DecodeError
from slipstream.decode_pillow import decode_with_pillow
from slipstream.header import read_header, read_jpeg_frame

SIZES = [(1, 1), (2, 1), (1, 2), (7, 3), (3, 7), (8, 8), (9, 17), (16, 16), (17, 33), (31, 16), (90, 61)]


def segment(data: bytes, marker: int) -> int:
    """Where the first segment of this marker begins."""
    at = 2
    while data[at + 1] != marker:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def with_frame(data: bytes, factors: int, size: tuple[int, int]) -> bytes:
    """With other sampling factors of luma, and another size: blocks of as many units lie in the same order."""
    torn = bytearray(data)
    at = segment(data, 0xC0)
    torn[at + 5 : at + 9] = size[1].to_bytes(2, "big") + size[0].to_bytes(2, "big")
    torn[at + 11] = factors
    return bytes(torn)


def with_wide_tables(data: bytes, factor: int = 1) -> bytes:
    """With quantisation tables of 16 bits a value, `factor` times as large."""
    while True:
        at = 2
        while data[at + 1] != 0xDB or data[at + 4] >> 4:
            if data[at + 1] == 0xDA:
                return data
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        assert length == 67  # one table
        wide = b"".join((factor * value).to_bytes(2, "big") for value in data[at + 5 : at + 69])
        data = data[: at + 2] + (131).to_bytes(2, "big") + bytes([data[at + 4] | 0x10]) + wide + data[at + 69 :]


def with_process(data: bytes, marker: int) -> bytes:
    at = segment(data, 0xC0)
    return data[: at + 1] + bytes([marker]) + data[at + 2 :]


def with_adobe(data: bytes, transform: int) -> bytes:
    at = segment(data, 0xEE)
    assert data[at + 4 : at + 9] == b"Adobe"
    return data[: at + 15] + bytes([transform]) + data[at + 16 :]


def without(data: bytes, marker: int) -> bytes:
    at = segment(data, marker)
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def jpeg(size: tuple[int, int] = (90, 61), mode: str = "RGB", **options) -> bytes:
    return bytes(encode(picture(sum(size), size).convert(mode), **({"quality": 90} | options)))


# name -> (the file, how it says that it is coded)
CODINGS = {
    "4:4:4": (jpeg(subsampling="4:4:4"), ("baseline", "4:4:4")),
    "4:2:2": (jpeg(subsampling="4:2:2"), ("baseline", "4:2:2")),
    "4:2:0": (jpeg(subsampling="4:2:0"), ("baseline", "4:2:0")),
    "4:4:0": (with_frame(jpeg((64, 32), subsampling="4:2:2"), 0x12, (30, 61)), ("baseline", "4:4:0")),
    "4:1:1": (with_frame(jpeg((50, 35), subsampling="4:2:0"), 0x41, (61, 45)), ("baseline", "4:1:1")),
    "grey": (jpeg(mode="L"), ("baseline", "grey")),
    "grey of factors 2x2": (with_frame(jpeg(mode="L"), 0x22, (90, 61)), ("baseline", "grey")),
    "Adobe RGB": (jpeg(keep_rgb=True), ("baseline", "4:4:4")),
    "RGB by its components' names": (without(jpeg(keep_rgb=True), 0xEE), ("baseline", "4:4:4")),
    "YCbCr by Adobe": (with_adobe(jpeg(keep_rgb=True), 1), ("baseline", "4:4:4")),
    "YCbCr without JFIF": (without(jpeg(), 0xE0), ("baseline", "4:2:0")),
    "CMYK": (jpeg(mode="CMYK"), ("baseline", "4:4:4")),
    "CMYK, 4:2:0": (jpeg(mode="CMYK", subsampling="4:2:0"), None),
    "CMYK without Adobe": (without(jpeg(mode="CMYK"), 0xEE), ("baseline", "4:4:4")),
    "YCCK": (with_adobe(jpeg(mode="CMYK"), 2), ("baseline", "4:4:4")),
    "YCCK, progressive": (with_adobe(jpeg(mode="CMYK", progressive=True), 2), ("progressive", "4:4:4")),
    "16-bit tables": (with_wide_tables(jpeg()), ("baseline", "4:2:0")),
    "16-bit tables, extended": (with_process(with_wide_tables(jpeg()), 0xC1), ("extended", "4:2:0")),
    "values beyond a byte": (with_wide_tables(jpeg(quality=40), 9), ("baseline", "4:2:0")),
    "progressive": (jpeg(progressive=True), ("progressive", "4:2:0")),
    "progressive, 4:4:4": (jpeg(progressive=True, subsampling="4:4:4"), ("progressive", "4:4:4")),
    "progressive, grey": (jpeg(progressive=True, mode="L"), ("progressive", "grey")),
    "progressive, restarts": (jpeg(progressive=True, restart_marker_blocks=3), ("progressive", "4:2:0")),
    "extended": (with_process(jpeg(), 0xC1), ("extended", "4:2:0")),
    "own Huffman tables": (jpeg(optimize=True), ("baseline", "4:2:0")),
    "restart at each block": (jpeg(restart_marker_blocks=1), ("baseline", "4:2:0")),
    "restart at each row": (jpeg(restart_marker_rows=1), ("baseline", "4:2:0")),
    "quality 1": (jpeg(quality=1), ("baseline", "4:2:0")),
    "quality 100": (jpeg(quality=100), ("baseline", "4:2:0")),
}


@pytest.fixture
def by_dali(decoder, monkeypatch: pytest.MonkeyPatch):
    """A decoder, and how many images DALI was given."""
    seen = [0]
    run = decoder._pipeline.run

    def count(encoded, stream):
        seen[0] += len(encoded)
        return run(encoded, stream)

    monkeypatch.setattr(decoder._pipeline, "run", count)
    return decoder, seen


def plain(data: bytes, apply_exif: bool = False) -> np.ndarray:
    """What Pillow makes of it, without any of ours."""
    image = Image.open(io.BytesIO(data))
    image.load()
    if apply_exif:
        image = ImageOps.exif_transpose(image)
    return np.asarray(image.convert("RGB"))


def stray(data: bytes) -> bytes:
    """The same picture with bytes between two markers, which is Pillow's alone."""
    at = 4 + int.from_bytes(data[4:6], "big")
    return data[:at] + b"\0\0" + data[at:]


@pytest.mark.parametrize("name", CODINGS)
def test_each_coding_comes_out_as_pillows(name: str, by_dali) -> None:
    decoder, seen = by_dali
    data, coded = CODINGS[name]
    if coded is not None:
        frame = read_jpeg_frame(data)
        assert (frame.process, frame.subsampling) == coded
    expected = plain(data)
    assert expected.std() > 5  # a picture
    assert_equal(pixels(decode(decoder, [np.frombuffer(data, np.uint8)])), [expected])
    alone = read_header(data).channels == 4
    assert seen == [0 if alone else 1]
    assert_equal([decode_with_pillow(np.frombuffer(data, np.uint8))], [expected])
    assert_equal(pixels(decode(decoder, [np.frombuffer(stray(data), np.uint8)])), [expected])
    assert seen == [0 if alone else 1]  # not with these


def test_16_bit_tables_are_what_they_say() -> None:
    data, _ = CODINGS["16-bit tables"]
    assert data[segment(data, 0xDB) + 4] >> 4 == 1
    assert_equal([plain(data)], [plain(jpeg())])
    coarse, _ = CODINGS["values beyond a byte"]
    first = segment(coarse, 0xDB) + 5
    assert max(coarse[first : first + 128 : 2]) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"progressive": True},
        {"mode": "L"},
    ],
    ids=str,
)
def test_odd_sizes_come_out_as_pillows(options: dict, by_dali) -> None:
    decoder, seen = by_dali
    encoded = [jpeg(size, **options) for size in SIZES]
    got = pixels(decode(decoder, [np.frombuffer(data, np.uint8) for data in encoded]))
    assert [image.shape[1::-1] for image in got] == SIZES
    assert_equal(got, [plain(data) for data in encoded])
    assert seen == [len(SIZES)]


@pytest.mark.parametrize("factors", [0x12, 0x41])
def test_odd_sizes_of_other_samplings_come_out_as_pillows(factors: int, decoder) -> None:
    across, down = 8 * (factors >> 4), 8 * (factors & 15)
    base = (16, 8) if factors == 0x12 else (16, 16)  # a unit of the file that is edited: as many blocks
    encoded = []
    for width, height in SIZES:
        wide, high = -(-width // across), -(-height // down)
        made = jpeg((base[0] * wide, base[1] * high), subsampling="4:2:2" if factors == 0x12 else "4:2:0")
        encoded.append(with_frame(made, factors, (width, height)))
    got = pixels(decode(decoder, [np.frombuffer(data, np.uint8) for data in encoded]))
    assert [image.shape[1::-1] for image in got] == SIZES
    assert_equal(got, [plain(data) for data in encoded])


def exif(orientation: int, endian: str) -> bytes:
    order = "little" if endian == "II" else "big"

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    entry = number(274, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + number(0, 2)
    return b"Exif\0\0" + endian.encode() + number(42, 2) + number(8, 4) + number(1, 2) + entry + number(0, 4)


@pytest.mark.parametrize("endian", ["II", "MM"])
@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_orientations_are_pillows_on_either_way(orientation: int, endian: str) -> None:
    """Those that mean nothing change nothing."""
    files = [jpeg(size, exif=exif(orientation, endian)) for size in [(90, 61), (7, 3), (17, 33)]]
    files += [jpeg(mode="L", exif=exif(orientation, endian)), jpeg(progressive=True, exif=exif(orientation, endian))]
    files += [stray(data) for data in files]
    for apply_exif in (False, True):
        decoder = make_decoder(apply_exif=apply_exif)
        got = pixels(decode(decoder, [np.frombuffer(data, np.uint8) for data in files]))
        assert_equal(got, [plain(data, apply_exif) for data in files])
        decoder.close()
    turned = orientation in (5, 6, 7, 8)
    assert [image.shape[:2] for image in got[:1]] == [(90, 61) if turned else (61, 90)]


def test_arithmetic_coding_comes_out_as_pillows(by_dali) -> None:
    files = sorted((SHARED / "hostile" / "arithmetic").glob("*.jpg"))
    if not files:
        pytest.skip("../shared/hostile is not here")
    decoder, seen = by_dali
    for file in files:
        data = file.read_bytes()
        assert "arithmetic" in read_jpeg_frame(data).process
        assert_equal(pixels(decode(decoder, [np.frombuffer(data, np.uint8)])), [plain(data)])
    assert seen == [0]


@pytest.mark.parametrize(("marker", "precision"), [(0xC0, 12), (0xC1, 12), (0xC1, 16), (0xC3, 8), (0xC7, 8)])
def test_what_pillow_does_not_take_is_refused_by_name(marker: int, precision: int, by_dali) -> None:
    decoder, seen = by_dali
    data = bytearray(with_process(jpeg(), marker))
    data[segment(bytes(data), marker) + 4] = precision
    with pytest.raises(DecodeError, match=r"sample 0 \(file-0.jpg\): \w+"):
        decode(decoder, [np.frombuffer(bytes(data), np.uint8)])
    assert seen == [0]
