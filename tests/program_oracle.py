"""What the tests of programs share: the backends, torchvision's answer to each operation, and how near is near."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from compiled import running_compiled
from gpu_copies import bring_back, to_gpu
from slipstream_kernels import ops
from slipstream_kernels.ops import OP_WIDTH, ProgramFormat
from slipstream_kernels.programs_cpu import run_programs_cpu
from torchvision.transforms import InterpolationMode

Run = Callable[..., list[torch.Tensor]]

FLOAT = ProgramFormat(dtype=torch.float32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN = 1e-5  # a value this near to a jump of an operation may land on either side of it
PLACE_MARGIN = 1e-4  # the same in pixels: torchvision's places are float32 from -1 to 1, 6e-8 of half an image apart

# Greatest absolute difference from torchvision for each operation, in [0, 1]. 6e-8 is half a step of float32 below 1.
TOLERANCES = {
    "nothing": 0.0,  # one multiplication, by the same number
    "brightness": 0.0,  # one more
    "add_brightness": 0.0,  # one addition
    "invert": 0.0,  # one subtraction
    "solarize": 0.0,  # a comparison and a subtraction
    "solarize_add": 0.0,  # a comparison and an addition
    "posterize": 0.0,  # a power of two takes nothing from a product
    "normalize": 0.0,  # a subtraction and an IEEE division
    "erase": 0.0,  # a copy
    "grey": 2.5e-7,  # torch fuses multiplications with additions: two steps
    "saturation": 1e-6,  # that, twice the factor of the grey and 1 - factor rounded from float64
    "contrast": 1e-5,  # torch's mean is a float32 sum of the whole image in an order of its own
    "hue": 2e-6,  # a hue is good to 1e-7 of a turn, which is 6e-7 of a channel, and torchvision rounds it eight times
    "autocontrast": 2.5e-7,  # a subtraction, and a division that need not be IEEE's: two steps
    "equalize": 0.0,  # whole numbers, and a multiplication
    "sharpness": 2e-6,  # nine products and their sum, in any order, times the factor
    "gaussian_blur": 2e-5,  # torchvision sums the products of both axes at once; its weights are rounded twice
    "gaussian_blur_float64": 1e-6,  # of torchvision's in float64: weights good to 2.4e-7 each, and sums in float32
    "warp_nearest": 0.0,  # a copy, away from where places are rounded
    "warp_bilinear": 1e-4,  # places are good to PLACE_MARGIN, and neighbouring pixels differ by 1 at the most
    "program": 1e-5,  # each operation's own, times the factors (to 1.4) of those after it
}

# Inverse maps a ... h, for images of any size: a turn, a shear, a shift and a stretch, and the same in perspective. The
# numbers are crooked, or many pixels would come from places halfway between two.
AFFINE = (0.9137, 0.2113, -3.3091, -0.1373, 1.0711, 2.6177, 0.0, 0.0)
PERSPECTIVE = (*AFFINE[:6], 4e-4, -3e-4)
FILL = (0.2, 0.4, 0.6)


def warped(x: torch.Tensor, coefficients: tuple, nearest: bool, fill: tuple | None) -> torch.Tensor:
    mode = InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR
    return tv.perspective(x, None, None, mode, None if fill is None else list(fill), list(coefficients))


def warp_row(coefficients: tuple, nearest: bool, fill: tuple | None) -> list[float]:
    """WARP's row of a program."""
    interpolation = ops.NEAREST if nearest else ops.BILINEAR
    return [ops.WARP, *coefficients, interpolation, *(fill or (0.0, 0.0, 0.0)), float(fill is not None)]


def _erased(x: torch.Tensor) -> torch.Tensor:
    return tv.erase(x, 3, 5, 17, 11, torch.tensor(FILL).view(3, 1, 1))


OPERATIONS: dict[str, tuple[list[float], Callable[[torch.Tensor], torch.Tensor]]] = {
    "nothing": ([ops.NOTHING], lambda x: x),
    "brightness": ([ops.BRIGHTNESS, 1.375], lambda x: tv.adjust_brightness(x, 1.375)),
    "add_brightness": ([ops.ADD_BRIGHTNESS, -0.125], lambda x: (x - 0.125).clamp(0, 1)),
    "contrast": ([ops.CONTRAST, 0.6], lambda x: tv.adjust_contrast(x, 0.6)),
    "saturation": ([ops.SATURATION, 1.4], lambda x: tv.adjust_saturation(x, 1.4)),
    "hue": ([ops.HUE, -0.1], lambda x: tv.adjust_hue(x, -0.1)),
    "grey": ([ops.GREY], lambda x: tv.rgb_to_grayscale(x, num_output_channels=3)),
    "solarize": ([ops.SOLARIZE, 0.3], lambda x: tv.solarize(x, 0.3)),
    "solarize_add": (
        [ops.SOLARIZE_ADD, 0.5, 0.3125],
        lambda x: torch.where(x < 0.5, (x + 0.3125).clamp(0, 1), x),  # timm's, in bytes there
    ),
    "posterize": ([ops.POSTERIZE, 16], lambda x: tv.posterize(x, 4)),
    "invert": ([ops.INVERT], tv.invert),
    "normalize": ([ops.NORMALIZE, *MEAN, *STD], lambda x: tv.normalize(x, list(MEAN), list(STD))),
    "autocontrast": ([ops.AUTOCONTRAST], tv.autocontrast),
    "equalize": ([ops.EQUALIZE], tv.equalize),
    "sharpness": ([ops.SHARPNESS, 1.8], lambda x: tv.adjust_sharpness(x, 1.8)),
    "gaussian_blur": ([ops.GAUSSIAN_BLUR, 9, 5, 1.3, 0.8], lambda x: tv.gaussian_blur(x, [9, 5], [1.3, 0.8])),
    "warp_nearest": (warp_row(PERSPECTIVE, True, None), lambda x: warped(x, PERSPECTIVE, True, None)),
    "warp_bilinear": (warp_row(PERSPECTIVE, False, FILL), lambda x: warped(x, PERSPECTIVE, False, FILL)),
    "erase": ([ops.ERASE, 3, 5, 17, 11, *FILL], _erased),
}


def in_interpreter(
    images: Any, programs: Any, formats: Any, out: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    from slipstream_kernels.programs import run_programs

    return run_programs(images, programs, formats, out)


compiled = running_compiled()(in_interpreter)


def on_gpu(images: Any, programs: Any, formats: Any, out: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    from slipstream_kernels.programs import run_programs

    there = None if out is None else [to_gpu(tensor) for tensor in out]
    result = run_programs([to_gpu(image) for image in images], programs, formats, there)
    if out is not None and there is not None:
        bring_back(out, there)
    return [tensor.cpu() for tensor in result]


BACKENDS = [
    pytest.param(run_programs_cpu, id="cpu"),
    pytest.param(in_interpreter, id="interpreter", marks=pytest.mark.interpret),
    pytest.param(compiled, id="compiled"),
    pytest.param(on_gpu, id="gpu", marks=pytest.mark.gpu),
]


def batch_of(image: np.ndarray) -> torch.Tensor:
    """One image, uint8 [H, W, 3], as a batch of one."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_floats(image: torch.Tensor, seed: int) -> torch.Tensor:
    """A uint8 image as float32 in [0, 1] whose values are not those of bytes, nor near a jump of equalize."""
    fraction = torch.rand(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + fraction / 2 + 0.25) / 256


def program_of(rows: list[list[float]], count: int = 1) -> np.ndarray:
    """The same operations for `count` images, float32 [count, K, 16]."""
    program = np.zeros((count, len(rows), OP_WIDTH), np.float32)
    for index, row in enumerate(rows):
        program[:, index, : len(row)] = row
    return program


def jitter(seed: int, count: int) -> np.ndarray:
    """A colour jitter of its own for each image, float32 [count, 4, 16]."""
    rng = np.random.default_rng(seed)
    program = np.zeros((count, 4, OP_WIDTH), np.float32)
    for row in program:
        row[:, 0] = rng.permutation([ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION, ops.HUE])
        row[:, 1] = np.where(row[:, 0] == ops.HUE, rng.uniform(-0.2, 0.2, 4), rng.uniform(0.5, 1.5, 4))
    return program


def mixed(seed: int, count: int) -> np.ndarray:
    """That, then operations of every kind, among them each that reads other pixels: float32 [count, 10, 16]."""
    after = [
        [ops.GAUSSIAN_BLUR, 5, 3, 0.9, 0.7],
        [ops.AUTOCONTRAST],
        warp_row(AFFINE, False, FILL),
        [ops.BOX_BLUR, 0.6],
        [ops.EQUALIZE],
        [ops.SHARPNESS, 1.4],
    ]
    return np.concatenate([jitter(seed, count), program_of(after, count)], 1)


def holds(row: np.ndarray | list[float], size: tuple[int, ...]) -> bool:
    """Whether an image of this size (h, w) can take the operation: reflection needs sides beyond a kernel's half."""
    return int(row[0]) != ops.GAUSSIAN_BLUR or (int(row[2]) // 2 < size[0] and int(row[1]) // 2 < size[1])


def near_a_jump(x: torch.Tensor, row: np.ndarray | list[float]) -> torch.Tensor:
    """Where a value before this operation, [..., 3, h, w], or the place it comes from, is near a jump of it."""
    code, amount = int(row[0]), float(row[1]) if len(row) > 1 else 0.0
    if code in (ops.SOLARIZE, ops.SOLARIZE_ADD):
        return (x - amount).abs() <= MARGIN
    if code == ops.POSTERIZE:
        level = (x * amount).round()
        return ((x - level / amount).abs() <= MARGIN) & (level > 0) & (level < amount)
    if code == ops.EQUALIZE:
        level = (x * 255.999).round()
        return ((x - level / 255.999).abs() <= MARGIN) & (level > 0) & (level < 256)
    if code == ops.BOX_BLUR:
        return (x * 255 - (x * 255).floor() - 0.5).abs() <= 255 * MARGIN
    if code == ops.WARP and row[9] == ops.NEAREST:
        a, b, c, d, e, f, g, h = map(float, row[1:9])
        y, x_place = torch.meshgrid(
            *(torch.arange(side, dtype=torch.float64) + 0.5 for side in x.shape[-2:]), indexing="ij"
        )
        under = g * x_place + h * y + 1
        columns, rows = (a * x_place + b * y + c) / under, (d * x_place + e * y + f) / under
        near = ((columns - columns.round()).abs() <= PLACE_MARGIN) | ((rows - rows.round()).abs() <= PLACE_MARGIN)
        return near.expand(x.shape)
    return torch.zeros_like(x, dtype=torch.bool)
