"""Kernels as Triton compiles them for a GPU, run on the CPU: their PTX as C (ptx_to_c.py), on a machine that checks.

A stand-in for Triton's CUDA driver: a launch takes Triton's own way (arguments specialised, compiled for sm_90, or
$SLIPSTREAM_CAPABILITY: 80 or 120) and then the CPU. What the interpreter cannot show is shown here: what each thread of
the compiled kernel loads and stores, its barriers, alignment.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptx_to_c import Translation
from slipstream_kernels import blur, bytes_at, programs, resized_crop
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver

FLAGS = ["-Og", "-w", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
CAPABILITY = int(os.environ.get("SLIPSTREAM_CAPABILITY", "90"))
C_COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")

_one_launch = threading.Lock()
_folder = tempfile.TemporaryDirectory(prefix="slipstream-compiled-")
_launches = iter(range(1, 1 << 32))
_tables = np.zeros((2, 1 << 20, 32), np.uint8)  # of ptx_machine.c
_sectors: list[tuple[str, float]] | None = None  # of noting_sectors
_ptx_of: dict[bytes, str] = {}  # a compiled kernel's binary -> its PTX


@functools.cache
def _machine(ptx: str) -> tuple[ctypes.CDLL, Translation]:
    translation = Translation(ptx)
    if C_COMPILER is None:
        pytest.skip("no C compiler is here")
    path = Path(_folder.name) / f"{len(os.listdir(_folder.name))}.c"
    path.write_text(translation.code)
    without_sanitizer = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    library = path.with_suffix(".so")
    subprocess.run([C_COMPILER, *FLAGS, "-o", library, path, "-lm", "-ldl"], check=True, env=without_sanitizer)
    return ctypes.CDLL(str(library)), translation


def run(ptx: str, grid: tuple[int, int, int], shared: int, arguments: list[Any]) -> None:
    with _one_launch:
        machine, kernel = _machine(ptx)
        scratch = [0] * (len(kernel.parameters) - len(arguments))  # what Triton appends, unused by these kernels
        words = [
            ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value if kind == "f32" else value & (1 << 64) - 1
            for kind, value in zip(kernel.parameters, arguments + scratch, strict=True)
        ]
        threads = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
        assert threads is not None
        message = ctypes.create_string_buffer(300)
        notes = None if _sectors is None else np.zeros(1 + 3 * (1 << 20), np.uint64)
        failed = machine.launch(
            (ctypes.c_uint64 * len(words))(*words),
            (ctypes.c_uint32 * 3)(*grid),
            int(threads[1]),
            shared,
            ctypes.c_uint32(next(_launches)),
            ctypes.c_void_p(_tables.ctypes.data),
            None if notes is None else ctypes.c_void_p(notes.ctypes.data),
            message,
        )
    if _sectors is not None and notes is not None:
        asked = sectors_of_a_request(notes[1 : 1 + 3 * int(notes[0])].reshape(-1, 3).astype(np.int64))
        _sectors.append((kernel.name, max(asked.values())))
    if failed:
        place = int(re.findall(r"line (\d+)", message.value.decode())[0])
        rows = ptx.split("\n")
        found = re.findall(r"//\s*(\w+\.py:\d+)", "\n".join(rows[:place]))
        raise RuntimeError(
            f"{kernel.name}: {message.value.decode()}: {rows[place - 1].strip()} ({(found or ['?'])[-1]})"
        )


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.shared = metadata["shared"] if isinstance(metadata, dict) else metadata.shared

    def __call__(self, *arguments: Any) -> None:
        *grid, _stream, ptx, _packed, _metadata, _enter, _exit = arguments[:9]
        given = [
            value.data_ptr() if isinstance(value, torch.Tensor) else value
            for kind, value in zip(self.kinds, arguments[9:], strict=True)
            if kind != "constexpr"
        ]
        run(ptx, (grid[0], grid[1], grid[2]), self.shared, given)


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), _ptx_of[binary], 0, 0, 1024


class _Driver:
    launcher_cls = _Launcher
    utils = _Utils()

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.device = -capability  # none that a GPU has: compiled kernels are kept by device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def running_compiled(capability: int = CAPABILITY) -> Iterator[None]:
    """In here kernels are compiled for a GPU and run on CPU tensors; a fault is a RuntimeError that says where."""
    made, ours = compiler.CompiledKernel.__init__, _Driver(capability)

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _ptx_of[self.kernel] = self.asm["ptx"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler.CompiledKernel, "__init__", remember)
        for module in (bytes_at, programs, resized_crop):
            patch.setattr(module, "check_device", lambda device, kernel: None)
        patch.setattr(driver, "active" if "active" in vars(driver) else "_active", ours)
        # Triton keeps the target with each kernel. For sm_90 this one would have wgmma, which is not translated.
        ours.capability = 80 if capability == 90 else capability
        assert blur.box_blur_kernel.device_caches[ours.get_current_device()]
        ours.capability = capability
        yield


@contextlib.contextmanager
def noting_sectors() -> Iterator[list[tuple[str, float]]]:
    """Gives a list that gets, for each launch in here, its kernel and the most that an instruction asks of memory.

    That is how many sectors of 32 bytes a warp's 32 threads ask for, on average over its visits of the instruction: 4
    for 32 neighbouring words, 32 where each thread's word lies elsewhere.
    """
    global _sectors
    _sectors = []
    try:
        yield _sectors
    finally:
        _sectors = None


def sectors_of_a_request(notes: np.ndarray) -> dict[int, float]:
    """By line of the PTX, from notes int64 [N, 3] of thread, line and address in the order in which threads ran."""
    thread, line, address = notes[np.lexsort((notes[:, 1], notes[:, 0]))].T
    place = np.arange(len(notes))
    begins = np.r_[True, (thread[1:] != thread[:-1]) | (line[1:] != line[:-1])]
    visit = place - np.maximum.accumulate(np.where(begins, place, 0))
    touched = np.unique(np.stack([line, thread // 32, visit, address // 32], 1), axis=0)
    requests = np.unique(touched[:, :3], axis=0)
    lines, counts = np.unique(touched[:, 0], return_counts=True)
    return dict(zip(lines.tolist(), (counts / np.unique(requests[:, 0], return_counts=True)[1]).tolist(), strict=True))
