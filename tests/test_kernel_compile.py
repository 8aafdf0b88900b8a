"""Every Triton kernel, compiled for GPUs that need not be there: no spills, exact arithmetic where it is promised."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from slipstream_kernels import blur, bytes_at, color, resized_crop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CROP = dict(resized_crop.launch_options())
WEIGHTS = dict(resized_crop.WEIGHT_OPTIONS)
COLOR = dict(color.launch_options())
CROP_TYPES = {"images": "*i64", "tasks": "*i64", "outputs": "*i64", "strips": "*i32", "weights": "*i32"}
CROP_TYPES |= {"between": "*i32", "num_crops": "i32", "num_strips": "i32"}
PROGRAMS = {"tasks": "*i64", "groups": "*i64", "num_groups": "i32", "crops": "*i64", "programs": "*fp32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")

# kernel -> (its module, arguments' types, launch options with the constexprs among them)
KERNELS = {
    "resize_weights_kernel": (
        resized_crop,
        {"tasks": "*i64", "outputs": "*i64", "weights": "*i32", "num_crops": "i32"},
        {**WEIGHTS, "JOB": 10},
    ),
    "resized_crop_kernel": (resized_crop, CROP_TYPES, {**CROP, "JOB": 10, "PLANES": False, "INTERLEAVED": False}),
    "resized_crop_kernel, interleaved": (
        resized_crop,
        CROP_TYPES,
        {**CROP, "JOB": 10, "PLANES": False, "INTERLEAVED": True},
    ),
    "resized_crop_kernel, of planes": (
        resized_crop,
        CROP_TYPES,
        {**CROP, "JOB": 10, "PLANES": True, "INTERLEAVED": False},
    ),
    "bytes_at_kernel": (bytes_at, {"addresses": "*i64", "out": "*u8", "count": "i32"}, dict(bytes_at.LAUNCH)),
    "readings_kernel": (color, PROGRAMS, COLOR),
    "equalize_kernel": (color, PROGRAMS, COLOR),
    "pixels_kernel": (color, PROGRAMS, {**COLOR, "GATHERS": False}),
    "pixels_kernel, gathering": (color, PROGRAMS, {**color.launch_options(gathers=True), "GATHERS": True}),
    "gaussian_blur_kernel": (blur, PROGRAMS, dict(blur.blur_options())),
    "box_blur_kernel": (blur, PROGRAMS | {"step": "i32"}, dict(blur.box_options())),
    "box_line_kernel": (blur, PROGRAMS | {"down": "i32"}, COLOR),
}

# The multiply-adds that a kernel asks for: divide_many's twelve for each of a thread's pixels (in normalize, and where
# there are readings in autocontrast too), two for each of autocontrast's reciprocals, and three for each of the
# Gaussian's pixels across bytes, across floats and down.
FUSED = {name: 4 * 12 for name in KERNELS if "programs" in KERNELS[name][1]}
FUSED |= {name: 2 * 4 * 12 + 6 for name in KERNELS if "pixels" in name}
FUSED |= {"gaussian_blur_kernel": 4 * 12 + 3 * 4 * 3, "box_blur_kernel": 8 * 12}


def compile_for(name: str, capability: int) -> Any:
    module, types, launch = KERNELS[name]
    constants = {key: value for key, value in launch.items() if key not in OPTIONS}
    kernel = getattr(module, name.split(",")[0])
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {key: value for key, value in launch.items() if key in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def test_every_kernel_is_here() -> None:
    assert triton.__file__ is not None
    source = Path(resized_crop.__file__).parent
    kernels = {
        name
        for path in source.glob("*.py")
        for name in re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text())
    }
    assert kernels == {name.split(",")[0] for name in KERNELS}


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("name", list(KERNELS))
def test_it_compiles_without_spills_and_exactly(
    name: str, capability: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = compile_for(name, capability)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    with capsys.disabled():
        print(f"\n{name} sm_{capability}: {registers} registers, {stack + local} bytes spilled", end="")
    assert stack == local == 0
    ptx = compiled.asm["ptx"]
    single, pairs = (len(re.findall(rf"\bfma\.rn\.{kind} ", ptx)) for kind in ("f32", "f32x2"))
    idle = single + 2 * pairs - FUSED.get(name, 0)  # halves of pairs, which there are on sm_120 only
    assert 0 <= idle <= pairs // 2, "a fused multiply-add that nobody asked for changes the last bit"
    assert not re.search(r"\bfma\.\S*f64|\bmad\.\S*f(32|64)", ptx)
    if "resize" in name:
        assert not re.search(r"\bdiv\.(full|approx)|\bsqrt\.approx", ptx), "approximate arithmetic"
    # What is only promised to a tolerance may use a division within 2 units of the last place and a square root within
    # 1 (hue, perspective, noise), but no approximate logarithm or cosine: they are good to 1e-7 only of 1.
    assert not re.search(r"\b(div|rcp)\.approx|\b(lg2|sin|cos|tanh)\.", ptx), "coarse arithmetic"
    # and the Gaussian's weights, whose exponentials are summed and divided by, one within 2 units
    assert ("ex2." in ptx) == ("gaussian" in name)
    if name == "box_blur_kernel":
        assert "mma" in ptx, "the products belong on the tensor cores"
    if name.startswith("resized_crop") or name == "gaussian_blur_kernel":
        across, barrier, down = ptx.partition("bar.sync")
        assert barrier and "st.global.b32" in across and "ld.global.b32" in down and "bar.sync" not in down
        assert "ld.global.nc" not in ptx, "such a load need not see what this launch wrote"
    # Triton up to 3.6 gives a warp's lanes to the rows of a block of two axes: as many cache lines for each load.
    assert not re.search(r"tensor<\d+x\d+x!tt\.ptr", compiled.asm["ttgir"]), "what is loaded and stored is flat"
    if name == "resize_weights_kernel":
        assert "div.rn.f64" in ptx
    elif name.startswith("resized_crop"):
        assert not re.search(r"\.f(16|32|64)\b", ptx), "the crop kernel is whole-number arithmetic"
    elif name not in ("bytes_at_kernel", "readings_kernel", "equalize_kernel"):
        assert "cvt.rn.bf16" in ptx, "the interpreter's cast is not the hardware's"
