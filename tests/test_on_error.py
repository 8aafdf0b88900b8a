"""Bad samples under each policy: neighbours untouched, the count and order of steps unchanged, each named once."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litdata_samples import plain, write
from PIL import Image

from slipstream import (
    CenterCrop,
    CutMix,
    DecodeError,
    MixUp,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    ReadError,
    SlipstreamDataset,
    SlipstreamLoader,
)
from slipstream.bad_samples import resampled_positions

CROPS = [
    MultiRandomResizedCrop({"a": dict(size=16), "b": CenterCrop(24)}, return_boxes=True),
    MultiCropPipeline({"a": [Normalize()]}),
]
BAD = {3: "torn", 4: "small", 9: "unreadable", 10: "text", 11: "label"}


class Damaged:
    """Twenty images, of which some cannot be decoded, read or cropped, and a label that cannot be read."""

    def __init__(self, bad: dict[int, str] = BAD, count: int = 20) -> None:
        self.fields = {"image": "image", "label": "int", "name": "str"}
        rng = np.random.default_rng(0)
        self.files = []
        self.bad = bad
        for index in range(count):
            side = 10 if bad.get(index) == "small" else 40
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (side, 50, 3), dtype=np.uint8)).save(stream, "JPEG")
            data = stream.getvalue()
            self.files.append({"torn": data[: len(data) // 2], "text": b"not an image"}.get(bad.get(index, ""), data))

    def __len__(self) -> int:
        return len(self.files)

    def _refuse(self, ids, kind: str) -> None:
        found = [(int(i), f"memory:{i}", f"no {kind}") for i in ids if self.bad.get(int(i)) == kind]
        if found:
            raise ReadError(found)

    def read(self, ids, field="image"):
        self._refuse(ids, "unreadable")
        return [np.frombuffer(self.files[i], np.uint8) for i in ids]

    def values(self, ids, field) -> list[Any]:
        if field == "label":
            self._refuse(ids, "label")
            return [int(i) % 7 for i in ids]
        return [f"name {i}" for i in ids]

    def describe(self, sample_id) -> str:
        return f"memory:{sample_id}"

    def close(self) -> None:
        pass


def make(source=None, **options) -> SlipstreamLoader:
    options = {"batch_size": 4, "pipelines": {"image": CROPS}, "device": "cpu", "verbose": False} | options
    return SlipstreamLoader(SlipstreamDataset(source or Damaged()), **options)


@pytest.fixture(scope="module")
def clean() -> dict[int, dict[str, torch.Tensor]]:
    """Every sample's crops from a source where nothing is wrong."""
    with make(Damaged({4: "small"}), on_error="replace") as loader:
        return {
            number: {name: batch[name][row] for name in ("a", "b", "label")}
            for batch in loader
            for row, number in enumerate(batch["_indices"].tolist())
        }


def by_id(batches, name: str) -> dict[int, torch.Tensor]:
    return {n: each for batch in batches for n, each in zip(batch["_indices"].tolist(), batch[name], strict=True)}


def test_replaced_samples_are_grey_and_not_valid(clean) -> None:
    with make(on_error="replace") as loader:
        batches = list(loader)
    assert [len(batch["_indices"]) for batch in batches] == [4] * 5
    valid, crops, plain = by_id(batches, "_valid"), by_id(batches, "b"), by_id(batches, "a")
    for number in range(20):
        assert bool(valid[number]) == (number not in BAD), number
        if number in BAD and BAD[number] != "label":
            assert (crops[number] == 128).all()
        elif number not in BAD:
            assert torch.equal(crops[number], clean[number]["b"]) and torch.equal(plain[number], clean[number]["a"])
    assert batches[0]["label"].dtype == torch.int64  # one that cannot be read does not make a list of it


def test_skipped_samples_shorten_their_batch_alone(clean) -> None:
    with make(on_error="skip") as loader:
        batches = list(loader)
    assert [batch["_indices"].tolist() for batch in batches] == [
        [0, 1, 2], [5, 6, 7], [8], [12, 13, 14, 15], [16, 17, 18, 19]
    ]  # fmt: skip
    for number, crop in by_id(batches, "a").items():
        assert torch.equal(crop, clean[number]["a"])
    assert "_valid" not in batches[0]


def test_padding_stays_marked_where_a_sample_before_it_is_skipped() -> None:
    with make(Damaged({17: "torn"}), on_error="skip", tail="pad", batch_size=8) as loader:
        *_, last = loader
    assert last["_indices"].tolist() == [16, 18, 19, 0, 1, 2, 3]
    assert last["_valid"].tolist() == [True] * 3 + [False] * 4


def test_a_batch_of_bad_samples_alone_is_empty() -> None:
    source = Damaged({4: "torn", 5: "text", 6: "unreadable", 7: "small"})
    with make(source, on_error="skip") as loader:
        batches = list(loader)
    assert [len(batch["a"]) for batch in batches] == [4, 0, 4, 4, 4]
    empty, other = batches[1], batches[0]
    assert empty["a"].shape == (0, 3, 16, 16) and empty["_indices"].shape == (0,)
    assert empty["label"].shape == (0,) and empty["name"] == []
    assert [getattr(value, "dtype", list) for value in empty.values()] == [
        getattr(value, "dtype", list) for value in other.values()
    ]
    with make(source, on_error="skip", batch_stages=[MixUp(7, crops=["a"]), CutMix(7, crops=["a"])]) as loader:
        assert [tuple(batch["label"].shape) for batch in loader][1] == (0, 7)


def test_resampled_samples_are_others_by_their_position(clean) -> None:
    with make(on_error="resample") as loader:
        batches = list(loader)
    again = make(on_error="resample", batch_size=7)
    with again:
        numbers = [n for batch in again for n in batch["_indices"].tolist()]
    taken = [n for batch in batches for n in batch["_indices"].tolist()]
    assert taken == numbers  # whatever the batch size
    assert not set(taken) & set(BAD) and len(taken) == 20
    assert [n for i, n in enumerate(taken) if i not in BAD] == [i for i in range(20) if i not in BAD]
    for number, crop in by_id(batches, "a").items():
        assert torch.equal(crop, clean[number]["a"])


def test_resampling_gives_up_where_all_are_bad() -> None:
    with (
        make(Damaged(dict.fromkeys(range(4), "torn"), 4), on_error="resample") as loader,
        pytest.raises(DecodeError, match="100 others in its place failed too"),
    ):
        next(iter(loader))


def test_positions_in_place_of_bad_ones_are_even() -> None:
    drawn = np.concatenate([resampled_positions(1, 0, np.arange(5000), attempt, 10) for attempt in range(4)])
    counts = np.bincount(drawn, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 1e-3
    assert not np.array_equal(
        resampled_positions(1, 0, np.arange(50), 0, 10), resampled_positions(1, 1, np.arange(50), 0, 10)
    )


def test_raising_names_them_and_goes_on(clean) -> None:
    seen, messages = [], []
    with make() as loader:
        batches = iter(loader)
        for _ in range(5):
            try:
                seen.append(next(batches)["_indices"].tolist())
            except (DecodeError, ReadError) as error:
                messages.append(str(error))
        assert loader.report().bad != ()
    assert seen == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert "sample 3 (memory:3)" in messages[0] and "memory:4" in messages[1] and "memory:9" in messages[2]


def test_the_report_names_each_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slipstream"), make(on_error="replace") as loader:
        for _ in range(2):
            list(loader)
        report = loader.report()
    assert [(number, path) for number, path, _ in report.bad] == [(n, f"memory:{n}") for n in BAD]
    reasons = {number: reason for number, _, reason in report.bad}
    assert reasons[9] == "no unreadable" and reasons[11] == "no label" and "CenterCrop" in reasons[4]
    assert (report.replaced, report.skipped, report.resampled) == (10, 0, 0)
    assert len(caplog.records) == len(BAD)
    assert "5 bad samples; 10 times replaced" in str(report)


@pytest.mark.parametrize("policy", ["raise", "replace", "skip", "resample"])
def test_a_source_that_gives_no_arrays_is_told(policy: str) -> None:
    class Plain(Damaged):
        def read(self, ids, field="image"):
            return [self.files[i] for i in ids]

    class Short(Damaged):
        def read(self, ids, field="image"):
            return super().read(ids, field)[1:]

    class Pixels(Damaged):
        def read(self, ids, field="image"):
            return [np.zeros((9, 8, 3), np.uint8) for _ in ids]

    wrong = (
        (Plain({}), "got a bytes: np.frombuffer"),
        (Short({}), "got 3:"),
        (Pixels({}), r"got uint8 of shape \[9, 8, 3\]"),
    )
    for source, got in wrong:
        with (
            make(source, on_error=policy) as loader,
            pytest.raises(TypeError, match=rf"{type(source).__name__}.read must give a list of 4 uint8 arrays.*{got}"),
        ):
            next(iter(loader))


@pytest.mark.parametrize("data", [b"", b"no image at all"])
@pytest.mark.parametrize("kind", ["litdata", "parquet"])
def test_a_first_sample_without_an_image_is_one_bad_sample(tmp_path: Path, kind: str, data: bytes) -> None:
    """The bytes of the first samples tell whether a field holds images: one of them must not end the run."""
    files = [data, *Damaged({}).files[:6]]
    if kind == "litdata":
        write(tmp_path / "set", plain([{"image": each, "path": f"{n}"} for n, each in enumerate(files)]))
        place = tmp_path / "set"
    else:
        place = tmp_path / "set.parquet"
        rows = [{"image": {"bytes": each, "path": None}, "path": f"{n}"} for n, each in enumerate(files)]
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), place)
    with SlipstreamLoader(
        SlipstreamDataset(place), 4, pipelines={"image": CROPS}, on_error="replace", device="cpu", verbose=False
    ) as loader:
        assert [batch["_valid"].tolist() for batch in loader] == [[False, True, True, True], [True] * 3]
        assert [number for number, _, _ in loader.report().bad] == [0]


@pytest.mark.parametrize(("kind", "value"), [("int", 5), ("float", 0.5), ("bool", True)])
def test_a_number_that_is_missing_makes_a_bad_sample(kind: str, value) -> None:
    """Not a list in place of that batch's tensor, which would end the training step, or MixUp."""

    class Unlabelled(Damaged):
        def __init__(self) -> None:
            super().__init__({}, 10)
            self.fields = {"image": "image", "label": kind, "text": "str"}

        def values(self, ids, field) -> list[Any]:
            return [None if i in (5, 7) else value if field == "label" else "" for i in ids]

    mixing = [MixUp(7, crops=["a"])] if kind == "int" else []
    with make(Unlabelled(), on_error="skip", batch_stages=mixing) as loader:
        batches = list(loader)
        assert [len(batch["label"]) for batch in batches] == [4, 2, 2]
        assert all(isinstance(batch["label"], torch.Tensor) for batch in batches)
        reason = "'label' is missing; exclude_fields=['label'] leaves it unread"
        assert loader.report().bad == tuple((n, f"memory:{n}", reason) for n in (5, 7))
    with make(Unlabelled(), on_error="replace") as loader:
        batches = list(loader)
        assert batches[1]["_valid"].tolist() == [True, False, True, False]
        assert len({batch["label"].dtype for batch in batches}) == 1
    with make(Unlabelled()) as loader:
        batches = iter(loader)
        next(batches)
        with pytest.raises(ReadError, match=r"sample 5 \(memory:5\): 'label' is missing.*\n.*sample 7 "):
            next(batches)
    with make(Unlabelled(), exclude_fields=["label"]) as loader:
        texts = [text for batch in loader for text in batch["text"]]
    assert texts == [None if n in (5, 7) else "" for n in range(10)]


def test_bad_policies_are_refused() -> None:
    with pytest.raises(
        ValueError, match="on_error must be one of 'raise', 'replace', 'skip', 'resample', got 'ignore'"
    ):
        make(on_error="ignore")
