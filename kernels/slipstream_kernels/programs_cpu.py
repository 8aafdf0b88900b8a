"""The programs launch on the CPU: the same programs, Numba instead of Triton.

An image is worked on in bands of a few rows, float32 and planar, small enough to stay in the first cache, from memory
through a run of operations to memory: a sweep. A program of operations that take a pixel by itself is one sweep from
the image to its output. One that needs to know the whole image is a sweep more, which only reads, through the
operations before; one that reads other pixels begins a sweep, from what the sweep before has kept.
"""

# Numba's carray is untyped.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numba
import numpy as np
import torch

from .blur_cpu import LANES, blur_band, box_blur, box_edge, sharpen_band, start_blur
from .color_cpu import finish_reading, read_band, run_band, start_reading
from .ops import (
    AUTOCONTRAST,
    BOX_BLUR,
    CONTRAST,
    EQUALIZE,
    GAUSSIAN_BLUR,
    HUE,
    NEIGHBOURS,
    NOTHING,
    OP_WIDTH,
    SHARPNESS,
    STATISTICS,
    WARP,
    ProgramFormat,
    check_pixels,
    check_programs,
    empty_pixels,
)
from .pixels_cpu import IN_BFLOATS, IN_BYTES, IN_FLOATS, IN_HALVES, load_band, start_cells, store_band
from .program_checks import check_neighbours
from .resized_crop_cpu import SHARES
from .source_rows_cpu import _pointer
from .warp_cpu import start_warp, warp_band

BAND = 1024  # pixels of a band, 4 KB a channel: whole rows, one at the least
KINDS = {torch.uint8: IN_BYTES, torch.float16: IN_HALVES, torch.bfloat16: IN_BFLOATS, torch.float32: IN_FLOATS}

# Columns of a crop's row in the table that the kernel reads, int64: two places, each an address, steps in bytes (image,
# channel, row, column) and the kind of values, then the size and the programs.
SOURCE, TARGET, PLACE, HEIGHT, WIDTH, PROGRAMS, LENGTH, COLUMNS = 0, 6, 6, 12, 13, 14, 15, 16
ROW, KIND = 3, 5  # in a place: the row's step, the kind


@numba.njit(nogil=True, cache=True)
def _pitch(width):
    return (width + LANES - 1) // LANES * LANES


@numba.njit(nogil=True, cache=True)
def _reads(code):
    return code in (CONTRAST, AUTOCONTRAST, EQUALIZE)


@numba.njit(nogil=True, cache=True)
def _looks_around(code):
    return code in (GAUSSIAN_BLUR, SHARPNESS, WARP)


@numba.njit(nogil=True, cache=True)
def _planes(address, kind, height, pitch):
    # Scratch as a place: bytes or float32 values [3, h, pitch].
    size = 4 if kind == IN_FLOATS else 1
    return np.array([address, 0, height * pitch * size, pitch * size, size, kind], np.int64)


@numba.njit(nogil=True, cache=True)
def _sweep(source, target, size, program, span, readings, tables):
    """One sweep of an image through operations span[0] ... span[1] - 1 of its program, to `target` if its address is
    not 0, and what operation span[1] must know, if it is one of STATISTICS, to readings and tables.

    source, target: places, int64 [6]. size: (h, w). If the first operation reads other pixels, source is scratch.
    """
    height, width = size
    begin, end = span
    rows = min(max(BAND // width, 1), height)
    band = np.empty((3, rows * width + LANES), np.float32)
    cells = start_cells(rows * width)
    code = int(program[end, 0]) if end < len(program) else NOTHING
    reads = _reads(code)
    gathered = start_reading(rows * width if code == AUTOCONTRAST else 0)
    first = int(program[begin, 0]) if begin < end else NOTHING
    op, pitch = program[min(begin, len(program) - 1)], source[ROW] // 4
    blur = start_blur(op if first == GAUSSIAN_BLUR else np.ones(OP_WIDTH, np.float32), rows, width)
    places = start_warp(width if first == WARP else 0)
    for top in range(0, height, rows):
        number = min(rows, height - top)
        after = begin + 1
        if first == GAUSSIAN_BLUR:
            blur_band(blur, source[0], pitch, size, top, number, band)
        elif first == SHARPNESS:
            sharpen_band(op[1], source[0], pitch, size, top, number, band)
        elif first == WARP:
            warp_band(op, places, source[0], pitch, size, top, number, band)
        else:
            after = begin
            load_band(source[0] + top * source[ROW], source[1:KIND], source[KIND], band, number, width)
        run_band(program, after, end, readings, tables, band, top, (number, width))
        if target[0]:
            place = target[0] + top * target[ROW]
            store_band(band, cells, place, target[1:KIND], target[KIND], number, width)
        if reads:
            read_band(code, band, number * width, gathered[0], gathered[1], gathered[2])
    if reads:
        number = 0
        for index in range(end):
            number += program[index, 0] == EQUALIZE
        finish_reading(code, height * width, gathered, readings[end], tables, number)


@numba.njit(nogil=True, cache=True)
def _image(image, target, size, program, scratch):
    # One image through its program, float32 [K, 16]: its place and its output's; scratch: addresses of two float32
    # images and of one for bytes, if the program reads other pixels.
    height, width = size
    readings = np.zeros((len(program), 3, 2), np.float32)
    equalizing = 0
    for index in range(len(program)):
        equalizing += program[index, 0] == EQUALIZE
    tables = np.empty((equalizing, 3, 256), np.float32)
    nowhere = np.zeros(PLACE, np.int64)
    source, begin, turn = image, 0, 0
    for end in range(len(program) + 1):
        code = int(program[end, 0]) if end < len(program) else NOTHING
        looked = begin < end and _looks_around(int(program[begin, 0]))
        edge = box_edge(program[end, 1]) if code == BOX_BLUR else 0
        if end == len(program):
            kept = target
        elif code == BOX_BLUR:
            kept = _planes(scratch[2] + edge, IN_BYTES, height, width + 2 * edge)
        elif _looks_around(code) or (_reads(code) and looked):
            # what a reading finds at some cost is kept for the sweep after it
            kept = _planes(scratch[turn], IN_FLOATS, height, _pitch(width))
            turn = 1 - turn
        elif _reads(code):
            kept = nowhere
        else:
            continue
        _sweep(source, kept, size, program, (begin, end), readings, tables)
        if code == BOX_BLUR:
            box_blur(program[end, 1], kept[0], kept[0] + 3 * height * (width + 2 * edge), height, width)
        if kept[0]:
            source, begin = kept, end + int(code == BOX_BLUR)


@numba.njit(nogil=True, cache=True)
def _program(crop, image):
    place = crop[PROGRAMS] + image * crop[LENGTH] * OP_WIDTH * 4
    return numba.carray(_pointer(place), (crop[LENGTH], OP_WIDTH), np.float32)


@numba.njit(nogil=True, cache=True)
def _images(work, crops):
    # work int64 [n, 2] (crop, image), crops int64 [C, 16]
    values, pixels = 0, 0  # the scratch is one for all the images: fresh memory costs more than most operations
    for index in range(len(work)):
        crop = crops[work[index, 0]]
        program = _program(crop, work[index, 1])
        for row in range(len(program)):
            code = int(program[row, 0])
            if _looks_around(code):
                values = max(values, 3 * crop[HEIGHT] * _pitch(crop[WIDTH]))
            elif code == BOX_BLUR:
                pixels = max(pixels, 6 * crop[HEIGHT] * (crop[WIDTH] + 2 * box_edge(program[row, 1])))
    floats, small = np.zeros((2, values), np.float32), np.empty(pixels, np.uint8)
    scratch = floats[0].ctypes.data, floats[1].ctypes.data, small.ctypes.data
    for index in range(len(work)):
        crop, image = crops[work[index, 0]], work[index, 1]
        source, target = crop[SOURCE:TARGET].copy(), crop[TARGET:HEIGHT].copy()
        source[0] += image * source[1]
        target[0] += image * target[1]
        _image(source, target, (crop[HEIGHT], crop[WIDTH]), _program(crop, image), scratch)
    return len(floats) + len(small)  # so that they live until here: Numba counts no addresses


def run_programs_cpu(
    images: Sequence[torch.Tensor],
    programs: Sequence[np.ndarray],
    formats: Sequence[ProgramFormat],
    out: Sequence[torch.Tensor] | None = None,
    pool: Executor | None = None,
    num_threads: int = 1,
) -> list[torch.Tensor]:
    """run_programs on CPU tensors: C crops through their programs, one output tensor each.

    images: uint8 or float32 [B, 3, h, w] each, any strides (B, h and w may differ). programs: float32 [B, K, 16] each.
    pool: an executor whose `num_threads` threads share the work; None does it on the caller's thread.
    Raises ValueError or TypeError for what does not fit together.
    """
    check_programs(images, programs, formats)
    check_neighbours(images, programs)
    for index, image in enumerate(images):
        if image.device.type != "cpu":
            raise ValueError(f"the CPU kernel takes images on the CPU, got images[{index}] on {image.device}")
        if formats[index].dtype not in KINDS:
            allowed = ", ".join(str(dtype) for dtype in KINDS)
            raise TypeError(f"formats[{index}].dtype must be one of {allowed}, got {formats[index].dtype}")
    if out is None:
        out = empty_pixels(images, formats)
    check_pixels(images, out, formats)
    kept = [np.ascontiguousarray(program) for program in programs]
    busy = [crop for crop, image in enumerate(images) if image.numel()]
    if not busy:
        return list(out)
    crops = np.zeros((len(images), COLUMNS), np.int64)
    for row, image, target, program in zip(crops, images, out, kept, strict=True):
        row[SOURCE:TARGET] = _place(image)
        row[TARGET:HEIGHT] = _place(target)
        row[HEIGHT:] = *image.shape[2:], program.ctypes.data, program.shape[1]
    work = np.concatenate(
        [np.stack([np.full(len(images[crop]), crop), np.arange(len(images[crop]))], 1) for crop in busy]
    )
    if pool is None:
        _images(work, crops)
    else:
        ends = np.cumsum(np.concatenate([_cost(images[crop], kept[crop]) for crop in busy]))
        shares = num_threads * SHARES
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, shares) / shares)
        for future in [pool.submit(_images, part, crops) for part in np.split(work, cuts)]:
            future.result()
    del kept  # its addresses are in use until here
    return list(out)


def _place(tensor: torch.Tensor) -> tuple[int, ...]:
    size = tensor.element_size()
    return tensor.data_ptr(), *(step * size for step in tensor.stride()), KINDS[tensor.dtype]


def _cost(images: torch.Tensor, programs: np.ndarray) -> np.ndarray:
    # Rough, float64 [B]: passes over each image times operations in a pass, which balances work between threads.
    codes = programs[..., 0]
    passes = 1 + np.isin(codes, STATISTICS).sum(1)
    slow = np.isin(codes, NEIGHBOURS).sum(1)
    cost = passes * (2.0 + (codes != NOTHING).sum(1) + 2 * (codes == HUE).sum(1)) + 10.0 * slow
    return images[0].numel() * cost
