"""What DALI's parser makes of an image's header, asked before DALI sees the image.

DALI 2.4 reads the headers of a batch of 32 or more on several threads; if the block of the thread that waits for the
others holds one that its parser refuses, it unwinds while they still use its frame, and the process dies of SIGSEGV.
So an image that the parser (nvImageCodec's, which DALI loads) refuses must not be in a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# DALI has no type for other pixels, which fails in the same place.
_PIXELS = ("uint8", "uint16")


def dali_can_parse(data: np.ndarray) -> bool:
    """Tell whether DALI's parser takes this encoded image, uint8 [n_bytes]; its damaged pixels are not met here.

    Takes 3 microseconds, and prints a line on stderr for an image that it refuses.
    """
    try:
        from nvidia import nvimgcodec
    except ImportError:  # some builds of DALI have it inside
        return True
    try:
        stream: Any = nvimgcodec.CodeStream(data)  # pyright: ignore[reportAttributeAccessIssue]
        return str(np.dtype(stream.dtype)) in _PIXELS and stream.height > 0 and stream.width > 0
    except Exception:
        return False
