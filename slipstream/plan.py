"""The plan: every box and parameter of one batch, drawn from keys. No pixels, no device."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .chain import Chain
from .crop import Crop, sample_geometry, seen_boxes
from .draws import Draws
from .words import describe_flip, describe_job, describe_op, is_program

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CropProgram:
    """What is drawn for one crop: its spec, the key of its boxes (None where nothing is random), its stages."""

    name: str
    crop: Crop
    box_key: int | None
    chain: Chain


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every box and parameter of one batch of B samples and C crops: what to save to make the same batch again.

    sample_ids: [B]. epoch. crops: C names. jobs: int32 [B, C, 10], what the crop launch is told (see
    slipstream_kernels.crop_jobs). boxes: int32 [B, C, 4] (top, left, height, width) in source pixels. flips: the names
    of crops that are flipped at random in the crop launch -> int32 [B], 1 mirrored, 2 upside down, 3 both. steps: the
    names of crops and copies -> for each step after that launch its programs, float32 [B, K, 16]
    (slipstream_kernels.ops), or what the user's own stage drew (an array, a dict of arrays, None).
    """

    sample_ids: np.ndarray
    epoch: int
    crops: tuple[str, ...]
    jobs: np.ndarray
    boxes: np.ndarray
    flips: dict[str, np.ndarray]
    steps: dict[str, tuple[Any, ...]]

    def describe(self, index: int) -> str:
        """What sample `index` of the batch gets, in words: a line for each crop."""
        lines = [f"sample {self.sample_ids[index]}, epoch {self.epoch}"]
        for crop, name in enumerate(self.crops):
            words = [describe_job(self.jobs[index, crop]), *self._words(name, index)]
            lines.append(f"  {name or 'crop'}: " + ", ".join(words))
        for name in self.steps:
            if name not in self.crops:
                flip = describe_flip(self.flips[name][index]) if name in self.flips else []
                lines.append(f"  {name}: " + ", ".join([*flip, *self._words(name, index)] or ["as cut"]))
        return "\n".join(lines)

    def _words(self, name: str, index: int) -> list[str]:
        words = []
        for step in self.steps.get(name, ()):
            if is_program(step):
                words += [describe_op(row) for row in step[index] if row[0]]
            elif isinstance(step, Mapping):
                words += [f"{key} {np.asarray(part)[index].tolist()}" for key, part in step.items()]
            elif step is not None:
                words.append(f"own {step[index].tolist()}")
        return words

    def save(self, file: str | Path | BinaryIO) -> None:
        """Write it to a file (a path, or a binary file open for writing): numpy's npz, with nothing pickled."""
        arrays = {"sample_ids": self.sample_ids, "jobs": self.jobs, "boxes": self.boxes}
        arrays |= {f"flips.{index}": bits for index, bits in enumerate(self.flips.values())}
        outline = []
        for name, steps in self.steps.items():
            kinds: list[Any] = []
            for step in steps:
                parts = step if isinstance(step, Mapping) else {} if step is None else {None: step}
                kinds.append(None if step is None else [])
                for key, part in parts.items():
                    kinds[-1].append(key)
                    arrays[f"steps.{len(arrays)}"] = part
            outline.append([name, kinds])
        head = {
            "format": FORMAT,
            "epoch": self.epoch,
            "crops": self.crops,
            "flips": list(self.flips),
            "steps": outline,
        }
        buffer = io.BytesIO()
        arrays["outline"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]  (no name is an option's)
        if isinstance(file, (str, Path)):
            Path(file).write_bytes(buffer.getvalue())
        else:
            file.write(buffer.getvalue())

    @classmethod
    def load(cls, file: str | Path | BinaryIO) -> Plan:
        """Read what `save` wrote. Raises ValueError, naming the file, for anything else."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                head = json.loads(arrays["outline"].tobytes())
                if head["format"] != FORMAT:
                    raise ValueError(f"format must be {FORMAT}, got {head['format']!r}")
                parts = iter([arrays[name] for name in arrays.files if name.startswith("steps.")])
                steps = {name: tuple(_join(kinds, parts) for kinds in outline) for name, outline in head["steps"]}
                return cls(
                    sample_ids=arrays["sample_ids"],
                    epoch=head["epoch"],
                    crops=tuple(head["crops"]),
                    jobs=arrays["jobs"],
                    boxes=arrays["boxes"],
                    flips={name: arrays[f"flips.{index}"] for index, name in enumerate(head["flips"])},
                    steps=steps,
                )
        except (KeyError, TypeError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is no plan that Plan.save wrote: {error}") from None


def _join(kinds: list[str | None] | None, parts: Any) -> Any:
    if kinds is None:
        return None
    if kinds == [None]:
        return next(parts)
    return {key: next(parts) for key in kinds}


def draw_plan(
    crops: Sequence[CropProgram],
    order: Sequence[str],
    copies: Mapping[str, Chain],
    sizes: np.ndarray,
    sample_ids: np.ndarray,
    epoch: int,
    boxes: Mapping[str, np.ndarray],
) -> Plan:
    """Draw the plan for images of these sizes, int32 [B, 2] (h, w): a pure function of its arguments, row by row.

    order: the crops' names, parents before those cut from within them. copies: the chains of a single crop's copies.
    boxes: the user's, whole numbers [B, 4], for crops that are cut at given ones.
    """
    count = len(sizes)
    jobs = np.zeros((count, len(crops), 10), np.int32)
    seen = np.zeros((count, len(crops), 4), np.int32)
    flips, steps, cut = {}, {}, {}
    places = {each.name: index for index, each in enumerate(crops)}
    for index in (places[name] for name in order):
        crop, name, chain = crops[index].crop, crops[index].name, crops[index].chain
        key = crops[index].box_key
        draws = None if key is None else Draws(key, sample_ids, epoch)
        parent = getattr(crop, "subset_of", None)
        within = None if parent is None else cut[parent]
        geometry = sample_geometry(crop, sizes, draws, within=within, boxes=boxes.get(name))
        assert isinstance(crop.size, tuple)
        seen[:, index] = cut[name] = seen_boxes(geometry, crop.size)
        job = jobs[:, index]
        job[:, 0:4], job[:, 4:6], job[:, 6:8] = geometry.box, geometry.full, geometry.origin
        job[:, 8], job[:, 9] = geometry.filter, geometry.flip
        if chain.flips:
            flips[name] = chain.sample_flips(sample_ids, epoch)
            job[:, 9] ^= flips[name]
        if chain.steps:
            steps[name] = chain.sample_steps(sample_ids, epoch, crop.size)
    for name, chain in copies.items():
        assert isinstance(crops[0].crop.size, tuple)
        if chain.flips:
            flips[name] = chain.sample_flips(sample_ids, epoch)
        steps[name] = chain.sample_steps(sample_ids, epoch, crops[0].crop.size)
    names = tuple(each.name for each in crops)
    return Plan(sample_ids=sample_ids, epoch=epoch, crops=names, jobs=jobs, boxes=seen, flips=flips, steps=steps)
