"""Whether a JPEG's markers are in order, from its first byte to its end: DALI mends files that Pillow refuses.

libjpeg fails where a marker in the coded data is none that may stand there, or where the data stops before the end
marker. DALI has all rows by then and looks no further. So the markers are followed here (ITU T.81, B.1 and B.2), and
so is what libjpeg asks of their tables, frame and scans, for a GPU's decoder asks other things: tables that are whole
and there when a scan needs them, sampling factors, a progressive scan's range. What lies between the markers is not
decoded. It takes about 3 us for a photograph of 120 KB that is in the cache.
"""

# Numba's types are untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import slipstream_kernels  # noqa: F401  (where Numba keeps what it compiles)
from numba import types

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_DHT, _DQT, _DRI, _COM = 0xC4, 0xDB, 0xDD, 0xFE
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2
_MOST_BLOCKS = 10  # of a unit of coded data (B.2.3)
_LONGEST = 65_500  # side that libjpeg takes
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


@numba.njit(types.intp(_READ_ONLY, types.intp, types.intp, types.intp), nogil=True, cache=True)
def _quantizers(data: Any, at: Any, end: Any, known: int) -> int:
    """Which of four quantization tables there are (a bit each) behind a DQT's segment; -1 for a bad one."""
    while at < end:
        table, wide = data[at] & 15, data[at] >> 4
        if table > 3 or wide > 1:
            return -1
        known |= 1 << table
        at += 1 + 64 * (1 + wide)
    return known if at == end else -1


@numba.njit(types.intp(_READ_ONLY, types.intp, types.intp, types.intp), nogil=True, cache=True)
def _huffman_tables(data: Any, at: Any, end: Any, known: int) -> int:
    """Likewise of Huffman tables behind a DHT's: four for DC, the low bits, and four for AC."""
    while at + 17 <= end:
        table, is_ac = data[at] & 15, data[at] >> 4
        if table > 3 or is_ac > 1:
            return -1
        count = 0
        room = 1 << 16  # codes of 16 bits that shorter ones leave; the last of them, all ones, is none
        for bits in range(1, 17):
            count += np.intp(data[at + bits])
            room -= np.intp(data[at + bits]) << (16 - bits)
        if count > 256 or room <= 0 or at + 17 + count > end:
            return -1
        if not is_ac:
            for place in range(at + 17, at + 17 + count):
                if data[place] > 15:
                    return -1
        known |= 1 << (4 * is_ac + table)
        at += 17 + count
    return known if at == end else -1


@numba.njit(types.boolean(_READ_ONLY, types.intp, types.intp, types.intp), nogil=True, cache=True)
def _is_frame(data: Any, at: Any, length: Any, components: Any) -> bool:
    """Whether components, three bytes each from `at` + 10 on, have names of their own and factors that divide."""
    if length != 8 + 3 * components:
        return False
    most_high = most_wide = 0
    for i in range(components):
        most_high = max(most_high, np.intp(data[at + 11 + 3 * i] & 15))
        most_wide = max(most_wide, np.intp(data[at + 11 + 3 * i] >> 4))
    for i in range(components):
        of = at + 10 + 3 * i
        wide, high = data[of + 1] >> 4, data[of + 1] & 15
        if not (1 <= high <= 4 and 1 <= wide <= 4) or most_high % high or most_wide % wide or data[of + 2] > 3:
            return False
        for j in range(i):
            if data[of] == data[at + 10 + 3 * j]:
                return False
    return True


@numba.njit(
    types.boolean(_READ_ONLY, types.intp, types.intp, types.intp, types.intp, types.intp), nogil=True, cache=True
)
def _is_scan(data: Any, at: Any, length: Any, frame: Any, quantizers: int, tables: int) -> bool:
    """Whether the scan whose marker is at `at` names components of the frame at `frame` and tables that are known."""
    progressive = data[frame + 1] == _PROGRESSIVE
    count = np.intp(data[at + 4])
    if count < 1 or length != 6 + 2 * count:
        return False
    parameters = at + 5 + 2 * count
    start, last = data[parameters], data[parameters + 1]
    before, shift = data[parameters + 2] >> 4, data[parameters + 2] & 15
    if progressive:
        if start > last or last > 63 or (start == 0 and last != 0) or (start > 0 and count > 1):
            return False
        if shift > 13 or (before != 0 and before != shift + 1):
            return False
    blocks = 0
    for i in range(count):
        name, dc, ac = data[at + 5 + 2 * i], data[at + 6 + 2 * i] >> 4, data[at + 6 + 2 * i] & 15
        which = -1
        for j in range(np.intp(data[frame + 9])):
            if data[frame + 10 + 3 * j] == name:
                which = j
        if which < i or dc > 3 or ac > 3:  # of the orders other than the frame's, libjpeg takes one: third, second
            return False
        factors, quantizer = data[frame + 11 + 3 * which], data[frame + 12 + 3 * which]
        blocks += np.intp(factors >> 4) * np.intp(factors & 15)
        needs_dc = not progressive or (start == 0 and before == 0)
        needs_ac = not progressive or start > 0
        if not quantizers & (1 << quantizer):
            return False
        if (needs_dc and not tables & (1 << dc)) or (needs_ac and not tables & (16 << ac)):
            return False
    return bool(count == 1 or blocks <= _MOST_BLOCKS)


@numba.njit(types.boolean(_READ_ONLY), nogil=True, cache=True)
def _is_in_order(data: np.ndarray) -> bool | np.bool_:
    end = data.shape[0]
    components = coded = frame = quantizers = tables = 0
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
            for side in (at + 5, at + 7):
                if (np.intp(data[side]) << 8 | np.intp(data[side + 1])) > _LONGEST:
                    return False
            components = np.intp(data[at + 9])
            sequential = marker != _PROGRESSIVE
            frame = at
            if not _is_frame(data, at, length, components):
                return False
        elif marker == _SOS:
            if components == 0 or length < 3:
                return False
            coded += np.intp(data[at + 4])  # in a sequential frame each is coded once, and then nothing may follow
            if coded == 0 or (sequential and coded > components):
                return False
            if not _is_scan(data, at, length, frame, quantizers, tables):
                return False
        elif marker == _DQT:
            quantizers = _quantizers(data, at + 4, at + 2 + length, quantizers)
            if quantizers < 0:
                return False
        elif marker == _DHT:
            tables = _huffman_tables(data, at + 4, at + 2 + length, tables)
            if tables < 0:
                return False
        elif marker == _DRI:
            if length != 4:
                return False
        elif not (0xE0 <= marker <= 0xEF or marker == _COM):  # APPn and comments
            return False
        at += 2 + length
        if marker == _SOS:
            at = _next_marker(data, np.uintp(at))
    return False
