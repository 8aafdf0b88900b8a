"""All crops of all images, in one launch, to the byte what Pillow gives.

A crop is box -> resize -> window -> flip, bilinear or bicubic, antialiased or not: a horizontal pass over the box's
rows, rounded to 8 bits, then a vertical pass over that, both with 22-bit fixed-point weights computed in float64
(Pillow's Resample.c). A small launch before it computes the weights of every job.

Each pass is a product with a banded matrix of weights, so it runs on the tensor cores in int8: a pixel less 128 is an
int8, a weight is three int8 pieces, and integer products are exact. README.md has the derivation.

An image of YUV 4:2:0 planes becomes RGB bytes, by the law of yuv420.py, as its pixels are loaded.

Shapes: B images (ragged), C crops, outputs [B, 3, h, w]. It does not sample boxes, blur, or know a crop's name.
"""

# A jit function is typed as its Python source, and what one constexpr branch sets another reads.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
import triton
import triton.language as tl

from ._math import byte_of_planes, chroma_of_four, filter_weight, pack_weight, round_to_byte, unpack_weight
from .crop_jobs import JOB_COLUMNS, OutputFormat, check_jobs, check_outputs, empty_outputs, tap_counts
from .launch import check_device, launching_on
from .ragged import RaggedBatch

# int64 columns of the three tables that travel to the device
IMAGE_COLUMNS = 4  # address, channel stride, row stride, column stride
PLANES_COLUMNS = 9  # and, where any image is YUV, Cb's and Cr's address, their row stride, height and width
TASK_COLUMNS = JOB_COLUMNS + 4  # a job, then where its vertical and horizontal weights start, then their tap counts
OUTPUT_COLUMNS = 9  # address, image / channel / row / column stride (elements), element size, table's address, h, w
HEADER = 2  # int32 before each output pixel's weights: first source pixel, and 2**21 + 128 * sum(weights)


class LaunchOptions(TypedDict):
    BLOCK_H: int
    BLOCK_W: int
    BLOCK_R: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool


def launch_options(*, planes: bool = False) -> LaunchOptions:
    """Tile and warps of the crop kernel: output rows and columns, source rows and columns a step."""
    return {
        "BLOCK_H": 32,
        "BLOCK_W": 32,
        "BLOCK_R": 32 if planes else 64,
        "BLOCK_K": 32,
        "num_warps": 8 if planes else 4,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


WEIGHT_OPTIONS = {"BLOCK": 64, "num_warps": 2, "enable_fp_fusion": False}


@triton.jit
def resize_weights_kernel(tasks, outputs, weights, num_crops, BLOCK: tl.constexpr, JOB: tl.constexpr):
    # One program computes the weights of BLOCK output pixels along one axis of one job.
    job = tl.program_id(0) // 2
    axis = tl.program_id(0) % 2  # 0 vertical, 1 horizontal
    task = tasks + job.to(tl.int64) * (JOB + 4)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    window = tl.load(outputs + (job % num_crops) * 9 + 7 + axis).to(tl.int32)
    live = pixel < window

    box = tl.load(task + 2 + axis).to(tl.int32)
    full = tl.load(task + 4 + axis).to(tl.int32)
    place = tl.load(task + 6 + axis).to(tl.int32)
    kind = tl.load(task + 8)
    bicubic = (kind & 1) != 0
    table = weights + tl.load(task + JOB + axis)
    taps = tl.load(task + JOB + 2 + axis).to(tl.int32)

    scale = box.to(tl.float64) / full.to(tl.float64)
    stretch = tl.where((kind & 2) != 0, 1.0, tl.maximum(scale, 1.0))
    support = tl.where(bicubic, 2.0, 1.0).to(tl.float64) * stretch
    shrink = 1.0 / stretch
    centre = ((pixel + place).to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((centre + support + 0.5).to(tl.int32), box) - first

    total = tl.zeros([BLOCK], tl.float64)
    for tap in range(taps):
        value = filter_weight(((tap + first).to(tl.float64) - centre + 0.5) * shrink, bicubic)
        total += tl.where(tap < count, value, 0.0)
    total = tl.where(live, total, 1.0)

    row = table + pixel.to(tl.int64) * (taps + 2)
    whole = tl.zeros([BLOCK], tl.int32)
    for tap in range(taps):
        value = filter_weight(((tap + first).to(tl.float64) - centre + 0.5) * shrink, bicubic)
        value = tl.where(tap < count, value / total * 4194304.0, 0.0)
        fixed = (value + tl.where(value < 0.0, -0.5, 0.5)).to(tl.int32)
        whole += fixed
        tl.store(row + 2 + tap, pack_weight(fixed), mask=live)
    tl.store(row, first, mask=live)
    tl.store(row + 1, (1 << 21) + whole * 128, mask=live)


@triton.jit
def banded_pieces(table, row, tap, taps, live):
    # The band matrix's int8 pieces: output pixels have their weights at `row`, source pixels are their taps, or none.
    inside = live & (tap >= 0) & (tap < taps)
    weight = tl.load(table + (row + tap), mask=inside, other=0)
    # A select, not the load's `other`: after a bare load the compiler unpacks in the dot operand's layout, where every
    # warp holds the whole matrix in int32, four times the registers and shared memory of the int8 pieces.
    return unpack_weight(tl.where(inside, weight, 0))


@triton.jit
def add_pixels_by_weights(total, pixels, high, middle, low):
    # total + pixels @ weights in int32, the weights in their three pieces, high piece first.
    part = tl.dot(pixels, high, out_dtype=tl.int32)
    part = tl.dot(pixels, middle, acc=part << 8, out_dtype=tl.int32)
    return total + tl.dot(pixels, low, acc=part << 8, out_dtype=tl.int32)


@triton.jit
def add_weights_by_pixels(total, high, middle, low, pixels):
    # total + weights @ pixels in int32, likewise.
    part = tl.dot(high, pixels, out_dtype=tl.int32)
    part = tl.dot(middle, pixels, acc=part << 8, out_dtype=tl.int32)
    return total + tl.dot(low, pixels, acc=part << 8, out_dtype=tl.int32)


@triton.jit
def nearest_two(place, last):
    # The nearer and the farther of the chroma rows (or columns) around these of the image, inside the plane.
    near = tl.minimum(place >> 1, last)
    return near, tl.minimum(tl.maximum((place >> 1) + (place & 1) * 2 - 1, 0), last)


@triton.jit
def add_chroma(total, share, plane, places, odd):
    # Add a chroma plane's share, if it has one, to pixels between its samples: four bytes of it a pixel. The second and
    # third channel, and a pixel's neighbours, find them in the cache.
    if share != 0:
        near = tl.load(plane + places[0]).to(tl.int32)
        below = tl.load(plane + places[1]).to(tl.int32)
        beside = tl.load(plane + places[2]).to(tl.int32)
        across = tl.load(plane + places[3]).to(tl.int32)
        total += share * chroma_of_four(near, below, beside, across, odd)
    return total


@triton.jit
def store_bytes(value, address, offset, mask, size, table):
    # One channel's bytes (int32 values) to their place, through the channel's table of 1-, 2- or 4-byte values if any.
    if size == 4:
        entry = tl.load(table.to(tl.pointer_type(tl.int32)) + value, mask=mask)
        tl.store(address.to(tl.pointer_type(tl.int32)) + offset, entry, mask=mask)
    elif size == 2:
        entry = tl.load(table.to(tl.pointer_type(tl.int16)) + value, mask=mask)
        tl.store(address.to(tl.pointer_type(tl.int16)) + offset, entry, mask=mask)
    else:
        if table != 0:
            value = tl.load(table.to(tl.pointer_type(tl.uint8)) + value, mask=mask).to(tl.int32)
        tl.store(address.to(tl.pointer_type(tl.uint8)) + offset, value.to(tl.uint8), mask=mask)


@triton.jit
def resized_crop_kernel(
    images,
    tasks,
    outputs,
    tiles,
    weights,
    num_crops,
    num_tiles,
    JOB: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program computes a BLOCK_H x BLOCK_W tile, all three channels, of one crop of one image. With PLANES an image
    # may be YUV 4:2:0, without none is.
    image = tl.program_id(0) // num_tiles
    tile = tiles + (tl.program_id(0) % num_tiles) * 3
    crop = tl.load(tile)
    y = tl.load(tile + 1) + tl.arange(0, BLOCK_H)
    x = tl.load(tile + 2) + tl.arange(0, BLOCK_W)

    task = tasks + (image * num_crops + crop).to(tl.int64) * (JOB + 4)
    output = outputs + crop * 9
    height = tl.load(output + 7).to(tl.int32)
    width = tl.load(output + 8).to(tl.int32)
    y_live = y < height
    x_live = x < width

    # the source rows and columns that this tile's pixels need, inside the box
    y_taps = tl.load(task + JOB + 2).to(tl.int32)
    x_taps = tl.load(task + JOB + 3).to(tl.int32)
    y_table = weights + tl.load(task + JOB)
    x_table = weights + tl.load(task + JOB + 1)
    y_row = y * (y_taps + 2)
    x_row = x * (x_taps + 2)
    y_first = tl.load(y_table + y_row, mask=y_live, other=0)
    x_first = tl.load(x_table + x_row, mask=x_live, other=0)
    box_h = tl.load(task + 2).to(tl.int32)
    box_w = tl.load(task + 3).to(tl.int32)
    row_begin = tl.min(tl.where(y_live, y_first, box_h), 0)
    row_end = tl.minimum(tl.max(tl.where(y_live, y_first + y_taps, 0), 0), box_h)
    column_begin = tl.min(tl.where(x_live, x_first, box_w), 0)
    column_end = tl.minimum(tl.max(tl.where(x_live, x_first + x_taps, 0), 0), box_w)

    source = images + image.to(tl.int64) * (9 if PLANES else 4)
    channel_step = tl.load(source + 1)
    row_step = tl.load(source + 2)
    column_step = tl.load(source + 3)
    corner = tl.load(source) + tl.load(task) * row_step + tl.load(task + 1) * column_step
    corner = corner.to(tl.pointer_type(tl.uint8))
    row_step = row_step.to(tl.int32)  # pack_tables made sure that an image spans less than 2 GiB
    column_step = column_step.to(tl.int32)
    if PLANES:
        blue_plane = tl.load(source + 4).to(tl.pointer_type(tl.uint8))
        red_plane = tl.load(source + 5).to(tl.pointer_type(tl.uint8))
        chroma_step = tl.load(source + 6).to(tl.int32)
        last_row = tl.load(source + 7).to(tl.int32) - 1
        last_column = tl.load(source + 8).to(tl.int32) - 1
        is_planes = tl.load(source + 4) != 0
        top = tl.load(task).to(tl.int32)
        left = tl.load(task + 1).to(tl.int32)

    x_bias = tl.load(x_table + 1 + x_row, mask=x_live, other=0)[None, :]
    y_bias = tl.load(y_table + 1 + y_row, mask=y_live, other=0)[:, None]
    flip = tl.load(task + 9)
    x = tl.where((flip & 1) != 0, width - 1 - x, x)
    y = tl.where((flip & 2) != 0, height - 1 - y, y)
    size = tl.load(output + 5)
    byte_table = tl.load(output + 6)
    address = tl.load(output) + image.to(tl.int64) * tl.load(output + 1) * size
    place = y[:, None] * tl.load(output + 3).to(tl.int32) + x[None, :] * tl.load(output + 4).to(tl.int32)

    # One channel at a time: three at once would share the weights, but take so many registers that two programs fill an
    # SM. The second and third channel find the first one's cache lines.
    for channel in range(3):
        if PLANES:  # an RGB image is planes whose chroma has no share
            of_cb = tl.where(is_planes, tl.where(channel == 0, 0, tl.where(channel == 1, -22554, 116130)), 0)
            of_cr = tl.where(is_planes, tl.where(channel == 0, 91881, tl.where(channel == 1, -46802, 0)), 0)
        total = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
        for row in range(row_begin, row_end, BLOCK_R):
            rows = row + tl.arange(0, BLOCK_R)
            if PLANES:
                near_row, far_row = nearest_two(top + rows, last_row)
                near_row = (near_row * chroma_step)[:, None]
                far_row = (far_row * chroma_step)[:, None]
            line = tl.zeros([BLOCK_R, BLOCK_W], tl.int32)
            for column in range(column_begin, column_end, BLOCK_K):
                columns = column + tl.arange(0, BLOCK_K)
                pixel = corner + (rows[:, None] * row_step + columns[None, :] * column_step)
                pixel = tl.load(pixel, mask=(rows < box_h)[:, None] & (columns < box_w)[None, :], other=128)
                if PLANES:
                    near, far = nearest_two((left + columns)[None, :], last_column)
                    odd = (left + columns)[None, :] & 1
                    places = (near_row + near, far_row + near, near_row + far, far_row + far)
                    share = tl.full([BLOCK_R, BLOCK_K], 32768, tl.int32)
                    share = add_chroma(share, of_cb, blue_plane, places, odd)
                    share = add_chroma(share, of_cr, red_plane, places, odd)
                    pixel = byte_of_planes(pixel, share).to(tl.uint8)
                tap = columns[:, None] - x_first[None, :]
                high, middle, low = banded_pieces(x_table + 2, x_row[None, :], tap, x_taps, x_live[None, :])
                line = add_pixels_by_weights(line, (pixel ^ 128).to(tl.int8, bitcast=True), high, middle, low)
            tap = rows[None, :] - y_first[:, None]
            high, middle, low = banded_pieces(y_table + 2, y_row[:, None], tap, y_taps, y_live[:, None])
            byte = (round_to_byte(line + x_bias) - 128).to(tl.int8)
            total = add_weights_by_pixels(total, high, middle, low, byte)
        store_bytes(round_to_byte(total + y_bias), address, place, y_live[:, None] & x_live[None, :], size, byte_table)
        corner += channel_step
        address += tl.load(output + 2) * size
        byte_table += tl.where(byte_table != 0, 256 * size, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropTables:
    """What one launch is told, packed for one copy to the device. For one launch: it writes the outputs' part.

    table: int64, pinned where CUDA is: images [B, 4 or 9], tasks [B, C, 14], outputs [C, 9] (filled in at the launch).
    num_images: B. num_weights: int32 weights of all jobs together. planes: whether any image is YUV.
    """

    table: torch.Tensor
    num_images: int
    num_weights: int
    planes: bool


def pack_tables(images: RaggedBatch, jobs: np.ndarray, formats: Sequence[OutputFormat]) -> CropTables:
    """Check the jobs (int32 [B, C, 10]) and pack them with the images' addresses: host work that can be done ahead."""
    check_jobs(images.sizes, jobs, formats)
    sources, planes = images.table(), images.has_planes
    span = np.maximum((np.abs(sources[:, 2:4]) * (images.sizes - 1)).sum(1), np.abs(sources[:, 6]) * sources[:, 7])
    if len(span) and span.max() >= 2**31:
        raise ValueError(
            f"images[{span.argmax()}] spans {span.max()} bytes of memory, allowed is less than 2 GiB: copy it"
        )
    count, crops = jobs.shape[:2]
    taps = tap_counts(jobs)
    lengths = np.array([fmt.size for fmt in formats], np.int64).reshape(-1, 2) * (taps + HEADER)
    ends = np.cumsum(lengths).reshape(lengths.shape)
    columns = PLANES_COLUMNS if planes else IMAGE_COLUMNS
    table = torch.empty(
        count * columns + count * crops * TASK_COLUMNS + crops * OUTPUT_COLUMNS,
        dtype=torch.int64,
        device="cpu",
        pin_memory=images.device.type == "cuda",
    )
    numbers = table.numpy()
    image_part = numbers[: count * columns].reshape(count, columns)
    image_part[:] = sources[:, :columns]
    task_part = numbers[image_part.size : image_part.size + count * crops * TASK_COLUMNS]
    task_part = task_part.reshape(count, crops, TASK_COLUMNS)
    task_part[..., :JOB_COLUMNS] = jobs
    task_part[..., JOB_COLUMNS : JOB_COLUMNS + 2] = ends - lengths
    task_part[..., JOB_COLUMNS + 2 :] = taps
    return CropTables(table=table, num_images=count, num_weights=int(lengths.sum()), planes=planes)


@functools.lru_cache(maxsize=256)
def tile_table(sizes: tuple[tuple[int, int], ...], block_h: int, block_w: int, device: torch.device) -> torch.Tensor:
    """Each tile of one image's crops: int32 [T, 3] (crop, first row, first column)."""
    tiles = [
        (crop, y, x)
        for crop, (height, width) in enumerate(sizes)
        for y in range(0, height, block_h)
        for x in range(0, width, block_w)
    ]
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def resized_crop(
    images: RaggedBatch,
    jobs: np.ndarray | CropTables,
    formats: Sequence[OutputFormat],
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Every crop of every image: one launch for the weights, one for all pixels.

    images: B ragged uint8 images. jobs: int32 [B, C, 10] (see crop_jobs), or what pack_tables made of them. formats: C,
    their tables on the images' device. Returns C tensors [B, 3, h, w] on that device; `out` gives them instead. Runs on
    torch's current stream, once the images are ready there; their owners must outlive it. Raises ValueError for jobs
    that leave their image, outputs or tables that do not fit; RuntimeError for CPU tensors outside Triton's
    interpreter. Reference: resized_crop_reference.
    """
    check_device(images.device, resized_crop_kernel)
    tables = jobs if isinstance(jobs, CropTables) else pack_tables(images, jobs, formats)
    count, crops = tables.num_images, len(formats)
    if out is None:
        out = empty_outputs(count, formats, images.device)
    check_outputs(out, count, formats, images.device)
    if not count or not crops:
        return list(out)
    images.wait_on_current_stream()
    numbers = tables.table.numpy()
    for row, tensor, fmt in zip(numbers[-crops * OUTPUT_COLUMNS :].reshape(crops, -1), out, formats, strict=True):
        byte_table = 0 if fmt.table is None else fmt.table.data_ptr()
        row[:] = (tensor.data_ptr(), *tensor.stride(), tensor.element_size(), byte_table, *fmt.size)
    on_device = tables.table.to(images.device, non_blocking=True)
    task_table = on_device[count * (PLANES_COLUMNS if tables.planes else IMAGE_COLUMNS) :]
    output_table = on_device[len(on_device) - crops * OUTPUT_COLUMNS :]
    weights = torch.empty(tables.num_weights, dtype=torch.int32, device=images.device)
    blocks = triton.cdiv(max(max(fmt.size) for fmt in formats), WEIGHT_OPTIONS["BLOCK"])
    options = launch_options(planes=tables.planes)
    tiles = tile_table(tuple(fmt.size for fmt in formats), options["BLOCK_H"], options["BLOCK_W"], images.device)
    with launching_on(images.device):
        # grid: each axis of each job, by blocks of output pixels
        resize_weights_kernel[(count * crops * 2, blocks)](
            task_table, output_table, weights, crops, JOB=JOB_COLUMNS, **WEIGHT_OPTIONS
        )
        # grid: each tile of each crop, image by image, so that an image's tiles run while it is in the cache
        resized_crop_kernel[(count * len(tiles),)](
            on_device,
            task_table,
            output_table,
            tiles,
            weights,
            crops,
            len(tiles),
            JOB=JOB_COLUMNS,
            PLANES=tables.planes,
            **options,
        )
    return list(out)
