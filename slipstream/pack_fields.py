"""How the fields of a source are stored as the leaves of a LitData set: their formats, and a sample's bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dataset import SlipstreamDataset
from .pack_format import Encode
from .source import ReadError
from .source_fields import MISSING
from .source_folder import FolderSource
from .source_litdata import LitDataSource

_INT, _FLOAT = struct.Struct("<q"), struct.Struct("<d")
# A leaf's size and an item's offsets are 32-bit; the rest is room for the chunk's header.
_MAX_ITEM = 2**32 - 2**10

Failure = tuple[int, str, str]
# A sample in the chunk's layout: a u32 size per leaf, then the leaves; each bytes or uint8 [n_bytes].
Item = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """A field as it is stored: litdata's name of the format, and the function from sample ids to the leaves' bytes."""

    field: str
    data_format: str
    read: Callable[[np.ndarray], Sequence[bytes | np.ndarray]]


class Layout:
    """The leaves of a dataset's samples, and litdata's specification of the tree that they make.

    The leaves of a LitData set stay as they are stored, whatever they hold; those of other sources follow from the
    fields' kinds. `encode` is applied to the image field `field` (default: the only one). Raises ValueError, naming
    the field, for one that cannot be stored.
    """

    def __init__(
        self, dataset: SlipstreamDataset, *, encode: Encode | None, field: str | None, exclude_fields: Sequence[str]
    ) -> None:
        self.dataset = dataset
        kept = _kept_fields(dataset, exclude_fields)
        encoded = _encoded_field(dataset, kept, encode, field)
        self.leaves = [_leaf(dataset, name) for name in kept]
        self.spec = _spec_of(dataset, kept)
        if encode is not None:
            number = kept.index(encoded)
            self.leaves[number] = _encoded_leaf(dataset, self.leaves[number], encode)
        self._header = struct.Struct(f"<{len(kept)}I")

    def __len__(self) -> int:
        return len(self.dataset)

    def items(self, positions: range) -> tuple[list[Item], list[Failure]]:
        """Give the samples at these positions of the dataset, but for those that cannot be stored, and which."""
        ids = self.dataset.sample_ids
        chosen = np.arange(positions.start, positions.stop) if ids is None else ids[positions.start : positions.stop]
        try:
            return self._items(chosen), []
        except ReadError:
            pass
        # An error may name one sample of several, or those of one field.
        items, failures = [], []
        for position in range(len(chosen)):
            try:
                items += self._items(chosen[position : position + 1])
            except ReadError as error:
                failures += error.failures[:1]
        return items, failures

    def _items(self, ids: np.ndarray) -> list[Item]:
        columns = [leaf.read(ids) for leaf in self.leaves]
        items = []
        for sample_id, row in zip(ids.tolist(), zip(*columns, strict=True), strict=True):
            sizes = [len(data) for data in row]
            if sum(sizes) > _MAX_ITEM:
                reason = f"it has {sum(sizes)} bytes, a chunk holds less than 4 GiB"
                raise ReadError([(sample_id, self.dataset.source.describe(sample_id), reason)])
            items.append((self._header.pack(*sizes), *row))
        return items


def _kept_fields(dataset: SlipstreamDataset, exclude_fields: Sequence[str]) -> list[str]:
    if isinstance(exclude_fields, str) or not isinstance(exclude_fields, Collection):
        raise TypeError(f"exclude_fields must be a list of field names, got {exclude_fields!r}")
    for field in exclude_fields:
        if field not in dataset.fields:
            raise ValueError(f"exclude_fields has {field!r}; the source has {', '.join(map(repr, dataset.fields))}")
    kept = [field for field in dataset.fields if field not in exclude_fields]
    if not kept:
        raise ValueError("exclude_fields must leave a field")
    return kept


def _encoded_field(dataset: SlipstreamDataset, kept: list[str], encode: Encode | None, field: str | None) -> str:
    if encode is None:
        if field is not None:
            raise ValueError(f"field={field!r} says which images are encoded anew, but format='same' keeps them all")
        return ""
    images = [name for name in kept if dataset.fields[name] == "image"]
    if field is None and len(images) != 1:
        raise ValueError(f"field must name the images to encode anew, one of {images}")
    if field is not None and field not in images:
        raise ValueError(f"field must be one of the image fields {images}, got {field!r}")
    return field or images[0]


def _spec_of(dataset: SlipstreamDataset, kept: list[str]) -> str | None:
    if isinstance(dataset.source, LitDataSource) and len(kept) == len(dataset.fields):
        return dataset.source.spec
    leaf = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": "builtins.dict", "context": json.dumps(kept), "children_spec": [leaf] * len(kept)}])


def _leaf(dataset: SlipstreamDataset, field: str) -> Leaf:
    source = dataset.source
    if isinstance(source, LitDataSource):
        return Leaf(field=field, data_format=source.formats[field], read=lambda ids: _as_stored(source, field, ids))
    kind = dataset.fields[field]
    if kind in ("image", "bytes"):
        # A page fault under a view may be taken with Python's lock held, the reading of a file is not: cold folders are
        # read twice as fast by two threads and more.
        give = source.values if isinstance(source, FolderSource) else source.read
        return Leaf(field=field, data_format="bytes", read=lambda ids: give(ids, field))
    has_missing = getattr(source, "has_missing", None)
    if kind in ("int", "float", "bool", "str") and callable(has_missing) and has_missing(field):
        kind = "json"
    if kind not in _STORED:
        raise ValueError(
            f"field {field!r} is of kind {kind!r}, which cannot be stored; leave it out with exclude_fields=[{field!r}]"
        )
    data_format, store = _STORED[kind]

    def read(ids: np.ndarray) -> list[bytes]:
        leaves, failures = [], []
        for sample_id, value in zip(ids.tolist(), source.values(ids, field), strict=True):
            try:
                leaves.append(store(value))
            except (ValueError, TypeError, KeyError, struct.error, RecursionError) as error:
                reason = (
                    f"field {field!r} is {value!r:.80}, which cannot be stored as {data_format} ({error}); "
                    f"exclude_fields=[{field!r}] leaves it out"
                )
                failures.append((sample_id, source.describe(sample_id), reason))
        if failures:
            raise ReadError(failures)
        return leaves

    return Leaf(field=field, data_format=data_format, read=read)


def _as_stored(source: LitDataSource, field: str, ids: np.ndarray) -> list[np.ndarray]:
    leaves = source.read(ids, field)
    if source.fields[field] not in ("int", "float", "bool", "str"):
        return leaves
    absent = [number for number, leaf in zip(ids.tolist(), leaves, strict=True) if leaf.tobytes() == MISSING]
    if absent:
        reason = (
            f"field {field!r} is None, which cannot be stored as {source.formats[field]}; "
            f"exclude_fields=[{field!r}] leaves it out"
        )
        raise ReadError([(number, source.describe(number), reason) for number in absent])
    return leaves


def _encoded_leaf(dataset: SlipstreamDataset, leaf: Leaf, encode: Encode) -> Leaf:
    def read(ids: np.ndarray) -> list[bytes | np.ndarray]:
        leaves, failures = [], []
        for sample_id, data in zip(ids.tolist(), leaf.read(ids), strict=True):
            try:
                leaves.append(encode(np.frombuffer(data, np.uint8)))
            except MemoryError:
                raise
            except Exception as error:
                # Pillow has many ways of saying that an image is damaged.
                failures.append((sample_id, dataset.source.describe(sample_id), f"{leaf.field!r}: {error}"))
        if failures:
            raise ReadError(failures)
        return leaves

    return Leaf(field=leaf.field, data_format="bytes", read=read)


def _bool(value: Any) -> bytes:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"it is of type {type(value).__name__}")
    return b"\1" if value else b"\0"


def _str(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"it is of type {type(value).__name__}")
    return value.encode()


def _json(value: Any) -> bytes:
    # litdata's own binary JSON differs with the packages installed, and turns a dict's numbers to text in silence.
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    if json.loads(text) != value:
        raise ValueError(f"it would come back as {text:.80}")
    return text.encode()


def _array(value: Any) -> bytes:
    from litdata.streaming.serializers import NumpySerializer

    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        raise TypeError(f"it is of type {getattr(value, 'dtype', type(value).__name__)}")
    return NumpySerializer().serialize(value)[0]


def _tensor(value: Any) -> bytes:
    from litdata.streaming.serializers import TensorSerializer

    return TensorSerializer().serialize(value)[0]


# litdata's data_format of each kind of field, and the function from a value to its bytes.
_STORED: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "int": ("int", _INT.pack),
    "float": ("float", _FLOAT.pack),
    "bool": ("bool", _bool),
    "str": ("str", _str),
    "array": ("numpy", _array),
    "tensor": ("tensor", _tensor),
    "json": ("json", _json),
}
