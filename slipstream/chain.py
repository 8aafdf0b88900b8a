"""A crop's stages, compiled: what rides in the crop launch, and what runs as one per-pixel launch after it.

Flips commute with everything here, so all of them ride in the crop launch. So do stages that map each value by itself
(one table), unless a colour stage comes among them: then they are the end of its per-pixel program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from slipstream_kernels import ops

from .draws import Draws
from .stage import Normalize, PointwiseStage, RandomHorizontalFlip, Stage, ToDtype
from .stage_program import ProgramStage, rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """One crop's stages. flips, and program (empty where the table does all): with the key of each (None: not random).

    table: [3, 256] output values by channel and byte, or None. dtype: the output's.
    """

    flips: tuple[tuple[int, RandomHorizontalFlip], ...]
    table: torch.Tensor | None
    program: tuple[tuple[int | None, ProgramStage | Normalize], ...]
    dtype: torch.dtype

    def sample_flips(self, sample_ids: np.ndarray, epoch: int) -> np.ndarray:
        """Whether each sample is mirrored, all flips taken together: bool [B]."""
        flipped = np.zeros(len(sample_ids), bool)
        for key, stage in self.flips:
            flipped ^= stage.sample_params(Draws(key, sample_ids, epoch))
        return flipped

    def sample_program(self, sample_ids: np.ndarray, epoch: int, size: tuple[int, int]) -> np.ndarray:
        """The per-pixel program of each sample: float32 [B, K, 16] (slipstream_kernels.ops)."""
        parts = []
        for key, stage in self.program:
            if isinstance(stage, Normalize):
                parts.append(rows(len(sample_ids), ops.NORMALIZE, *stage.mean, *stage.std))
            else:
                assert key is not None
                parts.append(stage.sample_program(Draws(key, sample_ids, epoch), size))
        return np.ascontiguousarray(np.concatenate(parts, axis=1))


def compile_chain(stages: Sequence[tuple[Stage, int]]) -> Chain:
    """Compile stages, each with its key (of no use to a stage that is not random); TypeError for what does not fit."""
    flips = tuple((key, stage) for stage, key in stages if isinstance(stage, RandomHorizontalFlip))
    rest = [(stage, key) for stage, key in stages if not isinstance(stage, RandomHorizontalFlip)]
    if not any(isinstance(stage, ProgramStage) for stage, _ in rest):
        table = _byte_table([stage for stage, _ in rest if isinstance(stage, PointwiseStage)])
        dtype = torch.uint8 if table is None else table.dtype
        return Chain(flips=flips, table=table, program=(), dtype=dtype)
    program: list[tuple[int | None, ProgramStage | Normalize]] = []
    dtype, normalized = torch.uint8, False
    for stage, key in rest:
        name = type(stage).__name__
        if isinstance(stage, ProgramStage):
            if normalized:
                raise TypeError(f"{name} takes images in [0, 1]: put it before Normalize")
            program.append((key, stage))
        elif isinstance(stage, Normalize):
            dtype, normalized = stage.output_dtype(dtype), True
            program.append((None, stage))
        elif isinstance(stage, ToDtype):
            if dtype == torch.uint8 and stage.dtype != torch.uint8 and not stage.scale:
                raise TypeError(f"{name}({stage.dtype}) beside colour stages needs scale=True: they work in [0, 1]")
            dtype = stage.output_dtype(dtype)
        else:
            raise TypeError(f"{name} cannot stand in one chain with colour stages")
    return Chain(flips=flips, table=None, program=tuple(program), dtype=dtype)


_WORDS = {
    ops.BRIGHTNESS: "brightness x {:.4g}",
    ops.ADD_BRIGHTNESS: "brightness {:+.4g}",
    ops.CONTRAST: "contrast x {:.4g}",
    ops.SATURATION: "saturation x {:.4g}",
    ops.HUE: "hue {:+.4g} turns",
    ops.GREY: "grey",
    ops.SOLARIZE: "solarize at {:.4g}",
    ops.POSTERIZE: "posterize to {:g} levels",
    ops.INVERT: "invert",
    ops.NORMALIZE: "normalize",
}


def describe_op(row: np.ndarray) -> str:
    """One operation of a per-pixel program, float32 [16], in words."""
    return _WORDS[int(row[0])].format(float(row[1]))


def _byte_table(stages: Sequence[PointwiseStage]) -> torch.Tensor | None:
    # The chain's value for each channel and byte, [3, 256]: the stages themselves on the 256 bytes.
    if not stages:
        return None
    values = torch.arange(256, dtype=torch.uint8, device="cpu").expand(3, 1, 256).contiguous()
    for stage in stages:
        values = stage.apply(values)
    return values.reshape(3, 256).contiguous()
