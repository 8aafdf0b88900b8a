"""The header reader agrees with Pillow on sizes and never raises anything but HeaderError, whatever the bytes are."""

import contextlib
import csv
import io
import random
import struct
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slipstream.header import Header, HeaderError, JpegFrame, is_image, read_header, read_jpeg_frame

FORMATS = {
    "jpeg": ("JPEG", {}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "webp": ("WEBP", {}),
    "jpeg2000": ("JPEG2000", {}),
    "pnm": ("PPM", {}),
}


@pytest.fixture
def shared():
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared files beside the checkout")
    return folder


def encode(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


def picture(mode="RGB", size=(37, 23)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pillow_header(data):
    """Size and orientation as Pillow has them on opening, None if it does not open the data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return image.size, image.getexif().get(0x0112, 1), image.format
    except Exception:
        return None


@pytest.mark.parametrize("name", FORMATS)
def test_reads_each_format(name):
    format, options = FORMATS[name]
    for mode, channels in (("RGB", 3), ("L", 1)):
        data = encode(picture(mode), format, **options)
        header = read_header(data)
        assert header[:3] == (name, 23, 37)
        assert header.channels == (3 if (name, mode) in (("bmp", "L"), ("webp", "L")) else channels)
        assert is_image(data)
        for cut in (0, 1, 2, 3, 8):
            with pytest.raises(HeaderError):
                read_header(data[:cut])


@pytest.mark.parametrize(
    ("format", "mode", "options", "expected"),
    [
        ("TIFF", "RGB", {"big_tiff": True}, Header("tiff", 23, 37, 3, 1)),
        ("WEBP", "RGB", {"lossless": True}, Header("webp", 23, 37, 3, 1)),
        ("WEBP", "RGBA", {"lossless": True, "exif": b"Exif\0\0"}, Header("webp", 23, 37, 4, 1)),
        ("JPEG2000", "RGB", {"no_jp2": True}, Header("jpeg2000", 23, 37, 3, 1)),
        ("PNG", "RGBA", {}, Header("png", 23, 37, 4, 1)),
        ("PNG", "P", {}, Header("png", 23, 37, 3, 1)),
        ("PPM", "1", {}, Header("pnm", 23, 37, 1, 1)),
        ("JPEG", "CMYK", {}, Header("jpeg", 23, 37, 4, 1)),
        ("JPEG", "RGB", {"progressive": True, "icc_profile": bytes(200_000)}, Header("jpeg", 23, 37, 3, 1)),
    ],
)
def test_reads_variants(format, mode, options, expected):
    image = picture(mode) if mode != "RGBA" else picture().convert("RGBA").transpose(Image.Transpose.ROTATE_180)
    if mode == "RGBA":
        image.putalpha(77)
    assert read_header(encode(image, format, **options)) == expected


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 0, 9])
def test_reads_the_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    header = read_header(encode(picture(), format, exif=exif))
    assert header.orientation == (orientation if 1 <= orientation <= 8 else 1)
    assert (header.height, header.width) == (23, 37)  # as stored


def test_bmp_rows_from_the_top():
    data = bytearray(encode(picture(), "BMP"))
    data[22:26] = struct.pack("<i", -23)
    assert read_header(np.frombuffer(data, np.uint8))[:3] == ("bmp", 23, 37)


def jpeg_of(*segments):
    return np.frombuffer(b"\xff\xd8" + b"".join(segments), np.uint8)


def frame(height, width, marker=0xC0, channels=3):
    body = struct.pack(">BHHB", 8, height, width, channels) + bytes(3 * channels)
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(body)) + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (jpeg_of(frame(0, 5)), "height 0, width 5"),
        (jpeg_of(frame(5, 0)), "height 5, width 0"),
        (jpeg_of(frame(5, 5, channels=0)), "0 components"),
        (jpeg_of(b"\xff\xda\0\x02", frame(5, 5)), "scan before"),
        (jpeg_of(b"\xff\xd9\0\x02", frame(5, 5)), "EOI"),
        (jpeg_of(b"\xff\xe0\xff\xff", frame(5, 5)), "no frame header"),
        (jpeg_of(b"\xff\x80\0\x02", frame(5, 5)), "unknown marker 0xFF80"),
        (jpeg_of(frame(5, 5))[:-10], "no frame header"),
        (np.frombuffer(b"GIF89a" + bytes(20), np.uint8), "unknown image format"),
        (np.empty(0, np.uint8), "unknown image format"),
    ],
)
def test_says_what_is_wrong(data, reason):
    with pytest.raises(HeaderError, match=reason):
        read_header(data)


def test_steps_over_fill_bytes_stray_bytes_and_other_tables():
    data = jpeg_of(
        b"\xff\xff\xff\xff\xe0\0\x04ab", bytes(700), b"\xff\0\xff\xd0", frame(1, 2, 0xC4), frame(30, 40, 0xC9)
    )
    assert read_header(data) == Header("jpeg", 30, 40, 3, 1)


def test_reads_a_huge_size_as_such():
    assert read_header(jpeg_of(frame(30000, 30000)))[1:3] == (30000, 30000)


def test_endless_segments_and_junk_end_quickly():
    begin = time.perf_counter()
    for filling in (b"\xff\xe0\0\x02", b"\xff", b"\0", b"\xff\0", b"\0\xff"):
        with pytest.raises(HeaderError):
            read_header(jpeg_of(filling * (20_000_000 // len(filling))))
    assert time.perf_counter() - begin < 5


def test_text_and_other_bytes_are_no_image():
    for data in (b"", b"BM", b"BMW is a maker of cars and engines", b"P5", b"P6 players", b"hello", b"II*", bytes(64)):
        assert not is_image(np.frombuffer(data, np.uint8))
    assert is_image(jpeg_of(b"\xff\xe0"))


def test_sizes_equal_pillow_on_real_photos(shared):
    files = sorted((shared / "photos").rglob("*.jpg"))
    assert len(files) > 100
    for file in files:
        data = np.fromfile(file, np.uint8)
        header = read_header(data)
        assert ((header.width, header.height), header.orientation) == pillow_header(data)[:2], file


def test_agrees_with_pillow_on_hostile_files(shared):
    agreed = 0
    for file in sorted((shared / "hostile").glob("*/*")):
        data = np.fromfile(file, np.uint8)
        is_image(data)
        opened = pillow_header(data)
        try:
            header = read_header(data)
        except HeaderError:
            assert opened is None or opened[2] == "AVIF", file  # DALI has no AVIF
            continue
        if opened is not None:
            size, orientation, _ = opened
            assert (header.width, header.height) == size, file
            assert header.orientation == (orientation if orientation in range(1, 9) else 1), file
            agreed += 1
    assert agreed > 250


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"subsampling": "4:4:4"}, ("baseline", "4:4:4")),
        ({"subsampling": "4:2:2"}, ("baseline", "4:2:2")),
        ({"subsampling": "4:2:0", "progressive": True}, ("progressive", "4:2:0")),
    ],
)
def test_reads_how_a_jpeg_is_coded(options, expected):
    frame = read_jpeg_frame(encode(picture(), "JPEG", **options))
    assert (frame.process, frame.subsampling, frame.precision) == (*expected, 8)
    assert read_jpeg_frame(encode(picture("L"), "JPEG")).subsampling == "grey"
    assert read_jpeg_frame(encode(picture("CMYK"), "JPEG")).subsampling == "4:4:4"


@pytest.mark.parametrize(
    ("marker", "process"),
    [
        (0xC1, "extended"),
        (0xC3, "lossless"),
        (0xC6, "differential progressive"),
        (0xC9, "extended, arithmetic"),
        (0xCA, "progressive, arithmetic"),
        (0xCF, "differential lossless, arithmetic"),
    ],
)
def test_names_every_jpeg_process(marker, process):
    frame = bytes([0xFF, 0xD8, 0xFF, marker, 0, 17, 12, 0, 5, 0, 7, 3, 1, 0x21, 0, 2, 0x11, 0, 3, 0x12, 0])
    assert read_jpeg_frame(frame) == JpegFrame(process, 12, ((2, 1), (1, 1), (1, 2)))
    assert read_jpeg_frame(frame).subsampling == "2x1 1x1 1x2"
    with pytest.raises(HeaderError, match="cut off"):
        read_jpeg_frame(frame[:-1])


def test_another_format_has_no_jpeg_frame():
    with pytest.raises(HeaderError, match="the image is png, no JPEG"):
        read_jpeg_frame(encode(picture(), "PNG"))


def test_frames_agree_with_the_list_of_hostile_files(shared):
    kinds = {"SOF0-baseline": "baseline", "SOF1-extended": "extended", "SOF2-progressive": "progressive"}
    kinds |= {
        "SOF3-lossless": "lossless",
        "SOF9-arith-seq": "extended, arithmetic",
        "SOF10-arith-prog": "progressive, arithmetic",
    }
    compared = 0
    with open(shared / "hostile" / "MANIFEST.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["expect"] != "ok":
                continue
            frame = read_jpeg_frame((shared / "hostile" / row["file"]).read_bytes())
            assert (frame.process, str(frame.precision)) == (kinds[row["sof"]], row["precision"]), row["file"]
            if row["subsampling"].startswith("4:"):
                assert frame.subsampling == row["subsampling"], row["file"]
                compared += 1
    assert compared > 100


def test_mutated_headers_raise_only_header_errors():
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [bytes(encode(picture(), format, **options)) for format, options in FORMATS.values()]
    seeds += [bytes(encode(picture(), format, exif=exif)) for format in ("JPEG", "TIFF")]
    seeds.append(bytes(encode(picture(), "TIFF", big_tiff=True)))
    rng = random.Random(0)
    read = 0
    for _ in range(20_000):
        data = bytearray(rng.choice(seeds))
        reach = min(len(data), rng.choice((32, 200, len(data))))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(reach)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        array = np.frombuffer(bytes(data), np.uint8)
        is_image(array)
        try:
            header = read_header(array)
        except HeaderError:
            continue
        assert header.height > 0
        assert header.width > 0
        with contextlib.suppress(HeaderError):
            assert read_jpeg_frame(array).subsampling
        read += 1
    assert read > 5_000
