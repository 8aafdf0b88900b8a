"""How `pack` stores an image: as its bytes are, or encoded anew. The one place where a sample's image is changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import checks

FORMATS = ("same", "yuv420")

Encode = Callable[[np.ndarray], bytes | np.ndarray]


def image_encoder(name: str, *, short_side: int | None, apply_exif: bool, max_pixels: int) -> Encode | None:
    """Give the function from an image's encoded bytes, uint8 [n_bytes], to those to be stored; None keeps them.

    The function is pure and may be called from several threads at once. What it raises for an image, but for
    MemoryError, makes that a bad sample, with the error's text as the reason. Raises ValueError for a name that is not
    in FORMATS, and for what goes with another one.
    """
    checks.one_of("format", name, FORMATS)
    if name == "same":
        for option, value in (("short_side", short_side), ("apply_exif", apply_exif)):
            if value:
                raise ValueError(f"{option}={value!r} needs format='yuv420': format='same' keeps images as they are")
        return None
    if short_side is not None:
        checks.whole("short_side", short_side, 1)
    from .yuv420 import encode_image

    return lambda data: encode_image(data, short_side=short_side, max_pixels=max_pixels, apply_exif=apply_exif)
