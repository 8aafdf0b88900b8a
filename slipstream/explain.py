"""What a pipeline launches, in words: which stages are in which launch, and the bytes that an image costs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from slipstream_kernels import ops
from slipstream_kernels.schedule import BOX, BOX_LINE, BOX_LINES, WIDE_BOX

from .chain import Chain, Own, Section, Step
from .stage_blur import PILGaussianBlur, box_radius
from .stage_program import ProgramStage

if TYPE_CHECKING:
    from .pipeline import Pipeline

FLOAT = 4  # bytes of a value between two passes
MOST_PROGRAMS = 4096  # of one section that are looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of a batch. kind: weights, crops, then those of
    slipstream_kernels.schedule, copy (of NamedCopies), or own (a stage of the user's).

    stages: crop -> the stages in it. read, written: bytes for one image, all crops together, at the most; the crop
    launch reads its boxes' pixels beside.
    """

    kind: str
    stages: dict[str, tuple[str, ...]]
    read: int
    written: int


def launches(pipeline: Pipeline) -> list[Launch]:
    """The launches of a batch in which every stage is applied to some image and not to others."""
    names = {program.name: type(program.crop).__name__ for program in pipeline.programs}
    chains = {program.name: program.chain for program in pipeline.programs}
    written = {
        program.name: 3 * fmt.size[0] * fmt.size[1] * fmt.dtype.itemsize
        for program, fmt in zip(pipeline.programs, pipeline.formats_on_host, strict=True)
    }
    cut = {name: (kind, *chains[name].riding) for name, kind in names.items()}
    result = [
        Launch(kind="weights", stages=dict.fromkeys(names, ()), read=0, written=0),
        Launch(kind="crops", stages=cut, read=0, written=sum(written.values())),
    ]
    sizes = {program.name: fmt.size for program, fmt in zip(pipeline.programs, pipeline.formats_on_host, strict=True)}
    dtypes = {program.name: fmt.dtype for program, fmt in zip(pipeline.programs, pipeline.formats_on_host, strict=True)}
    result += _steps(chains, sizes, dtypes)
    if pipeline.copies:
        size, dtype = pipeline.formats_on_host[0].size, pipeline.formats_on_host[0].dtype
        for step in pipeline.programs[0].chain.steps:
            dtype = step.output_dtype(dtype) if isinstance(step, Section) else dtype
        pixels = 3 * size[0] * size[1] * dtype.itemsize
        for name, chain in pipeline.copies.items():
            if chain.flips or not chain.steps:
                result.append(Launch(kind="copy", stages={name: chain.riding}, read=pixels, written=pixels))
        copies = dict.fromkeys(pipeline.copies, size)
        result += _steps(pipeline.copies, copies, dict.fromkeys(pipeline.copies, dtype))
    return result


def explain(pipeline: Pipeline) -> str:
    """A table of them."""
    found = launches(pipeline)
    count = len(pipeline.programs)
    lines = [
        f"{pipeline.field}: {count} crop{'s' * (count != 1)}, at most {sum(each.kind != 'own' for each in found)} "
        f"launches for a batch of any size; bytes are of one image"
    ]
    for number, each in enumerate(found, 1):
        grouped: dict[tuple[str, ...], list[str]] = {}
        for name, stages in each.stages.items():
            grouped.setdefault(stages, []).append(name or "crop")
        parts = [f"{_names(crops)}: {', '.join(stages)}" for stages, crops in grouped.items() if stages]
        words = "; ".join(parts) or _names([name or "crop" for name in each.stages])
        traffic = f"reads {each.read:,}, writes {each.written:,}"
        if each.kind == "weights":
            traffic = "a table"
        elif each.kind == "crops":
            traffic = f"reads the boxes, writes {each.written:,}"
        elif each.kind == "own":
            traffic = "what it does itself"
        lines.append(f"{number:3} {each.kind:9} {words} ({traffic})")
    return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    # "local_0 ... local_7" for three or more that are counted on
    runs: list[list[str]] = []
    for name in names:
        stem, _, number = (runs[-1][-1] if runs else "").rpartition("_")
        if number.isdecimal() and name == f"{stem}_{int(number) + 1}":
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]} ... {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _steps(
    chains: Mapping[str, Chain], sizes: Mapping[str, tuple[int, int]], dtypes: dict[str, torch.dtype]
) -> list[Launch]:
    result = []
    for number in range(max((len(chain.steps) for chain in chains.values()), default=0)):
        steps = {name: chain.steps[number] for name, chain in chains.items() if number < len(chain.steps)}
        passes = []
        for name, step in steps.items():
            if isinstance(step, Own):
                result.append(Launch(kind="own", stages={name: (step.label,)}, read=0, written=0))
                continue
            pixels = 3 * sizes[name][0] * sizes[name][1]
            before, dtypes[name] = dtypes[name], step.output_dtype(dtypes[name])
            passes.append((name, _passes(step, pixels * before.itemsize, pixels * dtypes[name].itemsize, pixels)))
        for index in range(max((len(each) for _, each in passes), default=0)):
            for kind in ("readings", "equalize", "pixels", "blur", "box blur"):
                parts = {name: each[index][kind] for name, each in passes if index < len(each) and kind in each[index]}
                if parts:
                    stages = {name: _labels(steps[name], part[0]) for name, part in parts.items()}
                    read, written = (sum(part[place] for part in parts.values()) for place in (1, 2))
                    result.append(Launch(kind=kind, stages=stages, read=read, written=written))
                wide = {name: part for name, part in parts.items() if kind == BOX and _is_wide(steps[name])}
                if wide:
                    stages = {name: _labels(steps[name], part[0]) for name, part in wide.items()}
                    between = sum(3 * sizes[name][0] * sizes[name][1] for name in wide)
                    line = Launch(kind=BOX_LINE, stages=stages, read=between, written=between)
                    result += [line] * BOX_LINES
    return result


def _is_wide(step: Any) -> bool:
    # Whether a Pillow blur in it may be too wide for a tile.
    if isinstance(step, Section):
        return any(_is_wide(stage) for _, stage in step.stages)
    inner = getattr(step, "stages", ())
    return any(map(_is_wide, inner)) or (
        isinstance(step, PILGaussianBlur) and float(box_radius(np.array(step.radius, np.float32)).max()) >= WIDE_BOX
    )


def _labels(step: Step, places: Sequence[int]) -> tuple[str, ...]:
    if not isinstance(step, Section) or not step.stages:
        return (step.label,)
    return tuple(type(step.stages[place][1]).__name__ for place in places)


def _passes(section: Section, read: int, written: int, pixels: int) -> list[dict[str, tuple[list[int], int, int]]]:
    # For each pass of a section its launches: kind -> places of the stages in it, bytes read and written, at the most.
    # read, written: bytes of what the section takes and gives.
    program, owners = every_program(section)
    passes = ops.split_passes(program)
    codes = program[..., 0].astype(int)
    last = np.where(passes[..., 1] > passes[..., 0], np.arange(passes.shape[1]), 0).max(1)
    result: list[dict[str, tuple[list[int], int, int]]] = []
    for index in range(passes.shape[1]):
        found: dict[str, tuple[list[int], int, int]] = {}
        for image, (first, end) in enumerate(passes[:, index].tolist()):
            if end <= first:
                continue
            begun = bool((passes[image, :index, 1] > passes[image, :index, 0]).any())
            source = pixels * FLOAT if begun else read
            target = written if index == last[image] else pixels * FLOAT
            rows = [row for row in range(first, end) if codes[image, row] != ops.NOTHING]
            for kind, part in _kinds(codes[image], rows).items():
                stages, most_read, most_written = found.get(kind, ([], 0, 0))
                stages = sorted({*stages, *(owners[row] for row in part)})
                writes = 0 if kind in ("readings", "equalize") else target
                found[kind] = (stages, max(most_read, source), max(most_written, writes))
        result.append(found)
    return result


def _kinds(codes: np.ndarray, rows: Sequence[int]) -> dict[str, list[int]]:
    # The launches of one image's pass: kind -> the rows that are in it.
    kinds: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if codes[row] in ops.STATISTICS:
            kinds["equalize" if codes[row] == ops.EQUALIZE else "readings"] = list(rows[: place + 1])
    blurs = {ops.GAUSSIAN_BLUR: "blur", ops.BOX_BLUR: "box blur"}
    kinds[blurs.get(int(codes[rows[0]]), "pixels") if rows else "pixels"] = list(rows)
    return kinds


def every_program(section: Section) -> tuple[np.ndarray, list[int]]:
    """Programs that hold each operation of a section, or NOTHING in its place, in every way: float32 [N, K, 16] with no
    parameters, and the place of each row's stage in the section."""
    slots: list[tuple[int, ...]] = []
    owners: list[int] = []
    for place, (_, stage) in enumerate(section.stages):
        random = isinstance(stage, ProgramStage)
        for codes in stage.slots() if random else ((ops.NORMALIZE,),):
            slots.append((*codes, ops.NOTHING) if random else codes)
            owners.append(place)
    if not slots:
        return np.zeros((1, 1, ops.OP_WIDTH), np.float32), [0]
    codes = np.array(list(islice(product(*slots), MOST_PROGRAMS)))
    program = np.zeros((*codes.shape, ops.OP_WIDTH), np.float32)
    program[..., 0] = codes
    return program, owners
