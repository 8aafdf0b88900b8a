"""Published recipes as plain functions that return pipelines: `pipelines={"image": presets.dino()}`. Data only.

Those of several crops give a dict of named crops (`global_0`, `global_1`, `local_0`, ..., or `view_0`, `view_1`), the
others one tensor under the field's name, [B, 3, size, size] each. What most have in common: size, local_size: of the
large and the small crops, pixels. scale, local_scale: what their boxes take of the image's area, (low, high) in (0, 1].
global_crops, local_crops: how many. mean, std: of Normalize. dtype: of the pixels, None for float32, or float16 or
bfloat16. seed: in place of the loader's. Raises ValueError or TypeError that names the argument when called.

They are lists of frozen specs, to be changed as such: `stages[0]` is the crop stage
(`dataclasses.replace(stages[0], return_boxes=True)`), `stages[1].pipelines["global_0"]` a crop's stages.

Known deviations of all: official code on Pillow images rounds to bytes after every step, here a crop's bytes become
float32 and are rounded once, at the end; colours follow torchvision's float functionals.
"""

from __future__ import annotations

import torch

from . import checks
from .crop import RandomResizedCrop
from .presets_multicrop import Range, Stages, dino_stages, named, pil_blur
from .presets_multicrop import dino as dino
from .presets_multicrop import dinov2 as dinov2
from .presets_multicrop import dinov3 as dinov3
from .presets_multicrop import ibot as ibot
from .presets_multicrop import lejepa as lejepa
from .presets_multicrop import multicrop as multicrop
from .presets_multicrop import swav as swav
from .presets_supervised import supervised_batch_stages as supervised_batch_stages
from .presets_supervised import supervised_train as supervised_train
from .presets_supervised import supervised_val as supervised_val
from .stage import IMAGENET_MEAN, IMAGENET_STD, Normalize, ToDtype
from .stage_blur import GaussianBlur, PILGaussianBlur
from .stage_color import ColorJitter, RandomGrayscale, RandomSolarize
from .stage_flip import RandomHorizontalFlip


def simclr(
    *,
    size: int = 224,
    scale: Range = (0.08, 1.0),
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """SimCLR's two views, alike; strength multiplies the jitter's 0.8, 0.8, 0.8, 0.2.

    Values stay in [0, 1]: the official code has no mean and std. Source: google-research/simclr data_util.py (and
    tf2/data_util.py, whose resize is followed: half-pixel centres). Deviations: contrast about the mean grey and
    saturation towards grey, where TensorFlow takes each channel's mean and HSV; the blur is reflected at the borders,
    where TensorFlow pads zeros; TensorFlow's law of boxes allows 100 tries, and its crops are not rounded to bytes.
    """
    amounts = 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength
    crop = RandomResizedCrop(size, scale=scale, interpolation="bicubic", antialias=False)
    stages = [
        RandomHorizontalFlip(),
        ColorJitter(*amounts, p=0.8),
        RandomGrayscale(0.2),
        GaussianBlur(_tenth(size), (0.1, 2.0), p=0.5),
        ToDtype(dtype or torch.float32, scale=True),
    ]
    return named(dict.fromkeys(("view_0", "view_1"), (crop, stages)), seed)


def byol(
    *,
    size: int = 224,
    scale: Range = (0.08, 1.0),
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """BYOL's two views: brightness is added, view_0 always blurred, view_1 seldom and solarized at 0.5.

    Source: deepmind-research byol/utils/augmentations.py, and byol/utils/dataset.py for the crop (TensorFlow's bicubic,
    not antialiased). Deviations: contrast, saturation, the blur's borders and bytes as in simclr; the official box is
    one try, cut to the image.
    """
    crop = RandomResizedCrop(size, scale=scale, interpolation="bicubic", antialias=False)
    colour = [
        RandomHorizontalFlip(),
        ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8, additive_brightness=True),
        RandomGrayscale(0.2),
    ]
    often, seldom = (GaussianBlur(_tenth(size), (0.1, 2.0), p=p) for p in (1.0, 0.1))
    normalize = Normalize(mean, std, dtype=dtype)
    views = {
        "view_0": (crop, [*colour, often, normalize]),
        "view_1": (crop, [*colour, seldom, RandomSolarize(127.5, 0.2), normalize]),
    }
    return named(views, seed)


def mocov3(
    *,
    size: int = 224,
    scale: Range = (0.08, 1.0),
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """MoCo v3's two views, flipped after colour and blur; scale=(0.2, 1.0) for its ResNet-50 (--crop-min=.2).

    Source: facebookresearch/moco-v3 main_moco.py and moco/loader.py. Deviations: those of all.
    """
    crop = RandomResizedCrop(size, scale=scale)
    colour = [ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), RandomGrayscale(0.2)]
    last = [RandomHorizontalFlip(), Normalize(mean, std, dtype=dtype)]
    views = {
        "view_0": (crop, [*colour, PILGaussianBlur((0.1, 2.0), p=1.0), *last]),
        "view_1": (crop, [*colour, PILGaussianBlur((0.1, 2.0), p=0.1), RandomSolarize(128, 0.2), *last]),
    }
    return named(views, seed)


def vicreg(
    *,
    size: int = 224,
    scale: Range = (0.08, 1.0),
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """VICReg's two views; view_0's solarization has p = 0 and is left out.

    Source: facebookresearch/vicreg augmentations.py. Deviations: those of all.
    """
    crop = RandomResizedCrop(size, scale=scale, interpolation="bicubic")
    first, second, _ = dino_stages(pil_blur, (1.0, 0.1, 0.5), Normalize(mean, std, dtype=dtype))
    return named({"view_0": (crop, first), "view_1": (crop, second)}, seed)


def ijepa(
    *,
    size: int = 224,
    scale: Range = (0.3, 1.0),
    mean: Range = IMAGENET_MEAN,
    std: Range = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Stages:
    """I-JEPA's one crop, neither flipped nor coloured.

    Source: facebookresearch/ijepa src/transforms.py, as configs/ switch it. No deviation; the masks are the model's
    business.
    """
    return [RandomResizedCrop(size, scale=scale, seed=seed), Normalize(mean, std, dtype=dtype)]


def _tenth(size: int) -> int:
    # SimCLR's and BYOL's kernel: a tenth of the height, halved to a whole radius.
    return 2 * (checks.size("size", size)[0] // 20) + 1
