"""Images in Parquet files, such as those of Hugging Face's `datasets`, read with pyarrow.

Parquet is read by row group: whole columns of a group at a time, of which the last few are kept.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from .daemon import in_threads
from .source import Kept, ProcessLock, raise_if_ours
from .source_shards import LocalShards, find_files
from .source_table import TableSource, one_schema

EXTENSION = ".parquet"
# Columns of row groups, together: in order a batch needs a group or two, and a shuffled set larger than this reads
# nearly a group for each sample whatever is kept.
_KEPT_BYTES = 512 * 2**20
# Each holds a descriptor.
_KEPT_FILES = 64
# Rows that tell whether a field of bytes holds images.
_LOOKED_AT = 16


class ParquetFiles:
    """Parquet files and the columns of row groups read last."""

    is_mapped = False

    def __init__(self, shards: LocalShards) -> None:
        self.shards = shards
        self._opened: Kept[int, Any] = Kept(_KEPT_FILES)
        self._columns: OrderedDict[tuple[int, int, str], Any] = OrderedDict()
        self._n_bytes = 0
        self._lock = ProcessLock()
        found = list(in_threads(self._described, range(len(shards.shards))))
        self.schema = one_schema([schema for schema, _ in found], shards)
        self.groups = [groups for _, groups in found]

    def _described(self, file: int) -> tuple[Any, list[int]]:
        # Not kept: thousands of footers are much memory.
        with self._open(file) as opened:
            metadata = opened.metadata
            return opened.schema_arrow, [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _open(self, file: int) -> Any:
        path = self.shards.path(file)
        try:
            # Mapped, a forked child does not move its parent's place in the file.
            return pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise_if_ours(error, path)
            raise ValueError(f"{path} is damaged or no Parquet file: {error}") from None

    def column(self, file: int, group: int, field: str) -> Any:
        key = file, group, field
        with self._lock:
            column = self._columns.get(key)
            if column is None:
                column = self._read(file, group, field)
                self._columns[key] = column
                self._n_bytes += column.nbytes
                while self._n_bytes > _KEPT_BYTES and len(self._columns) > 1:
                    _, oldest = self._columns.popitem(last=False)
                    self._n_bytes -= oldest.nbytes
            else:
                self._columns.move_to_end(key)
            return column

    def _read(self, file: int, group: int, field: str) -> Any:
        opened = self._opened.get([file], self._open)[0]
        if isinstance(opened, Exception):
            raise opened
        try:
            # Threads of pyarrow's own would not outlive a fork.
            return opened.read_row_group(group, columns=[field], use_threads=False).column(field)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"column {field!r} is damaged: {error}") from None

    def first_rows(self, field: str) -> Any:
        file, group = next((f, g) for f, groups in enumerate(self.groups) for g, n in enumerate(groups) if n)
        with self._open(file) as opened:
            batches = opened.iter_batches(_LOOKED_AT, row_groups=[group], columns=[field], use_threads=False)
            try:
                return next(batches).column(field)
            except (OSError, ValueError, StopIteration, pa.ArrowException) as error:
                raise ValueError(f"{self.shards.place(file)}: column {field!r} is damaged: {error}") from None

    def has_missing(self, field: str) -> bool:
        return any(in_threads(lambda file: self._has_missing(file, field), range(len(self.groups))))

    def _has_missing(self, file: int, field: str) -> bool:
        with self._open(file) as opened:
            metadata = opened.metadata
            for group in range(metadata.num_row_groups):
                columns = map(metadata.row_group(group).column, range(metadata.num_columns))
                found = next(column for column in columns if column.path_in_schema == field)
                known = found.statistics
                if known is None or not known.has_null_count:
                    known = self.column(file, group, field)
                if known.null_count:
                    return True
        return False

    def close(self) -> None:
        with self._lock:
            self._columns.clear()
            self._n_bytes = 0
        self._opened.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": OrderedDict(), "_n_bytes": 0}


def open_parquet(place: str | os.PathLike[str]) -> TableSource:
    """Open Parquet files with images in a column: a folder, a .parquet, a glob or a brace list of this machine.

    Raises ImportError without pyarrow; FileNotFoundError, OSError or ValueError, naming the file, for one that is not
    there, damaged, or has other columns than the first.
    """
    paths = find_files(os.fspath(place), EXTENSION)
    return TableSource(ParquetFiles(LocalShards(os.path.abspath(os.path.expanduser(place)), paths)))
