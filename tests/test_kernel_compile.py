"""Every Triton kernel, compiled for GPUs that need not be there: no spills, exact arithmetic where it is promised."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from slipstream_kernels import color, resized_crop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CROP = dict(resized_crop.launch_options())
WEIGHTS = dict(resized_crop.WEIGHT_OPTIONS)
COLOR = dict(color.launch_options())
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")

# kernel -> (its module, arguments' types, launch options with the constexprs among them)
KERNELS = {
    "resize_weights_kernel": (
        resized_crop,
        {"tasks": "*i64", "outputs": "*i64", "weights": "*i32", "num_crops": "i32"},
        {**WEIGHTS, "JOB": 10},
    ),
    "resized_crop_kernel": (
        resized_crop,
        {
            "images": "*i64",
            "tasks": "*i64",
            "outputs": "*i64",
            "tiles": "*i32",
            "weights": "*i32",
            "num_crops": "i32",
            "num_tiles": "i32",
        },
        {**CROP, "JOB": 10},
    ),
    "grey_sums_kernel": (
        color,
        {
            "crops": "*i64",
            "programs": "*fp32",
            "tiles": "*i32",
            "sums": "*fp32",
            "num_tiles": "i32",
            "level": "i32",
        },
        {**COLOR, "COLUMNS": color.CROP_COLUMNS},
    ),
    "pixel_ops_kernel": (
        color,
        {"crops": "*i64", "programs": "*fp32", "tiles": "*i32", "sums": "*fp32", "num_tiles": "i32"},
        {**COLOR, "COLUMNS": color.CROP_COLUMNS},
    ),
}


def compile_for(name: str, capability: int) -> Any:
    module, types, launch = KERNELS[name]
    constants = {key: value for key, value in launch.items() if key not in OPTIONS}
    source = ASTSource(getattr(module, name), {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {key: value for key, value in launch.items() if key in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def test_every_kernel_is_here() -> None:
    assert triton.__file__ is not None
    source = Path(resized_crop.__file__).parent
    kernels = {
        name
        for path in source.glob("*.py")
        for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text())
    }
    assert kernels == set(KERNELS)


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
    assert not re.search(r"\bfma\.|\bmad\.\S*f(32|64)", ptx), "a fused multiply-add changes the last bit"
    assert not re.search(r"\bdiv\.(full|approx)|\brcp\.approx|\bex2|\bsqrt\.approx", ptx), "approximate arithmetic"
    if name == "resize_weights_kernel":
        assert "div.rn.f64" in ptx
    elif name == "resized_crop_kernel":
        assert not re.search(r"\.f(16|32|64)\b", ptx), "the crop kernel is whole-number arithmetic"
        assert "mma" in ptx, "the products belong on the tensor cores"
    else:
        assert re.search(r"\bdiv\.rn\.(ftz\.)?f32", ptx)
        assert "pixel" not in name or "cvt.rn.bf16" in ptx, "the interpreter's cast is not the hardware's"
