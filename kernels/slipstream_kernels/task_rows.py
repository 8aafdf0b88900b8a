"""What every programs kernel reads first: which task it is in, and where that task's pixels lie.

A task is one pass over one image of one crop. All tables are int64, README.md has their columns. These are Triton
functions on pointers; what they give is values.
"""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from ._math import INTERPRETED, byte_to_unit, round_to_bfloat16, unit_to_byte

# A launch's tasks: source address, source layout, target address, target layout, crop, first and last + 1 operation
# (rows of all programs together), address of its readings, or of what a Gaussian blur sums across. A layout and a crop
# are places in the crops table.
TASK_COLUMNS = 8
# A run of tasks that take equally many programs: the first program, the first task, programs a task, unused.
GROUP_COLUMNS = 4
# Height, width, channels (3), unused, then three layouts: of the input, of the output, of what passes write in between.
CROP_COLUMNS = 16
# A layout: steps of channel, row and column in elements, and the dtype's place in ops.DTYPES.
INPUT_LAYOUT, OUTPUT_LAYOUT, BETWEEN_LAYOUT = 4, 8, 12


@triton.jit
def find_task(tasks, groups, num_groups):
    # This program's task, and which of the task's programs it is.
    program = tl.program_id(0)
    group = groups
    for _ in range(1, num_groups):
        group += tl.where(tl.load(group + 4) <= program, 4, 0)
    rest = program - tl.load(group).to(tl.int32)
    share = tl.load(group + 2).to(tl.int32)
    return tasks + (tl.load(group + 1) + rest // share) * 8, rest % share


@triton.jit
def rows_and_columns(first, width, BLOCK: tl.constexpr):
    # Row and column of BLOCK pixels of an image from pixel `first` on, with no division for each.
    top = first // width
    across = first - top * width + tl.arange(0, BLOCK)
    # exact: half a pixel is more than the quotient's error, for the widths that check_spans allows
    down = ((across.to(tl.float32) + 0.5) * (1.0 / width.to(tl.float32))).to(tl.int32)
    return top + down, across - down * width


@triton.jit
def load_channel(address, kind, offset, live):
    # Pixels of one channel in [0, 1], 0 where not live; kind 0 is uint8, else float32.
    if kind == 0:
        x = byte_to_unit(tl.load(address.to(tl.pointer_type(tl.uint8)) + offset, mask=live, other=0))
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=live, other=0.0)
    return x


@triton.jit
def load_pixels(address, layout, y, x, live):
    # Red, green, blue in [0, 1] of the pixels (y, x), 0 where not live.
    step = tl.load(layout)
    offset = y * tl.load(layout + 1).to(tl.int32) + x * tl.load(layout + 2).to(tl.int32)
    # one branch around the three loads, so that they are under way together
    if tl.load(layout + 3) == 0:
        octets = address.to(tl.pointer_type(tl.uint8)) + offset
        r = byte_to_unit(tl.load(octets, mask=live, other=0))
        g = byte_to_unit(tl.load(octets + step, mask=live, other=0))
        b = byte_to_unit(tl.load(octets + step * 2, mask=live, other=0))
    else:
        floats = address.to(tl.pointer_type(tl.float32)) + offset
        r = tl.load(floats, mask=live, other=0.0)
        g = tl.load(floats + step, mask=live, other=0.0)
        b = tl.load(floats + step * 2, mask=live, other=0.0)
    return r, g, b


@triton.jit
def store_channel(x, address, offset, live, kind):
    # One channel's values (float32) to their place, as uint8, float16, bfloat16 or float32.
    if kind == 0:
        tl.store(address.to(tl.pointer_type(tl.uint8)) + offset, unit_to_byte(x), mask=live)
    elif kind == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offset, x.to(tl.float16), mask=live)
    elif kind == 2:
        if INTERPRETED:
            x = round_to_bfloat16(x)
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offset, x.to(tl.bfloat16), mask=live)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offset, x, mask=live)


@triton.jit
def store_pixels(r, g, b, address, layout, y, x, live):
    # Red, green, blue to the pixels (y, x) that are live.
    kind = tl.load(layout + 3)
    step = tl.load(layout) * tl.where(kind == 0, 1, tl.where(kind == 3, 4, 2))
    offset = y * tl.load(layout + 1).to(tl.int32) + x * tl.load(layout + 2).to(tl.int32)
    store_channel(r, address, offset, live, kind)
    store_channel(g, address + step, offset, live, kind)
    store_channel(b, address + step * 2, offset, live, kind)
