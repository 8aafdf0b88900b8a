"""Runs a plan on a ragged batch: the only caller of the kernels' launchers.

A field's pipeline is compiled once: which crops there are, the key of everything that is drawn, and each crop's chain
of stages (chain.py). The launches of a batch: the crops' weights, all crops, then the steps of all crops (steps.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from slipstream_kernels.crop_jobs import OutputFormat, empty_outputs
from slipstream_kernels.crop_tables import pack_tables
from slipstream_kernels.ragged import RaggedBatch

from . import checks
from .chain import Chain, Section, Step, Values, compile_chain
from .crop import (
    Crop,
    CropStage,
    FiveCrop,
    ImageSizeError,
    MultiCropRandomResizedCrop,
    MultiRandomResizedCrop,
    RandomResizedCrop,
    Resize,
    ResizedCrop,
    TenCrop,
)
from .device import resolve_backend, to_device
from .draws import Draws, fresh_sample_ids, ids_array, stream_key
from .plan import CropProgram, Plan, draw_plan
from .stage import MultiCropPipeline, Stage, check_stage
from .stage_flip import HORIZONTAL, RandomHorizontalFlip, RandomVerticalFlip, flip_images
from .stage_own import NamedCopies
from .steps import Threads, pack_steps, run_steps

CROP_STAGES = (Crop, MultiRandomResizedCrop, MultiCropRandomResizedCrop, FiveCrop, TenCrop)
STAND_IN_BOX = (0, 0, 1, 1)  # lies in every image


class Pipeline:
    """One image field's stages, compiled: a crop stage, then what each of its crops goes through.

    stages: a crop stage, or a list that begins with one; MultiCropPipeline (where crops have names), NamedCopies (where
    there is one crop), or stages for all crops alike, follow. seed: the loader's. field: the field's name, which names
    what has no name of its own. scope: goes before every stream's name (the field's, where a loader has several).

    Called on images (uint8 [B, 3, H, W], or a list of [3, H, W] of any sizes and strides, on the CPU or a GPU) it gives
    what a loader adds to a batch: a dict of name -> tensor [B, 3, h, w]. Raises ValueError or TypeError.
    """

    def __init__(self, stages: Any, *, seed: int = 0, field: str = "image", scope: str = "") -> None:
        if isinstance(stages, CROP_STAGES):
            stages = [stages]
        first = stages[0] if isinstance(stages, Sequence) and stages else stages
        if first is stages or not isinstance(first, CROP_STAGES):
            checks.refuse_torchvision(f"pipelines[{field!r}]", first)
            raise TypeError(
                f"pipelines[{field!r}] must begin with a crop stage (RandomResizedCrop, CenterCrop, "
                f"MultiRandomResizedCrop, ...), got {checks.brief(stages)}"
            )
        self.stage: CropStage = stages[0]
        self.field = field
        self._crops, self._in_list = crops_of(self.stage)
        place = f"pipelines[{field!r}]"
        parents = [getattr(crop, "subset_of", None) for crop in self._crops.values()]
        if any(parents) and not self._named:
            raise ValueError(
                f"{place}[0]: subset_of={parents[0]!r} must name a crop beside this one: put both in a "
                f"MultiRandomResizedCrop"
            )
        chains, copies = _chains(place, self.stage, list(self._crops), stages[1:], seed)
        crop_seed = getattr(self.stage, "seed", None) if self._named or self._in_list else None
        box_seed = seed if crop_seed is None else crop_seed

        self.programs: list[CropProgram] = []
        self.formats_on_host: list[OutputFormat] = []
        for name, crop in self._crops.items():
            key = _key(crop, box_seed, scope, name, 0) if hasattr(crop, "seed") else None
            assert isinstance(crop.size, tuple)
            chain = _compiled(place, chains[name], scope, name, crop.size)
            self.programs.append(CropProgram(name=name, crop=crop, box_key=key, chain=chain))
            last = crop.memory_format == torch.channels_last
            self.formats_on_host.append(OutputFormat(size=crop.size, table=chain.table, channels_last=last))
        size, takes = self.formats_on_host[0].size, self.programs[0].chain.gives  # NamedCopies stand after one crop
        self.copies = {
            name: _compiled(place, stages, scope, name, size, takes=takes) for name, stages in copies.items()
        }
        self._formats_on: dict[torch.device, list[OutputFormat]] = {torch.device("cpu"): self.formats_on_host}

    @property
    def crop_names(self) -> list[str]:
        """The keys of a batch that hold its crops."""
        return [program.name for program in self.programs] if self._named else list(self.copies) or [self.field]

    @property
    def crop_dtypes(self) -> dict[str, torch.dtype | None]:
        """The crops' dtypes by those keys; None where only the batch tells, behind a stage of the user's own."""
        chains = self.copies.values() if self.copies else (program.chain for program in self.programs)
        return {name: chain.gives.dtype for name, chain in zip(self.crop_names, chains, strict=False)}

    @property
    def output_names(self) -> list[str]:
        """The keys that this pipeline adds to a batch."""
        names = self.crop_names
        if self.stage.return_boxes:
            for program in self.programs:
                names += [f"{self._label(program.name)}_{kind}" for kind in ("box", *_flip_names(program.chain))]
            for name, chain in self.copies.items():
                names += [f"{name}_{kind}" for kind in _flip_names(chain)]
        return names

    @property
    def box_fields(self) -> dict[str, str]:
        """The crops that are cut at boxes which a field of the samples holds: name of the crop -> of the field."""
        given = {name: getattr(crop, "boxes", None) for name, crop in self._crops.items()}
        return {name: field for name, field in given.items() if isinstance(field, str)}

    def draw(
        self,
        sizes: np.ndarray,
        sample_ids: np.ndarray,
        epoch: int,
        boxes: Mapping[str, np.ndarray] | None = None,
    ) -> Plan:
        """The plan for images of these sizes, int32 [B, 2]. boxes: int32 [B, 4] for each crop of box_fields."""
        order = self.stage.order if isinstance(self.stage, MultiRandomResizedCrop) else tuple(self._crops)
        return draw_plan(self.programs, order, self.copies, sizes, sample_ids, epoch, boxes or {})

    def unfit(self, sizes: np.ndarray, boxes: Mapping[str, Any]) -> dict[int, str]:
        """The images of these sizes, int32 [B, 2], that some crop cannot be cut from, and why. boxes: as in `draw`."""
        found: dict[int, str] = {}
        sizes, boxes = sizes.copy(), {name: list(given) for name, given in boxes.items()}
        draws = Draws(0, np.zeros(len(sizes), np.int64), 0)
        for name, crop in self._crops.items():
            while not isinstance(crop, RandomResizedCrop):
                try:
                    crop.sample_geometry(sizes, draws, None, np.array(boxes[name]) if name in boxes else None)
                    break
                except ImageSizeError as error:
                    found.setdefault(error.index, str(error))
                    sizes[error.index] = 2**15, 2**15
                    if name in boxes:
                        boxes[name][error.index] = np.array(STAND_IN_BOX)
        return found

    def plan(self, images: Any, *, sample_ids: Any = None, epoch: int = 0, boxes: Any = None) -> Plan:
        """What a call with the same arguments would do with these images."""
        batch = images if isinstance(images, RaggedBatch) else RaggedBatch.from_images(images)
        given: dict[str, Any] = {} if boxes is None else dict.fromkeys(self._crops, boxes)
        if given and not any(isinstance(crop, ResizedCrop) for crop in self._crops.values()):
            raise ValueError(f"boxes are for a ResizedCrop, and {type(self.stage).__name__} draws or has its own")
        return self.draw(batch.sizes, as_sample_ids(sample_ids, len(batch)), epoch, given)

    def explain(self) -> str:
        """The launches of a batch, in words: which stages are in which, and the bytes that an image costs in each."""
        from .explain import explain

        return explain(self)

    def __call__(
        self,
        images: Any,
        *,
        sample_ids: Any = None,
        epoch: int = 0,
        boxes: Any = None,
        plan: Plan | None = None,
    ) -> dict[str, Any]:
        """The crops of these images; with sample_ids a pure function of (seed, sample id, epoch) and the pixels.

        sample_ids: [B] whole numbers in [0, 2**64), None draws new crops. epoch: in [0, 2**32). boxes: int [B, 4] (top,
        left, height, width) for a ResizedCrop. plan: a saved one, which replaces all three. Raises ValueError for a
        plan of other crops or of another number of images.
        """
        batch = images if isinstance(images, RaggedBatch) else RaggedBatch.from_images(images)
        if plan is None:
            plan = self.plan(batch, sample_ids=sample_ids, epoch=epoch, boxes=boxes)
        else:
            self._check_plan(plan, len(batch))
        backend = resolve_backend(self.stage.backend, batch.device)
        prepared = self.prepare(batch, plan, backend)
        if backend != "cpu":
            return self.outputs(self.run(batch, prepared, backend), plan)
        count = torch.get_num_threads()
        with ThreadPoolExecutor(count) as pool:
            return self.outputs(self.run(batch, prepared, backend, pool, count), plan)

    def formats(self, device: torch.device) -> list[OutputFormat]:
        """Each crop's output format, its table on this device."""
        if device not in self._formats_on:
            self._formats_on[device] = [
                OutputFormat(
                    size=fmt.size,
                    table=None if fmt.table is None else fmt.table.to(device),
                    channels_last=fmt.channels_last,
                )
                for fmt in self.formats_on_host
            ]
        return self._formats_on[device]

    def prepare(self, images: RaggedBatch, plan: Plan, backend: str) -> Any:
        """The host's part of the launches, which may be done ahead on another thread: pass it to `run`."""
        if backend == "cpu":
            return plan, plan.jobs, None
        crops = empty_outputs(len(images), self.formats_on_host, torch.device("meta"))
        packed = pack_steps(crops, *self._steps(plan), pin_memory=images.device.type == "cuda")
        return plan, pack_tables(images, plan.jobs, self.formats(images.device)), packed

    def _steps(self, plan: Plan) -> tuple[list[tuple[Step, ...]], list[tuple[Any, ...]]]:
        # Each crop's steps, and what was drawn for them.
        steps = [program.chain.steps for program in self.programs]
        return steps, [plan.steps.get(program.name, ()) for program in self.programs]

    def run(
        self, images: RaggedBatch, prepared: Any, backend: str, pool: Executor | None = None, num_threads: int = 1
    ) -> list[torch.Tensor]:
        """Every crop of the batch, or every copy of its one crop, on the images' device; on CUDA on the current stream,
        without waiting for it."""
        plan, jobs, packed = prepared
        formats = self.formats(images.device)
        if backend == "cpu":
            from slipstream_kernels.resized_crop_cpu import resized_crop_cpu

            crops = resized_crop_cpu(images, jobs, formats, pool=pool, num_threads=num_threads)
        else:
            from slipstream_kernels.resized_crop import resized_crop

            crops = resized_crop(images, jobs, formats)
        threads = Threads(pool=pool, count=num_threads)
        crops = run_steps(crops, *self._steps(plan), backend, threads, packed)
        if not self.copies:
            return crops
        copies = []
        for name, chain in self.copies.items():
            if chain.flips:
                copies.append(flip_images(crops[0], to_device(plan.flips[name], images.device)))
            elif chain.steps and isinstance(chain.steps[0], Section):
                copies.append(crops[0])  # which a section leaves as it is
            else:
                copies.append(crops[0].clone())
        drawn = [plan.steps.get(name, ()) for name in self.copies]
        return run_steps(copies, [chain.steps for chain in self.copies.values()], drawn, backend, threads)

    def outputs(self, crops: Sequence[torch.Tensor], plan: Plan) -> dict[str, Any]:
        """What this pipeline adds to a batch, by name."""
        if self._named:
            batch: dict[str, Any] = dict(zip(plan.crops, crops, strict=True))
        elif self.copies:
            batch = dict(zip(self.copies, crops, strict=True))
        else:
            batch = {self.field: list(crops) if self._in_list else crops[0]}
        if self.stage.return_boxes:
            device = crops[0].device
            for index, program in enumerate(self.programs):
                label = self._label(program.name)
                batch[f"{label}_box"] = to_device(np.ascontiguousarray(plan.boxes[:, index]), device)
                batch |= _flips(label, program.chain, plan.flips.get(program.name), device)
            for name, chain in self.copies.items():
                batch |= _flips(name, chain, plan.flips.get(name), device)
        return batch

    @property
    def _named(self) -> bool:
        return isinstance(self.stage, MultiRandomResizedCrop)

    def _label(self, name: str) -> str:
        if self._named:
            return name
        return f"{self.field}_{name}" if self._in_list else self.field

    def _check_plan(self, plan: Plan, count: int) -> None:
        names = tuple(program.name for program in self.programs)
        steps = {program.name: program.chain.steps for program in self.programs if program.chain.steps}
        steps |= {name: chain.steps for name, chain in self.copies.items()}
        flipped = {name for name, chain in self.copies.items() if chain.flips}  # the jobs hold those of crops
        lengths = {name: len(each) for name, each in steps.items()}
        planned = {name: len(each) for name, each in plan.steps.items()}
        if plan.crops != names or planned != lengths or not flipped <= plan.flips.keys():
            raise ValueError(f"plan must be of this pipeline's crops {names} and stages, got one of {plan.crops}")
        for index, program in enumerate(self.programs):
            if isinstance(program.crop, (RandomResizedCrop, Resize, ResizedCrop)):  # whose boxes fill them
                size, found = program.crop.size, plan.jobs[:, index, 4:6]
                if (found != size).any():
                    which = f" for crop {program.name!r}" if program.name else ""
                    raise ValueError(f"plan must be of crops of {size}, got {tuple(found[0].tolist())}{which}")
        if len(plan.sample_ids) != count:
            raise ValueError(f"plan must be of {count} images, got one of {len(plan.sample_ids)}")


def _chains(
    place: str, crop_stage: CropStage, names: list[str], stages: Sequence[Any], seed: int
) -> tuple[dict[str, list[tuple[Stage, int]]], dict[str, list[tuple[Stage, int]]]]:
    # The stages of each crop, and of each copy of a single one, with the seed that each falls back on.
    chains: dict[str, list[tuple[Stage, int]]] = {name: [] for name in names}
    copies: dict[str, list[tuple[Stage, int]]] = {}
    for index, stage in enumerate(stages, 1):
        if isinstance(stage, NamedCopies):
            if names != [""] or copies:
                got = "copies of copies" if copies else f"{len(names)} named or listed crops"
                raise ValueError(
                    f"{place}[{index}]: NamedCopies takes the one crop of a stage without names, got {got}"
                )
            copies = {name: [] for name in stage.names}
        elif isinstance(stage, MultiCropPipeline):
            targets = copies or chains
            if not copies and not isinstance(crop_stage, MultiRandomResizedCrop):
                raise ValueError(
                    f"{place}[{index}] names the crops {list(stage.pipelines)}, but those of "
                    f"{type(crop_stage).__name__} have no names: give the stages themselves, for all its crops"
                )
            unknown = [name for name in stage.pipelines if name not in targets]
            if unknown:
                raise ValueError(f"{place}[{index}] names {unknown[0]!r}; allowed are {list(targets)}")
            stage_seed = seed if stage.seed is None else stage.seed
            for name, chain in stage.pipelines.items():
                targets[name] += [(each, stage_seed) for each in chain]
        else:
            single = check_stage(f"{place}[{index}]", stage)
            for chain in (copies or chains).values():
                chain.append((single, seed))
    return chains, copies


def _compiled(
    place: str,
    stages: Sequence[tuple[Stage, int]],
    scope: str,
    name: str,
    size: tuple[int, int],
    *,
    takes: Values | None = None,
) -> Chain:
    try:
        chain = compile_chain(with_keys(stages, scope, name), takes=takes)
        chain.check_size(size)
        return chain
    except (TypeError, ValueError) as error:
        which = f", crop {name!r}" if name else ""
        raise type(error)(f"{place}{which}: {error}") from None


def _flip_names(chain: Chain) -> dict[str, int]:
    # What return_boxes says of a crop's flips in the crop launch: name -> bit.
    kinds = {type(stage) for _, stage in chain.flips}
    both = {"flip": (RandomHorizontalFlip, HORIZONTAL), "vertical_flip": (RandomVerticalFlip, 2)}
    return {name: bit for name, (kind, bit) in both.items() if kind in kinds}


def _flips(label: str, chain: Chain, bits: np.ndarray | None, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        f"{label}_{kind}": to_device((bits & bit) != 0, device)
        for kind, bit in _flip_names(chain).items()
        if bits is not None
    }


def crops_of(stage: CropStage) -> tuple[dict[str, Crop], bool]:
    """Its crops by name (a list's by number, a single one's name is empty), and whether they form a list."""
    if isinstance(stage, MultiRandomResizedCrop):
        return {name: crop for name, crop in stage.crops.items() if isinstance(crop, Crop)}, False
    if isinstance(stage, Crop):
        return {"": stage}, False
    return {str(index): crop for index, crop in enumerate(stage.crops)}, True


def with_keys(stages: Sequence[tuple[Stage, int]], scope: str, name: str) -> list[tuple[Stage, int]]:
    """A crop's stages, each with its key in place of its seed; the second of a kind has a stream of its own."""
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


def as_sample_ids(sample_ids: Any, count: int) -> np.ndarray:
    """A call's sample ids, one for each image: those given, or new ones; ValueError for another number of them."""
    if sample_ids is None:
        return fresh_sample_ids(count)
    if isinstance(sample_ids, torch.Tensor):
        sample_ids = sample_ids.cpu().numpy()
    ids = ids_array(sample_ids)
    if ids.shape != (count,):
        raise ValueError(f"sample_ids must be one whole number for each of the {count} images, got shape {ids.shape}")
    return ids
