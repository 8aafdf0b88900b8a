"""The launches of a pipeline's batch: each one kept to be repeated, what it moves, and whether its crops are right.

Kernels are hooked where Triton starts them, so that no launcher need know of it; the memory that they work in is hooked
where torch makes it: filled with a poison before, and kept alive for the repetition.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import timing
import torch
from slipstream_kernels import ops
from slipstream_kernels.ragged import RaggedBatch
from slipstream_kernels.resized_crop import resized_crop_kernel

from slipstream.chain import Section
from slipstream.pipeline import Pipeline
from slipstream.plan import Plan

POISONS = (0xFF, 0x55)  # bytes of memory that nobody wrote: NaN in floats, and no byte is right under both
MAKERS = ("empty", "empty_like", "empty_strided")
# what a launch is called in slipstream.explain, by what its kernel's name holds
KINDS = {
    "weights": "weights",
    "resized_crop": "crops",
    "readings": "readings",
    "equalize": "equalize",
    "gaussian": "blur",
    "box": "box blur",
    "pixels": "pixels",
}
# How far two backends may be from each other, in [0, 1], and how many values may be beyond it where an operation jumps
# (a value at a threshold, or halfway between two bytes, may land on either side): as in the table of the tests.
BOUND = 1e-5
BOUNDS = {ops.GAUSSIAN_BLUR: 2e-5, ops.WARP: 1e-4}
JUMPS = (ops.SOLARIZE, ops.SOLARIZE_ADD, ops.POSTERIZE, ops.EQUALIZE, ops.BOX_BLUR, ops.WARP)
MOST_BEYOND = 1e-3
ROUNDING = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # a step, of the value
MOST_SLEEP = 200.0  # milliseconds: one call that took long must not make all that follow it take twice as long
MOST_DIFFERENT = 0.02  # a difference of BOUND changes the rounding of so few


@dataclass(kw_only=True, slots=True)
class Recording:
    """Launches in order, each with its kernel's name, and the memory that they work in."""

    launches: list[tuple[str, Callable[[], Any]]] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)

    def kinds(self) -> list[str]:
        """What each launch is called in slipstream.explain; its kernel's name where that is not known."""
        return [next((kind for part, kind in KINDS.items() if part in name), name) for name, _ in self.launches]


@contextlib.contextmanager
def recorded(poison: int) -> Iterator[Recording]:
    """Keep each Triton launch that is made, and fill what torch allocates with this byte."""
    recording = Recording()
    kind = type(resized_crop_kernel)
    launch_on = kind.__getitem__
    make = {name: getattr(torch, name) for name in MAKERS}

    def keep(kernel: Any, grid: Any) -> Callable[..., Any]:
        launch = launch_on(kernel, grid)

        def run(*args: Any, **settings: Any) -> Any:
            recording.launches.append((kernel.fn.__name__, functools.partial(launch, *args, **settings)))
            return launch(*args, **settings)

        return run

    def poisoned(name: str) -> Callable[..., torch.Tensor]:
        def maker(*args: Any, **settings: Any) -> torch.Tensor:
            tensor = make[name](*args, **settings)
            whole = make["empty"](0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            whole.fill_(poison)
            recording.memory.append(tensor)
            return tensor

        return maker

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kind, "__getitem__", keep))
        for name in MAKERS:
            stack.enter_context(mock.patch.object(torch, name, poisoned(name)))
        yield recording


def run_recorded(pipeline: Pipeline, images: RaggedBatch, plan: Plan, expected: Sequence[torch.Tensor]) -> Recording:
    """The launches of one batch, once its crops were found right on two poisons. Raises AssertionError if they are not.

    expected: the CPU backend's crops of the same plan, on the images' device.
    """
    recordings = []
    for poison in POISONS:
        with recorded(poison) as recording:
            prepared = pipeline.prepare(images, plan, "triton")
            crops = pipeline.run(images, prepared, "triton")
        check_crops(crops, expected, pipeline, plan)
        recording.memory += [prepared, crops]
        recordings.append(recording)
    return recordings[-1]


def check_crops(
    crops: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], pipeline: Pipeline, plan: Plan
) -> None:
    """Raise AssertionError, with the numbers, for crops that are not another backend's within the bounds above."""
    for program, crop, other in zip(pipeline.programs, crops, expected, strict=True):
        assert (crop.dtype, crop.shape) == (other.dtype, other.shape), (program.name, crop.dtype, crop.shape)
        rows = [step[step[..., 0] != ops.NOTHING] for step in plan.steps.get(program.name, ())]
        codes = {int(code) for row in rows for code in np.unique(row[:, 0])}
        deviations = [row[row[:, 0] == ops.NORMALIZE][:, 4:7].min(initial=1.0) for row in rows]
        bound = max([BOUND, *(BOUNDS[code] for code in codes & set(BOUNDS))]) / min(deviations, default=1.0)
        difference = (crop.float() - other.float()).abs()
        beyond = ~(difference <= bound + ROUNDING[crop.dtype] * other.float().abs())
        told = {
            "crop": program.name,
            "beyond": float(beyond.float().mean()),
            "worst": float(difference.max()),
            "different": float((crop != other).float().mean()),
        }
        assert bool(crop.isfinite().all()), told
        assert told["beyond"] <= (MOST_BEYOND if codes & set(JUMPS) else 0.0), told
        assert crop.dtype == torch.float32 or told["different"] <= MOST_DIFFERENT, told


def count_bytes(pipeline: Pipeline, plan: Plan, sizes: np.ndarray) -> list[tuple[str, int, int]]:
    """The launches that a plan makes for images of these sizes, int32 [B, 2]: kind, bytes read and bytes written.

    Bytes of a box's pixels, of a crop and of what lies between two passes are counted once for each launch that reads
    them; explain's numbers are the most that they can be. For a pipeline of one section a crop and no copies.
    """
    formats = pipeline.formats_on_host
    cut = [len(plan.sample_ids) * 3 * fmt.size[0] * fmt.size[1] * fmt.dtype.itemsize for fmt in formats]
    result = [("weights", 0, 0), ("crops", 3 * _covered(plan.boxes, sizes), sum(cut))]
    programs, taken, given, pixels = [], [], [], []
    for program, fmt in zip(pipeline.programs, formats, strict=True):
        for step, rows in zip(program.chain.steps, plan.steps.get(program.name, ()), strict=True):
            assert isinstance(step, Section), f"{program.name} has a stage of the user's own"
            size = 3 * fmt.size[0] * fmt.size[1]
            programs.append(rows)
            for column, item in ((taken, fmt.dtype), (given, step.output_dtype(fmt.dtype)), (pixels, torch.float32)):
                column.append(np.full(len(rows), size * item.itemsize))
    if not programs:
        return result
    longest = max(rows.shape[1] for rows in programs)
    joined = np.concatenate([np.pad(rows, ((0, 0), (0, longest - rows.shape[1]), (0, 0))) for rows in programs])
    first_read, last_written, between = (np.concatenate(column) for column in (taken, given, pixels))
    passes, codes = ops.split_passes(joined), joined[..., 0].astype(int)
    live = passes[..., 1] > passes[..., 0]
    before = live.cumsum(1) - live
    for number in range(passes.shape[1]):
        read = np.where(before[:, number] == 0, first_read, between)
        last = before[:, number] == live.sum(1) - 1
        written = np.where(last, last_written, between)
        found: dict[str, list[int]] = {}
        for image in np.flatnonzero(live[:, number]):
            first, end = passes[image, number]
            inside = codes[image, first:end]
            kinds = {"equalize" if code == ops.EQUALIZE else "readings" for code in inside if code in ops.STATISTICS}
            kinds.add({ops.GAUSSIAN_BLUR: "blur", ops.BOX_BLUR: "box blur"}.get(int(inside[0]), "pixels"))
            for kind in kinds:
                total = found.setdefault(kind, [0, 0])
                total[0] += int(read[image])
                total[1] += 0 if kind in ("readings", "equalize") else int(written[image])
        order = ("readings", "equalize", "pixels", "blur", "box blur")
        result += [(kind, found[kind][0], found[kind][1]) for kind in order if kind in found]
    return result


def by_queue(
    prepare: Callable[[], Any], run: Callable[[Any], Any], device: torch.device, calls: int = 20
) -> dict[str, float]:
    """Milliseconds of the device alone: all of a call's work is queued while the device sleeps, its cache flushed.

    prepare: the part of a call that is not timed. Gaps in which the device waits for the host are left out so; a call
    that waits for the device cannot be timed. On the CPU (a dry run) it is one call by the host's clock.
    """
    if device.type != "cuda":
        return timing.by_host(lambda: run(prepare()), device, calls=1)
    cache = torch.zeros(1 << 26, dtype=torch.int32, device=device)
    samples: list[float] = []
    sleep = 5.0
    for _ in range(4 * calls):
        prepared = prepare()
        cache.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        marks[0].record()
        torch.cuda._sleep(int(sleep * 2e6))  # cycles, of about half a nanosecond
        begun = time.perf_counter()
        marks[1].record()
        run(prepared)
        marks[2].record()
        queued = (time.perf_counter() - begun) * 1e3
        torch.cuda.synchronize(device)
        if queued < 0.9 * marks[0].elapsed_time(marks[1]):
            samples.append(marks[1].elapsed_time(marks[2]))
        else:
            sleep = min(2 * queued + 1, MOST_SLEEP)
        if len(samples) > calls:
            break
    samples = sorted(samples[1:])
    if not samples:
        raise RuntimeError("the device never slept for as long as the host took")
    return {"median": samples[len(samples) // 2], "min": samples[0], "max": samples[-1]}


def _covered(boxes: np.ndarray, sizes: np.ndarray) -> int:
    # Pixels of the images that some crop's box holds. boxes: int32 [B, C, 4].
    total = 0
    for (height, width), own in zip(sizes.tolist(), boxes.tolist(), strict=True):
        seen = np.zeros((height, width), bool)
        for top, left, box_height, box_width in own:
            seen[top : top + box_height, left : left + box_width] = True
        total += int(seen.sum())
    return total
