"""The plan: every box and parameter of one batch, drawn from keys. No pixels, no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .crop import INTERPOLATIONS, Crop, sample_geometry, seen_boxes
from .draws import Draws
from .stage import RandomHorizontalFlip


@dataclass(frozen=True, kw_only=True, slots=True)
class CropProgram:
    """What is drawn for one crop: its spec, the key of its boxes (None where nothing is random), its flips' keys."""

    name: str
    crop: Crop
    box_key: int | None
    flips: tuple[tuple[int, RandomHorizontalFlip], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every box and parameter of one batch of B samples and C crops.

    sample_ids: [B]. epoch. crops: C names. jobs: int32 [B, C, 10], what the crop launch is told (see
    slipstream_kernels.crop_jobs). boxes: int32 [B, C, 4] (top, left, height, width) in source pixels. flips: the names
    of crops that are flipped at random -> bool [B], all flips of the crop taken together.
    """

    sample_ids: np.ndarray
    epoch: int
    crops: tuple[str, ...]
    jobs: np.ndarray
    boxes: np.ndarray
    flips: dict[str, np.ndarray]


def draw_plan(programs: Sequence[CropProgram], sizes: np.ndarray, sample_ids: np.ndarray, epoch: int) -> Plan:
    """Draw the plan for images of these sizes, int32 [B, 2] (h, w): a pure function of its arguments, row by row."""
    count = len(sizes)
    jobs = np.zeros((count, len(programs), 10), np.int32)
    boxes = np.zeros((count, len(programs), 4), np.int32)
    flips = {}
    for index, program in enumerate(programs):
        draws = None if program.box_key is None else Draws(program.box_key, sample_ids, epoch)
        geometry = sample_geometry(program.crop, sizes, draws)
        job = jobs[:, index]
        job[:, 0:4], job[:, 4:6], job[:, 6:8] = geometry.box, geometry.full, geometry.origin
        job[:, 8] = INTERPOLATIONS.index(program.crop.interpolation)
        if program.flips:
            flipped = np.zeros(count, bool)
            for key, stage in program.flips:
                flipped ^= stage.sample_params(Draws(key, sample_ids, epoch))
            job[:, 9] = flips[program.name] = flipped
        assert isinstance(program.crop.size, tuple)
        boxes[:, index] = seen_boxes(geometry, program.crop.size)
    names = tuple(program.name for program in programs)
    return Plan(sample_ids=sample_ids, epoch=epoch, crops=names, jobs=jobs, boxes=boxes, flips=flips)
