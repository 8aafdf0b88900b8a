"""The resident memory of this process, in megabytes."""

from __future__ import annotations

from pathlib import Path


def resident(name: str = "VmRSS") -> float:
    """By Linux's name: VmRSS is what is resident now, VmHWM the most so far, RssAnon what no file backs.

    Not getrusage's ru_maxrss: a child has its parent's there, from before it became another program.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def peak() -> float:
    return resident("VmHWM")
