"""The progress bar of everything that takes long."""

from __future__ import annotations

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's bar without its monitor, a thread that would stay until the process ends."""

    monitor_interval = 0
