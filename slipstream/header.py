"""Size and layout of an encoded image, read from its first bytes without decoding it.

Covers what DALI's image decoder takes: JPEG, PNG, BMP, TIFF, WebP, JPEG 2000 and PNM; and the YUV 4:2:0 that yuv420.py
writes. The bytes may be hostile: no read goes beyond the buffer and every loop is bounded, whatever the file says.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np

# Sane files have a few segments before the frame header; embedded profiles and previews make it a few hundred.
_MAX_SEGMENTS = 65_536
_MAX_TIFF_ENTRIES = 4_096
_MAX_BOXES = 256
_JUNK_STEP = 256
_PNM_HEADER_BYTES = 4_096

_FRAME = struct.Struct(">HBHHB")
_SHORT, _LONG, _LONG8 = 3, 4, 16
_TIFF_SIZES = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}
_BMP_CORE, _BMP_INFO = 12, (40, 52, 56, 64, 108, 124)
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
# By the marker's low bits: Huffman coding; 8 more is the same with arithmetic coding (ITU T.81, table B.1).
_JPEG_PROCESSES = {0: "baseline", 1: "extended", 2: "progressive", 3: "lossless"}
_JPEG_PROCESSES |= {4 + kind: f"differential {_JPEG_PROCESSES[kind]}" for kind in (1, 2, 3)}
_SUBSAMPLINGS = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0", (1, 2): "4:4:0", (4, 1): "4:1:1", (4, 2): "4:1:0"}
_PNM_CHANNELS = {1: 1, 2: 1, 3: 3, 4: 1, 5: 1, 6: 3}
_PNM_HEADER = re.compile(rb"P([1-6])(?:\s|#[^\n]*\n)+(\d{1,10})(?:\s|#[^\n]*\n)+(\d{1,10})\s")

# Magic, version, height, width: see yuv420.py.
YUV420 = struct.Struct("<7sBII")
YUV420_MAGIC, YUV420_VERSION = b"\x93YUV420", 1


class HeaderError(ValueError):
    """The bytes are no image that Slipstream knows, or their header is damaged; the message says what is wrong."""


class Header(NamedTuple):
    """What an encoded image says about itself.

    `height` and `width` are in stored pixels, before any orientation is applied. `channels` counts the stored
    components (3 for a palette). `orientation` is the EXIF value 1 to 8 of a JPEG or a TIFF; 1 where there is none.
    """

    format: str
    height: int
    width: int
    channels: int
    orientation: int


class JpegFrame(NamedTuple):
    """How a JPEG is coded.

    `process` is "baseline", "extended", "progressive" or "lossless", with "differential " before it or ", arithmetic"
    behind it where that is so. `precision` is in bits a sample, `factors` each component's sampling (across, down).
    """

    process: str
    precision: int
    factors: tuple[tuple[int, int], ...]

    @property
    def subsampling(self) -> str:
        """Chroma's name, such as "4:2:0"; "grey" for one component, and the factors as they are where there is none.

        The name is that of the second and third component; a fourth (black) does not change it.
        """
        if len(self.factors) == 1:
            return "grey"
        (across, down), *others = self.factors
        if len(others) in (2, 3) and others[0] == others[1]:
            wide, high = others[0]
            if wide and high and across % wide == down % high == 0:
                name = _SUBSAMPLINGS.get((across // wide, down // high))
                if name is not None:
                    return name
        return " ".join(f"{across}x{down}" for across, down in self.factors)


def read_header(data: np.ndarray | bytes) -> Header:
    """Read an encoded image's size, channels and EXIF orientation.

    `data` is uint8 [n_bytes]. Raises HeaderError with the reason if the format is not known, the header is damaged or
    cut off, or a side is 0.
    """
    view = memoryview(data)  # pyright: ignore[reportArgumentType]  (its stubs know no buffers before Python 3.12)
    head = bytes(view[:12])
    if head[:3] == b"\xff\xd8\xff":
        header = _read_jpeg(view)
    else:
        reader = _reader_of(head)
        if reader is None:
            raise HeaderError(f"unknown image format: the data begins with {head!r} and has {len(view)} bytes")
        try:
            header = reader(view)
        except struct.error:
            raise HeaderError(f"image header is cut off: the data has {len(view)} bytes") from None
    if header.height <= 0 or header.width <= 0:
        raise HeaderError(f"{header.format} header says height {header.height}, width {header.width}: both must be > 0")
    return header


def read_jpeg_frame(data: np.ndarray | bytes) -> JpegFrame:
    """Read how a JPEG (uint8 [n_bytes]) is coded; HeaderError where `read_header` raises it, or for another format."""
    header = read_header(data)
    if header.format != "jpeg":
        raise HeaderError(f"the image is {header.format}, no JPEG")
    view = memoryview(data)  # pyright: ignore[reportArgumentType]
    at, _ = _find_frame(view)
    first, stop = at + 10, at + 10 + 3 * header.channels
    if stop > len(view):
        raise HeaderError(f"JPEG frame header is cut off: the data has {len(view)} bytes")
    kind, precision = view[at + 1] & 15, view[at + 4]
    process = _JPEG_PROCESSES[kind & 7] + (", arithmetic" if kind & 8 else "")
    return JpegFrame(process, precision, tuple((view[i] >> 4, view[i] & 15) for i in range(first + 1, stop, 3)))


def is_image(data: np.ndarray | bytes) -> bool:
    """Tell whether `data` (uint8 [n_bytes]) begins as an image of a format that is decoded; never raises on bytes."""
    view = memoryview(data)  # pyright: ignore[reportArgumentType]
    head = bytes(view[:12])
    if head[:3] == b"\xff\xd8\xff":
        return True
    # "BM" and "P5" also begin ordinary text, so those two must have a whole header.
    if head[:2] == b"BM":
        return len(view) >= 26 and _u32_le(view, 14) in (_BMP_CORE, *_BMP_INFO)
    if head[:1] == b"P":
        return _PNM_HEADER.match(bytes(view[:_PNM_HEADER_BYTES])) is not None
    return _reader_of(head) is not None


def _reader_of(head: bytes):
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return _read_png
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _read_webp
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _read_tiff
    if head[:4] == b"\xffO\xffQ" or head == b"\0\0\0\x0cjP  \r\n\x87\n":
        return _read_jpeg2000
    if head[:2] == b"BM":
        return _read_bmp
    if head[:7] == YUV420_MAGIC:
        return _read_yuv420
    if head[:1] == b"P" and head[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6"):
        return _read_pnm
    return None


def _u32_le(view: memoryview, at: int) -> int:
    return int.from_bytes(view[at : at + 4], "little")


def _read_jpeg(view: memoryview) -> Header:
    at, orientation = _find_frame(view)
    length, _, height, width, channels = _FRAME.unpack_from(view, at + 2)
    if length != 8 + 3 * channels or channels == 0:
        raise HeaderError(f"JPEG frame header has {length} bytes for {channels} components")
    return Header("jpeg", height, width, channels, orientation)


def _find_frame(view: memoryview) -> tuple[int, int]:
    """Walk the marker segments to the first frame header (ITU T.81, B.2), with libjpeg's tolerance for stray bytes.

    Gives where its marker is, with 10 bytes of it there, and the EXIF orientation that came before it.
    """
    end = len(view)
    at = 2
    orientation = 0
    for _ in range(_MAX_SEGMENTS):
        if at + 4 > end:
            break
        if view[at] != 0xFF:
            skipped = bytes(view[at : at + _JUNK_STEP]).find(b"\xff")
            at += _JUNK_STEP if skipped < 0 else skipped
            continue
        marker = view[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD8:  # stuffed byte, TEM, RSTn and SOI have no length
            at += 2
            continue
        length = view[at + 2] << 8 | view[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > end:
                break
            return at, orientation or 1
        if marker == 0xDA:
            raise HeaderError("JPEG has a scan before any frame header")
        if marker == 0xD9:
            raise HeaderError("JPEG ends (EOI) before any frame header")
        if marker < 0xC0:
            raise HeaderError(f"JPEG has the unknown marker 0xFF{marker:02X} at byte {at}")
        if marker == 0xE1 and orientation == 0 and view[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(view[at + 10 : at + 2 + length])
        at += 2 + max(length, 2)  # Pillow steps over a length of 0 or 1 too
    raise HeaderError(f"JPEG has no frame header in its {end} bytes, or none in its first {_MAX_SEGMENTS} segments")


def _exif_orientation(exif: memoryview) -> int:
    """EXIF orientation 1 to 8 of an EXIF block, and 1 when it is absent or the block is damaged."""
    try:
        value = _tiff_fields(exif, (274,)).get(274, 1)
    except (HeaderError, struct.error):
        return 1
    return value if 1 <= value <= 8 else 1


def _tiff_fields(view: memoryview, tags: tuple[int, ...]) -> dict[int, int]:
    """First values of whole-number fields in the first directory of a TIFF block (TIFF 6.0 and BigTIFF)."""
    order = "<" if view[:1] == b"I" else ">"
    big = struct.unpack_from(order + "H", view, 2)[0] == 43
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), view, 8 if big else 4)
    entry_bytes, value_at, room = (20, 12, 8) if big else (12, 8, 4)
    if start >= len(view):
        raise HeaderError(f"TIFF directory at byte {start} is beyond the {len(view)} bytes of data")
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), view, start)
    first = start + (8 if big else 2)
    fields: dict[int, int] = {}
    for i in range(min(count, _MAX_TIFF_ENTRIES)):
        at = first + i * entry_bytes
        if at + entry_bytes > len(view):
            break
        tag, kind = struct.unpack_from(order + "HH", view, at)
        if tag not in tags or tag in fields or kind not in _TIFF_SIZES:
            continue
        (values,) = struct.unpack_from(order + ("Q" if big else "I"), view, at + 4)
        code = order + _TIFF_SIZES[kind]
        at += value_at
        if values * struct.calcsize(code) > room:  # the values are elsewhere; all are alike for the fields read here
            (at,) = struct.unpack_from(order + ("Q" if big else "I"), view, at)
        if values == 0 or at + struct.calcsize(code) > len(view):
            continue
        (fields[tag],) = struct.unpack_from(code, view, at)
    return fields


def _read_tiff(view: memoryview) -> Header:
    fields = _tiff_fields(view, (256, 257, 274, 277))
    if 256 not in fields or 257 not in fields:
        raise HeaderError("TIFF has no width or no height in its first directory")
    orientation = fields.get(274, 1)
    return Header("tiff", fields[257], fields[256], fields.get(277, 1), orientation if 1 <= orientation <= 8 else 1)


def _read_png(view: memoryview) -> Header:
    length, kind, width, height, _, colour = struct.unpack_from(">I4sIIBB", view, 8)
    if kind != b"IHDR" or length != 13 or colour not in _PNG_CHANNELS:
        raise HeaderError(f"PNG begins with chunk {kind!r} of {length} bytes, colour type {colour}, not a valid IHDR")
    return Header("png", height, width, _PNG_CHANNELS[colour], 1)


def _read_bmp(view: memoryview) -> Header:
    (size,) = struct.unpack_from("<I", view, 14)
    if size == _BMP_CORE:
        width, height, _, bits = struct.unpack_from("<HHHH", view, 18)
    elif size in _BMP_INFO:
        width, height, _, bits = struct.unpack_from("<iiHH", view, 18)
    else:
        raise HeaderError(f"BMP information header has {size} bytes: known sizes are {(_BMP_CORE, *_BMP_INFO)}")
    return Header("bmp", abs(height), width, 4 if bits == 32 else 3, 1)  # a negative height means rows from the top


def _read_webp(view: memoryview) -> Header:
    (kind,) = struct.unpack_from("4s", view, 12)
    if kind == b"VP8X":
        flags, low, mid = struct.unpack_from("<I4xHB", view, 16 + 4)[0], *struct.unpack_from("<HB", view, 24)
        width = (low | mid << 16) + 1
        low, mid = struct.unpack_from("<HB", view, 27)
        return Header("webp", (low | mid << 16) + 1, width, 4 if flags & 0x10 else 3, 1)
    if kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", view, 20)
        if signature != 0x2F:
            raise HeaderError(f"WebP lossless data begins with 0x{signature:02X}, not 0x2F")
        return Header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 4 if bits >> 28 & 1 else 3, 1)
    if kind == b"VP8 ":
        start, width, height = struct.unpack_from("<3sHH", view, 23)
        if start != b"\x9d\x01\x2a":
            raise HeaderError("WebP lossy data does not begin with a key frame")
        return Header("webp", height & 0x3FFF, width & 0x3FFF, 3, 1)
    raise HeaderError(f"WebP begins with the unknown chunk {kind!r}")


def _read_jpeg2000(view: memoryview) -> Header:
    at = 0
    if view[:1] != b"\xff":  # in boxes: the code stream is the truth, whatever the image header box says
        at = _code_stream_start(view)
    marker, _, _, right, bottom, left, top = struct.unpack_from(">IHHIIII", view, at)
    (channels,) = struct.unpack_from(">H", view, at + 40)
    if marker != 0xFF4FFF51:
        raise HeaderError("JPEG 2000 code stream does not begin with SOC and SIZ")
    return Header("jpeg2000", bottom - top, right - left, channels, 1)


def _code_stream_start(view: memoryview) -> int:
    at = 0
    for _ in range(_MAX_BOXES):
        length, kind = struct.unpack_from(">I4s", view, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", view, body)
            body += 8
        if kind == b"jp2c":
            return body
        if length < body - at or at + length > len(view):
            break
        at += length
    raise HeaderError("JPEG 2000 file has no code stream box")


def _read_pnm(view: memoryview) -> Header:
    match = _PNM_HEADER.match(bytes(view[:_PNM_HEADER_BYTES]))
    if match is None:
        raise HeaderError("PNM header has no width and height")
    kind, width, height = (int(text) for text in match.groups())
    return Header("pnm", height, width, _PNM_CHANNELS[kind], 1)


def _read_yuv420(view: memoryview) -> Header:
    _, version, height, width = YUV420.unpack_from(view)
    if version != YUV420_VERSION:
        raise HeaderError(f"yuv420 data is of version {version}: this Slipstream reads version {YUV420_VERSION}")
    return Header("yuv420", height, width, 3, 1)
