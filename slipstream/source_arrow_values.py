"""From Arrow's types and scalars to the kinds of fields and to Python values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types


def kind_of(kind: Any) -> str:
    """The field kind of an Arrow type; "bytes" for those that may turn out to be images."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind_of(kind.storage_type)
    if types.is_dictionary(kind):
        named = kind_of(kind.value_type)
        return named if named in ("int", "float", "bool", "str") else "json"
    if types.is_struct(kind):
        parts = {part.name: part.type for part in kind}
        # What `datasets` makes of an Image (and of an Audio).
        return "bytes" if parts.keys() == {"bytes", "path"} and _is_binary(parts["bytes"]) else "json"
    if _is_list(kind):
        leaf = _leaf(kind)
        return "array" if types.is_integer(leaf) or types.is_floating(leaf) or types.is_boolean(leaf) else "json"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "str"
    if types.is_boolean(kind):
        return "bool"
    if types.is_integer(kind):
        return "int"
    if types.is_floating(kind):
        return "float"
    return "bytes" if _is_binary(kind) else "json"


def _leaf(kind: Any) -> Any:
    """The type that lists of lists of ... hold in the end."""
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_list(kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_binary(kind: Any) -> bool:
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


class BytesColumn:
    """The bytes in a binary column, or in the field `bytes` of a column of structs, as views over Arrow's memory.

    column[row] is uint8 [n_bytes], or None where they are missing. Arrow's own scalars would copy them.
    """

    def __init__(self, column: Any) -> None:
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        self._parts = [_part(chunk) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> np.ndarray | None:
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {row}")
        number = int(np.searchsorted(self._ends, row, side="right"))
        row -= int(self._ends[number - 1]) if number else 0
        missing, offsets, data = self._parts[number]
        if missing is not None and missing[row]:
            return None
        return data[offsets[row] : offsets[row + 1]]


def _part(array: Any) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """(which rows are missing or None, offsets [n + 1], the bytes that they divide) of one Arrow array."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    masks = [array]
    if isinstance(array, pa.StructArray):
        array = array.field("bytes")
        masks.append(array)
    missing = None
    for mask in masks:
        if mask.null_count:
            nulls = mask.is_null().to_numpy(zero_copy_only=False)
            missing = nulls if missing is None else missing | nulls
    if types.is_binary_view(array.type):
        array = array.cast(pa.large_binary())
    buffers = array.buffers()
    if types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        return missing, width * (np.arange(len(array) + 1) + array.offset), _bytes(buffers[1])
    kind = np.int64 if types.is_large_binary(array.type) else np.int32
    offsets = _bytes(buffers[1]).view(kind)[array.offset : array.offset + len(array) + 1]
    return missing, offsets, _bytes(buffers[2])


def _bytes(buffer: Any) -> np.ndarray:
    if buffer is None or not buffer.size:
        empty = np.empty(0, np.uint8)
        empty.flags.writeable = False
        return empty
    return np.frombuffer(buffer, np.uint8)


def why_missing(value: Any, field: str) -> str:
    """Say why a BytesColumn gives None for a value."""
    path = value["path"].as_py() if isinstance(value, pa.StructScalar) and value.is_valid else None
    if path is None:
        return f"{field!r} is missing"
    return f"the file holds no bytes of {field!r}, only the path {path!r}; write the set with embedded images"


def python_of(value: Any) -> Any:
    """A scalar as pyarrow puts it in Python, None where it is missing."""
    return value.as_py()


def array_of(value: Any) -> np.ndarray | None:
    """A list of numbers, or of equally long lists of them, as an array of its own; None where it is missing."""
    if isinstance(value, pa.ExtensionScalar):
        value = value.value
    if value is None or not value.is_valid:
        return None
    if _is_list(value.type.value_type):
        return np.array(value.as_py(), _leaf(value.type).to_pandas_dtype())
    return np.array(value.values.to_numpy(zero_copy_only=False))
