"""Rows of tables with a column of images: what Parquet and Arrow files have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .header import is_image
from .source import ReadError, UnavailableError, as_ids, check_field
from .source_arrow_values import BytesColumn, array_of, kind_of, python_of, why_missing
from .source_shards import LocalShards, marks_of


class Files(Protocol):
    """Opened files of one format; `groups` has each file's row counts by group."""

    shards: LocalShards
    schema: Any
    groups: list[list[int]]
    is_mapped: bool

    def column(self, file: int, group: int, field: str) -> Any:
        """One column of a group as an Arrow array or chunked array. Raises OSError, ValueError."""
        ...

    def first_rows(self, field: str) -> Any:
        """A few of the column's first rows, without reading their whole group where that can be."""
        ...

    def has_missing(self, field: str) -> bool:
        """Tell whether a column of plain values has none in some row. Raises OSError, ValueError."""
        ...

    def close(self) -> None: ...


class TableSource:
    """Rows of Parquet or Arrow files as a Source, from `open_parquet` or `open_arrow`.

    Every column is a field under its own name: binary columns and `datasets`' struct{bytes, path} are of kind "image"
    or "bytes" by what their first rows hold; numbers, bools and strings are values, lists of numbers arrays, anything
    else ("json") what pyarrow makes of it. A missing value is None (of which a loader makes a bad sample where it is a
    number or a bool), missing bytes are an error.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        rows = [(file, group, n) for file, groups in enumerate(files.groups) for group, n in enumerate(groups)]
        self._groups = [(file, group) for file, group, _ in rows]
        self._ends = np.cumsum([n for _, _, n in rows], dtype=np.int64)
        if not len(rows) or not self._ends[-1]:
            raise ValueError(f"{files.shards.name}: the files hold no rows")
        self.fields: Mapping[str, str] = {name: self._kind(name) for name in files.schema.names}

    def _kind(self, field: str) -> str:
        kind = kind_of(self._files.schema.field(field).type)
        if kind != "bytes":
            return kind
        rows = BytesColumn(self._files.first_rows(field))
        # Any of them, as the image of one may be damaged.
        return "image" if any(is_image(data) for data in rows if data is not None) else "bytes"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fingerprint(self) -> str:
        """The same for the same files, wherever they are."""
        return repr(marks_of(self._files.shards.shards))

    def read(self, ids: Sequence[int] | np.ndarray, field: str = "image") -> list[np.ndarray]:
        """Give the field's bytes as read-only uint8 [n_bytes], views over maps for Arrow files; see Source.read.

        Those of Parquet files are copies, because a view would keep its whole row group in memory.
        """
        check_field(field, self.fields)
        if self.fields[field] not in ("image", "bytes"):
            raise ValueError(f"field {field!r} is no bytes, but {self.fields[field]}; values() gives it")

        def reader(column: Any) -> Callable[[int], np.ndarray]:
            rows = BytesColumn(column)

            def read_row(row: int) -> np.ndarray:
                data = rows[row]
                if data is None:
                    raise ValueError(why_missing(column[row], field))
                if not self._files.is_mapped:
                    data = data.copy()
                    data.flags.writeable = False
                elif len(data):
                    # The pages are read here, in the background, and not under whoever decodes.
                    _ = data[0], data[-1]
                return data

            return read_row

        return self._each(as_ids(ids, len(self)), field, reader)

    def values(self, ids: Sequence[int] | np.ndarray, field: str) -> list[Any]:
        """Give numbers, bools and str as Python's, lists of numbers as arrays; see Source.values."""
        check_field(field, self.fields)
        kind = self.fields[field]
        if kind in ("image", "bytes"):
            return [data.tobytes() for data in self.read(ids, field)]
        convert = array_of if kind == "array" else python_of
        return self._each(as_ids(ids, len(self)), field, lambda column: lambda row: convert(column[row]))

    def _each(self, ids: np.ndarray, field: str, reader: Callable[[Any], Callable[[int], Any]]) -> list[Any]:
        """Give reader(column)(row) for each id, each row group read once; ReadError names those that fail."""
        numbers = np.searchsorted(self._ends, ids, side="right")
        values: list[Any] = [None] * len(ids)
        failures = []
        for number in np.unique(numbers).tolist():
            positions = np.flatnonzero(numbers == number).tolist()
            file, group = self._groups[number]
            rows = [self._row(int(ids[position]), number) for position in positions]
            try:
                read_row = reader(self._files.column(file, group, field))
            except UnavailableError:
                raise
            except (OSError, ValueError) as error:
                failures += [(int(ids[p]), self.describe(int(ids[p])), str(error)) for p in positions]
                continue
            for position, row in zip(positions, rows, strict=True):
                try:
                    values[position] = read_row(row)
                except (ValueError, IndexError) as error:
                    sample_id = int(ids[position])
                    failures.append((sample_id, self.describe(sample_id), f"field {field!r}: {error}"))
        if failures:
            raise ReadError(failures)
        return values

    def has_missing(self, field: str) -> bool:
        """Tell whether a field of numbers, bools or text is missing in some sample. Raises OSError, ValueError."""
        check_field(field, self.fields)
        return self._files.has_missing(field)

    def _row(self, sample_id: int, number: int) -> int:
        return sample_id - (int(self._ends[number - 1]) if number else 0)

    def describe(self, sample_id: int) -> str:
        """Name the sample's file, row group and row in it; never raises."""
        if not 0 <= sample_id < len(self):
            return f"no sample {sample_id} in {self._files.shards.name}"
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        file, group = self._groups[number]
        return f"{self._files.shards.place(file)} row group {group} row {self._row(sample_id, number)}"

    def close(self) -> None:
        """Forget files, maps and row groups; see Source.close."""
        self._files.close()

    def __repr__(self) -> str:
        return f"TableSource({self._files.shards.name!r}, {len(self)} samples, fields={list(self.fields)})"


def one_schema(schemas: list[Any], shards: LocalShards) -> Any:
    """Give the Arrow schema that all files share; ValueError names the first with another, or a name given twice."""
    first = schemas[0]
    for number, schema in enumerate(schemas):
        try:
            # Names are decoded where they are looked at, and not before.
            _ = schema.names, _listed(schema), [kind_of(field.type) for field in schema]
        except UnicodeDecodeError as error:
            raise ValueError(f"{shards.place(number)} is damaged: {error}") from None
        if not schema.equals(first, check_metadata=False):
            raise ValueError(
                f"{shards.place(number)} has the columns {_listed(schema)}, {shards.place(0)} has {_listed(first)}: "
                "one set's files have the same"
            )
    if len(set(first.names)) != len(first.names):
        raise ValueError(f"{shards.place(0)} has two columns of one name: {_listed(first)}")
    return first


def _listed(schema: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
