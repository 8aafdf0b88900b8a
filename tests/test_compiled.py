"""The machine that runs compiled kernels on the CPU finds what it is there to find."""

# A jit function is typed as its Python source.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import os

import compiled
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from program_oracle import AFFINE, FILL, noise, program_of, warp_row
from slipstream_kernels import ops
from slipstream_kernels.crop_jobs import BICUBIC, OutputFormat
from slipstream_kernels.ops import ProgramFormat
from slipstream_kernels.ragged import RaggedBatch

HEAD = """.version 8.4
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0)
.maxntid 32
{
.reg .pred %p<4>;
.reg .b32 %r<9>;
"""

# A program of each kind of pass.
PROGRAMS = {
    "blur": [[ops.GAUSSIAN_BLUR, 9, 9, 2.0, 2.0]],
    "box blur": [[ops.BOX_BLUR, 1.2]],
    "box line blur": [[ops.BOX_BLUR, 3.0]],
    "contrast": [[ops.CONTRAST, 0.7], [ops.NORMALIZE, *[0.5] * 6]],
    "equalize": [[ops.EQUALIZE]],
    "sharpness": [[ops.SHARPNESS, 1.8]],
    "warp": [warp_row(AFFINE, False, FILL)],
}


@triton.jit
def reversing_kernel(values, BARRIER: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(values + place, place)
    if BARRIER:
        tl.debug_barrier()
    reverse = tl.load(values + 255 - place)
    if BARRIER:
        tl.debug_barrier()
    tl.store(values + place, reverse)


@triton.jit
def passing_kernel(values):
    """Each block adds to what the one before left."""
    block = tl.program_id(0)
    tl.store(values + block + 1, tl.load(values + block) + 1)


@triton.jit
def reading_kernel(addresses, out):
    tl.store(out, tl.load(tl.load(addresses).to(tl.pointer_type(tl.int32))))


def run_ptx(body: str, shared: int = 0, argument: int = 0) -> None:
    compiled.run(HEAD + body + "\nret;\n}\n", (1, 1, 1), shared, [argument])


@triton.jit
def approximate_kernel(values, divisors, quotients, powers, roots):
    place = tl.arange(0, 256)
    value, divisor = tl.load(values + place), tl.load(divisors + place)
    tl.store(quotients + place, value / divisor)
    tl.store(powers + place, tl.exp2(value))
    tl.store(roots + place, tl.sqrt(value))


def test_approximate_instructions_are_as_wrong_as_they_may_be() -> None:
    """By two units in the last place (one for a root), up and down."""
    values, divisors = torch.rand(256) + 1, torch.rand(256) + 1
    found = [torch.zeros(256) for _ in range(3)]
    with compiled.running_compiled():
        approximate_kernel[(1,)](values, divisors, *found)
    for got, exact, steps in zip(found, (values / divisors, values.exp2(), values.sqrt()), (2, 2, 1), strict=True):
        off = got.view(torch.int32) - exact.view(torch.int32)
        assert off.abs().max() <= steps + 1  # torch's own exp2 may be off by one
        assert 50 < int((off < 0).sum()) < 206 and 50 < int((off > 0).sum()) < 206


def test_what_a_barrier_parts_is_seen_and_without_it_is_a_race() -> None:
    values = torch.zeros(256, dtype=torch.int32)
    with compiled.running_compiled():
        reversing_kernel[(1,)](values, True)
        assert torch.equal(values, torch.arange(255, -1, -1, dtype=torch.int32))
        with pytest.raises(RuntimeError, match=r"reversing_kernel: race: .*test_compiled.py:\d+"):
            reversing_kernel[(1,)](values, False)


def test_blocks_that_rest_on_their_order_race() -> None:
    with compiled.running_compiled(), pytest.raises(RuntimeError, match="passing_kernel: race: "):
        passing_kernel[(8,)](torch.zeros(9, dtype=torch.int32))


@pytest.mark.parametrize(("offset", "fault"), [(2, "a misaligned address"), (None, "an address near zero")])
def test_bad_addresses_are_faults(offset: int | None, fault: str) -> None:
    values = torch.arange(7, dtype=torch.int32)
    address = torch.tensor([4 if offset is None else values.data_ptr() + offset])
    with compiled.running_compiled(), pytest.raises(RuntimeError, match=f"reading_kernel: {fault}.*{int(address):x}"):
        reading_kernel[(1,)](address, torch.zeros(1, dtype=torch.int32))


@pytest.mark.skipif("libasan" not in os.environ.get("LD_PRELOAD", ""), reason="make sanitize looks for it")
def test_an_address_past_an_allocation_is_a_fault() -> None:
    values = torch.arange(8, dtype=torch.int32)
    address = torch.tensor([values.data_ptr() + 28])
    with compiled.running_compiled():
        reading_kernel[(1,)](address, values)
        with pytest.raises(RuntimeError, match="reading_kernel: an address outside an allocation"):
            reading_kernel[(1,)](address + 4, values)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 16;\n@%p1 bar.sync 0;", "some threads wait for others"),
        (
            "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 16;\n@%p1 bra $L1;\nbar.sync 0;\nret;\n$L1:\nbar.sync 0;",
            "threads meet at unlike barriers",
        ),
        ("mov.b32 %r1, global_smem;\nld.shared.b32 %r2, [%r1+64];", "an address outside shared memory"),
        ("mov.b32 %r1, global_smem;\nld.shared.b32 %r2, [%r1+2];", "a misaligned shared address"),
        ("mov.u32 %r1, %tid.x;\nmov.b32 %r2, global_smem;\nst.shared.b32 [%r2], %r1;", "race: writes what another"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, 65535;", "a part of a warp"),
    ],
)
def test_each_fault_is_told(body: str, fault: str) -> None:
    with pytest.raises(RuntimeError, match=f"kernel: {fault}.*line "):
        run_ptx(body, shared=64)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no translation of tanh.approx.f32 %r1, %r2 \(line 9\)"):
        run_ptx("tanh.approx.f32 %r1, %r2;")


def launch(kernel: str) -> torch.Tensor:
    """A batch of one, through this kernel among others."""
    from slipstream_kernels.programs import run_programs
    from slipstream_kernels.resized_crop import resized_crop

    image = noise(0, 1, 3, 60, 70)
    if kernel == "crop":
        job = np.array([[[0, 0, 60, 70, 40, 46, 0, 0, BICUBIC, 0]]], np.int32)
        return resized_crop(RaggedBatch.from_images([image[0]]), job, [OutputFormat(size=(40, 46))])[0]
    return run_programs([image], [program_of(PROGRAMS[kernel])], [ProgramFormat()])[0]


@pytest.mark.parametrize("kernel", ["crop", "blur"])
def test_our_kernels_need_their_barriers(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes across and down, through scratch memory."""
    run = compiled.run
    dropped = []

    def without_barriers(ptx: str, *rest) -> None:
        dropped.append(ptx.count("bar.sync"))
        run(ptx.replace("bar.sync", "// bar.sync"), *rest)

    with compiled.running_compiled():
        launch(kernel)
        monkeypatch.setattr(compiled, "run", without_barriers)
        with pytest.raises(RuntimeError, match=r"race: .*\(\w+\.py:\d+\)"):
            launch(kernel)
    assert max(dropped) == 1


@triton.jit
def copying_kernel(source, target, step):
    place = tl.arange(0, 128)
    tl.store(target + place, tl.load(source + place * step))


@pytest.mark.parametrize(("step", "sectors"), [(1, 4.0), (2, 8.0), (8, 32.0), (99, 32.0)])
def test_sectors_are_counted(step: int, sectors: float) -> None:
    source, target = (torch.zeros(99 * 128 + 8, dtype=torch.int32)[at:] for at in (0, 0))
    begin = -source.data_ptr() % 32 // 4
    with compiled.running_compiled(), compiled.noting_sectors() as found:
        copying_kernel[(1,)](source[begin:], target[begin:], step)
    assert found == [("copying_kernel", pytest.approx(sectors, abs=1.0))]


@pytest.mark.parametrize("kernel", ["crop", *PROGRAMS])
def test_what_a_warp_asks_for_lies_together(kernel: str) -> None:
    """Bytes of three channels 1.5 pixels apart are five or six sectors; a table read by each pixel's value is many."""
    with compiled.running_compiled(), compiled.noting_sectors() as found:
        launch(kernel)
    assert len(found) > 0
    assert all(sectors <= (32 if kernel == "equalize" else 8) for _, sectors in found), found
