"""A crop's stages, compiled: what rides in the crop launch, and the steps after it.

A flip commutes with all that treats pixels alike, so it rides in the crop launch unless a warp, an erased box or a
stage of the user's own comes before it. So do stages that map each value by itself (one table), if they come before any
other. What is left is sections, each one program of operations, with the user's own stages between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels import ops

from .draws import Draws
from .stage import Normalize, PointwiseStage, Stage, ToDtype
from .stage_flip import flip_bits
from .stage_own import sample_own
from .stage_program import ProgramStage, most, rows

PLACING = (ops.WARP, ops.ERASE)  # what treats one place of a crop unlike another


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Stages that run as one program of operations, each with its key (None: not random).

    dtype: of what it gives, None for that of what it takes. label: the stages' names.
    """

    stages: tuple[tuple[int | None, ProgramStage | Normalize], ...]
    dtype: torch.dtype | None
    label: str

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What it makes of images of this dtype: of float64, which it works on in float32, float32."""
        normalizes = any(isinstance(stage, Normalize) for _, stage in self.stages)
        if dtype == torch.float64 or (normalizes and dtype == torch.uint8):
            dtype = torch.float32
        return self.dtype or dtype

    @property
    def of_one_size(self) -> bool:
        """Whether its programs are of the size that they are drawn for: they move pixels, or erase a box."""
        return any(isinstance(stage, ProgramStage) and most(stage, PLACING) for _, stage in self.stages)

    def sample(self, sample_ids: np.ndarray, epoch: int, size: tuple[int, int]) -> np.ndarray:
        """The program of each sample: float32 [B, K, 16], K 1 or more."""
        parts = [np.zeros((len(sample_ids), 0, ops.OP_WIDTH), np.float32)]
        for key, stage in self.stages:
            if isinstance(stage, Normalize):
                parts.append(rows(len(sample_ids), ops.NORMALIZE, *stage.mean, *stage.std))
            else:
                assert key is not None
                parts.append(stage.sample_program(Draws(key, sample_ids, epoch), size))
        program = np.concatenate(parts, axis=1)
        return program if program.shape[1] else rows(len(sample_ids), ops.NOTHING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """A stage of the user's own, with its key."""

    key: int
    stage: Any
    label: str

    def sample(self, sample_ids: np.ndarray, epoch: int, size: tuple[int, int]) -> Any:
        """What it draws for each sample: an array, a dict of arrays, or None."""
        return sample_own(self.stage, Draws(self.key, sample_ids, epoch))


Step = Section | Own


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """What is known of a crop's values at a place in its chain.

    dtype: None where it is not known before the batch is there. unit: whether they may be bytes or in [0, 1], so not
    what Normalize gives.
    """

    dtype: torch.dtype | None
    unit: bool


BYTES, ANY = Values(dtype=torch.uint8, unit=True), Values(dtype=None, unit=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """One crop's stages. flips, each with its key, and table [3, 256] (output values by channel and byte, or None) ride
    in the crop launch; steps come after it. riding: the names of what rides. gives: what comes out."""

    flips: tuple[tuple[int, ProgramStage], ...]
    table: torch.Tensor | None
    steps: tuple[Step, ...]
    riding: tuple[str, ...]
    gives: Values

    def sample_flips(self, sample_ids: np.ndarray, epoch: int) -> np.ndarray:
        """Each sample's flips, taken together: int32 [B], bits of slipstream_kernels.crop_jobs.FLIP."""
        bits = np.zeros(len(sample_ids), np.int32)
        for key, stage in self.flips:
            flipped = stage.sample_params(Draws(key, sample_ids, epoch))  # pyright: ignore[reportAttributeAccessIssue]
            bits ^= np.where(flipped, flip_bits(stage), 0).astype(np.int32)
        return bits

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError if a stage of ours cannot take crops of this size (h, w), by drawing for one of them."""
        for step in self.steps:
            if isinstance(step, Section):
                step.sample(np.zeros(1, np.int64), 0, size)

    def sample_steps(self, sample_ids: np.ndarray, epoch: int, size: tuple[int, int]) -> tuple[Any, ...]:
        """What each step is to do with each sample of this size (h, w): a program, or what the user's stage drew."""
        return tuple(step.sample(sample_ids, epoch, size) for step in self.steps)


def compile_chain(stages: Sequence[tuple[Stage, int]], *, takes: Values | None = None) -> Chain:
    """Compile stages, each with its key (of no use to a stage that is not random); TypeError for what does not fit.

    takes: None where a crop launch comes before them, which a table can ride in, else what they are given.
    """
    flips, rest, fixed = [], [], False
    for stage, key in stages:
        if flip_bits(stage) and not fixed:
            flips.append((key, stage))
        else:
            rest.append((stage, key))
            kept = isinstance(stage, (PointwiseStage, ProgramStage)) and not (
                isinstance(stage, ProgramStage) and most(stage, PLACING)
            )
            fixed = fixed or not kept
    table, riding = None, [type(stage).__name__ for _, stage in flips]
    plain = 0
    values = BYTES if takes is None else takes
    if takes is None and not any(isinstance(stage, ProgramStage) for stage, _ in _first_run(rest)):
        while plain < len(rest) and _is_pointwise(rest[plain][0]):
            plain += 1
        table = _byte_table([stage for stage, _ in rest[:plain]])
        riding += [type(stage).__name__ for stage, _ in rest[:plain]]
    if table is not None:
        values = Values(dtype=table.dtype, unit=all(_stays_unit(stage) for stage, _ in rest[:plain]))
    steps, run = [], _Run(values)
    for stage, key in rest[plain:]:
        if isinstance(stage, (ProgramStage, Normalize, ToDtype)):
            run.add(stage, key)
        else:
            steps += run.end()
            steps.append(Own(key=key, stage=_function(stage), label=_name(stage)))
            run = _Run(ANY)
    steps += run.end()
    return Chain(flips=tuple(flips), table=table, steps=tuple(steps), riding=tuple(riding), gives=run.values)


def check_chain(field: str, stages: Sequence[Stage]) -> None:
    """Raise TypeError that names the field for stages that fit together neither on bytes nor on floats in [0, 1]."""
    keyed = [(stage, 0) for stage in stages]
    try:
        compile_chain(keyed, takes=BYTES)
    except TypeError as error:
        try:
            compile_chain(keyed, takes=Values(dtype=torch.float32, unit=True))
        except TypeError:
            raise TypeError(f"{field}: {error}") from None


def _is_pointwise(stage: Stage) -> bool:
    return isinstance(stage, PointwiseStage) and not isinstance(stage, ProgramStage)


def _stays_unit(stage: Stage) -> bool:
    # Of a stage that rides as a table; a user's own may give anything.
    return not (
        isinstance(stage, Normalize) or (isinstance(stage, ToDtype) and stage.dtype != torch.uint8 and not stage.scale)
    )


def _first_run(stages: Sequence[tuple[Stage, int]]) -> list[tuple[Stage, int]]:
    # Up to the first stage of the user's own.
    for index, (stage, _) in enumerate(stages):
        if not isinstance(stage, (ProgramStage, PointwiseStage)):
            return list(stages[:index])
    return list(stages)


def _function(stage: Any) -> Any:
    # A map of values that is none of ours, after or between programs, is run as it is.
    return stage.apply if _is_pointwise(stage) else stage


def _name(stage: Any) -> str:
    return getattr(stage, "__name__", type(stage).__name__)


class _Run:
    """A section in the making: its stages, and what the values are after them."""

    def __init__(self, values: Values) -> None:
        self._stages: list[tuple[int | None, ProgramStage | Normalize]] = []
        self._names: list[str] = []
        self.values = values

    def add(self, stage: Any, key: int) -> None:
        name, dtype, unit = type(stage).__name__, self.values.dtype, self.values.unit
        if isinstance(stage, ProgramStage):
            if not unit and not flip_bits(stage) and any(set(codes) - {ops.ERASE} for codes in stage.slots()):
                raise TypeError(f"{name} takes images in [0, 1]: put it before Normalize")
            self._stages.append((key, stage))
        elif isinstance(stage, Normalize):
            self.values = Values(dtype=stage.output_dtype(dtype) if dtype else stage.dtype, unit=False)
            self._stages.append((None, stage))
        else:
            if dtype is None and not unit:
                dtype = torch.float32  # or another float: what Normalize gives
            if dtype in (torch.uint8, None) and stage.dtype != torch.uint8 and not stage.scale:
                raise TypeError(f"{name}({stage.dtype}) beside other stages needs scale=True: they work in [0, 1]")
            self.values = Values(dtype=stage.output_dtype(dtype) if dtype else stage.dtype, unit=unit)
        self._names.append(name)

    def end(self) -> list[Step]:
        if not self._names:
            return []
        return [Section(stages=tuple(self._stages), dtype=self.values.dtype, label=", ".join(self._names))]


def _byte_table(stages: Sequence[PointwiseStage]) -> torch.Tensor | None:
    # The chain's value for each channel and byte, [3, 256]: the stages themselves on the 256 bytes.
    if not stages:
        return None
    values = torch.arange(256, dtype=torch.uint8, device="cpu").expand(3, 1, 256).contiguous()
    for stage in stages:
        values = stage.apply(values)
    return values.reshape(3, 256).contiguous()
