"""A loader's state: a few whole numbers, and marks of the dataset and pipelines that they belong to."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from . import checks
from .dataset import SlipstreamDataset

VERSION = 1


def fingerprint(
    dataset: SlipstreamDataset,
    pipelines: Mapping[str, Any],
    batch_stages: Sequence[Any],
    *,
    seed: int,
    shuffle: Any,
    apply_exif: bool,
) -> dict[str, Any]:
    """What must be equal for a state to mean the same samples and crops: numbers, and a mark of each other part.

    What to do about bad samples is not: a run that one has ended goes on under another policy.
    """
    return {
        "samples": len(dataset),
        "seed": seed,
        "shuffle": shuffle,
        "apply_exif": apply_exif,
        "dataset": dataset_mark(dataset),
        "batch_stages": _mark(describe_spec(batch_stages).encode()),
        "pipelines": {field: _mark(describe_spec(stages).encode()) for field, stages in pipelines.items()},
    }


def dataset_mark(dataset: SlipstreamDataset) -> str:
    """A mark of the samples that a dataset has: by its source's fingerprint, fields and length, and its indices."""
    source = dataset.source
    name = getattr(source, "fingerprint", None)
    kinds = ",".join(sorted(dataset.fields))
    of_source = f"{len(source)} {kinds} {name() if callable(name) else ''}"
    subset = b"" if dataset.sample_ids is None else np.ascontiguousarray(dataset.sample_ids).tobytes()
    return _mark(of_source.encode(errors="surrogateescape") + b"\0" + subset)


def make_state(epoch: int, position: int, mark: Mapping[str, Any]) -> dict[str, Any]:
    """The state after `position` samples of an epoch, of all ranks together."""
    return {"version": VERSION, "epoch": epoch, "position": position, "fingerprint": dict(mark)}


def read_state(state: Any, mark: Mapping[str, Any]) -> tuple[int, int]:
    """(epoch, position) of a state; ValueError or TypeError for none, or for another dataset's or pipeline's."""
    if not isinstance(state, Mapping) or not {"version", "epoch", "position", "fingerprint"} <= set(state):
        raise TypeError(f"state must be what state_dict() gave, got {state!r:.200}")
    if state["version"] != VERSION:
        raise ValueError(f"state must be of version {VERSION}, got {state['version']!r}")
    theirs = state["fingerprint"]
    different = [
        f"{name} (saved {theirs.get(name)!r}, here {mark[name]!r})"
        for name in ("samples", "seed", "shuffle", "apply_exif", "dataset", "batch_stages")
        if theirs.get(name) != mark[name]
    ]
    saved = theirs.get("pipelines", {})
    for field in sorted({*saved, *mark["pipelines"]}):
        if saved.get(field) != mark["pipelines"].get(field):
            different.append(f"pipelines[{field!r}]")
    if different:
        raise ValueError(f"state is of another run; different: {', '.join(different)}")
    epoch, position = checks.whole("epoch", state["epoch"], 0), checks.whole("position", state["position"], 0)
    if position > mark["samples"]:
        raise ValueError(f"position must be at most the {mark['samples']} samples, got {position}")
    return epoch, position


def describe_spec(spec: Any) -> str:
    """A stage, or stages in lists and dicts, by kinds and parameters: the same in every process."""
    if isinstance(spec, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe_spec(value)}" for key, value in spec.items()) + "}"
    if isinstance(spec, Sequence) and not isinstance(spec, (str, bytes)):
        return "[" + ", ".join(map(describe_spec, spec)) + "]"
    if is_dataclass(spec) and not isinstance(spec, type):
        parts = (f"{each.name}={describe_spec(getattr(spec, each.name))}" for each in fields(spec) if each.name != "_")
        return f"{type(spec).__qualname__}({', '.join(parts)})"
    if spec is None or isinstance(spec, (bool, int, float, str, bytes)):
        return repr(spec)
    if isinstance(spec, functools.partial):
        return f"partial({describe_spec([spec.func, *spec.args])}, {describe_spec(spec.keywords)})"
    # a function or an object of the user's own: by name and plain attributes, for its repr may be an address
    name = getattr(spec, "__qualname__", None) or type(spec).__qualname__
    own = repr(spec) if type(spec).__module__ == "torch" else ""
    plain = {key: value for key, value in sorted(getattr(spec, "__dict__", {}).items()) if _is_plain(value)}
    parameters = describe_spec(plain) if plain else ""
    return f"{getattr(spec, '__module__', type(spec).__module__)}.{name}{own}{parameters}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes))


def _mark(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=8).hexdigest()
