"""Supervised training's published recipes: pipelines of one crop, and the batch stages that go with them.

Known deviations of all are in presets.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import checks
from .batch_stage import BatchStage, CutMix, MixUp, RandomBatchChoice
from .crop import CenterCrop, RandomResizedCrop
from .stage import IMAGENET_MEAN, IMAGENET_STD, Normalize
from .stage_auto import TimmRandAugment, TrivialAugmentWide
from .stage_erase import RandomErasing
from .stage_flip import RandomHorizontalFlip

STYLES = ("torchvision", "torchvision_new", "timm")


def supervised_train(
    style: str = "torchvision",
    *,
    size: int | None = None,
    scale: Sequence[float] = (0.08, 1.0),
    interpolation: str | None = None,
    erase: float | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> list[Any]:
    """A training crop, flipped, augmented, normalised and erased.

    style: "torchvision" (size 224, flip alone), "torchvision_new" (176, TrivialAugmentWide, erasing with probability
    0.1) or "timm" (224, bilinear or bicubic at random, rand-m9-mstd0.5-inc1, noise erased with 0.25: as DeiT's). size,
    interpolation, erase (its probability): None for the style's own. Labels are mixed by supervised_batch_stages.

    Source: pytorch/vision references/classification/presets.py, and its README's commands for the new recipe;
    huggingface/pytorch-image-models timm/data/transforms_factory.py, with facebookresearch/deit main.py for the
    numbers that timm leaves open. Deviations: those of all, and of TrivialAugmentWide and TimmRandAugment; DeiT's
    filter is bicubic always (interpolation="bicubic"). Raises ValueError for another style.
    """
    checks.one_of("style", style, STYLES)
    size = {"torchvision_new": 176}.get(style, 224) if size is None else size
    interpolation = {"timm": "random"}.get(style, "bilinear") if interpolation is None else interpolation
    erase = {"torchvision": 0.0, "torchvision_new": 0.1, "timm": 0.25}[style] if erase is None else erase
    stages: list[Any] = [
        RandomResizedCrop(size, scale=scale, interpolation=interpolation, seed=seed),
        RandomHorizontalFlip(seed=seed),
    ]
    if style == "torchvision_new":
        stages.append(TrivialAugmentWide(interpolation="bilinear", seed=seed))
    elif style == "timm":
        red, green, blue = (min(255, round(255 * channel)) / 255 for channel in mean)
        stages.append(TimmRandAugment(magnitude=9, magnitude_std=0.5, fill=(red, green, blue), seed=seed))
    stages.append(Normalize(mean, std, dtype=dtype))
    if erase and style == "timm":
        stages.append(RandomErasing(erase, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random", seed=seed))
    elif erase:
        stages.append(RandomErasing(erase, seed=seed))
    return stages


def supervised_val(
    style: str = "torchvision",
    *,
    size: int = 224,
    resize: int | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """The middle of the resized image, normalised: for validation.

    style: "torchvision" (short side to 256), "torchvision_new" (232) or "timm" (size / 0.875, bicubic, as timm takes
    where a model says nothing else). resize, interpolation: None for the style's own.

    Source: as in supervised_train, and timm/data/config.py. Deviations: none. Raises ValueError for another style.
    """
    checks.one_of("style", style, STYLES)
    if resize is None:
        timm = style == "timm"
        resize = int(checks.whole("size", size, 1) / 0.875) if timm else {"torchvision_new": 232}.get(style, 256)
    interpolation = {"timm": "bicubic"}.get(style, "bilinear") if interpolation is None else interpolation
    return [CenterCrop(size, resize=resize, interpolation=interpolation), Normalize(mean, std, dtype=dtype)]


def supervised_batch_stages(
    style: str = "torchvision_new", num_classes: int = 1000, label: str = "label", *, seed: int | None = None
) -> list[BatchStage]:
    """What the recipe does to finished batches, for SlipstreamLoader's batch_stages: mixup or cutmix, at even odds.

    style: "torchvision" (nothing), "torchvision_new" (alpha 0.2 and 1.0) or "timm" (0.8 and 1.0: DeiT's).

    Source: pytorch/vision references/classification/transforms.py; facebookresearch/deit main.py with timm/data/
    mixup.py. Deviations: number, box and choice are each sample's, where the official code draws them for a batch;
    timm's partner is the sample as far from the batch's end; label smoothing is left to the loss, which takes mixed
    labels: CrossEntropyLoss(label_smoothing=0.1). Raises ValueError for another style.
    """
    alphas = {"torchvision": (), "torchvision_new": (0.2, 1.0), "timm": (0.8, 1.0)}[
        checks.one_of("style", style, STYLES)
    ]
    if not alphas:
        return []
    mixup, cutmix = alphas
    return [RandomBatchChoice([MixUp(num_classes, mixup, label), CutMix(num_classes, cutmix, label)], seed=seed)]
