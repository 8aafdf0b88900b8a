"""What a source holds: sizes, formats and codings from the headers and, if asked, what cannot be decoded."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .header import HeaderError, read_header, read_jpeg_frame
from .progress import Bar
from .sampler import Sampler
from .source import ReadError, Source

# Samples read at once: few enough that their maps and descriptors are nothing, enough to meet a chunk's all together.
_BLOCK = 256
# A decoded batch is held at once: images to a batch, and pixels by their headers.
_BATCH_IMAGES = 32
_BATCH_PIXELS = 50_000_000
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SHOWN_FAILURES = 50
_SHOWN_VALUES = 5
_UNKNOWN = "unknown"

Failure = tuple[int, str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The sum and mean of one number of every sample, and its quantiles 0, 5, 25, 50, 75, 95 and 100 %.

    Each quantile is the number of some sample, the least that this share of the samples does not exceed.
    """

    total: float
    mean: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What `inspect_source` found in the samples that it looked at.

    `samples` is the source's length. The spreads are over the samples that could be read (`bytes`) and whose header
    could be (`height`, `width`: stored pixels, `megapixels`); None where there are none. The others give the number of
    samples by value: `formats` ("unknown" for a damaged header), a JPEG's `chroma` subsampling and `coding`,
    `channels` as stored, EXIF `orientations` other than 1. Failures are (sample_id, path, reason): `unreadable`
    samples, `bad_headers`, and what could not be decoded of the readable ones, None if that was not tried.
    """

    samples: int
    looked_at: int
    seed: int
    field: str
    bytes: Spread | None
    height: Spread | None
    width: Spread | None
    megapixels: Spread | None
    formats: dict[str, int]
    chroma: dict[str, int]
    coding: dict[str, int]
    channels: dict[int, int]
    orientations: dict[int, int]
    unreadable: tuple[Failure, ...]
    bad_headers: tuple[Failure, ...]
    undecodable: tuple[Failure, ...] | None

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain values that json can write; no failure is left out."""
        return asdict(self)

    def text(self) -> str:
        """Give a report for people: every distribution, and the first failures of each sort."""
        part = "all looked at"
        if self.looked_at < self.samples:
            part = f"{self.looked_at:,} of them looked at (a random subset, seed {self.seed})"
        lines = [f"{self.samples:,} samples, {part}"]
        if self.bytes is not None:
            lines += [f"{self.bytes.total:,.0f} bytes in all", "", *self._table(), ""]
        counts: dict[str, Mapping[Any, int]] = {
            "format": self.formats,
            "channels": self.channels,
            "JPEG chroma": self.chroma,
            "JPEG coding": self.coding,
            "EXIF turned": self.orientations,
        }
        for name, values in counts.items():
            lines.append(f"{name:<12}{_shares(values)}")
        lines += _failures("could not be read", self.unreadable)
        if self.undecodable is None:
            lines += _failures("have no header that can be read; --decode tries them", self.bad_headers)
            lines.append("nothing was decoded: --decode does that")
        else:
            lines += _failures("could not be decoded", self.undecodable)
        return "\n".join(lines)

    def _table(self) -> Iterator[str]:
        names = ("min", *(f"{share:.0%}" for share in _QUANTILES[1:-1]), "max", "mean")
        yield f"{'':<11}" + "".join(f"{name:>8}" for name in names)
        for name, digits in (("bytes", 0), ("height", 0), ("width", 0), ("megapixels", 2)):
            spread: Spread | None = getattr(self, name)
            if spread is not None:
                cells = (f"{_short(value, digits):>8}" for value in (*spread.quantiles, spread.mean))
                yield f"{name:<11}" + "".join(cells)


def inspect_source(
    source: Source,
    *,
    field: str | None = None,
    limit: int | None = None,
    decode: bool = False,
    seed: int = 0,
    max_pixels: int = 178_956_970,
    progress: bool = False,
) -> Inspection:
    """Look at the encoded images of a source: their sizes and headers and, with `decode`, whether they decode.

    `field` is the image field, by default the first. `limit` looks at a random subset of that many samples, a pure
    function of `seed`. `decode` runs everything through the CPU decoder as the loader does, refusing what has more than
    `max_pixels`; after a batch that fails each sample of it is decoded alone once. Memory grows by 24 bytes a sample
    looked at, and with the failures. Raises ValueError for a bad argument or a source without such a field.
    """
    images = [name for name, kind in source.fields.items() if kind == "image"]
    if field is None and not images:
        raise ValueError(f"the source has no image field, its fields are {dict(source.fields)}")
    if field is not None and field not in images:
        raise ValueError(f"field must be one of the source's image fields {images}, got {field!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}")
    field = images[0] if field is None else field
    count = len(source) if limit is None else min(limit, len(source))
    found = _Found()
    trial = _Trial(source, max_pixels) if decode else None
    try:
        with Bar(total=count, unit="sample", disable=not progress) as bar:
            for ids in _blocks(len(source), count, seed):
                for sample_id, data in _read(source, ids, field, found.unreadable):
                    pixels = found.look(source, sample_id, data)
                    if trial is not None:
                        trial.add(sample_id, data, pixels)
                bar.update(len(ids))
            if trial is not None:
                trial.run()
    finally:
        if trial is not None:
            trial.close()
    height, width = np.array(found.height, np.int64), np.array(found.width, np.int64)
    return Inspection(
        samples=len(source),
        looked_at=count,
        seed=seed,
        field=field,
        bytes=_spread(np.array(found.n_bytes, np.int64)),
        height=_spread(height),
        width=_spread(width),
        megapixels=_spread(height * width / 1e6),
        formats=_ordered(found.formats),
        chroma=_ordered(found.chroma),
        coding=_ordered(found.coding),
        channels=_ordered(found.channels),
        orientations=_ordered(found.orientations),
        unreadable=tuple(found.unreadable),
        bad_headers=tuple(found.bad_headers),
        undecodable=None if trial is None else tuple(trial.failures),
    )


class _Found:
    """What was seen so far."""

    def __init__(self) -> None:
        self.n_bytes, self.height, self.width = array("q"), array("q"), array("q")
        self.formats: Counter[str] = Counter()
        self.chroma: Counter[str] = Counter()
        self.coding: Counter[str] = Counter()
        self.channels: Counter[int] = Counter()
        self.orientations: Counter[int] = Counter()
        self.unreadable: list[Failure] = []
        self.bad_headers: list[Failure] = []

    def look(self, source: Source, sample_id: int, data: np.ndarray) -> int:
        """Count a sample in; gives its pixels, 0 where the header does not tell."""
        self.n_bytes.append(len(data))
        try:
            header = read_header(data)
            frame = read_jpeg_frame(data) if header.format == "jpeg" else None
        except HeaderError as error:
            self.formats[_UNKNOWN] += 1
            self.bad_headers.append((sample_id, source.describe(sample_id), str(error)))
            return 0
        self.height.append(header.height)
        self.width.append(header.width)
        self.formats[header.format] += 1
        self.channels[header.channels] += 1
        if header.orientation != 1:
            self.orientations[header.orientation] += 1
        if frame is not None:
            self.chroma[frame.subsampling] += 1
            self.coding[frame.process + ("" if frame.precision == 8 else f", {frame.precision} bits")] += 1
        return header.height * header.width


class _Trial:
    """Decodes what it is given, in batches of bounded size, and keeps the failures and no pixels."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        import torch

        from .decode import DecodeError, Decoder
        from .device import usable_cores

        self._source = source
        self._max_pixels = max_pixels
        self._failed = DecodeError
        self._decoder = Decoder(
            device=torch.device("cpu"),
            max_batch=_BATCH_IMAGES,
            num_threads=usable_cores(),
            max_pixels=max_pixels,
        )
        self._ids: list[int] = []
        self._data: list[np.ndarray] = []
        self._pixels = 0
        self.failures: list[Failure] = []

    def add(self, sample_id: int, data: np.ndarray, pixels: int) -> None:
        if pixels > self._max_pixels:  # refused by its header, so it needs no room
            pixels = 0
        if self._ids and (len(self._ids) == _BATCH_IMAGES or self._pixels + pixels > _BATCH_PIXELS):
            self.run()
        self._ids.append(sample_id)
        self._data.append(data)
        self._pixels += pixels

    def run(self) -> None:
        """Decode what has come together."""
        try:
            if self._ids:
                self._decoder.decode(self._data, self._ids, self._source.describe)
        except self._failed as error:
            self.failures += error.failures
        self._ids, self._data, self._pixels = [], [], 0

    def close(self) -> None:
        self._decoder.close()


def _blocks(length: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Give the ids to look at in rising order, so that each chunk is met once."""
    if count == length:
        yield from (np.arange(first, min(first + _BLOCK, length)) for first in range(0, length, _BLOCK))
        return
    ids = np.sort(Sampler(length, shuffle=True, seed=seed).sample_ids(0, np.arange(count)))
    yield from (ids[first : first + _BLOCK] for first in range(0, count, _BLOCK))


def _read(source: Source, ids: np.ndarray, field: str, unreadable: list[Failure]) -> Iterator[tuple[int, np.ndarray]]:
    """Give (sample_id, bytes) of the samples that can be read; the others go to `unreadable`."""
    while len(ids):
        try:
            views = source.read(ids, field)
        except ReadError as error:
            unreadable += error.failures
            bad = [sample_id for sample_id, _, _ in error.failures]
            ids = ids[~np.isin(ids, bad)]
        else:
            yield from zip(ids.tolist(), views, strict=True)
            return


def _spread(values: np.ndarray) -> Spread | None:
    if not len(values):
        return None
    quantiles = np.quantile(values, _QUANTILES, method="inverted_cdf").tolist()
    return Spread(total=values.sum().item(), mean=values.mean().item(), quantiles=tuple(quantiles))


def _ordered(counts: Counter[Any]) -> dict[Any, int]:
    """Commonest first, equals by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _shares(counts: Mapping[Any, int]) -> str:
    total = sum(counts.values())
    shown = [f"{value} {count:,} ({count / total:.1%})" for value, count in list(counts.items())[:_SHOWN_VALUES]]
    if len(counts) > _SHOWN_VALUES:
        shown.append(f"{total - sum(list(counts.values())[:_SHOWN_VALUES]):,} others")
    return "; ".join(shown) or "none"


def _failures(what: str, failures: Sequence[Failure]) -> list[str]:
    lines = [f"{len(failures):,} samples {what}" + (":" if failures else "")]
    lines += [f"  sample {sample_id} ({path}): {reason}" for sample_id, path, reason in failures[:_SHOWN_FAILURES]]
    if len(failures) > _SHOWN_FAILURES:
        lines.append(f"  ... and {len(failures) - _SHOWN_FAILURES:,} more: --json names them all")
    return lines


def _short(value: float, digits: int) -> str:
    """A number in at most seven characters: 999,999, then 12.3M."""
    if value < 1e6:
        return f"{value:,.{digits if value < 1000 else 0}f}"
    for unit, size in (("M", 1e6), ("G", 1e9)):
        if value < 999.5 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value / 1e12:.3g}T"
