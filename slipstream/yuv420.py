"""Stored images that need no decoder: planar YUV 4:2:0 behind a header of 16 bytes.

    bytes 0 - 6     b"\\x93YUV420"
    byte 7          the version, 1
    bytes 8 - 11    height H, little-endian
    bytes 12 - 15   width W, little-endian
    then            Y [H, W], Cb and Cr [ceil(H / 2), ceil(W / 2)], row by row, and nothing after them

kernels/README.md states what the planes are as RGB, which the crop kernels compute while they read them, and what RGB
becomes as planes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.yuv420 import chroma_size

from .crop_geometry import resized_sizes
from .decode_pillow import check_size, decode_with_pillow
from .header import YUV420, YUV420_MAGIC, YUV420_VERSION, HeaderError, read_header


class Planes(NamedTuple):
    """An image's planes, uint8: luma [H, W], blue (Cb) and red (Cr) [ceil(H / 2), ceil(W / 2)]."""

    luma: np.ndarray
    blue: np.ndarray
    red: np.ndarray


def is_yuv420(data: np.ndarray | bytes) -> bool:
    """Tell whether `data` (uint8 [n_bytes]) begins as a stored YUV 4:2:0 image of any version."""
    return bytes(memoryview(data)[: len(YUV420_MAGIC)]) == YUV420_MAGIC  # pyright: ignore[reportArgumentType]


def stored_size(data: np.ndarray, *, max_pixels: int | None = None) -> tuple[int, int]:
    """(h, w) of a stored image (uint8 [n_bytes]).

    Raises HeaderError for what is none, and where the bytes are not as many as the header's size asks for; ValueError
    for more than `max_pixels` pixels.
    """
    header = read_header(data)
    if header.format != "yuv420":
        raise HeaderError(f"the image is {header.format}, not yuv420")
    height, width = header.height, header.width
    rows, columns = chroma_size(height, width)
    expected = YUV420.size + height * width + 2 * rows * columns
    if len(data) != expected:
        raise HeaderError(
            f"yuv420 header says height {height} and width {width}, which take {expected} bytes: "
            f"the data has {len(data)}"
        )
    check_size("yuv420", height, width, len(data), max_pixels)
    return height, width


def plane_addresses(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Where Y, Cb and Cr are of stored images that begin at `begins`, int64 [B], of `sizes` (h, w), int64 [B, 2]:
    int64 [B, 3]."""
    luma = begins + YUV420.size
    blue = luma + sizes.prod(1)
    return np.stack([luma, blue, blue + ((sizes + 1) // 2).prod(1)], axis=1)


def parse(data: np.ndarray) -> Planes:
    """The planes of a stored image (uint8 [n_bytes]), read in place. Raises HeaderError as `stored_size` does."""
    height, width = stored_size(data)
    _, blue, red = plane_addresses(np.zeros(1, np.int64), np.array([[height, width]]))[0].tolist()
    half = chroma_size(height, width)
    return Planes(
        luma=data[YUV420.size : blue].reshape(height, width),
        blue=data[blue:red].reshape(half),
        red=data[red:].reshape(half),
    )


def decode(data: np.ndarray, *, max_pixels: int | None = None) -> np.ndarray:
    """A stored image (uint8 [n_bytes]) as RGB, uint8 [H, W, 3]: what a crop of the whole of it shows.

    Raises HeaderError as `parse` does, and ValueError for more than `max_pixels` pixels.
    """
    stored_size(data, max_pixels=max_pixels)
    return RaggedBatch.from_planes([parse(data)]).image(0).permute(1, 2, 0).numpy()


def encode(pixels: np.ndarray) -> bytes:
    """An RGB image, uint8 [H, W, 3], as it is stored. Raises ValueError for another shape or dtype."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"pixels must be uint8 [H, W, 3] with H, W >= 1, got {pixels.dtype} {list(pixels.shape)}")
    from slipstream_kernels.yuv420_cpu import planes_of_rgb

    height, width = pixels.shape[:2]
    rows, columns = chroma_size(height, width)
    data = np.empty(YUV420.size + height * width + 2 * rows * columns, np.uint8)
    YUV420.pack_into(data.data, 0, YUV420_MAGIC, YUV420_VERSION, height, width)
    planes_of_rgb(np.ascontiguousarray(pixels), *parse(data))
    return data.tobytes()


def encode_image(
    data: np.ndarray, *, short_side: int | None = None, max_pixels: int | None = None, apply_exif: bool = False
) -> bytes:
    """An encoded image (uint8 [n_bytes], any format that decode_image reads) as it is stored.

    `short_side`: a larger image is resized to this short side, the long one in proportion as torchvision's Resize has
    it, by Pillow's antialiased Lanczos filter: of Pillow's filters the one whose result gives crops closest to those of
    the image itself. A smaller one stays as it is. `apply_exif` turns the image as its EXIF orientation says, which is
    not stored. Raises what decode_image raises.
    """
    if is_yuv420(data):
        size = stored_size(data, max_pixels=max_pixels)
        if short_side is None or min(size) <= short_side:
            return bytes(data)
    pixels = decode_image(data, max_pixels=max_pixels, apply_exif=apply_exif)
    if short_side is not None and min(pixels.shape[:2]) > short_side:
        height, width = resized_sizes(np.array([pixels.shape[:2]]), short_side)[0].tolist()
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    return encode(pixels)


def decode_image(data: np.ndarray, *, max_pixels: int | None = None, apply_exif: bool = False) -> np.ndarray:
    """One encoded image (uint8 [n_bytes]) as RGB, uint8 [H, W, 3]: by `decode` if stored here, else by Pillow."""
    if is_yuv420(data):
        return decode(data, max_pixels=max_pixels)
    return decode_with_pillow(data, max_pixels=max_pixels, apply_exif=apply_exif)
