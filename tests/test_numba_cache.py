"""Where compiled CPU kernels are kept: a process that can write nowhere has them all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import slipstream_kernels

# A function of the kernels' is compiled, one of the library's with a signature of its own, and a child looks.
PROGRAM = """
import subprocess, sys
import slipstream.jpeg_scan
from slipstream.progress import tell_compiling
tell_compiling()
from slipstream_kernels import numba_cache
from slipstream_kernels.philox import philox4x32
import numpy as np
philox4x32(*np.zeros(6, np.uint32))
import os
folder = os.environ.get("NUMBA_CACHE_DIR", "")
look = "import os; from slipstream_kernels import numba_cache as c; print(c.STAYS, os.environ.get('NUMBA_CACHE_DIR'))"
child = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
print(numba_cache.STAYS, folder, any(name.endswith(".nbi") for _, _, names in os.walk(folder) for name in names))
print(child.stdout + child.stderr)
"""


def run(tmp_path: Path, *, writable: bool) -> tuple[list[str], str]:
    root = Path(slipstream_kernels.__file__).parents[2]
    for package in ("slipstream", "kernels/slipstream_kernels"):
        copy = tmp_path / package
        shutil.copytree(root / package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if not writable:
            (copy / "__pycache__").touch()  # also for root, whom permissions do not hold
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | {
        "PYTHONPATH": f"{tmp_path}:{tmp_path}/kernels",
        "XDG_CACHE_HOME": "/dev/null",
        "TMPDIR": str(temporary),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
    return done.stdout.splitlines(), done.stderr


def test_a_process_that_can_write_nowhere_compiles_into_a_folder_of_its_own(tmp_path: Path) -> None:
    (told, here, child, *_), warned = run(tmp_path, writable=False)
    folder = here.split()[1]
    assert told == "slipstream: compiling CPU kernels, in this process (up to a minute)"
    assert here == f"False {folder} True" and folder.startswith(f"{tmp_path}/tmp/slipstream-numba-")
    assert child == f"True {folder}"
    assert warned.count("\n") == 1 and "set NUMBA_CACHE_DIR to a folder that stays" in warned


def test_one_that_can_write_beside_the_package_is_left_alone(tmp_path: Path) -> None:
    (told, here, child, *_), warned = run(tmp_path, writable=True)
    assert told.endswith("once on this machine (up to a minute)")
    assert (here, child, warned) == ("True  False", "True None", "")
    assert list((tmp_path / "kernels/slipstream_kernels/__pycache__").glob("philox.philox4x32-*.nbi"))
