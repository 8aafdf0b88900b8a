"""How the GPU tests lay tensors on a GPU, with copies on the host in its place."""

from __future__ import annotations

import pytest
import torch
from gpu_copies import bring_back, formats_on_gpu, to_gpu
from slipstream_kernels.crop_jobs import OutputFormat


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_strides_survive_and_what_lies_beside_comes_back_too(dtype: torch.dtype) -> None:
    memory = torch.arange(2 * 3 * 6 * 8).reshape(2, 3, 6, 8).to(dtype)
    for view in (memory[:, :, 1:5, 2:7], memory.permute(0, 1, 3, 2)[1:, :, ::2], memory[:1, :1].expand(4, 3, 6, 8)):
        before = memory.clone()
        there = to_gpu(view)
        assert torch.equal(there, view) and there.stride() == view.stride()
        assert there.data_ptr() != view.data_ptr()
        there.as_strided((memory.numel(),), (1,), 0).add_(1)
        assert torch.equal(memory, before)
        bring_back([view], [there])
        assert torch.equal(memory, before + 1)
        memory.copy_(before)


def test_tables_go_along() -> None:
    table = torch.rand(3, 256)
    plain, mapped = formats_on_gpu([OutputFormat(size=(3, 4)), OutputFormat(size=(5, 6), table=table)])
    assert plain.table is None and mapped.size == (5, 6)
    assert mapped.table is not None and mapped.table is not table and torch.equal(mapped.table, table)
