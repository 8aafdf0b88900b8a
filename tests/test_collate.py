"""What becomes of a field's values in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.collate import collate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], torch.tensor([1, 2])),
        ([np.int32(1), 2], torch.tensor([1, 2])),
        ([1.5, 2], torch.tensor([1.5, 2.0])),
        ([np.float64(1.5)], torch.tensor([1.5])),
        ([True, False], torch.tensor([True, False])),
        ([np.ones(2, np.float32)] * 2, torch.ones(2, 2)),
        ([np.ones(2, ">f4")] * 2, torch.ones(2, 2)),
        ([torch.ones(2)] * 2, torch.ones(2, 2)),
        (["a", "b"], ["a", "b"]),
        ([b"a"], [b"a"]),
        ([1, None], [1, None]),
        ([True, 1], [True, 1]),
        ([2**63, 1], [2**63, 1]),
    ],
)
def test_fields_become_tensors_or_lists(values, expected) -> None:
    result = collate(values, CPU)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result, expected) and result.dtype == expected.dtype
    else:
        assert result == expected


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int", torch.int64), ("float", torch.float32), ("bool", torch.bool), ("str", None), ("", None)]
)
def test_no_values_are_of_the_fields_kind(kind: str, dtype: torch.dtype | None) -> None:
    result = collate([], CPU, kind)
    assert result == [] if dtype is None else (result.dtype, result.shape) == (dtype, (0,))


def test_arrays_of_unlike_shapes_stay_a_list() -> None:
    values = [np.ones(2), np.ones(3)]
    assert collate(values, CPU) == values
