"""Which JPEGs are in order: every ordinary one, whatever lies behind its end, and none with a marker out of place."""

from __future__ import annotations

import io

import numpy as np
import pytest
from decode_samples import MAX_PIXELS, assert_equal, decode, encode, jpegs, make_decoder, picture, pixels
from PIL import Image

from slipstream import jpeg_scan
from slipstream.decode import DecodeError
from slipstream.decode_pillow import decode_with_pillow
from slipstream.jpeg_scan import is_in_order

ORDINARY = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1},
    "exif": {"exif": b"Exif\0\0" + b"\xff\xd9" * 40},
    "comment": {"comment": b"\xff\xda" * 9},
    "quality 100": {"quality": 100},
}


def jpeg(**options) -> bytes:
    return bytes(encode(picture(3, (120, 90)), **options))


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def scan_of(data: bytes) -> int:
    """Where the first scan's coded data begins."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_files_are_in_order_whatever_comes_behind_them(kind: str) -> None:
    data = jpeg(**ORDINARY[kind])
    for behind in (b"", b"\0", b"\xff", b"\r\n", bytes(70_000), b"\xff\xd8\xff\xe1" + bytes(99), data, data[:200]):
        assert is_in_order(as_array(data + behind)), (kind, behind[:4])


def test_a_file_with_pictures_behind_the_first_is_in_order() -> None:
    out = io.BytesIO()
    picture(0).save(out, "MPO", save_all=True, append_images=[picture(1)])
    assert is_in_order(as_array(out.getvalue()))


def test_fill_bytes_before_a_marker_are_in_order() -> None:
    data = jpeg()
    at = data.index(b"\xff\xdb")
    assert is_in_order(as_array(data[:at] + b"\xff\xff\xff" + data[at:]))
    assert is_in_order(as_array(data[:-2] + b"\xff\xff" + data[-2:]))


@pytest.mark.parametrize("kind", ORDINARY)
def test_no_beginning_of_a_file_is_in_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(**ORDINARY[kind])
    assert not any(is_in_order(as_array(data[:end])) for end in range(len(data)))
    # The same in Python, which says so where an index is beyond the end; compiled code reads on.
    for name in ("_next_marker", "_quantizers", "_huffman_tables", "_is_frame", "_is_scan"):
        monkeypatch.setattr(jpeg_scan, name, getattr(jpeg_scan, name).py_func)
    small = bytes(encode(picture(3, (9, 7)), **ORDINARY[kind]))
    assert jpeg_scan._is_in_order.py_func(as_array(small))
    assert not any(jpeg_scan._is_in_order.py_func(as_array(small[:end])) for end in range(len(small)))


@pytest.mark.parametrize("marker", [0x01, 0x02, 0x29, 0xC0, 0xC1, 0xC3, 0xC8, 0xC9, 0xD8, 0xDC, 0xDE, 0xDF, 0xF0, 0xFD])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.5, 0.99])
def test_a_marker_that_may_not_stand_in_coded_data_is_found_anywhere(marker: int, where: float) -> None:
    data = bytearray(jpeg(quality=95))
    begin = scan_of(data)
    for at in range(begin + int(where * (len(data) - 4 - begin)), len(data) - 4)[:3]:
        torn = bytearray(data)
        torn[at : at + 2] = bytes([0xFF, marker])
        assert not is_in_order(as_array(bytes(torn))), at


@pytest.mark.parametrize("marker", [0xC4, 0xDB, 0xDD, 0xE0, 0xFE, 0xDA])
def test_a_segment_that_lies_about_its_length_is_found(marker: int) -> None:
    data = jpeg(quality=95)
    at = scan_of(data) + 500
    for length in (0, 1, 7, 400, 60_000):
        torn = data[:at] + bytes([0xFF, marker]) + length.to_bytes(2, "big") + data[at:]
        # What begins at the stated end is no marker, but by chance.
        behind = at + 2 + length
        assert torn[behind : behind + 1] != b"\xff"
        assert not is_in_order(as_array(torn)), length


@pytest.mark.parametrize(
    ("kind", "precision"), [(0xC3, 8), (0xC5, 8), (0xC9, 8), (0xCA, 8), (0xC0, 2), (0xC1, 12), (0xC0, 0)]
)
def test_other_codings_than_huffmans_of_8_bits_are_left_to_pillow(kind: int, precision: int) -> None:
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = kind, precision
    assert not is_in_order(as_array(bytes(data)))


def test_four_components_are_left_to_pillow() -> None:
    assert not is_in_order(encode(picture().convert("CMYK")))
    assert is_in_order(encode(picture().convert("L")))


def spoilt(what: str) -> bytes:
    """A file in which libjpeg finds an error before or at the first scan, by the markers' contents alone."""
    progressive = what.startswith("progressive")
    data = bytearray(jpeg(progressive=progressive))
    frame, scan = data.index(b"\xff\xc2" if progressive else b"\xff\xc0"), data.index(b"\xff\xda")
    refining = data.find(b"\xff\xda", scan + 2)  # the second scan of a progressive file: AC
    quantizer, huffman = data.index(b"\xff\xdb"), data.index(b"\xff\xc4")
    length = 2 + int.from_bytes(data[quantizer + 2 : quantizer + 4], "big")
    if what == "no quantization table":
        del data[quantizer : quantizer + length]
    elif what == "no Huffman table":
        data[scan + 6] = 0x22
    elif what == "progressive, no Huffman table":
        data[refining + 6] = 0x03
    elif what == "a component that is none":
        data[scan + 5] = 77
    elif what == "a component twice":
        data[scan + 7] = data[scan + 5]
    elif what == "a name twice":
        data[frame + 13] = data[frame + 10]
    elif what == "seven components":
        data[scan + 4] = 7
    elif what == "a longer frame":
        data[frame + 3] += 1
        data.insert(frame + 19, 0)
    elif what == "three to two":
        data[frame + 11], data[frame + 14] = 0x31, 0x21
    elif what == "a code of ones":  # two of one bit
        data[huffman + 5 : huffman + 21] = bytes([2]) + bytes(15)
        data[huffman + 23 : huffman + 2 + int.from_bytes(data[huffman + 2 : huffman + 4], "big")] = b""
        data[huffman + 2 : huffman + 4] = (21).to_bytes(2, "big")
    elif what == "out of order":
        data[scan + 5 : scan + 11] = data[scan + 7 : scan + 9] + data[scan + 5 : scan + 7] + data[scan + 9 : scan + 11]
    elif what == "a side of 65,501":
        data[frame + 7 : frame + 9] = (65_501).to_bytes(2, "big")
    elif what == "a longer interval":
        data[scan:scan] = b"\xff\xdd\0\5\0\0\0"
    elif what == "a fifth quantization table":
        data[quantizer + 4] = 4
    elif what == "a short quantization table":
        data[quantizer + 3] -= 1
        del data[quantizer + 5]
    elif what == "a short Huffman table":
        data[huffman + 3] -= 1
        del data[huffman + 30]
    elif what == "a fifth Huffman table":
        data[huffman + 4] = 4
    elif what == "more codes than bits":
        data[huffman + 5], data[huffman + 5 + 8] = 3, 0
    elif what == "a difference of 16 bits":
        data[huffman + 21] = 16
    else:
        place, value = {
            "factor 0": (frame + 11, 0x02),
            "factor 5": (frame + 11, 0x51),
            "more than ten blocks": (frame + 11, 0x44),
            "a quantizer that is none": (frame + 12, 9),
            "progressive, from 227": (refining + 7, 227),
            "progressive, to 64": (refining + 8, 64),
            "progressive, shifted by 14": (refining + 9, 14),
            "progressive, from before": (refining + 9, 0x31),
            "progressive, DC and AC": (scan + 5 + 2 * data[scan + 4] + 1, 5),
        }[what]
        data[place] = value
    return bytes(data)


@pytest.mark.parametrize(
    "what",
    [
        *("no quantization table", "no Huffman table", "progressive, no Huffman table", "a component that is none"),
        *("a component twice", "a name twice", "seven components", "a longer frame", "a longer interval"),
        *("three to two", "a code of ones", "out of order", "a side of 65,501"),
        *("a fifth quantization table", "a short quantization table", "a short Huffman table", "a fifth Huffman table"),
        *("more codes than bits", "a difference of 16 bits", "factor 0", "factor 5", "more than ten blocks"),
        *("a quantizer that is none", "progressive, from 227", "progressive, to 64", "progressive, shifted by 14"),
        *("progressive, from before", "progressive, DC and AC"),
    ],
)
def test_what_libjpeg_refuses_in_tables_frame_and_scans_is_not_in_order(what: str) -> None:
    """A GPU's decoder asks other things, and may make a picture of it."""
    data = as_array(spoilt(what))
    assert not is_in_order(data)
    with pytest.raises(OSError, match=r"broken data stream|no image that Pillow knows"):
        decode_with_pillow(data)


@pytest.mark.parametrize("name", ["DHT", "SOS", "DRI", "COM", "all of another"])
def test_nothing_may_stand_behind_the_scan_of_a_sequential_frame(name: str) -> None:
    """libjpeg reads on there, and fails on what it finds; in a progressive file that is as it must be."""
    data, other = jpeg(), jpeg(quality=40)
    table, scan = other.index(b"\xff\xc4"), other.index(b"\xff\xda")
    behind = {
        "DHT": other[table:scan][: 2 + int.from_bytes(other[table + 2 : table + 4], "big")],
        "SOS": other[scan:-2],
        "DRI": b"\xff\xdd\0\4\0\1",
        "COM": b"\xff\xfe\0\5abc",
        "all of another": other[table:-2],
    }[name]
    assert not is_in_order(as_array(data[:-2] + behind + data[-2:]))
    progressive = jpeg(progressive=True)
    comment = b"\xff\xfe\0\5abc"
    assert is_in_order(as_array(progressive[:-2] + comment + progressive[-2:]))


def test_a_sequential_frame_may_have_its_components_in_scans_of_their_own() -> None:
    """Three grey files' scans make one such file."""
    parts = [bytes(encode(picture(i, (48, 32)).convert("L"), quality=90)) for i in range(3)]
    frame, scan = parts[0].index(b"\xff\xc0"), parts[0].index(b"\xff\xda")
    sizes = parts[0][frame + 5 : frame + 9]
    three = b"\xff\xc0\0\x11\x08" + sizes + b"\3" + b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
    heads = [b"\xff\xda\0\x08\1" + bytes([i, 0]) + b"\0\x3f\0" for i in (1, 2, 3)]
    scans = [head + part[scan_of(part) : -2] for head, part in zip(heads, parts, strict=True)]
    tables = parts[0][:frame] + three + parts[0][frame + 13 : scan]
    data = as_array(tables + b"".join(scans) + b"\xff\xd9")
    assert is_in_order(data)
    decoder = make_decoder()
    assert_equal(pixels(decode(decoder, [data])), [decode_with_pillow(data)])
    decoder.close()
    assert not is_in_order(as_array(tables + b"".join(scans[:2]) + b"\xff\xd9"))
    assert not is_in_order(as_array(tables + b"".join([*scans, scans[0]]) + b"\xff\xd9"))


def test_two_frames_no_scan_and_no_frame_are_found() -> None:
    data = jpeg()
    frame = data.index(b"\xff\xc0")
    scan = data.index(b"\xff\xda")
    header = data[frame : frame + 19]
    assert not is_in_order(as_array(data[:frame] + header + data[frame:]))
    assert not is_in_order(as_array(data[:frame] + data[frame + 19 :]))
    assert not is_in_order(as_array(data[:scan] + b"\xff\xd9"))


def test_photographs_are_in_order(photos) -> None:
    assert [path.name for path in photos if not is_in_order(np.fromfile(path, np.uint8))] == []


def test_views_that_are_not_contiguous_are_read() -> None:
    data = as_array(jpeg())
    assert is_in_order(np.repeat(data, 2)[::2])


@pytest.fixture
def seen_by_dali(decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images DALI was given, call by call."""
    seen: list[int] = []
    run = decoder._pipeline.run

    def count(encoded, stream):
        seen.append(len(encoded))
        return run(encoded, stream)

    monkeypatch.setattr(decoder._pipeline, "run", count)
    return seen


def test_dali_gets_what_is_in_order_only(decoder, seen_by_dali) -> None:
    good = jpegs(4)
    torn = bytearray(bytes(good[0]))
    at = scan_of(torn) + 200
    torn[at : at + 2] = b"\xff\x29"
    with pytest.raises(DecodeError) as caught:
        decode(decoder, [*good[:2], as_array(bytes(torn)), good[2][:-2], *good[2:]])
    assert [row for row, _, _ in caught.value.failures] == [2, 3]
    assert seen_by_dali == [4]  # and in one piece: bad ones do not make it fail
    tail = as_array(bytes(good[0]) + bytes(5000))
    assert_equal(pixels(decode(decoder, [tail, good[1]])), [decode_with_pillow(data) for data in good[:2]])
    assert seen_by_dali == [4, 2]


def test_suspicious_files_that_pillow_takes_come_out(decoder, seen_by_dali) -> None:
    data = jpeg()
    at = data.index(b"\xff\xdb")
    stray = as_array(data[:at] + b"\0\0\0" + data[at:])  # bytes between two markers
    assert not is_in_order(stray)
    assert_equal(pixels(decode(decoder, [stray])), [decode_with_pillow(as_array(data), max_pixels=MAX_PIXELS)])
    assert seen_by_dali == []


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 8, 100])
def test_a_bmp_that_lacks_bytes_is_pillows(cut: int) -> None:
    """DALI takes one that lacks up to a row, and gives another picture."""
    data = encode(picture(2, (91, 60)), "BMP")
    decoder = make_decoder()
    short = data[:-cut]
    try:
        expected = np.asarray(Image.open(io.BytesIO(short)).convert("RGB"))
    except OSError:
        with pytest.raises(DecodeError):
            decode(decoder, [short])
    else:
        assert_equal(pixels(decode(decoder, [short])), [expected])
    decoder.close()
