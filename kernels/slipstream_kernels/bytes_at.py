"""The bytes at any addresses: out[i] = *(uint8*) addresses[i].

addresses int64 [N] -> uint8 [N], on one device. It reads memory that no tensor of torch's describes, such as a
decoder's; that it may be read is for the caller to know.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import check_device, launching_on

LAUNCH: dict[str, Any] = {"BLOCK": 256, "num_warps": 4}


@triton.jit
def bytes_at_kernel(addresses, out, count, BLOCK: tl.constexpr):
    """One program: BLOCK addresses."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    pointers = tl.load(addresses + at, mask=inside, other=0).to(tl.pointer_type(tl.uint8))
    tl.store(out + at, tl.load(pointers, mask=inside, other=0), mask=inside)


def bytes_at(addresses: torch.Tensor) -> torch.Tensor:
    """The bytes at `addresses` (int64 [N]), uint8 [N] on the same device, in the order of its current stream."""
    check_device(addresses.device, bytes_at_kernel)
    out = torch.empty(len(addresses), dtype=torch.uint8, device=addresses.device)
    if len(addresses):
        with launching_on(addresses.device):
            # The grid spans the addresses.
            bytes_at_kernel[(triton.cdiv(len(addresses), LAUNCH["BLOCK"]),)](addresses, out, len(addresses), **LAUNCH)
    return out
