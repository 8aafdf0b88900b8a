"""The samples of a source, or of a part of it, one by one."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
import torch

from . import checks
from .source import Source, as_ids
from .source_folder import EXTENSIONS, FolderSource
from .source_litdata import open_litdata
from .source_shards import is_pattern, refuse_packed
from .source_tar import open_tar

# Pillow's own limit against decompression bombs.
_MAX_PIXELS = 178_956_970
# A folder that `pack` writes to has one of this name below it until it is whole.
PACKING = ".pack"
_SHARDS = (".tar", ".parquet", ".arrow")


class SlipstreamDataset(torch.utils.data.Dataset):
    """Encoded images and the other fields of their samples, from LitData, WebDataset, Parquet, Arrow or image files.

    Give exactly one of `source` (a Source, or a folder, files or s3:// URL to recognise), `remote_dir` (LitData chunks
    under an s3:// URL or in a slow folder, or WebDataset shards under an s3:// URL: each is fetched into the cache when
    it is first needed) and `local_dir` (read in place: LitData chunks if it holds an index.json; WebDataset's .tar
    shards, .parquet files, or what `datasets`' save_to_disk wrote, if it holds such; otherwise images in torchvision's
    ImageFolder layout). Shards may also be given by a glob or a brace list: "/data/train-{0000..0146}.tar".

    `cache_dir`: where fetched and unpacked chunks and the indexes of shards are kept; $SLIPSTREAM_CACHE, else
    slipstream in $XDG_CACHE_HOME or ~/.cache, by default. `max_cache_size`: bytes, or a text such as "200GB", that all
    sets and indexes in `cache_dir` may take together, by all processes that give it: what was used last stays, and what
    is being fetched counts. A larger set is read in order or by shuffle="windowed". `storage_options`: for s3://, named
    as boto3's client names them, or {"unsigned": True} for a public bucket. `indices`: the samples of a subset by their
    ids in the source; one that is repeated has the same crops each time within an epoch. `allow_pickle`: read pickled
    fields whatever they hold, which runs code that the data names.
    `decode_images`: `dataset[i]` gives images as uint8 [3, H, W] tensors (by Pillow, refused beyond `max_pixels`
    pixels) instead of bytes; the loader ignores it.

    `dataset[i]` is a dict of plain values: {'image': bytes, 'label': 3, 'path': '...'}. A sample's id is always that
    of the source, so that a subset draws the same crops for the same image. Raises FileNotFoundError, OSError,
    ValueError or TypeError when made, for a path, chunk or argument that does not fit.
    """

    def __init__(
        self,
        source: Source | str | os.PathLike[str] | None = None,
        *,
        remote_dir: str | os.PathLike[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        max_cache_size: int | str | None = None,
        decode_images: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        allow_pickle: bool = False,
        max_pixels: int = _MAX_PIXELS,
    ) -> None:
        given = {"source": source, "remote_dir": remote_dir, "local_dir": local_dir}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"give exactly one of source, remote_dir and local_dir, got {' and '.join(names) or 'none'}"
            )
        max_pixels = checks.whole("max_pixels", max_pixels, 1)
        if max_cache_size is not None:
            max_cache_size = checks.byte_count("max_cache_size", max_cache_size)
        checks.flag("allow_pickle", allow_pickle)
        if not isinstance(storage_options, (Mapping, NoneType)):  # not shown: it may hold credentials
            raise TypeError(f"storage_options must be a dict of boto3's, got {type(storage_options).__name__}")
        self.decode_images = checks.flag("decode_images", decode_images)
        for name, value in {"remote_dir": remote_dir, "local_dir": local_dir, "cache_dir": cache_dir}.items():
            if value is not None:
                checks.path(name, value)
        if isinstance(source, (str, os.PathLike)):
            is_url = "://" in os.fspath(source)
            remote_dir, local_dir = (source, None) if is_url else (None, source)
            source = None
        if source is not None:
            if not isinstance(source, Source) or isinstance(source, type):
                raise TypeError(f"source must be a path, an s3:// URL or a Source, got {type(source).__name__}")
            unused = {
                "cache_dir": cache_dir,
                "max_cache_size": max_cache_size,
                "storage_options": storage_options,
                "allow_pickle": allow_pickle or None,
            }
            for name, value in unused.items():
                if value is not None:
                    raise ValueError(f"{name} does not apply to a Source object: give it when that is made")
            self.source: Source = source
        else:
            cache = {"cache_dir": cache_dir, "max_cache_size": max_cache_size}
            if remote_dir is not None:
                self.source = _open_remote(remote_dir, cache, storage_options, allow_pickle)
            else:
                self.source = _open_local(names[0], local_dir, cache, storage_options, allow_pickle)
        self.sample_ids: np.ndarray | None = None if indices is None else _checked_indices(indices, len(self.source))
        self.max_pixels = max_pixels

    @property
    def fields(self) -> Mapping[str, str]:
        """The source's fields and their kinds; see Source.fields."""
        return self.source.fields

    def __len__(self) -> int:
        return len(self.source) if self.sample_ids is None else len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            position = operator.index(index)
        except TypeError:
            raise TypeError(f"index must be an int, got {index!r}; indices= makes a subset") from None
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} is out of range: the dataset has {len(self)} samples")
        position %= len(self)
        sample_id = position if self.sample_ids is None else int(self.sample_ids[position])
        sample = {field: self.source.values([sample_id], field)[0] for field in self.fields}
        if self.decode_images:
            for field in sample:
                if self.fields[field] == "image":
                    sample[field] = self._decode(sample_id, field)
        return sample

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    def _decode(self, sample_id: int, field: str) -> torch.Tensor:
        from .decode import DecodeError
        from .yuv420 import decode_image

        data = self.source.read([sample_id], field)[0]
        try:
            return torch.from_numpy(decode_image(data, max_pixels=self.max_pixels).transpose(2, 0, 1).copy())
        except Exception as error:
            raise DecodeError([(sample_id, self.source.describe(sample_id), str(error))]) from error

    def __repr__(self) -> str:
        subset = "" if self.sample_ids is None else f", {len(self)} of its samples"
        return f"SlipstreamDataset({self.source!r}{subset})"


def _open_remote(place: Any, cache: dict[str, Any], storage_options: Any, allow_pickle: bool) -> Source:
    place = os.fspath(place)
    if not place.startswith("s3://"):
        _refuse_options(storage_options)
    elif place.endswith(".tar") or is_pattern(place):
        return open_tar(place, **cache, storage_options=storage_options)
    try:
        return open_litdata(place, **cache, storage_options=storage_options, allow_pickle=allow_pickle)
    except FileNotFoundError as error:
        no_index = error
    if "://" in place:
        try:
            return open_tar(place, **cache, storage_options=storage_options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{place} holds neither LitData chunks nor tars ({no_index}; {error})") from None
    if not os.path.isdir(os.path.expanduser(place)):
        raise FileNotFoundError(f"remote_dir {place!r} does not exist")
    raise FileNotFoundError(
        f"remote_dir holds no LitData set ({no_index}); give a folder of images as local_dir, or one of tars or tables"
    )


def _open_local(name: str, place: Any, cache: dict[str, Any], storage_options: Any, allow_pickle: bool) -> Source:
    folder = os.path.expanduser(os.fspath(place))
    if "://" in folder:
        raise ValueError(f"{name} is a folder, got {folder.split('://')[0]}://...; give a URL as remote_dir")
    _refuse_options(storage_options)
    if not os.path.isdir(folder):
        return _open_files(name, folder, cache)
    if os.path.exists(os.path.join(folder, "index.json")):
        return open_litdata(folder, **cache, allow_pickle=allow_pickle, in_place=True)
    if os.path.isdir(os.path.join(folder, PACKING)):
        raise FileNotFoundError(f"{folder} is not packed to the end: run the same pack again, or its other ranks")
    if any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")):
        return _open_tables(folder, ".arrow")
    extension = _shards_in(folder)
    if extension is None:
        return _open_images(folder)
    return open_tar(folder, **cache) if extension == ".tar" else _open_tables(folder, extension)


def _open_images(folder: str) -> Source:
    try:
        return FolderSource(folder)
    except ValueError as error:
        with os.scandir(folder) as entries:
            sets = sorted(entry.path for entry in entries if entry.is_dir() and _is_set(entry.path))
        if not sets:
            raise
        raise ValueError(f"{error}; give one set, such as {sets[0]}") from None


def _is_set(folder: str) -> bool:
    names = os.listdir(folder)
    return "index.json" in names or any(os.path.splitext(name)[1].lower() in _SHARDS for name in names)


def _open_files(name: str, place: str, cache: dict[str, Any]) -> Source:
    """Open a file, a glob or a brace list, by the extension it ends in; name: of the argument, for messages."""
    if not os.path.exists(place) and not is_pattern(place):
        raise FileNotFoundError(f"{name} {place!r} does not exist")
    refuse_packed([place], name)
    extension = os.path.splitext(place)[1]
    if extension not in _SHARDS:
        raise NotADirectoryError(f"{name} {place!r} is not a folder, nor does it end in {', '.join(_SHARDS)}")
    return open_tar(place, **cache) if extension == ".tar" else _open_tables(place, extension)


def _open_tables(place: str, extension: str) -> Source:
    try:
        from .source_arrow import open_arrow
        from .source_parquet import open_parquet
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "pyarrow":
            raise
        raise ImportError(f"{place}: Parquet and Arrow files need pyarrow: pip install pyarrow") from error
    return open_parquet(place) if extension == ".parquet" else open_arrow(place)


def _shards_in(folder: str) -> str | None:
    """The extension of the shards that a folder holds; None for a folder of images, ValueError for a mixture."""
    found = {}
    packed = []
    with os.scandir(folder) as entries:
        for entry in entries:
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if extension in _SHARDS and entry.is_file():
                found.setdefault(extension, entry.name)
            elif extension in EXTENSIONS or entry.is_dir():
                found.setdefault("images or folders", entry.name)
            else:
                packed.append(entry.name)
    if len(found) > 1 and not found.keys().isdisjoint(_SHARDS):
        raise ValueError(
            f"{folder} holds {' and '.join(found.values())}: give the shards as a glob such as "
            f"{os.path.join(folder, '*.tar')}, or images as FolderSource(folder)"
        )
    if not found:
        refuse_packed(packed, folder)
    return next((extension for extension in found if extension in _SHARDS), None)


def _refuse_options(storage_options: Any) -> None:
    if storage_options:
        raise ValueError("storage_options apply to an s3:// remote_dir only")


def _checked_indices(indices: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    try:
        return as_ids(indices, length).copy()
    except TypeError:
        raise TypeError(f"indices must be a flat sequence of ints, got {indices!r:.80}") from None
    except IndexError as error:
        raise IndexError(f"indices: {error}") from None
