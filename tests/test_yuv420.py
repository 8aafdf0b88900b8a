"""YUV 4:2:0 as it is stored: the law of its pixels is libjpeg's, the encoder's is the stated one, no byte too far."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.yuv420 import rgb_of_planes

from slipstream import yuv420
from slipstream.header import HeaderError, is_image, read_header

# Sizes of every parity, down to one pixel.
SIZES = [(64, 64), (63, 65), (31, 34), (50, 41), (1, 9), (17, 5), (2, 6), (9, 1), (1, 1), (3, 2), (2, 2), (5, 4)]


def random_planes(rng: np.random.Generator, height: int, width: int) -> list[np.ndarray]:
    """Planes of noise, of which many colours lie outside RGB."""
    sizes = [(height, width), *[((height + 1) // 2, (width + 1) // 2)] * 2]
    return [rng.integers(0, 256, size).astype(np.uint8) for size in sizes]


def through_jpeg(image: Image.Image, **options: int) -> Image.Image:
    """The image as libjpeg gives it back; at quality 100 each coefficient is divided by 1."""
    memory = io.BytesIO()
    image.save(memory, "JPEG", quality=100, **options)
    return Image.open(memory)


def doubled(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.repeat(np.repeat(plane, 2, axis=0), 2, axis=1)[:height, :width]


def tensors(planes) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(plane)) for plane in planes]


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if size[1] > 4])
def test_the_law_is_libjpegs(height: int, width: int) -> None:
    """A 4:2:0 JPEG whose chroma is c at half the size holds what a grey JPEG of c holds: planes known to the byte."""
    planes = random_planes(np.random.default_rng(height * 100 + width), height, width)
    inputs = [planes[0], *(doubled(plane, height, width) for plane in planes[1:])]
    decoded = through_jpeg(Image.fromarray(np.stack(inputs, axis=2), "YCbCr"), subsampling=2)
    stored = [np.asarray(through_jpeg(Image.fromarray(plane))) for plane in planes]
    assert np.array_equal(rgb_of_planes(*tensors(stored)).permute(1, 2, 0).numpy(), np.asarray(decoded.convert("RGB")))


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if min(size) < 10])
def test_the_law_holds_at_every_edge(height: int, width: int) -> None:
    """README's formula, one pixel after another: libjpeg itself has another one for chroma less than 3 wide."""
    luma, *chroma = planes = random_planes(np.random.default_rng(height * 100 + width), height, width)

    def upsampled(plane: np.ndarray, y: int, x: int) -> int:
        def row(place: int) -> int:
            above_or_below = min(max(y // 2 + (1 if y % 2 else -1), 0), plane.shape[0] - 1)
            return 3 * int(plane[y // 2, place]) + int(plane[above_or_below, place])

        left_or_right = min(max(x // 2 + (1 if x % 2 else -1), 0), plane.shape[1] - 1)
        return (3 * row(x // 2) + row(left_or_right) + 8 - x % 2) // 16

    found = rgb_of_planes(*tensors(planes)).tolist()
    for y, x in np.ndindex(height, width):
        cb, cr = (upsampled(plane, y, x) - 128 for plane in chroma)
        shares = (91881 * cr, -22554 * cb - 46802 * cr, 116130 * cb)
        for channel, share in enumerate(shares):
            value = int(luma[y, x]) + (share + 32768) // 65536
            assert found[channel][y][x] == min(max(value, 0), 255)


def exact_planes(pixels: np.ndarray) -> list[np.ndarray]:
    """The encoder's law in float64, which holds all of its numbers exactly, as dense matrices."""

    def halving(length: int) -> np.ndarray:
        matrix = np.zeros(((length + 1) // 2, length))
        for row in range(len(matrix)):
            for offset, weight in ((-2, -1), (0, 5), (1, 5), (3, -1)):
                matrix[row, min(max(2 * row + offset, 0), length - 1)] += weight / 8
        return matrix

    red, green, blue = pixels.transpose(2, 0, 1).astype(np.float64)
    across, down = halving(pixels.shape[1]).T, halving(pixels.shape[0])
    cb = down @ (-11059 * red - 21709 * green + 32768 * blue) @ across
    cr = down @ (32768 * red - 27439 * green - 5329 * blue) @ across
    luma = np.floor((19595 * red + 38470 * green + 7471 * blue) / 65536 + 0.5)
    return [luma, *(np.floor(chroma / 65536 + 128.5).clip(0, 255) for chroma in (cb, cr))]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_encoder_is_the_stated_law(height: int, width: int) -> None:
    rng = np.random.default_rng(height * 100 + width)
    # corners of the cube too, where chroma is clamped and sums are largest
    for pixels in (rng.integers(0, 256, (height, width, 3)), rng.integers(0, 2, (height, width, 3)) * 255):
        pixels = pixels.astype(np.uint8)
        for plane, expected in zip(yuv420.parse(stored(pixels)), exact_planes(pixels), strict=True):
            assert np.array_equal(plane, expected)


def stored(pixels: np.ndarray) -> np.ndarray:
    return np.frombuffer(yuv420.encode(pixels), np.uint8)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def test_grey_comes_back_as_it_was() -> None:
    grey = np.repeat(np.random.default_rng(1).integers(0, 256, (33, 47, 1)), 3, axis=2).astype(np.uint8)
    assert np.array_equal(yuv420.decode(stored(grey)), grey)


def test_photographs_come_back_close(photos: list[Path]) -> None:
    """Chroma at half size costs what it costs; halved by the mean it would cost 2 dB more."""
    found, by_mean = [], []
    for path in photos[::8]:
        pixels = np.asarray(Image.open(path).convert("RGB").reduce(2))
        planes = yuv420.parse(stored(pixels))
        found.append(psnr(yuv420.decode(stored(pixels)), pixels))
        ycc = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
        halves = [np.asarray(Image.fromarray(ycc[:, :, i]).reduce(2)) for i in (1, 2)]
        by_mean.append(psnr(rgb_of_planes(*tensors([planes.luma, *halves])).permute(1, 2, 0).numpy(), pixels))
    assert min(found) > 30 and np.median(found) > 40
    assert np.median(found) > np.median(by_mean) + 1


def test_the_header_says_size_and_format() -> None:
    data = stored(np.zeros((300, 1, 3), np.uint8))
    assert bytes(data[:16]) == b"\x93YUV420\x01" + struct.pack("<II", 300, 1)
    header = read_header(data)
    assert (header.format, header.height, header.width, header.channels, header.orientation) == ("yuv420", 300, 1, 3, 1)
    assert is_image(data) and yuv420.is_yuv420(data)
    assert not yuv420.is_yuv420(b"\x93YUV") and not is_image(b"\x93YUV")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], r"height 7 and width 9, which take 119 bytes: the data has 118"),
        (lambda data: data + b"\0", r"which take 119 bytes: the data has 120"),
        (lambda data: data[:16], r"which take 119 bytes: the data has 16"),
        (lambda data: data[:12], r"cut off: the data has 12 bytes"),
        (lambda data: data[:7], r"cut off: the data has 7 bytes"),
        (lambda data: data[:7] + b"\2" + data[8:], r"of version 2: this Slipstream reads version 1"),
        (lambda data: data[:8] + struct.pack("<II", 2**32 - 1, 2**32 - 1) + data[16:], r"bytes: the data has 119"),
        (lambda data: data[:8] + struct.pack("<II", 0, 9) + data[16:], r"height 0, width 9: both must be > 0"),
        (lambda data: data[:8] + struct.pack("<II", 9, 7) + data[16:-2], r"the data has 117"),
        (lambda data: b"\x89PNG\r\n\x1a\n" + data[8:], r"PNG"),
        (lambda data: b"", r"unknown image format"),
    ],
)
def test_bytes_that_the_header_does_not_fit_are_refused(change, message: str) -> None:
    data = yuv420.encode(np.zeros((7, 9, 3), np.uint8))
    with pytest.raises(HeaderError, match=message):
        yuv420.parse(np.frombuffer(change(data), np.uint8))


def test_too_many_pixels_are_refused() -> None:
    data = stored(np.zeros((7, 9, 3), np.uint8))
    assert yuv420.decode(data, max_pixels=63).shape == (7, 9, 3)
    with pytest.raises(ValueError, match="63 pixels, max_pixels is 62"):
        yuv420.decode(data, max_pixels=62)


def jpeg(pixels: np.ndarray, **options) -> np.ndarray:
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "JPEG", **options)
    return np.frombuffer(memory.getvalue(), np.uint8)


def test_an_encoded_image_is_stored_at_its_own_size_or_smaller(scenes: list[np.ndarray]) -> None:
    data = jpeg(scenes[1])  # 333 x 187
    pixels = np.asarray(Image.open(io.BytesIO(data.tobytes())))
    assert yuv420.encode_image(data) == yuv420.encode_image(data, short_side=187) == yuv420.encode(pixels)
    resized = Image.fromarray(pixels).resize((101, 179), Image.Resampling.LANCZOS)  # 333 * 101 / 187 is 179.9
    assert yuv420.encode_image(data, short_side=101) == yuv420.encode(np.asarray(resized))


def test_a_stored_image_may_be_stored_again(scenes: list[np.ndarray]) -> None:
    data = stored(scenes[0])
    assert yuv420.encode_image(data) == yuv420.encode_image(data, short_side=240) == bytes(data)
    small = yuv420.decode(np.frombuffer(yuv420.encode_image(data, short_side=60), np.uint8))
    assert small.shape == (60, 80, 3)
    with pytest.raises(HeaderError, match="the data has"):
        yuv420.encode_image(data[:-1])


def test_an_orientation_is_applied_before_it_is_lost(scenes: list[np.ndarray]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = jpeg(scenes[0], exif=exif)
    assert read_header(np.frombuffer(yuv420.encode_image(data), np.uint8))[1:3] == (240, 320)
    assert read_header(np.frombuffer(yuv420.encode_image(data, apply_exif=True), np.uint8))[1:3] == (320, 240)


def test_what_cannot_be_decoded_is_refused(scenes: list[np.ndarray]) -> None:
    data = jpeg(scenes[0])
    with pytest.raises(OSError, match="truncated"):
        yuv420.encode_image(data[: len(data) // 2])
    with pytest.raises(ValueError, match="max_pixels is 100"):
        yuv420.encode_image(data, max_pixels=100)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \[H, W, 3\]"):
            yuv420.encode(wrong)


def batch_of(images: list[list[np.ndarray]]) -> RaggedBatch:
    return RaggedBatch.from_planes([tuple(planes) for planes in images])


def test_a_ragged_batch_shows_planes_as_rgb() -> None:
    rng = np.random.default_rng(2)
    images = [random_planes(rng, *size) for size in SIZES]
    wide = [np.pad(plane, ((1, 2), (3, 4)))[1:-2, 3:-4] for plane in images[0]]  # rows that lie apart
    batch = batch_of([wide, *images])
    assert batch.has_planes
    for index, planes in enumerate([images[0], *images]):
        assert torch.equal(batch.image(index), rgb_of_planes(*tensors(planes)))


def test_rows_of_planes_and_of_rgb_share_a_batch(scenes: list[np.ndarray]) -> None:
    rng = np.random.default_rng(3)
    planes, rgb = batch_of([random_planes(rng, *size) for size in SIZES[:4]]), RaggedBatch.from_arrays(scenes[:2])
    assert not rgb.has_planes
    for one, other in ((planes, rgb), (rgb, planes.rows(np.array([3])))):
        rows = np.arange(len(other))
        mixed = one.with_rows(rows, other)
        for index in range(len(one)):
            source, place = (other, index) if index in rows else (one, index)
            assert torch.equal(mixed.image(index), source.image(place))
        assert mixed.has_planes
        kept = mixed.rows(np.array([1, 0]))
        assert torch.equal(kept.image(1), mixed.image(0)) and torch.equal(kept.image(0), mixed.image(1))
    assert not planes.with_rows(np.arange(2), rgb).rows(np.arange(2)).has_planes


def test_planes_that_do_not_fit_are_refused() -> None:
    luma, half = np.zeros((7, 9), np.uint8), np.zeros((4, 5), np.uint8)
    with pytest.raises(ValueError, match=r"images\[0\] must have Cb and Cr \[4, 5\]"):
        RaggedBatch.from_planes([(luma, half, half[:3])])
    with pytest.raises(ValueError, match=r"images\[0\] must have Cb and Cr \[4, 5\] of like strides"):
        RaggedBatch.from_planes([(luma, half, np.zeros((4, 9), np.uint8)[:, :5])])
    with pytest.raises(ValueError, match=r"chroma\[0\] is of planes, which need .* strides \(0, any, 1\)"):
        RaggedBatch.from_planes([(np.zeros((7, 18), np.uint8)[:, ::2], half, half)])
    with pytest.raises(ValueError, match=r"blue must be \[4, 5\] for luma \[7, 9\], got \[5, 4\]"):
        rgb_of_planes(*tensors([luma, half.T, half]))
