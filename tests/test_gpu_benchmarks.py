"""The GPU benchmark that runs on a CPU too: its dry run, so that it is whole when there is a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_a_table_of_every_launch_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    gpu_crop, report = importlib.import_module("gpu_crop"), importlib.import_module("report")
    rows = [dict(zip(gpu_crop.OPTION_NAMES, row, strict=True)) for row in gpu_crop.OPTIONS]
    told = [{"options": row, "launches_milliseconds": 2.0, "fraction_of_copy": 0.5} for row in rows]
    result = {"settings": {"images": 1}, "moved_bytes": 1, "options": [*told, {"options": rows[0], "error": "no"}]}
    about = {"gpu": None, "cpu": "", "cores": 1, "versions": {}, "commit": "", "date": ""}
    (*_, table) = report.gpu_crop_tables(result | about)
    assert table.count("50.0%") == len(rows) and "| no |" in table


def test_torchvisions_crops_are_like_ours_as_a_gpu_cuts_them(photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torchvision resizes in float32 and rounds once: beside hard edges that is farther than elsewhere."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    gpu_batch, gpu_peers = importlib.import_module("gpu_batch"), importlib.import_module("gpu_peers")
    geometry = importlib.import_module("torchvision.transforms.v2.functional._geometry")
    monkeypatch.setattr(geometry, "_do_native_uint8_resize_on_cpu", lambda interpolation: False)
    batch = gpu_batch.make_batch(photos[0].parents[1], gpu_batch.Shape(images=24), torch.device("cpu"), 0)
    crops = gpu_peers.with_torchvision(batch)()
    gpu_peers.check_peer("torchvision v2", crops, batch)
    with pytest.raises(AssertionError):
        gpu_peers.check_peer("torchvision v2", [crop.flip(-1) for crop in crops], batch)
