"""Who takes which position of an epoch at which step: a pure function of whole numbers, for one process of many.

Step t of W ranks is the G = batch_size * W positions from start + t * G on; rank r takes every W-th of them, from r on.
So the samples of a step do not depend on W, as long as G stays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checks

TAILS = ("keep", "pad", "drop", "uneven")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """The positions of one rank.

    length: positions in the epoch. batch_size: samples of one rank and step. rank, world_size: which of how many.
    tail: what becomes of positions that fill no step: "keep" a short last batch (one rank), "pad" with the epoch's
    first positions, marked as not valid, so that every rank has the same number of full steps, "drop" them, or
    "uneven": each position once, so that ranks may differ by a sample and by a step. start: the first position that
    has not been handed out before.
    """

    length: int
    batch_size: int
    rank: int
    world_size: int
    tail: str
    start: int = 0

    @property
    def step_size(self) -> int:
        """Positions of one step of all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps that this rank takes."""
        left = max(self.length - self.start, 0)
        if self.tail == "drop":
            return left // self.step_size
        if self.tail == "uneven":
            left = max(left - self.rank + self.world_size - 1, 0) // self.world_size
            return -(-left // self.batch_size)
        return -(-left // self.step_size)

    def positions(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions of this rank at a step, int64 [B] in [0, length), and which are its own, bool [B]."""
        first = self.start + step * self.step_size + self.rank
        taken = first + np.arange(self.batch_size, dtype=np.int64) * self.world_size
        valid = taken < self.length
        if self.tail != "pad":
            return taken[valid], valid[valid]
        return taken % max(self.length, 1), valid

    def handed_out(self, steps: int) -> int:
        """The position that follows the first `steps` steps of all ranks."""
        return min(self.start + steps * self.step_size, self.length)


def choose_ranks(rank: Any, world_size: Any) -> tuple[int, int]:
    """(rank, world_size) as given, else torch.distributed's, else torchrun's ($RANK, $WORLD_SIZE), else (0, 1).

    Raises ValueError or TypeError for one without the other, or a rank outside [0, world_size).
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given together, got {rank!r} and {world_size!r}")
    if rank is None:
        if (initialized := distributed_ranks()) is not None:
            return initialized
        found = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if None in found:
            return 0, 1
        rank, world_size = (int(text) if text and text.isdecimal() else text for text in found)
    rank, world_size = checks.whole("rank", rank, 0), checks.whole("world_size", world_size, 1)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size {world_size}, got {rank}")
    return rank, world_size


def distributed_ranks() -> tuple[int, int] | None:
    """torch.distributed's (rank, world_size); None before init_process_group."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return None


def slurm_ranks() -> tuple[int, int] | None:
    """(rank, world_size) of a task of a Slurm array, of a task that srun started, or of both; None outside.

    Raises ValueError for an array whose numbers do not follow one another at even steps.
    """
    rank, world_size = 0, 1
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        names = ("ID", "MIN", "MAX", "COUNT", "STEP")
        given = {name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names}
        number, first, last, count, step = (int(text) if text.isdecimal() else -1 for text in given.values())
        step = max(step, 1)
        if min(number, first, last, count) < 0 or last - first != (count - 1) * step or (number - first) % step:
            raise ValueError(
                "the numbers of the Slurm array must follow one another at even steps, got "
                + ", ".join(f"SLURM_ARRAY_TASK_{name}={text}" for name, text in given.items())
                + "; give rank and world_size"
            )
        rank, world_size = (number - first) // step, count
    # A batch script that srun did not start has the numbers of all its tasks too, and is one process.
    if "SLURM_STEP_ID" in os.environ:
        tasks = checks.whole("SLURM_NTASKS", int(os.environ.get("SLURM_NTASKS", "1")), 1)
        rank, world_size = rank * tasks + int(os.environ.get("SLURM_PROCID", "0")), world_size * tasks
    elif "SLURM_ARRAY_TASK_ID" not in os.environ:
        return None
    if not 0 <= rank < world_size:
        raise ValueError(f"SLURM_PROCID must be below SLURM_NTASKS, got {os.environ.get('SLURM_PROCID')}")
    return rank, world_size


def choose_tail(tail: Any, drop_last: bool, world_size: int) -> str:
    """The tail as given; drop_last is "drop"; else "keep" for one rank and "pad" for several. Raises ValueError."""
    if tail is not None and drop_last:
        raise ValueError(f'drop_last=True is tail="drop": give one of them, got tail={tail!r} too')
    if drop_last:
        return "drop"
    if tail is None:
        return "keep" if world_size == 1 else "pad"
    checks.one_of("tail", tail, TAILS)
    if tail == "keep" and world_size > 1:
        raise ValueError('tail="keep" is for one rank: several need "pad", "drop" or "uneven"')
    return tail
