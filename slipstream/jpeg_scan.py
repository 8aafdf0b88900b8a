"""Whether a JPEG's markers are in order, from its first byte to its end: DALI mends files that Pillow refuses.

libjpeg fails where a marker in the coded data is none that may stand there, or where the data stops before the end
marker. DALI has all rows by then and looks no further. So the markers are followed here (ITU T.81, B.1 and B.2); what
lies between them is not decoded. It takes about 3 us for a photograph of 120 KB that is in the cache.
"""

# Numba's types are untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
from __future__ import annotations

import numba
import numpy as np
import slipstream_kernels  # noqa: F401  (where Numba keeps what it compiles)
from numba import types

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2
_BLOCK = 1024  # bytes of coded data looked at together, which becomes vector code
_READ_ONLY = types.Array(types.uint8, 1, "C", readonly=True)


def is_in_order(data: np.ndarray) -> bool:
    """Tell whether a JPEG (uint8 [n_bytes]) is of the ordinary kind, with all its markers in order up to its end.

    Ordinary is Huffman coding of 8 bits a sample, sequential or progressive, of one or three components: DALI takes
    CMYK without Adobe's marker for inverted. Bytes behind the end marker do not matter:
    cameras write previews, films and what not there. False is a suspicion, no verdict: Pillow takes some such files.
    """
    return bool(_is_in_order(np.ascontiguousarray(data)))


# Unsigned indices: for signed ones Numba writes a test of wrap-around, which keeps the loops from being vectorised.
@numba.njit(types.intp(_READ_ONLY, types.uintp), nogil=True, cache=True)
def _next_marker(data: np.ndarray, at: np.uintp) -> np.intp:
    """The first 0xFF at or behind `at` that begins a marker other than RSTn; the length where there is none."""
    end = np.uintp(data.shape[0])
    one = np.uintp(1)
    while at + one < end:
        stop = min(at + np.uintp(_BLOCK), end - one)
        most = np.uint8(0)
        for i in range(at, stop):
            most = max(most, data[i] if data[i + one] != np.uint8(0) else np.uint8(0))
        if most == np.uint8(255):
            for i in range(at, stop):
                follower = data[i + one]
                if data[i] == 255 and follower != 0 and follower != 255 and not 0xD0 <= follower <= 0xD7:
                    return np.intp(i)
        at = stop
    return np.intp(end)


@numba.njit(types.boolean(_READ_ONLY), nogil=True, cache=True)
def _is_in_order(data: np.ndarray) -> bool | np.bool_:
    end = data.shape[0]
    components = coded = 0
    sequential = False
    at = 2
    while at + 1 < end:
        if data[at] != 255:
            return False
        marker = data[at + 1]
        if marker == 255:  # fill byte
            at += 1
            continue
        if marker == _EOI:
            return coded == components if sequential else coded > 0
        if at + 4 > end or (sequential and coded == components):
            return False
        length = (np.intp(data[at + 2]) << 8) | np.intp(data[at + 3])
        if length < 2 or at + 2 + length > end:
            return False
        if _BASELINE <= marker <= _PROGRESSIVE:
            if components or length < 8 or data[at + 4] != 8 or (data[at + 9] != 1 and data[at + 9] != 3):
                return False
            components = np.intp(data[at + 9])
            sequential = marker != _PROGRESSIVE
        elif marker == _SOS:
            if components == 0 or length < 3:
                return False
            coded += np.intp(data[at + 4])  # in a sequential frame each is coded once, and then nothing may follow
            if coded == 0 or (sequential and coded > components):
                return False
        # tables (DHT, DQT, DRI), APPn and comments
        elif not (marker == 0xC4 or marker == 0xDB or marker == 0xDD or 0xE0 <= marker <= 0xEF or marker == 0xFE):
            return False
        at += 2 + length
        if marker == _SOS:
            at = _next_marker(data, np.uintp(at))
    return False
