"""What a pipeline launches, in words: which stages are in which launch, and the bytes that an image costs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from itertools import permutations, product, zip_longest
from math import factorial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from slipstream_kernels import ops, schedule

from .chain import Chain, Own, Section
from .stage import Normalize
from .stage_blur import PILGaussianBlur, box_radius
from .stage_compose import RandomApply, RandomChoice, RandomOrder

if TYPE_CHECKING:
    from .pipeline import Pipeline

FLOAT = 4  # bytes of a value between two passes
LAST_LINE = schedule.BOX_LINES - 1
MOST_ORDERS = 720  # of a section's stages that are told apart

Choice = tuple[int, float]  # an operation and its first parameter
Rows = tuple[tuple[Choice, ...], ...]  # what may stand in each row of a program


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of a batch. kind: weights, crops, then those of
    slipstream_kernels.schedule, copy (of NamedCopies), or own (a stage of the user's).

    stages: crop -> the stages in it. read, written: bytes for one image, all crops together, at the most; the crop
    launch beside reads its boxes' pixels, and writes and reads four bytes for each row of a box and column of its crop;
    a Gaussian blur writes and reads its pixels in float32 between across and down.
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
        parts = []
        for name, step in steps.items():
            if isinstance(step, Own):
                result.append(Launch(kind="own", stages={name: (step.label,)}, read=0, written=0))
                continue
            before, dtypes[name] = dtypes[name], step.output_dtype(dtypes[name])
            values = 3 * sizes[name][0] * sizes[name][1]
            parts.append(_Part(name, step, values, values * before.itemsize, values * dtypes[name].itemsize))
        result += _shared_launches(parts)
    return result


@dataclass(frozen=True, slots=True)
class _Part:
    """One crop's section: how many values an image has, and the bytes of what it takes and gives."""

    name: str
    section: Section
    values: int
    read: int
    written: int


def _shared_launches(parts: Sequence[_Part]) -> list[Launch]:
    # What the launcher itself would do with a batch that holds every program of every crop.
    if not parts:
        return []
    programs, owners = zip(*(every_program(part.section) for part in parts), strict=True)
    joined = schedule.join_programs(programs)
    plan = schedule.plan_launches(joined)
    crop_of = np.repeat(np.arange(len(parts)), [len(program) for program in programs])
    live = plan.passes[..., 1] > plan.passes[..., 0]
    result = []
    for launch in plan.launches:
        stages: dict[int, set[int]] = {}
        most: dict[int, tuple[int, int]] = {}
        for image in launch.images.tolist():
            crop = int(crop_of[image])
            part, shift = parts[crop], joined.shape[1] - programs[crop].shape[1]
            first, end = plan.passes[image, launch.number].tolist()
            reading = launch.kind in (schedule.READINGS, schedule.EQUALIZE_TABLES)
            if reading:
                end = int(plan.read_at[image, launch.number]) + 1
            used = {owners[crop][row - shift] for row in range(first, end) if joined[image, row, 0] != ops.NOTHING}
            stages.setdefault(crop, set()).update(used)
            begun, goes_on = live[image, : launch.number].any(), live[image, launch.number + 1 :].any()
            wide = launch.kind == schedule.BOX_LINE
            read = part.values * FLOAT if begun or (wide and launch.line) else part.read
            written = part.values * FLOAT if goes_on or (wide and launch.line < LAST_LINE) else part.written
            before = most.get(crop, (0, 0))
            most[crop] = max(before[0], read), max(before[1], 0 if reading else written)
        result.append(
            Launch(
                kind=launch.kind,
                stages={parts[crop].name: _labels(parts[crop].section, sorted(used)) for crop, used in stages.items()},
                read=sum(read for read, _ in most.values()),
                written=sum(written for _, written in most.values()),
            )
        )
    return result


def _labels(section: Section, places: Sequence[int]) -> tuple[str, ...]:
    if not section.stages:
        return (section.label,)
    return tuple(type(section.stages[place][1]).__name__ for place in places)


def every_program(section: Section) -> tuple[np.ndarray, list[int]]:
    """Programs that between them need every launch which a program of this section can need, float32 [N, K, 16], and
    the place of each row's stage in the section.

    Each operation stands in each of its rows after everything that rows before can come to, in any order of the stages
    of a RandomOrder; a box blur with its widest too.
    """
    stages = [stage for _, stage in section.stages]
    orders = [_orders(stage) for stage in stages]
    if np.prod([float(len(each)) for each in orders]) > MOST_ORDERS:
        orders = [[_any_of(each)] for each in orders]
    owners = [place for place, each in enumerate(orders) for _ in each[0]]
    programs: dict[tuple[Choice, ...], None] = {}
    for order in product(*orders):
        states: dict[_State, tuple[Choice, ...]] = {_State(): ()}
        for row, choices in enumerate(joined.from_iterable(order)):
            after: dict[_State, tuple[Choice, ...]] = {}
            for state, before in states.items():
                for choice in choices:
                    after.setdefault(state.after(choice, row), (*before, choice))
                    programs[(*before, choice)] = None
            states = after
    chosen = np.zeros((max(len(programs), 1), max(len(owners), 1), 2), np.float32)
    for index, program in enumerate(programs):
        chosen[index, : len(program)] = program
    chosen = np.unique(chosen, axis=0)
    result = np.ones((*chosen.shape[:2], ops.OP_WIDTH), np.float32)
    result[..., :2] = chosen
    return result, owners or [0]


@dataclass(frozen=True, slots=True)
class _State:
    """What the rest of an image's launches depends on: its pass, how that began, its reading, whether there was a pass
    before, and whether its first row began at its neighbours, which with other crops is a later pass (split_passes).
    """

    number: int = 0
    begun: int = ops.NOTHING
    reading: int = ops.NOTHING
    full: bool = False
    before: bool = False
    at_once: bool = False

    def after(self, choice: Choice, row: int) -> _State:
        code, wide = choice
        if code == ops.NOTHING:
            return self
        neighbours, reading = code in ops.NEIGHBOURS, code in ops.STATISTICS
        kind = code if code in ops.BLURS else ops.BRIGHTNESS  # what else a pass begins with makes no launch
        kind += ops.NUM_OPS * (wide > 0)
        if (neighbours and row > 0) or (reading and self.full):
            before = self.before or self.begun != ops.NOTHING
            return _State(self.number + 1, kind, code if reading else ops.NOTHING, True, before, self.at_once)
        return _State(
            self.number,
            self.begun or kind,
            code if reading else self.reading,
            self.full or neighbours or reading,
            self.before,
            self.at_once or neighbours,
        )


def _orders(stage: Any) -> list[Rows]:
    # What may stand in a stage's rows, for each order of the stages inside; NOTHING last in each row.
    if isinstance(stage, RandomChoice):
        found = [rows for each in stage.stages for rows in _orders(each)]
        longest = max(map(len, found))
        found = [(*rows, *[((ops.NOTHING, 0.0),)] * (longest - len(rows))) for rows in found]
    elif isinstance(stage, (RandomApply, RandomOrder)):
        inside = [_orders(each) for each in stage.stages]
        count = np.prod([float(len(each)) for each in inside])
        shuffled = isinstance(stage, RandomOrder)
        if count * (factorial(len(inside)) if shuffled else 1) <= MOST_ORDERS:
            several = [each for one in product(*inside) for each in (permutations(one) if shuffled else [one])]
            found = [tuple(joined.from_iterable(each)) for each in several]
        else:
            rows = tuple(joined.from_iterable(_any_of(each) for each in inside))
            found = [_any_of([(row,) for row in rows]) * len(rows) if shuffled else rows]
    elif isinstance(stage, Normalize):
        found = [(((ops.NORMALIZE, 0.0),),)]
    else:  # a stage that samples programs: inside another it need not be a ProgramStage
        widest = _widest_box(stage)
        found = [tuple(tuple(_choices(codes, widest)) for codes in stage.slots())]
    return list(dict.fromkeys(found))


def _choices(codes: Sequence[int], widest: float) -> list[Choice]:
    boxes = [(ops.BOX_BLUR, widest)] if ops.BOX_BLUR in codes else []
    return [*((code, 0.0) for code in codes), *boxes, (ops.NOTHING, 0.0)]


def _any_of(orders: Sequence[Rows]) -> Rows:
    # In each row what any of these has there.
    return tuple(
        tuple(sorted(dict.fromkeys(joined.from_iterable(each)), key=lambda choice: choice[0] == ops.NOTHING))
        for each in zip_longest(*orders, fillvalue=((ops.NOTHING, 0.0),))
    )


def _widest_box(stage: Any) -> float:
    # The largest box radius of a Pillow blur.
    return float(box_radius(np.array(stage.radius, np.float32)).max()) if isinstance(stage, PILGaussianBlur) else 0.0
