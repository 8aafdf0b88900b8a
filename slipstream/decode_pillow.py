"""One encoded image to RGB pixels with Pillow: what DALI does not take, and a dataset's own decoding."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
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
    # By process: what another thread had begun at a fork never ends in the child.
    with _settings.setdefault(os.getpid(), _Settings()).held(lenient=truncated == "grey"):
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


class _Settings:
    """Pillow's and Python's settings while images are decoded: of the whole process, so several threads share them.

    Warnings are ignored, as Pillow warns of large and oddly made images, and where users turn warnings into errors that
    would fail a good sample. ImageFile.LOAD_TRUNCATED_IMAGES, Pillow's only way to leniency, is a truth of each thread
    that decodes; to all others it is what it was before, and users set that too: strict must stay strict then.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._lenient: dict[int, bool] = {}  # by thread
        self._elsewhere: Any = False
        self._before = contextlib.ExitStack()

    def __bool__(self) -> bool:
        lenient = self._lenient.get(threading.get_ident()) if self._pid == os.getpid() else None
        return bool(self._elsewhere) if lenient is None else lenient

    @contextlib.contextmanager
    def held(self, *, lenient: bool) -> Iterator[None]:
        """Decode in this thread."""
        with self._lock:
            if not self._lenient:
                self._before.enter_context(warnings.catch_warnings())
            # Each time: somebody may have set them meanwhile.
            warnings.simplefilter("ignore")
            own: Any = self
            if ImageFile.LOAD_TRUNCATED_IMAGES is not own:
                self._elsewhere = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = own
            self._lenient[threading.get_ident()] = lenient
        try:
            yield
        finally:
            with self._lock:
                del self._lenient[threading.get_ident()]
                if not self._lenient:
                    self._before.close()
                    if ImageFile.LOAD_TRUNCATED_IMAGES is own:
                        ImageFile.LOAD_TRUNCATED_IMAGES = self._elsewhere


_settings: dict[int, _Settings] = {}
