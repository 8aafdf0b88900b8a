"""Two clocks for work on a device: events around a launch, and the host's around everything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def by_events(call: Callable[[], Any], device: torch.device, milliseconds: int = 100) -> dict[str, float]:
    """Median, least and largest milliseconds on the device, its L2 cache flushed before each call.

    On the CPU (a dry run) it is one call by the host's clock.
    """
    if device.type != "cuda":
        return by_host(call, device, calls=1)
    from triton.testing import do_bench

    times: Any = do_bench(call, warmup=25, rep=milliseconds, quantiles=[0.5, 0.0, 1.0])
    return dict(zip(("median", "min", "max"), times, strict=True))


def by_host(call: Callable[[], Any], device: torch.device, calls: int) -> dict[str, float]:
    """Median, least and largest milliseconds until the device has finished, after one call that is not counted."""
    samples = []
    for turn in range(calls + 1):
        _finish(device)
        begin = time.perf_counter()
        call()
        _finish(device)
        if turn:
            samples.append((time.perf_counter() - begin) * 1e3)
    samples.sort()
    return {"median": samples[len(samples) // 2], "min": samples[0], "max": samples[-1]}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
