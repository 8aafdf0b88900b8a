"""All crops of all images through their programs of operations, in as few launches as their passes allow."""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton

from .color import CROP_COLUMNS, grey_sums_kernel, launch_options, pixel_ops_kernel
from .launch import check_device, launching_on
from .ops import CONTRAST, DTYPES, OP_WIDTH, ProgramFormat, check_pixels, check_programs, empty_pixels
from .resized_crop import tile_table


def check_spans(images: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Raise ValueError for a plane too large for the kernels' int32 offsets."""
    for index, (image, tensor) in enumerate(zip(images, out, strict=True)):
        height, width = image.shape[2:]
        span = max(height * width, *(t.stride(2) * (height - 1) + t.stride(3) * (width - 1) for t in (image, tensor)))
        if span >= 2**30:
            raise ValueError(f"images[{index}] or its output spans {span} elements, allowed is less than 2**30")


def rows_and_columns(image: torch.Tensor, out: torch.Tensor) -> tuple[int, int]:
    """A crop's (h, w), or (1, h * w) where both tensors' rows follow on at one step: then no pixel needs a division."""
    height, width = image.shape[2:]
    flat = all(tensor.stride(2) == width * tensor.stride(3) for tensor in (image, out))
    return (1, height * width) if flat else (height, width)


def pack_programs(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    out: Sequence[torch.Tensor],
    first_sums: Sequence[int],
    shapes: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """What one launch is told, for one copy to the device: int64 [C, 18] then every program's float32 operations,
    pinned where CUDA is."""
    num_ops = sum(program.shape[0] * program.shape[1] for program in programs)
    head = len(images) * CROP_COLUMNS
    pinned = len(images) > 0 and images[0].device.type == "cuda"
    table = torch.empty(head + num_ops * OP_WIDTH // 2, dtype=torch.int64, device="cpu", pin_memory=pinned)
    numbers = table.numpy()
    operations = numbers[head:].view(np.float32)
    first = 0
    for row, image, program, tensor, first_sum, shape in zip(
        numbers[:head].reshape(-1, CROP_COLUMNS), images, programs, out, first_sums, shapes, strict=True
    ):
        row[:6] = (*shape, len(image), first, program.shape[1], first_sum)
        row[6:11] = (image.data_ptr(), *image.stride())
        row[11:] = (tensor.data_ptr(), *tensor.stride(), DTYPES.index(tensor.dtype), 0)
        end = first + program.shape[0] * program.shape[1]
        operations[first * OP_WIDTH : end * OP_WIDTH] = program.reshape(-1)
        first = end
    return table


def run_programs(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    formats: Sequence[ProgramFormat],
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Every crop of every image through its program: one launch, and one before it for each level of contrast.

    images: C crops, uint8 [B, 3, h, w] each (B, h, w may differ), any strides, on one device. programs: C of float32
    [B, K, 16] (see ops). formats: C. Returns C tensors of the images' shapes; `out` gives them instead. Raises
    ValueError or TypeError for what does not fit together; RuntimeError for CPU tensors outside Triton's interpreter.
    Reference: run_programs_reference.
    """
    check_programs(images, programs, formats)
    for image in images:
        check_device(image.device, pixel_ops_kernel)
    if out is None:
        out = empty_pixels(images, formats)
    check_pixels(images, out, formats)
    check_spans(images, out)
    most_images = max(map(len, images), default=0)
    shapes = tuple(rows_and_columns(image, tensor) for image, tensor in zip(images, out, strict=True))
    if not any(image.numel() for image in images):
        return list(out)

    options = launch_options()
    block = options["BLOCK"]
    planes = tuple((1, rows * columns) for rows, columns in shapes)
    device = images[0].device
    contrasts = [int((program[..., 0] == CONTRAST).sum(1).max(initial=0)) for program in programs]
    lengths = [
        number * len(image) * triton.cdiv(rows * columns, block)
        for image, number, (rows, columns) in zip(images, contrasts, shapes, strict=True)
    ]
    first_sums = [sum(lengths[:index]) for index in range(len(lengths))]
    sums = torch.empty(sum(lengths), dtype=torch.float32, device=device)
    table = pack_programs(images, programs, out, first_sums, shapes).to(device, non_blocking=True)
    operations = table[len(images) * CROP_COLUMNS :].view(torch.float32)
    with launching_on(device):
        for level in range(max(contrasts)):
            # grid: each block of each image of the crops that have such a contrast
            read = tuple((1, n if number > level else 0) for (_, n), number in zip(planes, contrasts, strict=True))
            tiles = tile_table(read, 1, block, device)
            if len(tiles):
                grey_sums_kernel[(most_images * len(tiles),)](
                    table, operations, tiles, sums, len(tiles), level, COLUMNS=CROP_COLUMNS, **options
                )
        # grid: each block of each crop, image by image
        tiles = tile_table(planes, 1, block, device)
        pixel_ops_kernel[(most_images * len(tiles),)](
            table, operations, tiles, sums, len(tiles), COLUMNS=CROP_COLUMNS, **options
        )
    return list(out)
