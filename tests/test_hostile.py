"""Damaged and odd JPEGs through the loader under every policy: what Pillow takes comes out, the rest is named."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from own_source import ImageSource
from PIL import Image, ImageFile
from process_memory import peak

from slipstream import DecodeError, Resize, SlipstreamDataset, SlipstreamLoader
from slipstream.bad_samples import Report
from slipstream.decode_pillow import decode_with_pillow

WHOLE = Resize((16, 16))
MAX_PIXELS = 178_956_970
COLOUR = 4.0  # of 255: a 16 x 16 picture's mean against the whole's


class Files(ImageSource):
    """The files as they are."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, ids, field="image"):
        return [np.frombuffer(self.paths[int(i)].read_bytes(), np.uint8) for i in ids]

    def describe(self, sample_id) -> str:
        return self.paths[sample_id].name


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


@pytest.fixture(scope="module")
def compiled(hostile: list[Path], colours: dict[int, np.ndarray]) -> None:
    """The crop kernel, which may take longer to compile than any batch to decode."""
    good = [hostile[number] for number in list(colours)[:2]]
    with SlipstreamLoader(
        SlipstreamDataset(Files(good)), 2, pipelines={"image": WHOLE}, device="cpu", verbose=False
    ) as loader:
        next(iter(loader))


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("compiled")
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
    assert set(crops) == set(colours)  # DALI alone would refuse eight of them and mend eleven others
    assert bad == set(range(len(hostile))) - set(colours)  # and nothing is lost
    assert report.partial == ()
    for number, mean in colours.items():
        found = crops[number].double().mean((1, 2)).numpy()
        assert np.abs(found - mean).max() < COLOUR, hostile[number].name
    assert all(reason for _, _, reason in report.bad)
    assert slowest < 16  # a second a file, at the most
    with capsys.disabled():
        print(f"\n{policy}: {len(crops)} of {len(hostile)} come out, {len(bad)} are named;", end="")
        print(f" slowest batch {slowest:.2f} s; peak {peak():.0f} MB", end="")
        if policy == "replace":
            print(table(hostile, {number: reason for number, _, reason in report.bad}), end="")


def table(files: list[Path], reasons: dict[int, str]) -> str:
    """By kind of file: how many come out, how many are named, and the commonest reason."""
    lines = [f"\n  {'kind':<20} {'files':>5} {'out':>5} {'named':>5}  mostly"]
    for kind in sorted({path.parent.name for path in files}):
        numbers = [number for number, path in enumerate(files) if path.parent.name == kind]
        named = Counter(reasons[number].split("(")[0] for number in numbers if number in reasons)
        mostly = named.most_common(1)[0][0] if named else ""
        bad = named.total()
        lines.append(f"  {kind:<20} {len(numbers):>5} {len(numbers) - bad:>5} {bad:>5}  {mostly:.70}")
    return "\n".join(lines)


def test_raising_names_each_bad_one_and_goes_on(hostile: list[Path], colours: dict[int, np.ndarray]) -> None:
    options = dict(pipelines={"image": WHOLE}, device="cpu", verbose=False, num_threads=2)
    good, bad = [], {}
    with SlipstreamLoader(SlipstreamDataset(Files(hostile)), 1, **options) as loader:
        batches = iter(loader)
        for _ in range(len(loader)):
            try:
                good += next(batches)["_indices"].tolist()
            except DecodeError as error:
                bad |= {number: (path, reason) for number, path, reason in error.failures}
    assert set(good) == set(colours) and set(bad) == set(range(len(hostile))) - set(colours)
    assert all(path == hostile[number].name and reason for number, (path, reason) in bad.items())


def lenient_mean(path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | None:
    """The mean colour of what Pillow itself makes of a file with its own switch; None where that is nothing."""
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                return np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
        except Exception:
            return None


def test_truncated_ones_come_out_in_grey_and_are_counted(
    hostile: list[Path], colours: dict[int, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    options = dict(pipelines={"image": WHOLE}, device="cpu", verbose=False, num_threads=2)

    def run() -> tuple[dict[int, np.ndarray], Report]:
        with SlipstreamLoader(
            SlipstreamDataset(Files(hostile)), 16, on_error="replace", truncated="grey", **options
        ) as loader:
            return {
                number: batch["image"][row].numpy()
                for batch in loader
                for row, number in enumerate(batch["_indices"].tolist())
                if batch["_valid"][row]
            }, loader.report()

    crops, report = run()
    expected = {number: lenient_mean(path, monkeypatch) for number, path in enumerate(hostile)}
    # One of 6 KB says that it has 13 million pixels: Pillow fills them in.
    taken = {number for number, mean in expected.items() if mean is not None}
    empty = {number for number, _, reason in report.bad if "cannot hold" in reason} & taken
    assert len(empty) == 1 and not empty & set(colours)
    taken -= empty
    assert set(colours) < taken
    assert set(crops) == taken
    assert {number for number, _, _ in report.bad} == set(range(len(hostile))) - taken
    assert {number for number, _, _ in report.partial} == taken - set(colours)
    assert report.greyed == len(report.partial)
    assert all(path == hostile[number].name and reason for number, path, reason in report.partial)
    for number in taken:
        found = crops[number].astype(np.float64).mean((1, 2))
        assert np.abs(found - expected[number]).max() < COLOUR, hostile[number].name
    again, _ = run()
    assert all(np.array_equal(again[number], crop) for number, crop in crops.items())
    with capsys.disabled():
        print(f"\ngrey: {len(taken)} of {len(hostile)} come out, {len(report.partial)} in part", end="")


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
