"""One encoded image to RGB pixels with Pillow, strictly: what DALI does not take, and a dataset's own decoding."""

from __future__ import annotations

import io
import os
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow also opens formats that run other programs (EPS) or that are no photographs; these are enough for images.
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "GIF", "AVIF")

# By process: a lock that another thread held at a fork stays locked in the child.
_pillow_locks: dict[int, threading.Lock] = {}


def decode_with_pillow(data: np.ndarray, *, max_pixels: int | None = None, apply_exif: bool = False) -> np.ndarray:
    """Decode one image as `Image.open(...).convert("RGB")` does, refusing damaged data.

    `data` is uint8 [n_bytes]; the result is uint8 [H, W, 3]. 16-bit grey is scaled to 8 bits by rounding v / 257 as
    DALI does (Pillow's own conversion clips it). Raises ValueError for more than `max_pixels` pixels and for 32-bit or
    float pixels, and whatever Pillow raises for data that it cannot decode whole; Pillow's own limit,
    twice Image.MAX_IMAGE_PIXELS, holds too.
    """
    # Pillow warns of large and oddly made images; where users turn warnings into errors that would fail a good sample.
    # catch_warnings changes state of the whole process, hence the lock.
    with _pillow_locks.setdefault(os.getpid(), threading.Lock()), warnings.catch_warnings():
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
            check_pixels(image.height, image.width, max_pixels)
            image.load()
            if apply_exif:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                grey = np.asarray(image).astype(np.uint32)
                return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {image.mode!r} have no 8-bit form: store 8 or 16 bits")
            return np.array(image.convert("RGB"))


def check_pixels(height: int, width: int, max_pixels: int | None) -> None:
    """Raise ValueError for more than `max_pixels` pixels."""
    if max_pixels is not None and height * width > max_pixels:
        raise ValueError(
            f"the header says height {height} and width {width}: {height * width} pixels, max_pixels is {max_pixels}"
        )
