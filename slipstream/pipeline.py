"""Runs a plan on a ragged batch: the only caller of the kernels' launchers.

A field's pipeline is compiled once: which crops there are, the key of everything that is drawn, and each crop's chain
of stages (chain.py). The launches of a batch: the crops' weights, all crops, and where there are colour stages one for
all per-pixel programs, with a reading before it for each contrast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from slipstream_kernels.crop_jobs import OutputFormat
from slipstream_kernels.ops import ProgramFormat
from slipstream_kernels.ragged import RaggedBatch

from .chain import compile_chain
from .crop import (
    CenterCrop,
    Crop,
    CropStage,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    RandomResizedCrop,
)
from .device import resolve_backend, to_device
from .draws import Draws, fresh_sample_ids, stream_key
from .plan import CropProgram, Plan, draw_plan
from .stage import MultiCropPipeline, RandomHorizontalFlip, Stage, check_stage
from .stage_program import ProgramStage

CROP_STAGES = (RandomResizedCrop, CenterCrop, MultiRandomResizedCrop, MultiCropRandomResizedCrop)


class Pipeline:
    """One image field's stages, compiled: a crop stage, then what each of its crops goes through.

    stages: a crop stage, or a list that begins with one; MultiCropPipeline (after MultiRandomResizedCrop), or stages
    for all crops alike, follow. seed: the loader's. field: the field's name, which names what has no name of its own.
    scope: goes before every stream's name (the field's, where a loader has several). Raises ValueError or TypeError.
    """

    def __init__(self, stages: Any, *, seed: int = 0, field: str = "image", scope: str = "") -> None:
        if isinstance(stages, CROP_STAGES):
            stages = [stages]
        if not isinstance(stages, Sequence) or not stages or not isinstance(stages[0], CROP_STAGES):
            names = ", ".join(kind.__name__ for kind in CROP_STAGES)
            raise TypeError(f"pipelines[{field!r}] must begin with a crop stage ({names}), got {stages!r}")
        self.stage: CropStage = stages[0]
        self.field = field
        self._crops, self._in_list = _crops_of(self.stage)
        crop_seed = getattr(self.stage, "seed", None)
        own = isinstance(self.stage, (RandomResizedCrop, CenterCrop))
        box_seed = seed if own or crop_seed is None else crop_seed

        chains: dict[str, list[tuple[Stage, int]]] = {name: [] for name in self._crops}
        for index, stage in enumerate(stages[1:], 1):
            if isinstance(stage, MultiCropPipeline):
                if not self._named:
                    raise ValueError(
                        f"pipelines[{field!r}][{index}] names the crops {list(stage.pipelines)}, but those of "
                        f"{type(self.stage).__name__} have no names: give the stages themselves, for all its crops"
                    )
                unknown = [name for name in stage.pipelines if name not in chains]
                if unknown:
                    raise ValueError(f"pipelines[{field!r}][{index}] names {unknown[0]!r}; allowed are {list(chains)}")
                stage_seed = seed if stage.seed is None else stage.seed
                for name, chain in stage.pipelines.items():
                    chains[name] += [(each, stage_seed) for each in chain]
            else:
                single = check_stage(f"pipelines[{field!r}][{index}]", stage)
                for chain in chains.values():
                    chain.append((single, seed))

        self.programs: list[CropProgram] = []
        self._formats: list[OutputFormat] = []
        self._program_formats: dict[str, ProgramFormat] = {}
        for name, crop in self._crops.items():
            key = None
            if isinstance(crop, RandomResizedCrop):
                key = _key(crop, box_seed, scope, name, 0)
            try:
                chain = compile_chain(_with_keys(chains[name], scope, name))
            except TypeError as error:
                which = f", crop {name!r}" if name else ""
                raise TypeError(f"pipelines[{field!r}]{which}: {error}") from None
            self.programs.append(CropProgram(name=name, crop=crop, box_key=key, chain=chain))
            assert isinstance(crop.size, tuple)
            last = crop.memory_format == torch.channels_last
            self._formats.append(OutputFormat(size=crop.size, table=chain.table, channels_last=last))
            if chain.program:
                self._program_formats[name] = ProgramFormat(dtype=chain.dtype, channels_last=last)
        self._formats_on: dict[torch.device, list[OutputFormat]] = {torch.device("cpu"): self._formats}

    @property
    def output_names(self) -> list[str]:
        """The keys that this pipeline adds to a batch."""
        names = [self.field] if self._in_list or not self._named else [program.name for program in self.programs]
        if self.stage.return_boxes:
            for program in self.programs:
                names.append(f"{self._label(program.name)}_box")
                if program.chain.flips:
                    names.append(f"{self._label(program.name)}_flip")
        return names

    def draw(self, sizes: np.ndarray, sample_ids: np.ndarray, epoch: int) -> Plan:
        """The plan for images of these sizes, int32 [B, 2]."""
        return draw_plan(self.programs, sizes, sample_ids, epoch)

    def formats(self, device: torch.device) -> list[OutputFormat]:
        """Each crop's output format, its table on this device."""
        if device not in self._formats_on:
            self._formats_on[device] = [
                OutputFormat(
                    size=fmt.size,
                    table=None if fmt.table is None else fmt.table.to(device),
                    channels_last=fmt.channels_last,
                )
                for fmt in self._formats
            ]
        return self._formats_on[device]

    def prepare(self, images: RaggedBatch, plan: Plan, backend: str) -> Any:
        """The host's part of the launches, which may be done ahead on another thread: pass it to `run`."""
        if backend == "cpu":
            return plan.jobs, plan.programs
        from slipstream_kernels.resized_crop import pack_tables

        return pack_tables(images, plan.jobs, self.formats(images.device)), plan.programs

    def run(
        self, images: RaggedBatch, prepared: Any, backend: str, pool: Executor | None = None, num_threads: int = 1
    ) -> list[torch.Tensor]:
        """Every crop of the batch, on the images' device; on CUDA on the current stream, without waiting for it."""
        jobs, programs = prepared
        formats = self.formats(images.device)
        if backend == "cpu":
            from slipstream_kernels.resized_crop_cpu import resized_crop_cpu

            crops = resized_crop_cpu(images, jobs, formats, pool=pool, num_threads=num_threads)
        else:
            from slipstream_kernels.resized_crop import resized_crop

            crops = resized_crop(images, jobs, formats)
        places = [index for index, program in enumerate(self.programs) if program.name in self._program_formats]
        if places:
            names = [self.programs[index].name for index in places]
            finished = _run_programs(
                [crops[index] for index in places],
                [programs[name] for name in names],
                [self._program_formats[name] for name in names],
                backend,
                (pool, num_threads),
            )
            for index, crop in zip(places, finished, strict=True):
                crops[index] = crop
        return crops

    def outputs(self, crops: Sequence[torch.Tensor], plan: Plan) -> dict[str, Any]:
        """What this pipeline adds to a batch, by name."""
        if self._named:
            batch: dict[str, Any] = dict(zip(plan.crops, crops, strict=True))
        else:
            batch = {self.field: list(crops) if self._in_list else crops[0]}
        if self.stage.return_boxes:
            device = crops[0].device
            for index, program in enumerate(self.programs):
                label = self._label(program.name)
                batch[f"{label}_box"] = to_device(np.ascontiguousarray(plan.boxes[:, index]), device)
                if program.chain.flips:
                    batch[f"{label}_flip"] = to_device(plan.flips[program.name], device)
        return batch

    @property
    def _named(self) -> bool:
        return isinstance(self.stage, MultiRandomResizedCrop)

    def _label(self, name: str) -> str:
        if self._named:
            return name
        return f"{self.field}_{name}" if self._in_list else self.field


def apply_crops(stage: CropStage, images: Any, sample_ids: Any, epoch: int) -> Any:
    """A crop stage by itself on decoded images: what its `__call__` does."""
    own_seed = stage.seed if isinstance(stage, (MultiRandomResizedCrop, MultiCropRandomResizedCrop)) else None
    pipeline = Pipeline(stage, seed=own_seed or 0)
    batch = images if isinstance(images, RaggedBatch) else RaggedBatch.from_images(images)
    ids = _sample_ids(sample_ids, len(batch))
    plan = pipeline.draw(batch.sizes, ids, epoch)
    backend = resolve_backend(stage.backend, batch.device)
    prepared = pipeline.prepare(batch, plan, backend)
    if backend == "cpu":
        num_threads = torch.get_num_threads()
        with ThreadPoolExecutor(num_threads) as pool:
            crops = pipeline.run(batch, prepared, backend, pool, num_threads)
    else:
        crops = pipeline.run(batch, prepared, backend)
    result = pipeline.outputs(crops, plan)
    return result[pipeline.field] if len(result) == 1 and not isinstance(stage, MultiRandomResizedCrop) else result


def apply_stage(stage: Stage, images: torch.Tensor, sample_ids: Any, epoch: int) -> torch.Tensor:
    """A stage that is drawn, by itself on a batch [B, C, h, w]: what its `__call__` does."""
    _check_batch("images", images)
    return _apply_chain([stage], images, _sample_ids(sample_ids, len(images)), epoch, seed=0, name="")


def apply_named_stages(
    stage: MultiCropPipeline, crops: Mapping[str, torch.Tensor], sample_ids: Any, epoch: int
) -> dict[str, torch.Tensor]:
    """A MultiCropPipeline by itself on named crops: what its `__call__` does."""
    if not isinstance(crops, Mapping):
        raise TypeError(f"crops must be a dict of name -> [B, C, h, w], got {type(crops).__name__}")
    unknown = [name for name in stage.pipelines if name not in crops]
    if unknown:
        raise ValueError(f"pipelines names the crop {unknown[0]!r}, the crops given are {list(crops)}")
    for name in stage.pipelines:
        _check_batch(f"crops[{name!r}]", crops[name])
    result = dict(crops)
    counts = {name: len(crops[name]) for name in stage.pipelines}
    if len(set(counts.values())) > 1:
        raise ValueError(f"crops must be of the same images, got batches of {counts}")
    if stage.pipelines:
        ids = _sample_ids(sample_ids, max(counts.values()))
        for name, chain in stage.pipelines.items():
            result[name] = _apply_chain(chain, crops[name], ids, epoch, seed=stage.seed or 0, name=name)
    return result


def _apply_chain(
    stages: Sequence[Stage], images: torch.Tensor, ids: np.ndarray, epoch: int, *, seed: int, name: str
) -> torch.Tensor:
    keyed = _with_keys([(stage, seed) for stage in stages], "", name)
    if not any(isinstance(stage, ProgramStage) for stage in stages):  # on any dtype and number of channels
        for stage, key in keyed:
            if isinstance(stage, RandomHorizontalFlip):
                images = _flip(images, stage.sample_params(Draws(key, ids, epoch)))
            elif not isinstance(stage, ProgramStage):
                images = stage.apply(images)
        return images
    chain = compile_chain(keyed)
    if chain.flips:
        images = _flip(images, chain.sample_flips(ids, epoch))
    last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    fmt = ProgramFormat(dtype=chain.dtype, channels_last=last)
    backend = resolve_backend(None, images.device)
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads) as pool:
        return _run_programs(
            [images],
            [chain.sample_program(ids, epoch, (images.shape[2], images.shape[3]))],
            [fmt],
            backend,
            (pool, num_threads),
        )[0]


def _run_programs(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    formats: Sequence[ProgramFormat],
    backend: str,
    threads: tuple[Executor | None, int],
) -> list[torch.Tensor]:
    if backend == "cpu":
        from slipstream_kernels.programs_cpu import run_programs_cpu

        return run_programs_cpu(images, programs, formats, pool=threads[0], num_threads=threads[1])

    from slipstream_kernels.programs import run_programs

    return run_programs(images, programs, formats)


def _flip(images: torch.Tensor, flipped: np.ndarray) -> torch.Tensor:
    return torch.where(to_device(flipped, images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def _check_batch(field: str, images: Any) -> None:
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"{field} must be a tensor [B, C, h, w], got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"{field} must be [B, C, h, w], got shape {list(images.shape)}")


def _crops_of(stage: CropStage) -> tuple[dict[str, Crop], bool]:
    # The crops by name (a list's by number, a single one's name is empty), and whether they form a list.
    if isinstance(stage, MultiRandomResizedCrop):
        return {name: crop for name, crop in stage.crops.items() if not isinstance(crop, Mapping)}, False
    if isinstance(stage, MultiCropRandomResizedCrop):
        return {str(index): stage.crop for index in range(stage.num_crops)}, True
    return {"": stage}, False


def _with_keys(stages: Sequence[tuple[Stage, int]], scope: str, name: str) -> list[tuple[Stage, int]]:
    # Each stage with its key in place of its seed; the second of a kind in a crop has a stream of its own.
    seen: dict[str, int] = {}
    keyed = []
    for stage, seed in stages:
        kind = type(stage).__name__
        keyed.append((stage, _key(stage, seed, scope, name, seen.setdefault(kind, 0))))
        seen[kind] += 1
    return keyed


def _key(spec: Any, seed: int, scope: str, name: str, occurrence: int) -> int:
    kind, own_seed = type(spec).__name__, getattr(spec, "seed", None)
    if own_seed is not None:
        return stream_key(own_seed, kind)
    return stream_key(seed, "\x1f".join((scope, name, kind, str(occurrence))))


def _sample_ids(sample_ids: Any, count: int) -> np.ndarray:
    if sample_ids is None:
        return fresh_sample_ids(count)
    if isinstance(sample_ids, torch.Tensor):
        sample_ids = sample_ids.cpu().numpy()
    ids = np.asarray(sample_ids)
    if ids.shape != (count,):
        raise ValueError(f"sample_ids must be one whole number for each of the {count} images, got shape {ids.shape}")
    return ids
