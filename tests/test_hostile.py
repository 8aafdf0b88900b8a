"""Damaged and odd JPEGs through the loader under every policy: what Pillow takes comes out, the rest is named."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

from slipstream import Resize, SlipstreamDataset, SlipstreamLoader
from slipstream.decode_pillow import decode_with_pillow

WHOLE = Resize((16, 16))
MAX_PIXELS = 178_956_970
# Files that Pillow refuses and DALI's JPEG decoder mends, such as bytes too many between two markers: pictures all the
# same. The share of all files is bounded, so that a decoder that takes anything fails here.
MOST_MENDED = 0.03
COLOUR = 4.0  # of 255: a 16 x 16 picture's mean against the whole's


class Files:
    """The files as they are."""

    def __init__(self, paths: list[Path]) -> None:
        self.fields = {"image": "image"}
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, ids, field="image"):
        return [np.frombuffer(self.paths[int(i)].read_bytes(), np.uint8) for i in ids]

    def values(self, ids, field):
        raise KeyError(field)

    def describe(self, sample_id) -> str:
        return self.paths[sample_id].name

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def hostile() -> list[Path]:
    paths = sorted(path for path in (SHARED / "hostile").rglob("*") if path.is_file() and path.suffix != ".csv")
    if not paths:
        pytest.skip("../shared/hostile is not here")
    return paths


@pytest.fixture(scope="module")
def colours(hostile: list[Path]) -> dict[int, np.ndarray]:
    """The mean colour of each file that Pillow accepts strictly."""
    means = {}
    for index, path in enumerate(hostile):
        try:
            pixels = decode_with_pillow(np.frombuffer(path.read_bytes(), np.uint8), max_pixels=MAX_PIXELS)
        except Exception:
            continue
        means[index] = pixels.reshape(-1, 3).mean(0)
    return means


@pytest.mark.timeout(180)
@pytest.mark.parametrize("policy", ["replace", "skip", "resample"])
def test_good_ones_come_out_and_bad_ones_are_named(
    hostile: list[Path], colours: dict[int, np.ndarray], policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(pipelines={"image": WHOLE}, device="cpu", verbose=False, on_error=policy, num_threads=2)
    slowest, crops = 0.0, {}
    with SlipstreamLoader(SlipstreamDataset(Files(hostile)), 16, **options) as loader:
        batches = iter(loader)
        for _ in range(len(loader)):
            begin = time.monotonic()
            batch = next(batches)
            slowest = max(slowest, time.monotonic() - begin)
            for row, number in enumerate(batch["_indices"].tolist()):
                if policy != "replace" or batch["_valid"][row]:
                    crops[number] = batch["image"][row]
        report = loader.report()
    bad = {number for number, _, _ in report.bad}
    assert not bad & set(colours)  # nothing good is refused
    assert set(crops) == set(range(len(hostile))) - bad  # and nothing is lost
    mended = set(crops) - set(colours)
    assert len(mended) <= MOST_MENDED * len(hostile)
    for number, mean in colours.items():
        found = crops[number].double().mean((1, 2)).numpy()
        assert np.abs(found - mean).max() < COLOUR, hostile[number].name
    assert all(reason for _, _, reason in report.bad)
    assert slowest < 16  # a second a file, at the most
    with capsys.disabled():
        print(
            f"\n{policy}: {len(crops)} of {len(hostile)} come out, {len(mended)} of them mended by DALI alone;", end=""
        )
        print(f" {len(bad)} named; slowest batch {slowest:.2f} s; peak {peak_megabytes():.0f} MB", end="")
        if policy == "replace":
            print("".join(f"\n  {path}: {reason:.90}" for _, path, reason in report.bad[:8]), "\n  ...", end="")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_neighbours_of_bad_ones_are_untouched(hostile: list[Path], colours: dict[int, np.ndarray]) -> None:
    good = [hostile[number] for number in sorted(colours)][:20]
    bad = [path for number, path in enumerate(hostile) if number not in colours][:20]
    mixed = [path for pair in zip(good, bad, strict=True) for path in pair]

    def crops(paths: list[Path], policy: str) -> dict[str, bytes]:
        options = dict(pipelines={"image": WHOLE}, device="cpu", verbose=False, on_error=policy, num_threads=2)
        with SlipstreamLoader(SlipstreamDataset(Files(paths)), 8, **options) as loader:
            return {
                paths[number].name: batch["image"][row].numpy().tobytes()
                for batch in loader
                for row, number in enumerate(batch["_indices"].tolist())
            }

    alone, among = crops(good, "raise"), crops(mixed, "replace")
    assert all(among[path.name] == alone[path.name] for path in good)
