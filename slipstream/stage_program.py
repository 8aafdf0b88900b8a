"""Stages that sample a program of operations for every image: what colour, blur, warps and erasing have in common.

A program (slipstream_kernels.ops) is rows of operation and parameters, NOTHING where the stage is not applied. A crop's
stages of this kind, and the Normalize and cast after them, run together, in float32, rounded once at the end (uint8:
half to even).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from slipstream_kernels import ops

from .draws import Draws


class ProgramStage(ABC):
    """A stage on [0, 1] images: subclasses are frozen dataclasses with `seed`, and sample a program for each image."""

    __slots__ = ()
    seed: int | None

    @abstractmethod
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """For each row of its programs, in any order, the operations that may stand there."""

    @abstractmethod
    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Its operations for each image, float32 [B, K, 16], of crops of this size (h, w)."""

    def __call__(self, images: torch.Tensor, *, sample_ids: Any = None, epoch: int = 0) -> torch.Tensor:
        """Images [B, 3, h, w], uint8 or float in [0, 1], transformed; with sample_ids a pure function of (seed, sample
        id, epoch)."""
        from .standalone import apply_stage

        return apply_stage(self, images, sample_ids, epoch)


def most(stage: ProgramStage, codes: Collection[int]) -> int:
    """How many of these operations one program of the stage holds at the most."""
    return sum(not codes_of.isdisjoint(codes) for codes_of in map(set, stage.slots()))


def rows(count: int, code: int, *parameters: Any) -> np.ndarray:
    """Programs of one operation, float32 [count, 1, 16]; a parameter is a number or one for each image, [count]."""
    program = np.zeros((count, 1, ops.OP_WIDTH), np.float32)
    program[:, 0, 0] = code
    for column, parameter in enumerate(parameters, 1):
        program[:, 0, column] = parameter
    return program


def where(applied: np.ndarray, program: np.ndarray) -> np.ndarray:
    """The programs, made NOTHING for the images, bool [B], to which they are not applied (in place)."""
    program[~applied] = 0.0
    return program


def applied(draws: Draws, p: float) -> np.ndarray:
    """Whether each image gets the stage, bool [B]: word 0 of block 0, in every stage that has a p."""
    return draws.uniform(0)[:, 0, 0] < p
