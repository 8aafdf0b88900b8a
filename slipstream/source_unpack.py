"""From the other ways in which litdata stores a chunk (zstd, Arrow rows) to the plain layout, which can be mapped.

Which way it is, the bytes tell and not the index: litdata stores dicts of plain fields as an Arrow table wherever
pyarrow was installed, and without it writes them uncompressed whatever compression its index names.
"""

from __future__ import annotations

import itertools
import os
import pickle
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import zstandard

from .source_fields import MISSING

_COPY_BYTES = 1 << 20
_U32 = struct.Struct("<I")
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_FRAMES_MAGIC = b"LDFZ01\0\0"
_ARROW_MAGIC = b"LDARW01\0"
_SCALARS = {"int": struct.Struct("<q"), "float": struct.Struct("<d"), "bool": struct.Struct("<?")}


def has_rows_only(head: bytes, tail: bytes) -> bool:
    """Tell from a chunk's first 12 and last 8 bytes whether its samples are an Arrow table and nothing else."""
    return tail == _ARROW_MAGIC and len(head) == 12 and head[4:8] == head[8:12]


def unpack(packed: str, path: str, *, leaves: Sequence[tuple[str, str]], n_bytes: int) -> bool:
    """Write a chunk file to `path` in the plain layout: u32 count, u32 offsets [count + 1], items.

    `leaves` are the index's, `n_bytes` is its chunk_bytes. Gives False, and writes nothing, where the file is plain
    already. Raises ValueError if it is damaged or unpacks to more than its index says, or if it holds Arrow rows and
    pyarrow is not installed.
    """
    with open(packed, "rb") as source:
        head = source.read(12)
        source.seek(max(0, os.stat(packed).st_size - 8))
        tail = source.read(8)
        source.seek(0)
        try:
            if head.startswith(_ZSTD_MAGIC):
                with open(path, "xb") as target:
                    _unpack_whole(source, target, n_bytes)
            elif head.startswith(_FRAMES_MAGIC):
                with open(path, "xb") as target:
                    _unpack_frames(source.read(), target)
            elif has_rows_only(head, tail):
                _unpack_rows(packed, path, leaves)
            elif _has_packed_samples(source, head):
                with open(path, "xb") as target:
                    _unpack_samples(source.read(), target)
            else:
                return False
        except (zstandard.ZstdError, struct.error, RuntimeError) as error:
            raise ValueError(f"packed chunk is damaged: {error}") from None
    return True


def _unpack_whole(source: BinaryIO, target: BinaryIO, n_bytes: int) -> None:
    reader = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
    written = 0
    # Stops at the first byte too many, so that a small hostile file cannot fill the disk.
    while written <= n_bytes and (block := reader.read(min(_COPY_BYTES, n_bytes + 1 - written))):
        written += target.write(block)
    if written != n_bytes:
        size = f"{written} bytes" if written < n_bytes else "more"
        raise ValueError(f"packed chunk is damaged: its index says {n_bytes} bytes, it unpacks to {size}")


def _write_header(target: BinaryIO, sizes: np.ndarray) -> None:
    offsets = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))) + 4 * (len(sizes) + 2)
    if (sizes < 0).any() or offsets[-1] > np.iinfo(np.uint32).max:
        raise ValueError("packed chunk is damaged: its samples' offsets do not rise, or pass 4 GiB")
    target.write(_U32.pack(len(sizes)))
    target.write(offsets.astype("<u4").tobytes())


class _Zstd:
    """The decompressor that litdata's frame reader calls."""

    def decompress(self, data: memoryview, decompressed_size: int) -> bytes:
        # One byte over, so that a frame longer than it says shows as a wrong length and not as a cut.
        return zstandard.ZstdDecompressor().stream_reader(data).read(decompressed_size + 1)


def _unpack_frames(data: bytes, target: BinaryIO) -> None:
    from litdata.streaming.framed_zstd import inflate_frame, parse_framed_header

    header = parse_framed_header(data)
    sizes = np.diff(np.array(header.offsets, np.int64))
    if sum(frame.uncompressed_len for frame in header.frames) != sizes.sum():
        raise ValueError("packed chunk is damaged: its frames and its samples' offsets differ in length")
    _write_header(target, sizes)
    for number in range(len(header.frames)):
        target.write(inflate_frame(data, header, number, _Zstd()))


def _has_packed_samples(source: BinaryIO, head: bytes) -> bool:
    if len(head) < 12:
        return False
    source.seek(_U32.unpack_from(head, 4)[0])
    # A plain item begins with a leaf's size, which cannot be the 4 GB that these four bytes would say.
    packed = source.read(4) == _ZSTD_MAGIC
    source.seek(0)
    return packed


def _unpack_samples(data: bytes, target: BinaryIO) -> None:
    count = _U32.unpack_from(data)[0]
    if len(data) < 4 * (count + 2):
        raise ValueError(f"packed chunk is damaged: {count} samples do not fit its {len(data)} bytes")
    offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
    if offsets != sorted(offsets) or offsets[-1] > len(data):
        raise ValueError("packed chunk is damaged: its samples' offsets do not rise, or leave the file")
    items = []
    for start, stop in itertools.pairwise(offsets):
        reader = zstandard.ZstdDecompressor().decompressobj()
        items.append(reader.decompress(data[start:stop]))
        if not reader.eof:
            raise ValueError(f"packed chunk is damaged: sample {len(items) - 1} is cut off")
    _write_items(target, items)


def _write_items(target: BinaryIO, items: list[bytes]) -> None:
    _write_header(target, np.array([len(item) for item in items], np.int64))
    target.writelines(items)


def _unpack_rows(packed: str, path: str, leaves: Sequence[tuple[str, str]]) -> None:
    try:
        import pyarrow as pa  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "the chunk is an Arrow table, as litdata writes them where it finds pyarrow; install pyarrow to read it"
        ) from None
    from litdata.streaming.item_loader import load_arrow_footer_table

    with open(packed, "rb") as source, pa.memory_map(packed) as view:
        table = load_arrow_footer_table(memoryview(view.read_buffer()))
        count = _U32.unpack(source.read(4))[0]
        if table is None or table.num_rows != count:
            raise ValueError("packed chunk is damaged: its Arrow table cannot be read")
        items = []
        # One batch at a time becomes Python objects; litdata writes 256 rows in each.
        for batch in table.to_batches():
            items += [_item(row, leaves) for row in batch.to_pylist()]
    with open(path, "xb") as target:
        _write_items(target, items)


def _item(row: dict[str, Any], leaves: Sequence[tuple[str, str]]) -> bytes:
    parts = [_leaf(row, name, data_format) for name, data_format in leaves]
    return struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts)


def _leaf(row: dict[str, Any], name: str, data_format: str) -> bytes:
    value: Any = row
    # A key may hold dots itself; only where it does not do they join the keys of nested dicts.
    for key in [name] if name in row else name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    kind = data_format.split(":")[0]
    if kind == "json":
        from litdata.streaming.serializers import JsonSerializer

        return JsonSerializer().serialize(value)[0]
    if kind == "pickle":  # also of plain values: of text that names a file, of numbers below a None
        return pickle.dumps(value, 4)
    if value is None:
        return b"" if kind == "bytes" else MISSING
    if kind in _SCALARS:
        return _SCALARS[kind].pack(value)
    if kind == "bytes" and isinstance(value, bytes):
        return value
    if kind == "str" and isinstance(value, str):
        return value.encode()
    raise ValueError(f"field {name!r} of a row in the chunk's Arrow table is {value!r:.80}, no {data_format!r}")
