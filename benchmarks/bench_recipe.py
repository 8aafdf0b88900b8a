"""Whole recipes on two CPU threads, from decoded pixels to normalised crops: slipstream, and torchvision per sample.

DINO (blur by Pillow) and DINOv2 (blur by a kernel of 9, as written), 2x224 + 8x96 each. torchvision v2 is used as its
users do, one image at a time in each of two threads: on uint8 tensors, and on PIL images, which is the official code's
way (DINO's blur there is Pillow's filter). Random numbers are each library's own and their drawing is in the time.
Checked before it is timed: every crop's shape and dtype, and means, deviations and roughness of all crops of a kind,
which agree within chance.

On two cores of an AMD EPYC (Zen 4), 2026-11-23, b70fe32, milliseconds an image: DINO 1.38, torchvision on PIL 22.7;
DINOv2 1.96, torchvision 18.7 on tensors and on PIL. Every sample is in results/recipe-cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import photographs
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, v2

from slipstream import Pipeline, presets
from slipstream.stage import IMAGENET_MEAN, IMAGENET_STD

IMAGES = 32
THREADS = 2
CROPS = ["global_0", "global_1", *(f"local_{index}" for index in range(8))]
# of each kind of crop: size, scale, blur's probability, solarize's
DINO = {
    "global_0": (224, (0.4, 1.0), 1.0, 0.0),
    "global_1": (224, (0.4, 1.0), 0.1, 0.2),
    "local": (96, (0.05, 0.4), 0.5, 0.0),
}
DINOV2 = {
    "global_0": (224, (0.32, 1.0), 1.0, 0.0),
    "global_1": (224, (0.32, 1.0), 0.1, 0.2),
    "local": (96, (0.05, 0.32), 0.5, 0.0),
}
Run = Callable[[], dict[str, torch.Tensor]]


class PillowBlur(torch.nn.Module):
    """DINO's own blur: Pillow's filter, its radius drawn uniformly."""

    def forward(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(()).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(radius=radius))


def transforms(recipe: dict[str, Any], blur: torch.nn.Module, *, pillow: bool) -> dict[str, v2.Compose]:
    """torchvision's transforms for each kind of crop."""
    made = {}
    for name, (size, scale, blur_p, solarize_p) in recipe.items():
        made[name] = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([blur], blur_p),
                *([v2.RandomSolarize(128, solarize_p)] if solarize_p else []),
                *([v2.PILToTensor()] if pillow else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([*IMAGENET_MEAN], [*IMAGENET_STD]),
            ]
        )
    return made


def with_torchvision(images: Sequence[Any], made: dict[str, v2.Compose], pool: ThreadPoolExecutor) -> Run:
    """Each image through all its crops on one thread of the pool."""

    def crops(image: Any) -> list[torch.Tensor]:
        return [made[name if name in made else "local"](image) for name in CROPS]

    def run() -> dict[str, torch.Tensor]:
        rows = list(pool.map(crops, images))
        return {name: torch.stack([row[index] for row in rows]) for index, name in enumerate(CROPS)}

    return run


def with_slipstream(images: Sequence[torch.Tensor], stages: list[Any]) -> Run:
    """The preset, with new draws at each call."""
    pipeline = Pipeline(stages)
    return lambda: pipeline(images)


PROVIDERS = {
    "DINO": ("slipstream", "torchvision on PIL"),
    "DINOv2": ("slipstream", "torchvision on tensors", "torchvision on PIL"),
}


def prepare(recipe: str, provider: str, arrays: Sequence[np.ndarray], pool: ThreadPoolExecutor) -> Run:
    """What is timed."""
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    if provider == "slipstream":
        return with_slipstream(tensors, presets.dino() if recipe == "DINO" else presets.dinov2(blur="as_written"))
    pillow = provider.endswith("PIL")
    blur = PillowBlur() if recipe == "DINO" else v2.GaussianBlur(9, (0.1, 2.0))
    made = transforms(DINO if recipe == "DINO" else DINOV2, blur, pillow=pillow)
    return with_torchvision([Image.fromarray(array) for array in arrays] if pillow else tensors, made, pool)


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    with photographs.in_memory(None) as folder:
        found = photographs.paths(folder)
        return [photographs.decoded(found[index % len(found)]) for index in range(IMAGES)]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(THREADS)  # what a pipeline outside a loader takes
        yield pool
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("recipe", "provider"), [(recipe, provider) for recipe, names in PROVIDERS.items() for provider in names]
)
def test_recipe(benchmark, recipe: str, provider: str, arrays: list[np.ndarray], pool: ThreadPoolExecutor) -> None:
    benchmark.group = recipe
    run = prepare(recipe, provider, arrays, pool)
    check(run(), prepare(recipe, PROVIDERS[recipe][-1], arrays, pool)())
    written = sum(crop.numel() * crop.element_size() for crop in run().values())
    benchmark.extra_info |= {
        "images": IMAGES,
        "threads": THREADS,
        "bytes": written + sum(array.nbytes for array in arrays),
    }
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def check(crops: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError for crops that are not of the recipe: shapes, and statistics within five standard errors."""
    for name in CROPS:
        size = 224 if name.startswith("global") else 96
        assert crops[name].shape == (IMAGES, 3, size, size)
        assert crops[name].dtype == torch.float32
        assert crops[name].isfinite().all()
    for kind in ("global_0", "global_1", "local"):
        mine, theirs = (torch.cat([each[name] for name in CROPS if name.startswith(kind)]) for each in (crops, others))
        for statistic in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)), roughness):
            a, b = statistic(mine), statistic(theirs)
            allowed = 5 * float((a.var() / len(a) + b.var() / len(b)).sqrt())
            assert abs(float(a.mean() - b.mean())) < allowed, kind


def roughness(x: torch.Tensor) -> torch.Tensor:
    """The mean step between neighbours, which a blur lessens."""
    return (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
