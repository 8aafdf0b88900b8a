"""Damaged JPEGs among good ones through the GPU's decoder: the same come out as on the CPU, others are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hostile import WHOLE, Files

from slipstream import SlipstreamDataset, SlipstreamLoader
from slipstream.bad_samples import Report

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Of 255, the mean of a 16 x 16 picture: a GPU decoder rounds otherwise, and what it refuses goes to the CPU's.
COLOUR = 2.0


def run(paths: list[Path], device: str, **options: Any) -> tuple[dict[int, np.ndarray], Report]:
    """The valid crops by sample id, float64 [3, 16, 16], and the report."""
    crops = {}
    given: dict[str, Any] = {"pipelines": {"image": WHOLE}, "verbose": False, "device": device, **options}
    with SlipstreamLoader(SlipstreamDataset(Files(paths)), 16, **given) as loader:
        for batch in loader:
            valid = batch["_valid"].tolist()
            for row, number in enumerate(batch["_indices"].tolist()):
                if valid[row]:
                    crops[number] = batch["image"][row].cpu().numpy().astype(np.float64)
        return crops, loader.report()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("truncated", ["fail", "grey"])
def test_what_comes_out_and_what_is_named_is_as_on_the_cpu(hostile: list[Path], truncated: str) -> None:
    here, expected = run(hostile, "cpu", on_error="replace", truncated=truncated)
    there, report = run(hostile, DEVICE, on_error="replace", truncated=truncated)
    assert there.keys() == here.keys()
    assert [number for number, _, _ in report.bad] == [number for number, _, _ in expected.bad]
    assert [number for number, _, _ in report.partial] == [number for number, _, _ in expected.partial]
    unlike = {
        hostile[number].name: float(np.abs(there[number].mean((1, 2)) - here[number].mean((1, 2))).max())
        for number in here
    }
    assert max(unlike.values()) < COLOUR, sorted(unlike.items(), key=lambda pair: -pair[1])[:5]


def test_good_ones_do_not_depend_on_damaged_neighbours(hostile: list[Path]) -> None:
    crops, report = run(hostile, DEVICE, on_error="replace")
    good = [hostile[number] for number in sorted(crops)][:24]
    bad = [hostile[number] for number, _, _ in report.bad][:24]
    alone, _ = run(good, DEVICE, on_error="replace")
    among, _ = run([path for pair in zip(good, bad, strict=True) for path in pair], DEVICE, on_error="replace")
    for place in range(len(good)):
        assert np.abs(alone[place] - among[2 * place]).mean() < 1.0, good[place].name
