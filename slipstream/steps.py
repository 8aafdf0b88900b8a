"""The steps after the crop launch: every crop's sections in shared launches, the user's own stages between them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels.ops import IN_DTYPES, ProgramFormat

from .chain import Section, Step
from .stage_own import apply_own


@dataclass(frozen=True, kw_only=True, slots=True)
class Threads:
    """Where CPU kernels run: a pool (None: the caller's thread), and how many of its threads they may use."""

    pool: Executor | None = None
    count: int = 1


def run_steps(
    images: Sequence[torch.Tensor],
    steps: Sequence[tuple[Step, ...]],
    drawn: Sequence[tuple[Any, ...]],
    backend: str,
    threads: Threads,
) -> list[torch.Tensor]:
    """C crops [B, 3, h, w], each through its steps with what was drawn for them; the first sections of all crops share
    their launches, so do the second ones, and so on. The images given are left as they are."""
    images = list(images)
    for number in range(max(map(len, steps), default=0)):
        places = [index for index, each in enumerate(steps) if number < len(each)]
        together = []
        for index in places:
            step = steps[index][number]
            if isinstance(step, Section):
                together.append(index)
            else:
                images[index] = apply_own(step.stage, images[index], drawn[index][number])
        sections = [steps[index][number] for index in together]
        formats = [
            ProgramFormat(
                dtype=section.output_dtype(images[index].dtype), channels_last=is_channels_last(images[index])
            )
            for index, section in zip(together, sections, strict=True)
            if isinstance(section, Section)
        ]
        taken = [images[index] if images[index].dtype in IN_DTYPES else images[index].float() for index in together]
        programs: list[Any] = [drawn[index][number] for index in together]
        for index, image in zip(together, run_programs(taken, programs, formats, backend, threads), strict=True):
            images[index] = image
    return images


def is_channels_last(images: torch.Tensor) -> bool:
    """Whether [B, C, h, w] lies in memory as [B, h, w, C]."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def run_programs(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    formats: Sequence[ProgramFormat],
    backend: str,
    threads: Threads,
) -> list[torch.Tensor]:
    """slipstream_kernels' run_programs of this backend."""
    if not images:
        return []
    if backend == "cpu":
        from slipstream_kernels.programs_cpu import run_programs_cpu

        return run_programs_cpu(images, programs, formats, pool=threads.pool, num_threads=threads.count)
    from slipstream_kernels.programs import run_programs

    return run_programs(images, programs, formats)
