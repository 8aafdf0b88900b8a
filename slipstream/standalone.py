"""Stages by themselves, on images or crops that somebody else made: what their `__call__` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from .chain import ANY, Values, compile_chain
from .crop import CropStage, MultiRandomResizedCrop
from .device import resolve_backend, to_device
from .draws import Draws
from .pipeline import Pipeline, as_sample_ids, crops_of, with_keys
from .stage import DTYPES, MultiCropPipeline, PointwiseStage, Stage
from .stage_flip import flip_bits, flip_images
from .stage_own import apply_own, sample_own
from .stage_program import ProgramStage
from .steps import Threads, run_steps


def apply_crops(stage: CropStage, images: Any, sample_ids: Any, epoch: int, boxes: Any = None) -> Any:
    """A crop stage by itself on decoded images: what its `__call__` does."""
    _, in_list = crops_of(stage)
    own_seed = getattr(stage, "seed", None) if isinstance(stage, MultiRandomResizedCrop) or in_list else None
    result = Pipeline(stage, seed=own_seed or 0)(images, sample_ids=sample_ids, epoch=epoch, boxes=boxes)
    return result["image"] if len(result) == 1 and not isinstance(stage, MultiRandomResizedCrop) else result


def apply_stage(stage: Stage, images: torch.Tensor, sample_ids: Any, epoch: int) -> torch.Tensor:
    """A stage that is drawn, by itself on a batch [B, C, h, w]: what its `__call__` does."""
    _check_batch("images", images)
    return _apply_chain([stage], images, as_sample_ids(sample_ids, len(images)), epoch, seed=0, name="")


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
        ids = as_sample_ids(sample_ids, max(counts.values()))
        for name, chain in stage.pipelines.items():
            result[name] = _apply_chain(chain, crops[name], ids, epoch, seed=stage.seed or 0, name=name)
    return result


def _apply_chain(
    stages: Sequence[Stage], images: torch.Tensor, ids: np.ndarray, epoch: int, *, seed: int, name: str
) -> torch.Tensor:
    keyed = with_keys([(stage, seed) for stage in stages], "", name)
    if not any(isinstance(stage, ProgramStage) and not flip_bits(stage) for stage in stages):
        return _one_by_one(keyed, images, ids, epoch)
    if images.requires_grad and torch.is_grad_enabled():
        field = f"crops[{name!r}]" if name else "images"
        raise ValueError(f"{field} must not require gradients, which kernels do not carry: detach() them")
    chain = compile_chain(keyed, takes=_values_of(images))
    if chain.flips:
        images = flip_images(images, to_device(chain.sample_flips(ids, epoch), images.device))
    drawn = chain.sample_steps(ids, epoch, (images.shape[2], images.shape[3]))
    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as pool:
        backend = resolve_backend(None, images.device)
        return run_steps([images], [chain.steps], [drawn], backend, Threads(pool=pool, count=count))[0]


def _one_by_one(keyed: Sequence[tuple[Stage, int]], images: torch.Tensor, ids: np.ndarray, epoch: int) -> torch.Tensor:
    # Stages none of which takes images [B, 3, h, w] alone: any dtype and number of channels.
    for stage, key in keyed:
        if flip_bits(stage):
            bits = compile_chain([(stage, key)], takes=ANY).sample_flips(ids, epoch)
            images = flip_images(images, to_device(bits, images.device))
        elif isinstance(stage, PointwiseStage):
            images = stage.apply(images)
        else:
            images = apply_own(stage, images, sample_own(stage, Draws(key, ids, epoch)))
    return images


def _values_of(images: torch.Tensor) -> Values:
    # float64 is worked on as float32; what no stage takes is named where it is run
    dtype = torch.float32 if images.dtype == torch.float64 else images.dtype
    return Values(dtype=dtype if dtype in DTYPES else None, unit=True)


def _check_batch(field: str, images: Any) -> None:
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"{field} must be a tensor [B, C, h, w], got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"{field} must be [B, C, h, w], got shape {list(images.shape)}")
