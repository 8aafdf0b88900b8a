"""What is told of that which takes long."""

from __future__ import annotations

from functools import cache
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's bar without its monitor, a thread that would stay until the process ends."""

    monitor_interval = 0


@cache
def tell_compiling() -> Any:
    """Print a line, once in this process, when numba begins to compile a function of ours: it looks like a hang.

    Gives the listener, which stays registered.
    """
    from numba.core import event
    from slipstream_kernels import numba_cache

    class Listener(event.Listener):
        told = False

        def on_start(self, event: Any) -> None:
            package = event.data["dispatcher"].py_func.__module__.partition(".")[0]
            if not self.told and package in ("slipstream", "slipstream_kernels"):
                self.told = True
                where = "once on this machine" if numba_cache.STAYS else "in this process"
                print(f"slipstream: compiling CPU kernels, {where} (up to a minute)", flush=True)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", listener := Listener())
    return listener
