"""How Triton kernels are launched: on their tensors' device, or in the interpreter one thread at a time."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

# Triton's interpreter keeps its place in the grid, and the language that it stands in for, in globals.
_interpreter = threading.Lock()


def check_device(device: torch.device, kernel: Any) -> None:
    """RuntimeError, saying what to do, for tensors on a device where this kernel cannot run."""
    if device.type != "cuda" and not isinstance(kernel, InterpretedFunction):
        raise RuntimeError(
            f"Triton kernels run on CUDA tensors, got images on {device}; "
            "set TRITON_INTERPRET=1 before triton is imported to run them on the CPU (slow)"
        )


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Wrap launches in this: Triton launches on the current device, whichever its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else _interpreter
