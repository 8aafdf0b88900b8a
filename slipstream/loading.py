"""One batch's bytes, pixels and values; and what stands for the samples that have none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from slipstream_kernels.ragged import RaggedBatch

from .bad_samples import DIFFERING, GREY, PARTIAL, TRIES, resampled_positions
from .decode import DecodeError
from .fetch_ahead import numbers_of
from .pipeline import STAND_IN_BOX
from .source import ReadError, Source

if TYPE_CHECKING:
    from .dataset import SlipstreamDataset
    from .fetch_ahead import FetchAhead
    from .sampler_windowed import Order
    from .workers import Resources

_NO_BYTES = np.zeros(0, np.uint8)
_NUMBERS = ("int", "float", "bool")
_EMPTY: dict[str, Any] = {"int": 0, "float": 0.0, "bool": False, "str": ""}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Sample ids [B], decoded images and values by field, and which samples are themselves, bool [B]."""

    sample_ids: np.ndarray
    images: dict[str, RaggedBatch]
    values: dict[str, list[Any]]
    valid: np.ndarray


def sample_ids_of(resources: Resources, sampler: Order, epoch: int, positions: np.ndarray) -> np.ndarray:
    """The sample ids at these positions of an epoch, int64 [n]."""
    ids = sampler.sample_ids(epoch, positions)
    subset = resources.dataset.sample_ids
    return ids if subset is None else subset[ids]


def load_batch(
    resources: Resources,
    sampler: Order,
    epoch: int,
    positions: np.ndarray,
    valid: np.ndarray,
    ahead: FetchAhead | None = None,
) -> Decoded:
    """The samples at these positions, whose files are there, with bad ones by the loader's policy.

    Raises ReadError or DecodeError where the policy is to raise, or where resampling finds nothing; whatever the
    policy, UnavailableError where the store or the cache folder fails, and WrongPixelsError for batches before.
    """
    partial: list[tuple[int, str, str]] = []
    decoded = _load_by_policy(resources, sampler, epoch, positions, valid, ahead, partial)
    resources.record.add(PARTIAL, partial)  # not before: after an outage all of this is done again
    return decoded


def _load_by_policy(
    resources: Resources,
    sampler: Order,
    epoch: int,
    positions: np.ndarray,
    valid: np.ndarray,
    ahead: FetchAhead | None,
    partial: list[tuple[int, str, str]],
) -> Decoded:
    ids = sample_ids_of(resources, sampler, epoch, positions)
    policy = resources.on_error
    if policy == "raise":
        return _load(resources, ids, valid, partial)
    decoded, reasons = _load_what_can_be(resources, ids, valid, partial)
    if not reasons:
        return decoded
    failures = _failures(resources, ids, reasons)
    rows = np.array(sorted(reasons))
    if policy != "resample":
        resources.record.add(policy, failures)
    if policy == "replace":
        decoded.valid[rows] = False
        return decoded
    if policy == "skip":
        kept = np.ones(len(ids), bool)
        kept[rows] = False
        return _rows(decoded, kept)
    met = [*failures]
    for attempt in range(TRIES):
        others = resampled_positions(sampler.seed, epoch, positions[rows], attempt, len(sampler))
        new_ids = sample_ids_of(resources, sampler, epoch, others)
        with nullcontext() if ahead is None else ahead.reading_also(numbers_of(resources.dataset, new_ids)):
            found, why = _load_what_can_be(resources, new_ids, valid[rows], partial)
        met += _failures(resources, new_ids, why)
        good = np.array([row not in why for row in range(len(rows))])
        _put(decoded, rows[good], _rows(found, good))
        rows = rows[~good]
        if not len(rows):
            break
    resources.record.add(policy, met)  # not before: after an outage all of this is done again
    if not len(rows):
        return decoded
    raise DecodeError(
        [(number, path, f"{reason}; {TRIES} others in its place failed too") for number, path, reason in failures]
    )


def _load(resources: Resources, ids: np.ndarray, valid: np.ndarray, partial: list[tuple[int, str, str]]) -> Decoded:
    source = resources.dataset.source
    in_part: dict[int, str] = {}
    images = {
        field: resources.decoder.decode(_read(source, ids, field), ids, source.describe, partial=in_part)
        for field in resources.image_fields
    }
    partial += _failures(resources, ids, in_part)
    values = {field: _values(resources.dataset, ids, field) for field in resources.other_fields}
    return Decoded(sample_ids=ids, images=images, values=values, valid=valid)


def _load_what_can_be(
    resources: Resources, ids: np.ndarray, valid: np.ndarray, partial: list[tuple[int, str, str]]
) -> tuple[Decoded, dict[int, str]]:
    # All samples, with grey and empty values where there are none, and why: by row.
    source, fields = resources.dataset.source, resources.dataset.fields
    reasons: dict[int, str] = {}
    in_part: dict[int, str] = {}
    values = {}
    for field in resources.other_fields:
        taken, rows = _tolerant(lambda some, field=field: _values(resources.dataset, some, field), ids, reasons)
        values[field] = _filled(taken, rows, len(ids), _empty_value(fields[field], taken))
    images = {}
    for field in resources.image_fields:
        taken, rows = _tolerant(lambda some, field=field: _read(source, some, field), ids, reasons)
        decode = functools.partial(resources.decoder.decode_or_stand_in, stand_in=resources.stand_in)
        encoded = _filled(taken, rows, len(ids), _NO_BYTES)
        batch, why = decode(encoded, ids, source.describe, partial=in_part)
        for row, reason in why.items():
            reasons.setdefault(row, reason)
        pipeline = resources.pipelines.get(field)
        if pipeline is not None:
            boxes = {}
            for crop, of in pipeline.box_fields.items():
                for row in reasons:
                    values[of][row] = _stand_in_box(values[of][row])
                boxes[crop] = boxes_of(of, values[of], ids)
            unfit = pipeline.unfit(batch.sizes, boxes)
            if unfit:
                grey, _ = decode([_NO_BYTES] * len(unfit), ids[list(unfit)], source.describe)
                batch = batch.with_rows(np.array(list(unfit)), grey)
                for of in pipeline.box_fields.values():
                    for row in unfit:
                        values[of][row] = _stand_in_box(values[of][row])
                reasons |= {row: reason for row, reason in unfit.items() if row not in reasons}
        images[field] = batch
        resources.record.add(DIFFERING, resources.decoder.differing())
    partial += _failures(resources, ids, {row: reason for row, reason in in_part.items() if row not in reasons})
    return Decoded(sample_ids=ids.copy(), images=images, values=values, valid=valid.copy()), reasons


def _read(source: Source, ids: np.ndarray, field: str) -> list[np.ndarray]:
    # The encoded bytes; TypeError where a source of the user's own gives something else.
    encoded = source.read(ids, field)
    count = len(encoded) if isinstance(encoded, (list, tuple)) else 0
    wrong = [each for each in encoded if not _is_bytes(each)] if count else []
    if count != len(ids) or wrong:
        got = f"{count}" if not wrong else f"a {type(wrong[0]).__name__}"
        if wrong and isinstance(wrong[0], np.ndarray):
            got = f"{wrong[0].dtype} of shape {list(wrong[0].shape)}"
        raise TypeError(
            f"{type(source).__name__}.read must give a list of {len(ids)} uint8 arrays [n_bytes], got {got}: "
            f"np.frombuffer(data, np.uint8) makes one of bytes"
        )
    return encoded


def _is_bytes(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1


def _values(dataset: SlipstreamDataset, ids: np.ndarray, field: str) -> list[Any]:
    # ReadError for numbers that are missing: with one, a batch would have a list where others have a tensor.
    source = dataset.source
    values = source.values(ids, field)
    if dataset.fields[field] in _NUMBERS and None in values:
        missing = [int(number) for number, value in zip(ids, values, strict=True) if value is None]
        reason = f"{field!r} is missing; exclude_fields=[{field!r}] leaves it unread"
        raise ReadError([(number, source.describe(number), reason) for number in missing])
    return values


def _tolerant(
    call: Callable[[np.ndarray], list[Any]], ids: np.ndarray, reasons: dict[int, str]
) -> tuple[list[Any], list[int]]:
    # What the call gives for the rows that it can read; those of which it says that it cannot become reasons.
    rows = [row for row in range(len(ids)) if row not in reasons]
    while rows:
        try:
            return call(ids[rows]), rows
        except ReadError as error:
            failed = {sample_id: reason for sample_id, _, reason in error.failures}
            bad = [row for row in rows if int(ids[row]) in failed]
            if not bad:
                raise
            reasons |= {row: failed[int(ids[row])] for row in bad}
            rows = [row for row in rows if row not in bad]
    return [], []


def _filled(taken: Sequence[Any], rows: Sequence[int], count: int, empty: Any) -> list[Any]:
    result = [empty] * count
    for row, value in zip(rows, taken, strict=True):
        result[row] = value
    return result


def _empty_value(kind: str, taken: Sequence[Any]) -> Any:
    # Of the others' type, so that the batch keeps its tensor.
    if taken and isinstance(taken[0], np.ndarray):
        return np.zeros_like(taken[0])
    if taken and isinstance(taken[0], torch.Tensor):
        return torch.zeros_like(taken[0])
    return _EMPTY.get(kind, type(taken[0])() if taken and isinstance(taken[0], (int, float, str, bytes)) else None)


def _stand_in_box(old: Any) -> Any:
    # A box that lies in every image, likewise of the type of what it stands for.
    if isinstance(old, torch.Tensor):
        return torch.tensor(STAND_IN_BOX, dtype=old.dtype)
    return np.array(STAND_IN_BOX, old.dtype if isinstance(old, np.ndarray) else None)


def _failures(resources: Resources, ids: np.ndarray, reasons: dict[int, str]) -> list[tuple[int, str, str]]:
    describe = resources.dataset.source.describe
    return [(int(ids[row]), describe(int(ids[row])), reasons[row]) for row in sorted(reasons)]


def _rows(decoded: Decoded, kept: np.ndarray) -> Decoded:
    places = np.flatnonzero(kept).tolist()
    return Decoded(
        sample_ids=decoded.sample_ids[kept],
        images={field: batch.rows(kept) for field, batch in decoded.images.items()},
        values={field: [values[place] for place in places] for field, values in decoded.values.items()},
        valid=decoded.valid[kept],
    )


def _put(decoded: Decoded, rows: np.ndarray, others: Decoded) -> None:
    # In place: the samples of `others` at these rows.
    if not len(rows):
        return
    decoded.sample_ids[rows] = others.sample_ids
    for field, batch in others.images.items():
        decoded.images[field] = decoded.images[field].with_rows(rows, batch)
    for field, values in others.values.items():
        for row, value in zip(rows.tolist(), values, strict=True):
            decoded.values[field][row] = value


def boxes_of(field: str, values: list[Any], sample_ids: np.ndarray) -> np.ndarray:
    """A field's boxes as int64 [B, 4]; ValueError that names the sample for what is none."""
    boxes = np.zeros((len(values), 4), np.int64)
    for index, value in enumerate(values):
        given = np.asarray(value)
        if given.shape != (4,) or given.dtype.kind not in "iu":
            raise ValueError(
                f"{field} must be a box (top, left, height, width) of four whole numbers, "
                f"got {value!r} for sample {sample_ids[index]}"
            )
        boxes[index] = given
    return boxes


def make_stand_in(pipelines: Sequence[Any]) -> np.ndarray:
    """A grey image, uint8 [H, W, 3], that every crop of these pipelines can be cut from."""
    side = 64
    while side < 2**13:
        boxes = [{crop: [np.array(STAND_IN_BOX)] for crop in pipeline.box_fields} for pipeline in pipelines]
        size = np.array([[side, side]], np.int32)
        if not any(pipeline.unfit(size, box) for pipeline, box in zip(pipelines, boxes, strict=True)):
            break
        side *= 2
    return np.full((side, side, 3), GREY, np.uint8)
