"""The GPU benchmark that runs on a CPU too: its dry run, so that it is whole when there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_loaders_dry_run(tmp_path: Path) -> None:
    folder = REPOSITORY / "benchmarks"
    roots = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "SLIPSTREAM_COMMIT": "none"}
    command = [sys.executable, folder / "gpu_loader.py", "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, env=variables, check=False, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    subprocess.run([sys.executable, folder / "report.py", "--results", tmp_path], check=True, capture_output=True)
    result = json.loads((tmp_path / "gpu-loader.json").read_text())
    assert min(result["decode"].values()) > 0 and min(rate["min"] for rate in result["loader"].values()) > 0
    assert all(told["unlike"] == 0 for told in result["differences"].values())  # on the CPU one decoder, four times
