"""What tests lay on a GPU: tensors and formats as they are on the host, and what was written there back again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from slipstream_kernels.crop_jobs import OutputFormat


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a copy of all the memory that it is a view of, so that its strides survive."""
    return _memory(tensor).cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def bring_back(tensors: Sequence[torch.Tensor], there: Sequence[torch.Tensor]) -> None:
    """Copy what `to_gpu` made of these tensors over them, and over all the memory that they are views of."""
    for tensor, other in zip(tensors, there, strict=True):
        _memory(tensor).copy_(_memory(other))


def formats_on_gpu(formats: Sequence[OutputFormat]) -> list[OutputFormat]:
    """The formats, their tables on the GPU."""
    return [dataclasses.replace(fmt, table=None if fmt.table is None else fmt.table.cuda()) for fmt in formats]


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
