"""Colour stages on one CPU thread: per-pixel programs and torchvision v2, with the same numbers for each sample.

DINO's colour chain on 224-pixel crops of real photographs: jitter (p 0.8, random order), grey, solarize, normalize,
uint8 in, float32 out. torchvision applies its functionals image by image, as torchvision's own transforms do in a
worker. Checked before it is timed: the two differ by at most 1e-5 in [0, 1], pixels at solarize's threshold left out.
`bytes` of a result are each byte read once and each float written once.

On an AMD EPYC (Zen 4), 2026-11-23, b70fe32: 0.44 ms an image, torchvision 2.9. Every sample is in results/color-
cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import photographs
import pytest
import torch
from slipstream_kernels import ops
from slipstream_kernels.programs_cpu import run_programs_cpu
from torchvision.transforms.v2 import functional

from slipstream import ColorJitter, Normalize, RandomGrayscale, RandomResizedCrop, RandomSolarize
from slipstream.pipeline import Pipeline
from slipstream.stage import IMAGENET_STD

IMAGES = 64
CHAIN = [ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), RandomGrayscale(0.2), RandomSolarize(128, p=0.2), Normalize()]
APPLY: dict[int, Callable[..., torch.Tensor]] = {
    ops.BRIGHTNESS: lambda image, a, *_: functional.adjust_brightness(image, a),
    ops.CONTRAST: lambda image, a, *_: functional.adjust_contrast(image, a),
    ops.SATURATION: lambda image, a, *_: functional.adjust_saturation(image, a),
    ops.HUE: lambda image, a, *_: functional.adjust_hue(image, a),
    ops.GREY: lambda image, *_: functional.rgb_to_grayscale(image, 3),
    ops.SOLARIZE: lambda image, a, *_: functional.solarize(image, a),
    ops.NORMALIZE: lambda image, *p: functional.normalize(image, list(p[:3]), list(p[3:6])),
}


def with_slipstream(crops: torch.Tensor, program: np.ndarray) -> torch.Tensor:
    """The CPU kernel on the caller's thread."""
    fmt = ops.ProgramFormat(dtype=torch.float32)
    return run_programs_cpu([crops], [program], [fmt])[0]


def with_torchvision(crops: torch.Tensor, program: np.ndarray) -> torch.Tensor:
    """torchvision v2's float functionals, one image at a time."""
    images = []
    for crop, rows in zip(crops, program.tolist(), strict=True):
        image = functional.to_dtype(crop, torch.float32, scale=True)
        for code, *parameters in rows:
            if code != ops.NOTHING:
                image = APPLY[int(code)](image, *parameters)
        images.append(image)
    return torch.stack(images)


PROVIDERS = {"slipstream": with_slipstream, "torchvision": with_torchvision}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.usefixtures("one_thread")
def test_dino_colour(benchmark, provider: str) -> None:
    benchmark.group = "DINO colour chain, 1x224"
    with photographs.in_memory(None) as folder:
        found = photographs.paths(folder)
        arrays = [photographs.decoded(found[index % len(found)]) for index in range(IMAGES)]
    crops = RandomResizedCrop(224)(
        [torch.from_numpy(array).permute(2, 0, 1) for array in arrays], sample_ids=range(IMAGES)
    )
    chain = Pipeline([RandomResizedCrop(224), *CHAIN]).programs[0].chain
    program = chain.sample_steps(np.arange(IMAGES), 0, (224, 224))[0]
    output, expected = PROVIDERS[provider](crops, program), with_torchvision(crops, program)
    far = (output - expected).abs().amax(1) > 1e-5 / min(IMAGENET_STD)
    solarized = torch.from_numpy((program[..., 0] == ops.SOLARIZE).any(1)).view(-1, 1, 1)
    assert not (far & ~solarized).any()
    assert far.float().mean() < 1e-3
    benchmark.extra_info |= {"images": IMAGES, "bytes": crops.numel() * 5}
    benchmark.pedantic(PROVIDERS[provider], (crops, program), rounds=10, warmup_rounds=1)
