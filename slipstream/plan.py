"""The plan: every box and parameter of one batch, drawn from keys. No pixels, no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .chain import Chain, describe_op
from .crop import INTERPOLATIONS, Crop, sample_geometry, seen_boxes
from .draws import Draws


@dataclass(frozen=True, kw_only=True, slots=True)
class CropProgram:
    """What is drawn for one crop: its spec, the key of its boxes (None where nothing is random), its stages."""

    name: str
    crop: Crop
    box_key: int | None
    chain: Chain


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every box and parameter of one batch of B samples and C crops.

    sample_ids: [B]. epoch. crops: C names. jobs: int32 [B, C, 10], what the crop launch is told (see
    slipstream_kernels.crop_jobs). boxes: int32 [B, C, 4] (top, left, height, width) in source pixels. flips: the names
    of crops that are flipped at random -> bool [B], all flips of the crop taken together. programs: the names of crops
    with colour stages -> float32 [B, K, 16], each sample's per-pixel program (see slipstream_kernels.ops).
    """

    sample_ids: np.ndarray
    epoch: int
    crops: tuple[str, ...]
    jobs: np.ndarray
    boxes: np.ndarray
    flips: dict[str, np.ndarray]
    programs: dict[str, np.ndarray]

    def describe(self, index: int) -> str:
        """What sample `index` of the batch gets, in words: a line for each crop."""
        lines = [f"sample {self.sample_ids[index]}, epoch {self.epoch}"]
        for crop, name in enumerate(self.crops):
            top, left, height, width, full_h, full_w, y, x, kind, _ = self.jobs[index, crop].tolist()
            words = [f"box {height} x {width} at ({top}, {left}) -> {full_h} x {full_w} {INTERPOLATIONS[kind]}"]
            if (y, x) != (0, 0):
                words.append(f"window at ({y}, {x})")
            if name in self.flips and self.flips[name][index]:
                words.append("mirrored")
            words += [
                describe_op(row) for row in self.programs.get(name, np.zeros((index + 1, 0, 16)))[index] if row[0]
            ]
            lines.append(f"  {name or 'crop'}: " + ", ".join(words))
        return "\n".join(lines)


def draw_plan(crops: Sequence[CropProgram], sizes: np.ndarray, sample_ids: np.ndarray, epoch: int) -> Plan:
    """Draw the plan for images of these sizes, int32 [B, 2] (h, w): a pure function of its arguments, row by row."""
    count = len(sizes)
    jobs = np.zeros((count, len(crops), 10), np.int32)
    boxes = np.zeros((count, len(crops), 4), np.int32)
    flips, programs = {}, {}
    for index, program in enumerate(crops):
        draws = None if program.box_key is None else Draws(program.box_key, sample_ids, epoch)
        assert isinstance(program.crop.size, tuple)
        geometry = sample_geometry(program.crop, sizes, draws)
        job = jobs[:, index]
        job[:, 0:4], job[:, 4:6], job[:, 6:8] = geometry.box, geometry.full, geometry.origin
        job[:, 8] = INTERPOLATIONS.index(program.crop.interpolation)
        if program.chain.flips:
            job[:, 9] = flips[program.name] = program.chain.sample_flips(sample_ids, epoch)
        if program.chain.program:
            programs[program.name] = program.chain.sample_program(sample_ids, epoch, program.crop.size)
        boxes[:, index] = seen_boxes(geometry, program.crop.size)
    names = tuple(program.name for program in crops)
    return Plan(sample_ids=sample_ids, epoch=epoch, crops=names, jobs=jobs, boxes=boxes, flips=flips, programs=programs)
