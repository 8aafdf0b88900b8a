"""One field of a batch from its samples' values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .device import to_device

_DTYPES = {"int": torch.int64, "float": torch.float32, "bool": torch.bool}


def collate(values: Sequence[Any], device: torch.device, kind: str = "") -> Any:
    """One field of a batch: int64, float32 or bool tensors of numbers, equal-shape arrays stacked, the rest as a list.

    kind: the field's (Source.fields), which tells what no values are. Tensors go to the device without waiting for the
    copy.
    """
    if not values:
        return torch.empty(0, dtype=_DTYPES[kind], device=device) if kind in _DTYPES else []
    kinds = {type(value) for value in values}
    if kinds <= {bool, np.bool_}:
        return to_device(np.array(values, bool), device)
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        if all(-(2**63) <= value < 2**63 for value in values):
            return to_device(np.array(values, np.int64), device)
        return list(values)
    if all(issubclass(kind, (int, float, np.number)) and kind is not bool for kind in kinds):
        if any(issubclass(kind, np.complexfloating) for kind in kinds):
            return list(values)
        return to_device(np.array(values, np.float32), device)
    if all(isinstance(value, (np.ndarray, torch.Tensor)) for value in values):
        tensors = [value if isinstance(value, torch.Tensor) else _tensor(value) for value in values]
        if all(t is not None and t.shape == tensors[0].shape and t.dtype == tensors[0].dtype for t in tensors):
            return to_device(torch.stack(tensors), device)
    return list(values)


def _tensor(array: np.ndarray) -> Any:
    try:
        # A copy, for the array may be a read-only view of a map, in this machine's byte order, the only one torch has.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except TypeError:  # a dtype that torch does not have
        return None
