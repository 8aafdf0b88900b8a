"""Where tensors live and what runs there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Microseconds, and of how many: version 2 of cgroups has both in one file. A container sees its own limit there.
_CPU_LIMITS = [
    ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu.max"),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
]

_MOST_GPU_THREADS = 16  # each takes some 30 MB of GPU and pinned memory, by DALI's defaults


def choose_device(given: torch.device | str | None) -> torch.device:
    """The device that a loader's argument means; ValueError for one that is unknown or not there.

    None is $SLIPSTREAM_DEVICE, else the current CUDA device (LOCAL_RANK's under torchrun, unless the process sees one
    only), else the CPU.
    """
    name = "device"
    if given is None and os.environ.get("SLIPSTREAM_DEVICE"):
        given, name = os.environ["SLIPSTREAM_DEVICE"], "SLIPSTREAM_DEVICE"
    if given is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if "LOCAL_RANK" not in os.environ or count == 1:
            return torch.device("cuda", torch.cuda.current_device())
        rank = os.environ["LOCAL_RANK"]
        if not rank.isdecimal() or int(rank) >= count:
            raise ValueError(f"LOCAL_RANK must be one of this machine's CUDA devices, 0 to {count - 1}, got {rank!r}")
        return torch.device("cuda", int(rank))
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise ValueError(f'{name} must be "cpu", "cuda" or "cuda:N", got {given!r}') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'{name} must be "cpu", "cuda" or "cuda:N", got {given!r}')
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"{name} is {given!r}, but this machine has no CUDA device that torch can use")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"{name} must be below cuda:{torch.cuda.device_count()}, got {given!r}")
    return device


def own_cores() -> int:
    """This process's share of the cores: under torchrun the processes of one machine share them."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_threads(device: torch.device) -> int:
    """Threads of a loader on this device: one a core, for a GPU's decoder 16 at most."""
    return own_cores() if device.type == "cpu" else min(own_cores(), _MOST_GPU_THREADS)


def usable_cores() -> int:
    """The cores that this process may run on, and no more than a container's limit on their time comes to.

    `docker run --cpus 2`, or a limit of Kubernetes, leaves a process all cores of the machine to run on, and stops all
    of its threads once they have used up what two cores have in a tenth of a second.
    """
    cores = len(os.sched_getaffinity(0))
    for quota_file, period_file in _CPU_LIMITS:
        try:
            with open(quota_file) as quota, open(period_file) as period:
                share, length = quota.read().split()[0], period.read().split()[-1]
            if share.isdecimal():  # and neither "max" nor -1
                cores = min(cores, -(-int(share) // int(length)))
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue  # no such limit, or not told as cgroups tell it
    return max(1, cores)


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on this device; RuntimeError for one that cannot run there."""
    if backend is None:
        return "triton" if device.type == "cuda" else "cpu"
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            'backend="triton" on CPU tensors needs Triton\'s interpreter: set TRITON_INTERPRET=1 before triton is '
            'imported, or use backend="cpu" (or None)'
        )
    if backend == "cpu" and device.type == "cuda":
        raise RuntimeError('backend="cpu" takes images on the CPU, got images on a CUDA device')
    return backend


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Run what follows on this stream of torch's, on its device; None is no stream.

    torch.cuda.stream alone, on a thread whose current device is another, sets that one again when it ends, and CUDA
    makes a context on it: half a gigabyte of GPU 0 for each other rank of a machine. torch.cuda.device does not.
    """
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def use_device(device: torch.device) -> None:
    """Make this the calling thread's device: a thread begins on GPU 0, where its first call would make a context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host array or tensor as a tensor on the device, without waiting for the copy."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
