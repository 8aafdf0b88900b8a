"""One encoded image to RGB pixels with Pillow: what DALI does not take, and a dataset's own decoding."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# Pillow also opens formats that run other programs (EPS) or that are no photographs; these are enough for images.
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "GIF", "AVIF")

TRUNCATED = ("fail", "grey")
# Decoders fill in what a header promises and the data lacks: a JPEG of 1 KB took 2.8 s and 1 GB, a JPEG 2000 of 8 KB
# 12 s and 2.5 GB. Above so many pixels, which cost at most a second and 200 MB, the data must be able to hold them.
_PLAIN_PIXELS = 10_000_000
# The most pixels a byte. JPEG: a block of 64 has at least one bit of Huffman code; PNG: deflate makes 1032 bytes of
# one, each of eight pixels; PNM: eight. The others have no such bound, but beyond this they are blank, or lie. There is
# none for BMP, which fails at no cost, nor for bilevel TIFF, whose blank pages are as small.
_PIXELS_A_BYTE = {"jpeg": 512, "mpo": 512, "png": 1032 * 8, "pnm": 8, "ppm": 8}
_PIXELS_A_BYTE |= dict.fromkeys(("webp", "jpeg2000", "gif", "avif", "tiff of bytes"), 2048)
# Of a damaged image whose rest is to be filled in.
_GREY_PIXELS_A_BYTE = 512

# By process: a lock that another thread held at a fork stays locked in the child.
_pillow_locks: dict[int, threading.Lock] = {}


def decode_with_pillow(
    data: np.ndarray, *, max_pixels: int | None = None, apply_exif: bool = False, truncated: str = "fail"
) -> np.ndarray:
    """Decode one image as `Image.open(...).convert("RGB")` does, refusing damaged data.

    `data` is uint8 [n_bytes]; the result is uint8 [H, W, 3]. 16-bit grey is scaled to 8 bits by rounding v / 257 as
    DALI does (Pillow's own conversion clips it). `truncated="grey"` takes what there is of a damaged image, with grey
    or black for the rest, as Pillow does with ImageFile.LOAD_TRUNCATED_IMAGES (all of it is black where the decoder
    gave up before a row was whole). That flag itself has no effect here, and other threads never see it changed.

    Raises ValueError for more than `max_pixels` pixels, for a header that promises far more of them than the data can
    hold, and for 32-bit or float pixels, and whatever Pillow raises for data that it cannot decode whole; Pillow's own
    limit, twice Image.MAX_IMAGE_PIXELS, holds too.
    """
    if truncated not in TRUNCATED:
        raise ValueError(f"truncated must be one of {', '.join(map(repr, TRUNCATED))}, got {truncated!r}")
    # Pillow warns of large and oddly made images; where users turn warnings into errors that would fail a good sample.
    # catch_warnings changes state of the whole process, hence the lock.
    lock = _pillow_locks.setdefault(os.getpid(), threading.Lock())
    with lock, warnings.catch_warnings(), _leniency(truncated == "grey"):
        warnings.simplefilter("ignore")
        Image.init()  # loads the plugins once; which ones there are depends on how Pillow was built
        formats = [name for name in _PILLOW_FORMATS if name in Image.OPEN]
        stream = io.BytesIO(data)  # pyright: ignore[reportArgumentType]  (its stubs know no buffers before Python 3.12)
        try:
            opened = Image.open(stream, formats=formats)
        except UnidentifiedImageError:
            # Pillow's own message names the stream by its address.
            reason = f"no image that Pillow knows: {len(data)} bytes, beginning {bytes(data[:8])!r}"
            raise UnidentifiedImageError(reason) from None
        with opened as image:
            format = (image.format or "").lower()
            if format == "tiff" and image.mode != "1":
                format = "tiff of bytes"
            check_size(format, image.height, image.width, len(data), max_pixels, truncated=truncated)
            image.load()
            if apply_exif:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                grey = np.asarray(image).astype(np.uint32)
                return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {image.mode!r} have no 8-bit form: store 8 or 16 bits")
            return np.array(image.convert("RGB"))


def check_size(
    format: str, height: int, width: int, n_bytes: int, max_pixels: int | None, *, truncated: str = "fail"
) -> None:
    """Raise ValueError for more than `max_pixels` pixels, or for far more than `n_bytes` of this format can hold."""
    pixels = height * width
    says = f"the header says height {height} and width {width}: {pixels} pixels"
    if max_pixels is not None and pixels > max_pixels:
        raise ValueError(f"{says}, max_pixels is {max_pixels}")
    densest = _PIXELS_A_BYTE.get(format, pixels)
    if truncated == "grey":
        densest = min(densest, _GREY_PIXELS_A_BYTE)
    if pixels > max(_PLAIN_PIXELS, n_bytes * densest):
        raise ValueError(f"{says}, which {n_bytes} bytes of {format} cannot hold")


class _HereOnly:
    """A truth that one thread sees; to all others it is what it was before."""

    def __init__(self, here: bool, elsewhere: Any) -> None:
        self._here = here
        self._elsewhere = elsewhere
        self._where = (os.getpid(), threading.get_ident())

    def __bool__(self) -> bool:
        return self._here if self._where == (os.getpid(), threading.get_ident()) else bool(self._elsewhere)


@contextmanager
def _leniency(lenient: bool) -> Iterator[None]:
    # Pillow knows no other way to it than a variable of its module, and users set that: strict must stay strict then.
    before: Any = ImageFile.LOAD_TRUNCATED_IMAGES
    own: Any = _HereOnly(lenient, before)
    ImageFile.LOAD_TRUNCATED_IMAGES = own
    try:
        yield
    finally:
        if ImageFile.LOAD_TRUNCATED_IMAGES is own:  # else somebody has set it meanwhile
            ImageFile.LOAD_TRUNCATED_IMAGES = before
