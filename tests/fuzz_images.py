"""Mutated images among whole ones: what Pillow takes comes out with its pixels, and the rest is named."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from conftest import SHARED
from decode_samples import encode, make_decoder, picture, pixels
from fuzz_mutations import mutate

from slipstream import yuv420
from slipstream.decode import DecodeError
from slipstream.decode_pillow import check_size, decode_with_pillow
from slipstream.header import HeaderError, is_image, read_header, read_jpeg_frame
from slipstream.jpeg_scan import is_in_order

# A mutated size is one of 65,535 often; what such files cost has a test of its own.
MAX_PIXELS = 2_000_000
GREY = np.full((4, 4, 3), 77, np.uint8)
PHOTO_BYTES = 60_000


def seeds() -> list[bytes]:
    """Images of every format and coding, small; and some photographs if they are there."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    jpegs: list[dict] = [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "quality": 95},
        {"progressive": True},
        {"progressive": True, "subsampling": 0, "restart_marker_blocks": 2},
        {"restart_marker_blocks": 1},
        {"optimize": True, "exif": exif},
        {"mode": "L"},
        {"mode": "L", "progressive": True},
        {"mode": "CMYK"},
        {"keep_rgb": True},
    ]
    made = [
        encode(picture(i, (90, 61)).convert(options.pop("mode", "RGB")), **options) for i, options in enumerate(jpegs)
    ]
    made *= 2  # JPEGs are what matters most
    for format, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "LA", {}),
        ("BMP", "RGB", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("JPEG2000", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ):
        made.append(encode(picture(40, (50, 37)).convert(mode), format, **options))
    photos = sorted((SHARED / "photos").rglob("*.jp*g"), key=lambda path: path.stat().st_size)
    made += [np.fromfile(path, np.uint8) for path in photos[:60:10] if path.stat().st_size < PHOTO_BYTES]
    stored = [yuv420.encode(np.asarray(picture(50, size))) for size in ((40, 30), (33, 21))]
    return [data.tobytes() for data in made] + stored


class Images:
    """Batches of mutated images between two whole ones."""

    def __init__(self, folder: Path) -> None:
        self.seeds = seeds()
        self.whole = [encode(picture(i, (64 + i, 48))) for i in range(8)]
        self.pixels = [decode_with_pillow(data) for data in self.whole]
        self.strict = make_decoder(max_pixels=MAX_PIXELS, max_batch=16)
        self.lenient = make_decoder(max_pixels=MAX_PIXELS, max_batch=16, truncated="grey")

    def check(self, rng: np.random.Generator) -> int:
        count = int(rng.integers(1, 7))
        torn = []
        for _ in range(count):
            seed = self.seeds[int(rng.integers(len(self.seeds)))]
            torn.append(np.frombuffer(mutate(seed, rng, head=700, others=self.seeds), np.uint8))
        for data in torn:
            headers_are_bounded(data)
        first, last = (int(i) for i in rng.integers(len(self.whole), size=2))
        batch = [self.whole[first], *torn, self.whole[last]]
        truncated = "grey" if rng.random() < 0.25 else "fail"
        self.compare(batch, (first, last), truncated)
        return count

    def compare(self, batch: list[np.ndarray], whole: tuple[int, int], truncated: str) -> None:
        decoder = self.lenient if truncated == "grey" else self.strict
        partial: dict[int, str] = {}
        ids = range(100, 100 + len(batch))
        got, reasons = decoder.decode_or_stand_in(batch, ids, str, stand_in=GREY, partial=partial)
        images = pixels(got)
        assert np.array_equal(images[0], self.pixels[whole[0]]), "the first neighbour changed"
        assert np.array_equal(images[-1], self.pixels[whole[1]]), "the last neighbour changed"
        assert not {0, len(batch) - 1} & (set(reasons) | set(partial)), f"a whole neighbour is named: {reasons}"
        assert all(reasons.values()) and all(partial.values()), "a failure without a reason"
        for row, data in enumerate(batch[1:-1], 1):
            expected, lenient = by_pillow(data, "fail"), None
            if expected is None and truncated == "grey":
                expected = lenient = by_pillow(data, "grey")
            what = f"row {row}, {data[:4].tobytes()!r}, {len(data)} bytes, {truncated}"
            assert (row in reasons) == (expected is None), f"{what}: Pillow {expected is not None}, {reasons.get(row)}"
            assert (row in partial) == (lenient is not None), f"{what}: in part {row in partial}"
            assert_same(images[row], GREY if expected is None else expected, what)
        named: list[int] = []
        try:
            decoder.decode(batch, ids, str)
        except DecodeError as error:
            named = [number - 100 for number, _, _ in error.failures]
        assert named == sorted(reasons), f"decode() names {named}, decode_or_stand_in() {sorted(reasons)}"


def by_pillow(data: np.ndarray, truncated: str) -> np.ndarray | None:
    try:
        if yuv420.is_yuv420(data):  # there is no half of one
            return yuv420.decode(data, max_pixels=MAX_PIXELS)
        with contextlib.suppress(HeaderError):  # ours sees what JPEG 2000's code stream says, Pillow the box around it
            header = read_header(data)
            check_size(header.format, header.height, header.width, len(data), MAX_PIXELS)
        return decode_with_pillow(data, max_pixels=MAX_PIXELS, truncated=truncated)
    except Exception:
        return None


def assert_same(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: {got.shape}, Pillow's {expected.shape}"
    most = int(np.abs(got.astype(np.int16) - expected).max())
    assert most == 0, f"{what}: {most} from Pillow's pixels"


def headers_are_bounded(data: np.ndarray) -> None:
    """What reads headers raises nothing but HeaderError, whatever the bytes."""
    for read in (read_header, read_jpeg_frame):
        with contextlib.suppress(HeaderError):
            read(data)
    is_image(data)
    is_in_order(data)
