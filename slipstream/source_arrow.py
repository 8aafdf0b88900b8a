"""Images in Arrow files, such as those that save_to_disk of Hugging Face's `datasets` writes, as views over maps."""

from __future__ import annotations

import json
import os
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from .daemon import in_threads
from .source import Kept, map_file
from .source_shards import LocalShards, find_files
from .source_table import TableSource, one_schema

EXTENSION = ".arrow"
_LOOKED_AT = 16
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowFiles:
    """Arrow files mapped into memory; their record batches are the groups."""

    is_mapped = True

    def __init__(self, shards: LocalShards) -> None:
        self.shards = shards
        self._opened: Kept[int, Any] = Kept()
        found = list(in_threads(self._described, range(len(shards.shards))))
        self.schema = one_schema([schema for schema, _ in found], shards)
        self.groups = [groups for _, groups in found]

    def _described(self, file: int) -> tuple[Any, list[int]]:
        schema, batches = self._open(file)
        return schema, [batch.num_rows for batch in batches]

    def _open(self, file: int) -> tuple[Any, list[Any]]:
        path = self.shards.path(file)
        data = pa.py_buffer(map_file(path))
        try:
            if data.size >= 6 and data.slice(0, 6).to_pybytes() == b"ARROW1":
                reader = pa.ipc.open_file(data)
                return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]
            stream = pa.ipc.open_stream(data)
            batches = list(stream)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{path} is damaged or no Arrow file: {error}") from None
        # pyarrow takes the end of the file for the end of the stream.
        if data.slice(max(data.size - 8, 0)).to_pybytes() != _STREAM_END:
            raise ValueError(f"{path} is cut off at {data.size} bytes: the mark that ends an Arrow stream is missing")
        return stream.schema, batches

    def _open_checked(self, file: int) -> list[Any]:
        _, batches = self._open(file)
        try:
            for batch in batches:
                # Wrong offsets would lead pyarrow out of the map.
                batch.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(f"{self.shards.place(file)} is damaged: {error}") from None
        return batches

    def column(self, file: int, group: int, field: str) -> Any:
        opened = self._opened.get([file], self._open_checked)[0]
        if isinstance(opened, Exception):
            raise opened
        return opened[group].column(field)

    def first_rows(self, field: str) -> Any:
        file, group = next((f, g) for f, groups in enumerate(self.groups) for g, n in enumerate(groups) if n)
        return self.column(file, group, field)[:_LOOKED_AT]

    def has_missing(self, field: str) -> bool:
        places = [(file, group) for file, groups in enumerate(self.groups) for group in range(len(groups))]
        return any(self.column(file, group, field).null_count for file, group in places)

    def close(self) -> None:
        self._opened.close()


def open_arrow(place: str | os.PathLike[str]) -> TableSource:
    """Open what `datasets`' save_to_disk wrote (a folder), or Arrow stream or file formats under *.arrow.

    Raises as `open_parquet` does, and ValueError for a folder of several splits.
    """
    folder = os.path.abspath(os.path.expanduser(place))
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        raise ValueError(f"{folder} is a DatasetDict: give the folder of one of its splits")
    state = os.path.join(folder, "state.json")
    paths = _saved(folder, state) if os.path.exists(state) else find_files(os.fspath(place), EXTENSION)
    return TableSource(ArrowFiles(LocalShards(folder, paths)))


def _saved(folder: str, state: str) -> list[str]:
    with open(state, "rb") as file:
        try:
            saved = json.load(file)
            names = [entry["filename"] for entry in saved["_data_files"]]
            chosen = saved.get("_indices_data_files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{state} is none that `datasets` wrote ({error!r})") from None
    if chosen:
        raise ValueError(f"{folder} was saved with a list of chosen rows: flatten_indices() and save it again")
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or any(letter in name for letter in "/\\\0"):
            raise ValueError(f"{state}: file name {name!r} must be a plain one inside the set's own folder")
    return [os.path.join(folder, name) for name in names]
