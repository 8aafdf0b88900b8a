"""The published recipes of global and local crops, which presets.py names.

Known deviations of all are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import checks
from .crop import MultiRandomResizedCrop, RandomResizedCrop
from .draws import stream_key
from .stage import IMAGENET_MEAN, IMAGENET_STD, MultiCropPipeline, Normalize, check_stages
from .stage_blur import GaussianBlur, PILGaussianBlur
from .stage_color import ColorJitter, RandomGrayscale, RandomSolarize
from .stage_flip import RandomHorizontalFlip

Range = Sequence[float]
Stages = list[Any]
BLURS = ("as_written", "as_trained")
SWAV_STD = (0.228, 0.224, 0.225)


def swav(
    *,
    size: int = 224,
    local_size: int = 96,
    local_crops: int = 6,
    scale: Range = (0.14, 1.0),
    local_scale: Range = (0.05, 0.14),
    mean: Range = IMAGENET_MEAN,
    std: Range = SWAV_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """SwAV's two large and six small crops, all with the same stages; its std's first number is 0.228.

    Source: facebookresearch/swav src/multicropdataset.py, sizes and scales from its README and scripts (main_swav.py's
    own default is two large crops). Deviations: those of all.
    """
    stages = [
        RandomHorizontalFlip(),
        ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        RandomGrayscale(0.2),
        PILGaussianBlur((0.1, 2.0), p=0.5),
        Normalize(mean, std, dtype=dtype),
    ]
    large, small = RandomResizedCrop(size, scale=scale), RandomResizedCrop(local_size, scale=local_scale)
    return named(_views((large, small), (stages, stages, stages), 2, local_crops), seed)


def dino(
    *,
    size: int = 224,
    local_size: int = 96,
    local_crops: int = 8,
    scale: Range = (0.4, 1.0),
    local_scale: Range = (0.05, 0.4),
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """DINO's two global and eight local crops; its ResNet-50 has scale=(0.14, 1.0) and local_scale=(0.05, 0.14).

    Source: facebookresearch/dino main_dino.py and utils.py. Deviations: those of all.
    """
    crops = _bicubic(size, scale, local_size, local_scale)
    stages = dino_stages(pil_blur, (1.0, 0.1, 0.5), Normalize(mean, std, dtype=dtype))
    return named(_views(crops, stages, 2, local_crops), seed)


def ibot(
    *,
    size: int = 224,
    local_size: int = 96,
    global_crops: int = 2,
    local_crops: int = 10,
    scale: Range = (0.25, 1.0),
    local_scale: Range = (0.05, 0.25),
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """iBOT's two global and ten local crops, with DINO's stages; every global crop after the first is like the second.

    Source: bytedance/ibot main_ibot.py, numbers of crops and scales from the runs in its README (the code's own default
    is no local crops and a scale of 0.14 to 1). Deviations: those of all; the masks are the model's business.
    """
    crops = _bicubic(size, scale, local_size, local_scale)
    stages = dino_stages(pil_blur, (1.0, 0.1, 0.5), Normalize(mean, std, dtype=dtype))
    return named(_views(crops, stages, global_crops, local_crops), seed)


def dinov2(
    *,
    blur: str = "as_written",
    size: int = 224,
    local_size: int = 96,
    local_crops: int = 8,
    scale: Range = (0.32, 1.0),
    local_scale: Range = (0.05, 0.32),
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """DINOv2's two global and eight local crops; local_size=98 for patches of 14.

    blur: "as_written" blurs with probability 1.0, 0.1 and 0.5 (global_0, global_1, local), as the code reads;
    "as_trained" with 0, 0.9 and 0.5, as it ran: its GaussianBlur hands 1 - p to RandomApply, which takes p. Source:
    facebookresearch/dinov2 dinov2/data/augmentations.py, transforms.py and configs/. Deviations: those of all; the
    masks are the model's business.
    """
    crops = _bicubic(size, scale, local_size, local_scale)
    stages = dino_stages(_blur_of_9, _inverted(blur), Normalize(mean, std, dtype=dtype))
    return named(_views(crops, stages, 2, local_crops), seed)


def dinov3(
    *,
    blur: str = "as_written",
    size: int = 224,
    local_size: int = 96,
    local_crops: int = 8,
    scale: Range = (0.32, 1.0),
    local_scale: Range = (0.05, 0.32),
    horizontal_flips: bool = True,
    share_color_jitter: bool = False,
    subset_of_globals: bool = False,
    gram_size: int | None = None,
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """DINOv3's two global and eight local crops; the 7B: size=256, local_size=112, horizontal_flips=False.

    blur: as in dinov2. share_color_jitter: all crops get one jitter and one choice of grey. subset_of_globals: the
    first half of the local crops is cut from global_0, the rest from global_1, at their scale. gram_size: adds gram_0
    and gram_1, the boxes and flips of the globals at that size (512 for the 7B's Gram anchoring), normalised only.
    What crops share is drawn from `seed`, from 0 without one, and not from the loader's. Source:
    facebookresearch/dinov3 dinov3/data/augmentations.py, transforms.py and configs/. Deviations: those of all; shared
    jitter is done on each crop, with its own mean for contrast, not on the image; local crops from globals are squares
    of the source with flips of their own, off the grid of patches, and blurred after they are cut; with Gram crops the
    globals are resized once, not to gram_size first, and their distortions are not shared.
    """
    crops = _bicubic(size, scale, local_size, local_scale)
    jitter_seed = _shared(seed, "jitter") if share_color_jitter else None
    flip = [RandomHorizontalFlip()] if checks.flag("horizontal_flips", horizontal_flips) else []
    normalize = Normalize(mean, std, dtype=dtype)
    stages = dino_stages(_blur_of_9, _inverted(blur), normalize, flip=flip, jitter_seed=jitter_seed)
    views = _views(crops, stages, 2, local_crops)
    if checks.flag("subset_of_globals", subset_of_globals):
        if checks.whole("local_size", local_size, 1) > checks.whole("size", size, 1):
            raise ValueError(f"local_size must be at most size ({size}) with subset_of_globals, got {local_size}")
        share = (local_size / size) ** 2
        for index in range(local_crops):
            parent = f"global_{int(index >= local_crops // 2)}"
            crop = RandomResizedCrop(
                local_size, scale=(share, share), ratio=(1.0, 1.0), interpolation="bicubic", subset_of=parent
            )
            views[f"local_{index}"] = (crop, stages[2])
    if gram_size is not None:
        for index in range(2):
            name, own = f"global_{index}", _shared(seed, f"global_{index}")
            yoked = [RandomHorizontalFlip(seed=own)] if flip else []
            boxes = [
                RandomResizedCrop(side, scale=scale, interpolation="bicubic", seed=own) for side in (size, gram_size)
            ]
            views[name] = (boxes[0], [*yoked, *stages[index][len(flip) :]])
            views[f"gram_{index}"] = (boxes[1], [*yoked, normalize])
    return named(views, seed)


def lejepa(
    *,
    size: int = 224,
    local_size: int = 98,
    local_crops: int = 6,
    scale: Range = (0.3, 1.0),
    local_scale: Range = (0.05, 0.3),
    kernel_size: int = 23,
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """LeJEPA's two global and six local crops, all with the same stages.

    Source: rbalestr-lab/lejepa README.md, which gives neither filter nor kernel: bilinear, and 23 with sigma 0.1 to 2
    as in stable-pretraining benchmarks/imagenet10/lejepa-vit-small.py (lejepa's MINIMAL.md, another recipe, has 7).
    Deviations: those of all.
    """
    stages = [
        RandomHorizontalFlip(),
        ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        RandomGrayscale(0.2),
        GaussianBlur(kernel_size, (0.1, 2.0), p=0.5),
        RandomSolarize(128, 0.2),
        Normalize(mean, std, dtype=dtype),
    ]
    large, small = RandomResizedCrop(size, scale=scale), RandomResizedCrop(local_size, scale=local_scale)
    return named(_views((large, small), (stages, stages, stages), 2, local_crops), seed)


def multicrop(
    *,
    global_crops: int = 2,
    local_crops: int = 8,
    size: int = 224,
    local_size: int = 96,
    scale: Range = (0.4, 1.0),
    local_scale: Range = (0.05, 0.4),
    stages: Sequence[Any] | None = None,
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """Global and local crops with the same stages, then Normalize: a frame for a recipe of one's own.

    stages: None for a flip alone. Not a published recipe: sizes, scales and filter are DINO's.
    """
    own = [RandomHorizontalFlip()] if stages is None else check_stages("stages", stages)
    chain = [*own, Normalize(mean, std, dtype=dtype)]
    crops = _bicubic(size, scale, local_size, local_scale)
    return named(_views(crops, (chain, chain, chain), global_crops, local_crops), seed)


def named(views: Mapping[str, tuple[RandomResizedCrop, Stages]], seed: int | None) -> Stages:
    """The pipeline of these crops by name, each with its stages."""
    crops = {name: crop for name, (crop, _) in views.items()}
    return [
        MultiRandomResizedCrop(crops, seed=seed),
        MultiCropPipeline({name: stages for name, (_, stages) in views.items()}, seed=seed),
    ]


def _views(
    crops: tuple[RandomResizedCrop, RandomResizedCrop],
    stages: tuple[Stages, Stages, Stages],
    global_crops: int,
    local_crops: int,
) -> dict[str, tuple[RandomResizedCrop, Stages]]:
    # crops: global, local. stages: of the first global crop, of the other global crops, of the local ones.
    counts = checks.whole("global_crops", global_crops, 1), checks.whole("local_crops", local_crops, 0)
    views = {f"global_{index}": (crops[0], stages[min(index, 1)]) for index in range(counts[0])}
    return views | {f"local_{index}": (crops[1], stages[2]) for index in range(counts[1])}


def _bicubic(
    size: int, scale: Range, local_size: int, local_scale: Range
) -> tuple[RandomResizedCrop, RandomResizedCrop]:
    return (
        RandomResizedCrop(size, scale=scale, interpolation="bicubic"),
        RandomResizedCrop(local_size, scale=local_scale, interpolation="bicubic"),
    )


def dino_stages(
    blur: Callable[[float], Any],
    ps: tuple[float, float, float],
    normalize: Normalize,
    *,
    flip: Stages | None = None,
    jitter_seed: int | None = None,
) -> tuple[Stages, Stages, Stages]:
    """What DINO, iBOT, DINOv2, DINOv3 and VICReg share: stages of the first global crop, the second, the local ones.

    blur: makes the blur of a probability; ps: that of each of the three, 0 for no blur. flip: None for an ordinary one.
    """
    colour = [
        *([RandomHorizontalFlip()] if flip is None else flip),
        ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8, seed=jitter_seed),
        RandomGrayscale(0.2, seed=jitter_seed),
    ]
    first, second, local = ([*colour, *([blur(p)] if p else [])] for p in ps)
    return [*first, normalize], [*second, RandomSolarize(128, 0.2), normalize], [*local, normalize]


def pil_blur(p: float) -> PILGaussianBlur:
    """DINO's blur, with this probability."""
    return PILGaussianBlur((0.1, 2.0), p=p)


def _blur_of_9(p: float) -> GaussianBlur:
    return GaussianBlur(9, (0.1, 2.0), p=p)


def _inverted(blur: str) -> tuple[float, float, float]:
    # The probabilities of DINOv2's and DINOv3's blur: first global crop, second, local.
    return {"as_written": (1.0, 0.1, 0.5), "as_trained": (0.0, 0.9, 0.5)}[checks.one_of("blur", blur, BLURS)]


def _shared(seed: int | None, name: str) -> int:
    # A seed for what several crops share; hashed, so that it is nothing else's.
    return stream_key(seed or 0, name)
