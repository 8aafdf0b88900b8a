"""LitData's index.json, checked: which chunks there are, and the names and formats of a sample's leaves."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

_COMPRESSION_LEVELS = ("chunk", "batch", "sample")
_MAPPINGS = ("builtins.dict", "collections.OrderedDict")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One chunk: its file's name, its number of samples, and the index's `chunk_bytes` (before whole-file zstd)."""

    name: str
    samples: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """A LitData set's chunks and leaves.

    `leaves` gives (field name, litdata's data_format) in the order they are stored in, `spec` the tree that they make,
    as litdata writes it. `compression` is None, or "chunk" (the file is one zstd stream), "batch" (frames of samples)
    or "sample" (each sample is one).
    """

    chunks: tuple[Chunk, ...]
    leaves: tuple[tuple[str, str], ...]
    spec: str | None
    compression: str | None


def parse_index(text: str | bytes, place: str) -> Index:
    """Read an index.json: ValueError, naming `place` and the reason, if it is not LitData's or not readable here.

    Names: a dict's keys, joined by dots where dicts are nested; element i of a tuple or list is `field_i`; a sample
    that is a single bare leaf has the one field `data`.
    """
    try:
        index = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not a LitData index: it is no JSON ({error})") from None
    if not isinstance(index, dict) or not isinstance(index.get("chunks"), list):
        hint = " (it looks like a MosaicML Streaming one)" if isinstance(index, dict) and "shards" in index else ""
        raise ValueError(f"{place} is not a LitData index: it has no list 'chunks'{hint}")
    config = index.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{place} is not a LitData index: it has no object 'config'")
    if config.get("encryption"):
        raise ValueError(
            f"{place}: config.encryption is set, and encrypted chunks cannot be read; write the set without encryption"
        )
    loader = config.get("item_loader", "PyTreeLoader")
    if loader != "PyTreeLoader":
        raise ValueError(
            f"{place}: config.item_loader is {loader!r}; only 'PyTreeLoader' sets hold samples with fields"
        )
    if not index["chunks"]:
        raise ValueError(f"{place} lists no chunks: the set is empty")
    chunks = tuple(_chunk(entry, place) for entry in index["chunks"])
    twice = [name for name, count in Counter(chunk.name for chunk in chunks).items() if count > 1]
    if twice:
        raise ValueError(f"{place} lists the chunk {twice[0]!r} more than once: its samples would come under two ids")
    return Index(
        chunks=chunks,
        leaves=_leaves(config, place),
        spec=config.get("data_spec") or None,
        compression=_compression(config, place),
    )


def _chunk(entry: Any, place: str) -> Chunk:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is not a LitData index: a chunk is {entry!r}, not an object")
    name, samples, n_bytes = entry.get("filename"), entry.get("chunk_size"), entry.get("chunk_bytes")
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ValueError(f"{place}: chunk filename {name!r} must be a plain file name inside the set's own folder")
    # A chunk counts its samples in 32 bits.
    for key, value, bits in (("chunk_size", samples, 32), ("chunk_bytes", n_bytes, 63)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**bits:
            allowed = f"a whole number > 0 and < 2**{bits}"
            raise ValueError(f"{place}: {key} of chunk {name!r} is {value!r}; it must be {allowed}")
    return Chunk(name=name, samples=samples, n_bytes=n_bytes)  # pyright: ignore[reportArgumentType]


def _compression(config: dict[str, Any], place: str) -> str | None:
    codec = config.get("compression")
    if not codec:
        return None
    if str(codec).split(":")[0] != "zstd":
        raise ValueError(f"{place}: config.compression is {codec!r}; only 'zstd' and 'zstd:<level>' can be read")
    level = config.get("compression_level") or "chunk"
    if level not in _COMPRESSION_LEVELS:
        raise ValueError(f"{place}: config.compression_level is {level!r}; it must be one of {_COMPRESSION_LEVELS}")
    return level


def _leaves(config: dict[str, Any], place: str) -> tuple[tuple[str, str], ...]:
    formats = config.get("data_format")
    if not isinstance(formats, list) or not formats or not all(isinstance(name, str) for name in formats):
        raise ValueError(f"{place} is not a LitData index: config.data_format is {formats!r}, not a list of names")
    spec = config.get("data_spec")
    try:
        names = _leaf_names(json.loads(spec)[1], ()) if spec else [f"field_{i}" for i in range(len(formats))]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{place}: config.data_spec {spec!r} is not a litdata tree specification") from None
    if len(names) != len(formats):
        raise ValueError(f"{place}: config.data_spec names {len(names)} leaves, config.data_format {len(formats)}")
    if len(set(names)) != len(names):
        raise ValueError(f"{place}: config.data_spec gives two leaves one name: {names}")
    return tuple(zip(names, formats, strict=True))


def _leaf_names(node: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    # Read as plain JSON: litdata's own loader imports the classes that a specification names.
    kind, children = node["type"], node["children_spec"]
    if kind is None:
        return [".".join(path) or "data"]
    if kind in _MAPPINGS:
        keys = [str(key) for key in json.loads(node["context"])]
    else:
        keys = [f"field_{i}" for i in range(len(children))]
    names = []
    for key, child in zip(keys, children, strict=True):
        names += _leaf_names(child, (*path, key))
    return names
