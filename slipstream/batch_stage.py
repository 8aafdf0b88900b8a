"""Batch stages: mixup and cutmix, which pair each sample of a finished batch with the one before it.

The mixing number is drawn for each sample from its key; the partner depends on the batch, the one named exception to
batch independence. A stage's parameters are a dict of arrays: `lam` float32 [B], the sample's own share in its label;
`blend` float32 [B], its own share in every pixel (no blend: 1); `box` int32 [B, C, 4] (top, left, height, width), what
is pasted from the partner into each of the C crops (no box: nothing).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from . import checks
from .device import to_device
from .distributions import symmetric_beta
from .draws import Draws, fresh_sample_ids, stream_key

Params = dict[str, np.ndarray]
Sizes = Sequence[tuple[int, int]]


class BatchStage(ABC):
    """A stage on a finished batch: subclasses are frozen dataclasses that draw `lam`, `blend` and `box`."""

    __slots__ = ()
    num_classes: int
    label: str
    crops: Sequence[str] | None
    seed: int | None

    @abstractmethod
    def sample_params(self, draws: Draws, sizes: Sizes) -> Params:
        """Its parameters for each sample; sizes: (h, w) of each crop tensor that is mixed, as `sizes(batch)` gives."""

    def sizes(self, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(h, w) of each crop tensor of the batch that is mixed, in the order of `crops`, else of the batch."""
        return [(crop.shape[2], crop.shape[3]) for _, _, crop in self._crop_tensors(batch)]

    def apply(self, batch: Mapping[str, Any], params: Params) -> dict[str, Any]:
        """The batch with its crops mixed and its labels as float32 [B, num_classes], on the crops' device.

        The given batch is left as it is. A label on the host is checked there; one on a GPU is not, since that would
        wait for it. Raises ValueError or TypeError that names the field, and what it holds.
        """
        result = dict(batch)
        found = list(self._crop_tensors(batch))
        count, device = len(found[0][2]), found[0][2].device
        if any(len(array) != count for array in params.values()):
            raise ValueError(f"params must be of the batch's {count} samples, got {len(params['lam'])}")
        own = {name: to_device(array, device) for name, array in params.items()}
        for number, (name, place, crop) in enumerate(found):
            box = own["box"][:, number] if "box" in own else None
            mixed = _mix_images(crop, own.get("blend"), box)
            if place is None:
                result[name] = mixed
            else:
                result[name] = [*result[name][:place], mixed, *result[name][place + 1 :]]
        result[self.label] = _mix_rows(self._targets(batch, count, device), own["lam"])
        return result

    def __call__(self, batch: Mapping[str, Any], *, sample_ids: Any = None, epoch: int = 0) -> dict[str, Any]:
        """The mixed batch; with sample_ids (whole numbers [B]) pure in (seed, sample ids, epoch) and the pixels."""
        sizes = self.sizes(batch)
        if sample_ids is None:
            sample_ids = fresh_sample_ids(len(next(self._crop_tensors(batch))[2]))
        elif isinstance(sample_ids, torch.Tensor):
            sample_ids = sample_ids.cpu().numpy()
        key = batch_stage_keys([self], 0)[0]
        return self.apply(batch, self.sample_params(Draws(key, sample_ids, epoch), sizes))

    def _crop_tensors(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, int | None, torch.Tensor]]:
        # name, place in its list (None: no list) and pixels of each crop that is mixed
        kind, count = type(self).__name__, None
        names = [name for name, value in batch.items() if _is_crop(value)] if self.crops is None else self.crops
        if not names:
            raise ValueError(f"{kind} found no crop [B, 3, h, w] in the batch, which has {list(batch)}")
        for name in names:
            if not _is_crop(batch.get(name)):
                allowed = [each for each, value in batch.items() if _is_crop(value)]
                raise ValueError(f"{kind}: crops names {name!r}, the crops [B, 3, h, w] of the batch are {allowed}")
            in_list = isinstance(batch[name], list)
            for place, crop in enumerate(batch[name] if in_list else [batch[name]]):
                if not crop.is_floating_point():
                    raise TypeError(_not_floats(self, name, crop.dtype))
                if count is not None and len(crop) != count:
                    raise ValueError(f"{kind}: the crops must be of the same samples, got {count} and {len(crop)}")
                count = len(crop)
                yield name, place if in_list else None, crop

    def _targets(self, batch: Mapping[str, Any], count: int, device: torch.device) -> torch.Tensor:
        # The label as float32 [B, num_classes] on the device: one-hot, or as it is after another batch stage.
        label, classes = batch.get(self.label), self.num_classes
        if count == 0 and self.label in batch:  # all samples left out: a list, where the field does not tell its kind
            return torch.zeros(0, classes, device=device)
        if not isinstance(label, torch.Tensor):
            if self.label not in batch:
                raise ValueError(f"label must name a field of the batch, got {self.label!r} of {list(batch)}")
            got = type(label).__name__
            raise TypeError(f"label {self.label!r} must be int64 [B] or float [B, {classes}], got a {got}")
        soft = label.is_floating_point() and label.ndim == 2
        if tuple(label.shape) != ((count, classes) if soft else (count,)):
            expected = [count, classes] if soft else [count]
            raise ValueError(f"label {self.label!r} must have shape {expected}, got {list(label.shape)}")
        if soft:
            return label.to(device, torch.float32, non_blocking=True)
        if label.dtype != torch.int64:
            raise TypeError(f"label {self.label!r} must be int64 [B] or float [B, {classes}], got {label.dtype}")
        if label.device.type == "cpu":
            check_labels(self.label, label.numpy(), classes)
            label = to_device(label.numpy(), device)
        # not one_hot, which waits for the GPU to check the values
        return torch.zeros(count, classes, device=device).scatter_(1, label[:, None], 1.0)


@dataclass(frozen=True, slots=True)
class MixUp(BatchStage):
    """Blend each sample with the one before it: torchvision v2's MixUp, the mixing number drawn for each sample.

    num_classes: labels are whole numbers below it. alpha: the sample's own share is drawn from Beta(alpha, alpha).
    label: the field of the labels, int64 [B] -> float32 [B, num_classes] (float [B, num_classes] is taken too).
    crops: names of what is mixed, None for every [B, 3, h, w] tensor of the batch and lists of them; all crops of a
    sample get the same number. p: the share of samples mixed. seed: its own instead of the loader's.

    The first sample's partner is the last one (torch.roll), so a batch of one is mixed with itself. Pixels must be
    float and keep their dtype and memory format; they are mixed in float32 and rounded once. Raises ValueError or
    TypeError for a parameter outside these ranges; at the batch, for uint8 pixels and for a label outside
    [0, num_classes). Source: torchvision v2's MixUp; Zhang et al. 2018.
    """

    num_classes: int = 1000
    alpha: float = 0.2
    label: str = "label"
    _: KW_ONLY
    crops: Sequence[str] | None = None
    p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_mixing(self)

    def sample_params(self, draws: Draws, sizes: Sizes) -> Params:
        """Block 0: applied (word 0); block 1: the number."""
        lam = np.where(draws.uniform(0)[:, 0, 0] < self.p, symmetric_beta(draws.words(1)[:, 0], self.alpha), 1.0)
        lam = lam.astype(np.float32)
        return {"lam": lam, "blend": lam}


@dataclass(frozen=True, slots=True)
class CutMix(BatchStage):
    """Paste a box of the sample before into each one: torchvision v2's CutMix, the box drawn for each sample.

    alpha: 1 minus the box's share of the area is drawn from Beta(alpha, alpha), before the box is cut at the edges.
    The centre and sides are drawn once, as fractions of the image, and scaled to each crop's size; the label's share is
    that of the pixels pasted in the end, with crops of unlike sizes their mean share. The others, dtypes, the partner
    and errors as in MixUp. Source: torchvision v2's CutMix; Yun et al. 2019.
    """

    num_classes: int = 1000
    alpha: float = 1.0
    label: str = "label"
    _: KW_ONLY
    crops: Sequence[str] | None = None
    p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_mixing(self)

    def sample_params(self, draws: Draws, sizes: Sizes) -> Params:
        """Block 0: applied (word 0), the box's centre (words 1 and 2: left, top); block 1: the number."""
        words = draws.words(0)[:, 0]
        applied = words[:, 0] * 2.0**-32 < self.p
        lam = symmetric_beta(draws.words(1)[:, 0], self.alpha).astype(np.float32)  # float32, as torchvision draws it
        half = 0.5 * np.sqrt(1.0 - lam.astype(np.float64))
        box = np.zeros((len(draws), len(sizes), 4), np.int32)
        shares = np.zeros((len(draws), len(sizes)))
        for index, (h, w) in enumerate(sizes):
            left, right = _edges(words[:, 1], half, w)
            top, bottom = _edges(words[:, 2], half, h)
            box[:, index] = np.stack([top, left, bottom - top, right - left], axis=1)
            shares[:, index] = (bottom - top) * (right - left) / (w * h)
        box[~applied] = 0
        lam = np.where(applied, 1.0 - shares.mean(1), 1.0).astype(np.float32)
        return {"lam": lam, "box": box}


@dataclass(frozen=True, slots=True)
class RandomBatchChoice(BatchStage):
    """One of several MixUp and CutMix, picked for each sample: torchvision's RandomChoice, there picked for a batch.

    stages: they must agree in num_classes, label and crops. p: their weights, None for equal ones. seed: its own
    instead of the loader's, for the pick and for stages that have none. Raises ValueError or TypeError.
    """

    stages: Sequence[MixUp | CutMix]
    p: Sequence[float] | None = None
    _: KW_ONLY
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stages, Sequence) or not self.stages:
            raise TypeError(f"stages must be a list of MixUp and CutMix, got {checks.brief(self.stages)}")
        stages = tuple(self.stages)
        for index, stage in enumerate(stages):
            if not isinstance(stage, (MixUp, CutMix)):
                raise TypeError(f"stages[{index}] must be a MixUp or a CutMix, got {checks.brief(stage)}")
            for field in ("num_classes", "label", "crops"):
                mine, first = getattr(stage, field), getattr(stages[0], field)
                if mine != first:
                    raise ValueError(f"stages must agree in {field}, got {first!r} and {mine!r}")
        p = self.p
        if p is not None:
            p = tuple(checks.numbers("p", p, len(stages), f"{len(stages)} weights, one a stage"))
            if min(p) < 0 or not 0 < sum(p) < math.inf:
                raise ValueError(f"p must be weights of 0 or more, not all 0, got {self.p!r}")
        checks.settle(self, stages=stages, p=p, seed=checks.seed("seed", self.seed))

    @property
    def num_classes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the stages."""
        return self.stages[0].num_classes

    @property
    def label(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the stages."""
        return self.stages[0].label

    @property
    def crops(self) -> Sequence[str] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the stages."""
        return self.stages[0].crops

    def sample_params(self, draws: Draws, sizes: Sizes) -> Params:
        """Word 0 of block 0 picks; each stage has a stream of its own."""
        ends = list(accumulate(self.p or [1.0] * len(self.stages)))
        # below the sum of all, whatever the rounding; weights of 0 are empty intervals
        picked = np.searchsorted(np.array(ends[:-1]), draws.uniform(0)[:, 0, 0] * ends[-1], side="right")
        count = len(draws)
        result = {
            "lam": np.ones(count, np.float32),
            "blend": np.ones(count, np.float32),
            "box": np.zeros((count, len(sizes), 4), np.int32),
        }
        for index, (stage, key) in enumerate(zip(self.stages, batch_stage_keys(self.stages, draws.key), strict=True)):
            rows = picked == index
            for name, values in stage.sample_params(Draws(key, draws.sample_ids, draws.epoch), sizes).items():
                result[name][rows] = values[rows]
        return result


def batch_stage_keys(stages: Sequence[BatchStage], seed: int) -> list[int]:
    """The key of each stage: of its own seed and kind, else of this seed, its kind and which of the kind it is."""
    seen: dict[str, int] = {}
    keys = []
    for stage in stages:
        kind = type(stage).__name__
        occurrence = seen.setdefault(kind, 0)
        seen[kind] += 1
        if stage.seed is not None:
            keys.append(stream_key(stage.seed, kind))
        else:
            keys.append(stream_key(seed, f"batch\x1f{kind}\x1f{occurrence}"))
    return keys


def apply_batch_stages(
    stages: Sequence[BatchStage], keys: Sequence[int], batch: Mapping[str, Any], sample_ids: Any, epoch: int
) -> tuple[dict[str, Any], list[Params]]:
    """The stages in order on a finished batch: a pure function of its arguments, which waits for no device.

    keys: from `batch_stage_keys`. batch: crops on one device, labels as in MixUp (on the host where they are to be
    checked). sample_ids: whole numbers [B]. Gives a new dict, and what each stage drew; no tensor of the batch is
    changed.
    """
    result, drawn = dict(batch), []
    for stage, key in zip(stages, keys, strict=True):
        drawn.append(stage.sample_params(Draws(key, sample_ids, epoch), stage.sizes(result)))
        result = stage.apply(result, drawn[-1])
    return result, drawn


def _not_floats(stage: BatchStage, name: str, dtype: torch.dtype) -> str:
    return (
        f"{type(stage).__name__} mixes float images, got {dtype} for {name!r}: put Normalize or "
        f"ToDtype(torch.float32, scale=True) at the end of its pipeline, or name the others in crops="
    )


def check_batch_stages(field: str, stages: Any) -> tuple[BatchStage, ...]:
    """A loader's batch stages as a tuple; TypeError that names the field and the place of what is none."""
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise TypeError(f"{field} must be a list of MixUp, CutMix and RandomBatchChoice, got {checks.brief(stages)}")
    for index, stage in enumerate(stages):
        if not isinstance(stage, BatchStage):
            raise TypeError(f"{field}[{index}] must be a MixUp, CutMix or RandomBatchChoice, got {checks.brief(stage)}")
    return tuple(stages)


def check_mixing(
    stages: Any, crops: Mapping[str, torch.dtype | None], fields: Collection[str]
) -> tuple[BatchStage, ...]:
    """A loader's batch stages as a tuple. ValueError for a label or a crop that its batches do not have, TypeError for
    a crop whose dtype is known and not a float's."""
    checked = check_batch_stages("batch_stages", stages)
    for index, stage in enumerate(checked):
        place = f"batch_stages[{index}]"
        if stage.label not in fields:
            raise ValueError(f"{place}.label must be a field that is read, one of {list(fields)}, got {stage.label!r}")
        for name in crops if stage.crops is None else stage.crops:
            if name not in crops:
                raise ValueError(f"{place}.crops names {name!r}, the crops are {list(crops)}")
            dtype = crops[name]
            if dtype is not None and not dtype.is_floating_point:
                raise TypeError(f"{place}: {_not_floats(stage, name, dtype)}")
    return checked


def check_labels(field: str, labels: np.ndarray, num_classes: int) -> None:
    """ValueError that names the first label, of whole numbers [B], that is outside [0, num_classes)."""
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"{field} must be in [0, {num_classes}), got {labels[index]} at batch index {index}")


def describe_batch_params(params: Params, index: int) -> str:
    """What these parameters do to sample `index` of the batch, in words."""
    words = []
    if "blend" in params and params["blend"][index] < 1:
        words.append(f"blended with the sample before, {params['blend'][index]:.4g} its own")
    if "box" in params and params["box"][index].any():
        top, left, height, width = params["box"][index, 0].tolist()
        words.append(f"box {height} x {width} at ({top}, {left}) from the sample before")
    return ", ".join([*words, f"label {params['lam'][index]:.4g} its own"]) if words else "not mixed"


def _check_mixing(stage: MixUp | CutMix) -> None:
    alpha = checks.number("alpha", stage.alpha)
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {stage.alpha!r}")
    if not isinstance(stage.label, str) or not stage.label:
        raise TypeError(f"label must be the name of a field, got {stage.label!r}")
    crops = stage.crops
    if crops is not None:
        if not isinstance(crops, Sequence) or isinstance(crops, str) or not all(isinstance(c, str) for c in crops):
            raise TypeError(f"crops must be a list of crop names or None, got {crops!r}")
        if not crops or len(set(crops)) < len(crops):
            raise ValueError(f"crops must name at least one crop, and each once, got {crops!r}")
        crops = tuple(crops)
    checks.settle(
        stage,
        num_classes=checks.whole("num_classes", stage.num_classes, 1),
        alpha=alpha,
        crops=crops,
        p=checks.probability("p", stage.p),
        seed=checks.seed("seed", stage.seed),
    )


def _is_crop(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, torch.Tensor) and _is_crop(each) for each in value)
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == 3


def _mix_rows(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    # own * values[i] + (1 - own) * values[i - 1]: products and a sum, not one fused step that another device lacks
    own = own.view(-1, *[1] * (values.ndim - 1))
    mixed = values * own  # float32 at least, in the values' memory format
    return mixed.add_(values.roll(1, 0) * (1 - own)).to(values.dtype)


def _mix_images(images: torch.Tensor, blend: torch.Tensor | None, box: torch.Tensor | None) -> torch.Tensor:
    mixed = images if blend is None else _mix_rows(images, blend)
    if box is None:
        return mixed
    top, left, height, width = box.view(-1, 4, 1, 1, 1).unbind(1)
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((y >= top) & (y < top + height)).transpose(2, 3) & (x >= left) & (x < left + width)
    return torch.where(inside, images.roll(1, 0), mixed)


def _edges(words: np.ndarray, half: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    # A centre uniform on the whole pixels, and whole pixels to both sides of it, cut at the edges.
    centre = (words.astype(np.uint64) * np.uint64(side) >> np.uint64(32)).astype(np.int64)
    reach = (half * side).astype(np.int64)
    return np.maximum(centre - reach, 0), np.minimum(centre + reach, side)
