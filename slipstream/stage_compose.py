"""Stages made of stages: all of them with a probability, one of them, or all in a random order, for each sample.

What is inside must sample programs, as these do themselves. A stage inside draws from a child of the outer stage's key
named by its kind and place, or from its own seed if it has one, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from slipstream_kernels import ops

from . import checks
from .draws import Draws, stream_key
from .stage_program import ProgramStage, applied, where


@dataclass(frozen=True, slots=True)
class RandomApply(ProgramStage):
    """All the stages, in order, with probability p: torchvision's RandomApply, drawn for each sample.

    stages: one or more that sample programs. seed: its own instead of the loader's. Images and output as in
    RandomGrayscale. Raises ValueError or TypeError that names the parameter, or the place of a stage that cannot stand
    here.
    """

    stages: Sequence[ProgramStage]
    p: float = 0.5
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.settle(
            self,
            stages=_check_inner("stages", self.stages),
            p=checks.probability("p", self.p),
            seed=checks.seed("seed", self.seed),
        )

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Those of all the stages."""
        return tuple(row for stage in self.stages for row in stage.slots())

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Word 0 of block 0 decides."""
        program = np.concatenate(_programs(self.stages, draws, size), axis=1)
        return where(applied(draws, self.p), program)


@dataclass(frozen=True, slots=True)
class RandomChoice(ProgramStage):
    """One of the stages, picked at random: torchvision's RandomChoice, drawn for each sample.

    stages: one or more that sample programs. p: their weights, 0 or more, not all 0, of any sum; all alike by default.
    seed: its own instead of the loader's. Images and output as in RandomGrayscale. Raises ValueError or TypeError that
    names the parameter, or the place of a stage that cannot stand here.
    """

    stages: Sequence[ProgramStage]
    p: Sequence[float] | None = None
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        stages = _check_inner("stages", self.stages)
        p = None
        if self.p is not None:
            p = tuple(checks.numbers("p", self.p, len(stages), f"{len(stages)} weights, one a stage"))
            if min(p) < 0.0 or not 0.0 < sum(p) < float("inf"):
                raise ValueError(f"p must be weights of 0 or more that are not all 0, got {self.p!r}")
        checks.settle(self, stages=stages, p=p, seed=checks.seed("seed", self.seed))

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """In each row, what any of the stages has there."""
        together = zip_longest(*(stage.slots() for stage in self.stages), fillvalue=())
        return tuple(tuple(sorted({code for row in rows_of for code in row})) for rows_of in together)

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """Word 0 of block 0 picks."""
        share = np.cumsum(self.p or np.ones(len(self.stages)))
        chosen = np.searchsorted(share / share[-1], draws.uniform(0)[:, 0, 0], side="right")
        programs = _programs(self.stages, draws, size)
        longest = max(program.shape[1] for program in programs)
        result = np.zeros((len(draws), longest, ops.OP_WIDTH), np.float32)
        for index, program in enumerate(programs):
            result[chosen == index, : program.shape[1]] = program[chosen == index]
        return result


@dataclass(frozen=True, slots=True)
class RandomOrder(ProgramStage):
    """All the stages, in a random order: torchvision's RandomOrder, drawn for each sample.

    stages: one or more that sample programs; each one's operations stay together. seed: its own instead of the
    loader's. Images and output as in RandomGrayscale. Raises ValueError or TypeError that names the parameter, or the
    place of a stage that cannot stand here.
    """

    stages: Sequence[ProgramStage]
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.settle(self, stages=_check_inner("stages", self.stages), seed=checks.seed("seed", self.seed))

    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Those of all the stages, in any order."""
        return tuple(row for stage in self.stages for row in stage.slots())

    def sample_program(self, draws: Draws, size: tuple[int, int]) -> np.ndarray:
        """A word for each stage, from word 0 of block 0 on: they run from the least to the greatest."""
        count = len(self.stages)
        blocks = (count + 3) // 4
        words = draws.words(0, blocks).reshape(len(draws), 4 * blocks)[:, :count]
        programs = _programs(self.stages, draws, size)
        stage_of_row = np.repeat(np.arange(count), [program.shape[1] for program in programs])
        # a stable sort of the rows by their stage's word keeps the rows of a stage in order, and together; words that
        # are equal keep the order of the stages
        order = np.argsort(words[:, stage_of_row], axis=1, kind="stable")
        return np.take_along_axis(np.concatenate(programs, axis=1), order[:, :, None], axis=1)


def _programs(stages: Sequence[ProgramStage], draws: Draws, size: tuple[int, int]) -> list[np.ndarray]:
    # each stage's program for every sample
    programs = []
    for index, stage in enumerate(stages):
        kind, seed = type(stage).__name__, getattr(stage, "seed", None)
        if seed is None:
            inner = draws.child(f"{kind}\x1f{index}")
        else:
            inner = Draws(stream_key(seed, kind), draws.sample_ids, draws.epoch)
        programs.append(stage.sample_program(inner, size))
    return programs


def _check_inner(field: str, stages: Any) -> tuple[ProgramStage, ...]:
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise TypeError(f"{field} must be a list of stages, got {checks.brief(stages)}")
    if not stages:
        raise ValueError(f"{field} must hold one stage or more, got {stages!r}")
    for index, stage in enumerate(stages):
        fits = all(callable(getattr(stage, name, None)) for name in ("slots", "sample_program"))
        if isinstance(stage, type) or not fits:
            raise TypeError(
                f"{field}[{index}] must be a stage that samples a program (a flip, colour, blur, warp or erasing "
                f"stage, RandAugment, RandomApply, ...); Normalize, ToDtype and functions go into the crop's own "
                f"list, got {checks.brief(stage)}"
            )
    return tuple(stages)
