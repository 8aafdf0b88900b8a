"""The long run (soak.py) in short, and what it would complain about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from soak import MB, Census, complaints, leftovers

POINT = Census(
    part="some",
    done=0.0,
    samples=0,
    seconds=0.0,
    resident=1000 * MB,
    trimmed=900 * MB,
    anonymous=500 * MB,
    threads=10,
    ours=0,
    descriptors=7,
    maps=1400,
    sockets=0,
    gpu_allocated=0,
    gpu_used=2000 * MB,
)


def test_a_short_run_leaves_and_adds_nothing(tmp_path: Path) -> None:
    script = Path(__file__).with_name("soak.py")
    # In the first seconds the allocator still takes its part, hence more room than a long run's 2 %.
    short = ["--samples", "12000", "--loaders", "12", "--growth", "0.05"]
    command = [sys.executable, script, *short, "--json", tmp_path / "soak.json"]
    done = subprocess.run(command, timeout=200, env=os.environ, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["failed"] == []
    last = {point["part"]: point for point in record["points"] if point["done"] == 1}
    assert {part: point["samples"] for part, point in last.items()} == {
        "shuffle=True": 6000,
        "shuffle=windowed": 6000,
        "loaders": 12,
    }


def points(**grown: float) -> list[Census]:
    """Twenty points of a part in which these grow to so many times themselves, or from 0 to so many."""
    found = []
    for step in range(1, 21):
        more = {name: int((getattr(POINT, name) or 1) * (1 + (by - 1) * step / 20)) for name, by in grown.items()}
        found.append(replace(POINT, done=step / 20, **more))
    return found


GROWN = {"resident": 1.03, "trimmed": 1.03, "gpu_used": 1.03, "maps": 1.1, "gpu_allocated": 9 * MB}


@pytest.mark.parametrize("name", [*GROWN, "threads", "descriptors", "sockets"])
def test_growth_is_found(name: str) -> None:
    (found,) = complaints(points(**{name: GROWN.get(name, 20)}))
    assert found.startswith(f"some: {name} grew from")
    assert complaints(points(**{name: 1.001})) == []


def test_growth_before_the_first_tenth_is_the_start() -> None:
    early = replace(POINT, done=0.05, trimmed=500 * MB, resident=500 * MB)
    assert complaints([early, *points()]) == []


def test_what_is_left_is_found() -> None:
    assert leftovers(POINT, POINT) == []
    for name in ("ours", "threads", "descriptors", "sockets", "gpu_allocated"):
        assert len(leftovers(POINT, replace(POINT, **{name: getattr(POINT, name) + 9}))) == 1
