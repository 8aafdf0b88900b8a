"""The steps after the crop launch: every crop's sections in shared launches, the user's own stages between them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels.ops import IN_DTYPES, ProgramFormat

from .chain import Own, Section, Step
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
    packed: Any = None,
) -> list[torch.Tensor]:
    """C crops [B, 3, h, w], each through its steps with what was drawn for them; the first sections of all crops share
    their launches, so do the second ones, and so on. The images given are left as they are. packed: of pack_steps."""
    images, sizes = list(images), [image.shape[2:] for image in images]
    for number in range(max(map(len, steps), default=0)):
        for index, step, params in _at(number, steps, drawn):
            if isinstance(step, Own):
                images[index] = apply_own(step.stage, images[index], params)
            elif images[index].shape[2:] != sizes[index] and step.of_one_size:
                drawn_for, got = (" x ".join(map(str, size)) for size in (sizes[index], images[index].shape[2:]))
                raise ValueError(
                    f"{step.label} was drawn for crops of {drawn_for} (height x width), got {got}: "
                    f"a stage of your own before it must keep the size"
                )
        together, taken, programs, formats = _sections(number, images, steps, drawn)
        if packed is not None and number == 0:
            programs = packed
        for index, image in zip(together, run_programs(taken, programs, formats, backend, threads), strict=True):
            images[index] = image
    return images


def pack_steps(
    images: Sequence[torch.Tensor],
    steps: Sequence[tuple[Step, ...]],
    drawn: Sequence[tuple[Any, ...]],
    *,
    pin_memory: bool,
) -> Any:
    """The host's part of the launches of all crops' first sections, for Triton; None where no crop begins with one.

    images: C crops [B, 3, h, w] as the crop launch will make them; "meta" tensors serve. pin_memory: for a GPU.
    """
    from slipstream_kernels.programs import pack_programs

    together, taken, programs, formats = _sections(0, images, steps, drawn)
    return pack_programs(taken, programs, formats, pin_memory=pin_memory) if together else None


def _at(
    number: int, steps: Sequence[tuple[Step, ...]], drawn: Sequence[tuple[Any, ...]]
) -> list[tuple[int, Step, Any]]:
    # The crops that have a step of this number, each with it and what was drawn for it.
    return [(index, each[number], drawn[index][number]) for index, each in enumerate(steps) if number < len(each)]


def _sections(
    number: int, images: Sequence[torch.Tensor], steps: Sequence[tuple[Step, ...]], drawn: Sequence[tuple[Any, ...]]
) -> tuple[list[int], list[torch.Tensor], list[np.ndarray], list[ProgramFormat]]:
    # Which crops have a section as their step of this number; its images, programs and formats.
    together, taken, programs, formats = [], [], [], []
    for index, step, program in _at(number, steps, drawn):
        if isinstance(step, Section):
            image = images[index]
            _check_takes(step.label, image)
            together.append(index)
            taken.append(image if image.dtype in IN_DTYPES else image.float())
            programs.append(program)
            formats.append(ProgramFormat(dtype=step.output_dtype(image.dtype), channels_last=is_channels_last(image)))
    return together, taken, programs, formats


def _check_takes(label: str, images: torch.Tensor) -> None:
    # What a stage of the user's own gave, or images from elsewhere; the crop launch gives nothing else.
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{label} takes images [B, 3, h, w], got shape {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{label} takes uint8 images, or float in [0, 1], got {images.dtype}")


def is_channels_last(images: torch.Tensor) -> bool:
    """Whether [B, C, h, w] lies in memory as [B, h, w, C]."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def run_programs(
    images: Sequence[torch.Tensor],
    programs: Any,
    formats: Sequence[ProgramFormat],
    backend: str,
    threads: Threads,
) -> list[torch.Tensor]:
    """slipstream_kernels' run_programs of this backend; programs: C of float32 [B, K, 16], or what packed them."""
    if not images:
        return []
    if backend == "cpu":
        from slipstream_kernels.programs_cpu import run_programs_cpu

        return run_programs_cpu(images, programs, formats, pool=threads.pool, num_threads=threads.count)
    from slipstream_kernels.programs import run_programs

    return run_programs(images, programs, formats)
