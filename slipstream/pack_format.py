"""How `pack` stores an image: as its bytes are, or encoded anew. The one place where a sample's image is changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import checks

FORMATS = ("same",)

Encode = Callable[[np.ndarray], bytes | np.ndarray]


def image_encoder(name: str) -> Encode | None:
    """Give the function from an image's encoded bytes, uint8 [n_bytes], to those to be stored; None keeps them.

    The function is pure and may be called from several threads at once. What it raises for an image, but for
    MemoryError, makes that a bad sample, with the error's text as the reason. Raises ValueError for a name that is not
    in FORMATS.
    """
    checks.one_of("format", name, FORMATS)
    return None
