"""Jobs and operations in words, for people who look at a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
from slipstream_kernels import ops

FILTERS = ("bilinear", "bicubic", "bilinear without antialias", "bicubic without antialias")
_FLIPS = ("", "mirrored", "upside down", "mirrored and upside down")
_WORDS = {
    ops.BRIGHTNESS: "brightness x {:.4g}",
    ops.ADD_BRIGHTNESS: "brightness {:+.4g}",
    ops.CONTRAST: "contrast x {:.4g}",
    ops.SATURATION: "saturation x {:.4g}",
    ops.HUE: "hue {:+.4g} turns",
    ops.GREY: "grey",
    ops.SOLARIZE: "solarize at {:.4g}",
    ops.POSTERIZE: "posterize to {:g} levels",
    ops.INVERT: "invert",
    ops.NORMALIZE: "normalize",
    ops.AUTOCONTRAST: "autocontrast",
    ops.EQUALIZE: "equalize",
    ops.SHARPNESS: "sharpness x {:.4g}",
    ops.GAUSSIAN_BLUR: "gaussian blur of {:g} x {:g}, sigma {:.4g}",
    ops.BOX_BLUR: "blur by three boxes of radius {:.4g}",
    ops.SOLARIZE_ADD: "add {1:+.4g} below {0:.4g}",
}


def describe_job(job: np.ndarray) -> str:
    """A crop job, int32 [10]: its box, size, filter, window and flip."""
    top, left, height, width, full_h, full_w, y, x, kind, flip = job.tolist()
    words = [f"box {height} x {width} at ({top}, {left}) -> {full_h} x {full_w} {FILTERS[kind]}"]
    if (y, x) != (0, 0):
        words.append(f"window at ({y}, {x})")
    return ", ".join([*words, *describe_flip(flip)])


def describe_flip(bits: int) -> list[str]:
    """A flip, of a job's FLIP bits; nothing for none."""
    return [_FLIPS[bits]] if bits else []


def is_program(step: Any) -> bool:
    """Whether a plan's step is programs, float32 [B, K, 16], and not an array that a user's own stage drew."""
    if not isinstance(step, np.ndarray) or step.dtype != np.float32 or step.ndim != 3 or step.shape[2] != ops.OP_WIDTH:
        return False
    return bool(np.isin(step[..., 0], np.arange(ops.NUM_OPS)).all())


def describe_op(row: np.ndarray) -> str:
    """One operation of a program, float32 [16]."""
    code, *parameters = row.tolist()
    if code == ops.ERASE:
        top, left, height, width, *value = parameters[:8]
        fill = "noise" if value[3] else "({:.4g}, {:.4g}, {:.4g})".format(*value)
        return f"erase {height:g} x {width:g} at ({top:g}, {left:g}) with {fill}"
    if code == ops.WARP:
        numbers = ", ".join(f"{number:.4g}" for number in parameters[:8])
        return f"warp ({numbers}) {'bilinear' if parameters[8] else 'nearest'}"
    return _WORDS[int(code)].format(*parameters)
