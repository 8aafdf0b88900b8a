"""Damaged images that are there in part: refused, or grey for the rest; Pillow's switch stays as its user set it."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from decode_samples import assert_equal, by_pillow, decode, encode, jpegs, make_decoder, picture, pixels
from own_source import ImageSource
from PIL import Image, ImageFile

from slipstream import DecodeError, SlipstreamDataset, SlipstreamLoader, UnavailableError
from slipstream.decode_pillow import decode_with_pillow

SIZE = (160, 120)


def broken(data: np.ndarray) -> np.ndarray:
    """With a marker in the middle of the coded data that ends libjpeg's work."""
    torn = data.copy()
    torn[len(torn) * 2 // 3 :][:2] = 0xFF, 0x29
    return torn


def damaged() -> dict[str, np.ndarray]:
    files = {name: encode(picture(5, SIZE), **options) for name, options in JPEGS.items()}
    cut = {f"{name}, cut": data[: len(data) * 2 // 3] for name, data in files.items()}
    torn = {
        f"{name}, torn": broken(data) for name, data in files.items() if name != "restarts"
    }  # those go on behind it
    others = {format: encode(picture(5, SIZE), format) for format in ("PNG", "BMP", "TIFF")}
    return cut | torn | {f"{name}, cut": data[: len(data) * 2 // 3] for name, data in others.items()}


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0, "quality": 95},
    "restarts": {"restart_marker_blocks": 4},
}


def by_lenient_pillow(data: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | None:
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        try:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except Exception:
            return None


@pytest.mark.parametrize("name", damaged())
def test_grey_is_what_pillow_makes_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = damaged()[name]
    good = jpegs(3)
    with pytest.raises(Exception):  # noqa: B017  (each format has its own)
        decode_with_pillow(data)
    strict, lenient = make_decoder(), make_decoder(truncated="grey")
    with pytest.raises(DecodeError) as caught:
        decode(strict, [good[0], data, *good[1:]])
    expected = by_lenient_pillow(data, monkeypatch)
    if expected is None:  # Pillow knows no half TIFFs
        with pytest.raises(DecodeError):
            decode(lenient, [data])
    else:
        partial: dict[int, str] = {}
        batch = lenient.decode([good[0], data, *good[1:]], range(4), str, partial=partial)
        assert_equal(pixels(batch), [by_pillow(good[0]), expected, *map(by_pillow, good[1:])])
        assert partial == {1: caught.value.failures[0][2]}
        # Something is there, but of a progressive one whose decoder gave up: Pillow has no row of it then.
        assert len(np.unique(expected.reshape(-1, 3), axis=0)) > (0 if name == "progressive, torn" else 100)
        assert_equal([decode_with_pillow(data, truncated="grey")], [expected])
    assert_equal(pixels(decode(lenient, good)), list(map(by_pillow, good)))
    strict.close()
    lenient.close()


def test_what_is_no_image_at_all_fails_either_way() -> None:
    decoder = make_decoder(truncated="grey", max_pixels=50 * 50)
    partial: dict[int, str] = {}
    bad = [np.frombuffer(b"no image", np.uint8), np.empty(0, np.uint8), encode(picture(0, (51, 50)))]
    with pytest.raises(DecodeError) as caught:
        decoder.decode([*bad, *jpegs(1)], range(4), str, partial=partial)
    assert [row for row, _, _ in caught.value.failures] == [0, 1, 2]
    assert "max_pixels" in caught.value.failures[2][2]
    assert partial == {}
    decoder.close()


@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("ours", ["fail", "grey"])
def test_no_other_thread_sees_the_switch_change(users: bool, ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", users)
    seen: dict[str, bool] = {}
    load = Image.init

    def look() -> None:
        def other() -> None:
            seen["other"] = bool(ImageFile.LOAD_TRUNCATED_IMAGES)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        seen["here"] = bool(ImageFile.LOAD_TRUNCATED_IMAGES)
        load()

    data = encode(picture(5, SIZE))[:-500]
    with monkeypatch.context() as patched:
        patched.setattr(Image, "init", look)
        if ours == "grey":
            decode_with_pillow(data, truncated="grey")
        else:
            with pytest.raises(OSError, match="truncated"):  # also where the user has set it
                decode_with_pillow(data)
    assert seen == {"other": users, "here": ours == "grey"}
    assert ImageFile.LOAD_TRUNCATED_IMAGES is users


def test_a_switch_that_is_set_meanwhile_stays_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    load = Image.init

    def look() -> None:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        load()

    with monkeypatch.context() as patched:
        patched.setattr(Image, "init", look)
        decode_with_pillow(encode(picture()))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_decode_side_by_side_and_leave_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pack` does: one at a time, its threads would decode no faster than one of them."""
    meeting, begin = threading.Barrier(2, timeout=20), Image.open
    before = [*warnings.filters]

    def together(*args, **options):
        meeting.wait()
        try:
            warnings.warn("large", Image.DecompressionBombWarning, stacklevel=1)
            return begin(*args, **options)
        finally:
            meeting.wait()

    data = encode(picture(5, SIZE))[:-500]
    with monkeypatch.context() as patched, warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("error")
        patched.setattr(Image, "open", together)
        strict, lenient = (pool.submit(decode_with_pillow, data, truncated=how) for how in ("fail", "grey"))
        assert lenient.result().shape == (*SIZE[::-1], 3)
        with pytest.raises(OSError, match="truncated"):
            strict.result()
        with pytest.raises(UserWarning):
            warnings.warn("still an error", stacklevel=1)
    assert warnings.filters == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_threads_that_want_either_get_what_they_want() -> None:
    data = encode(picture(5, SIZE))[:-500]
    expected = decode_with_pillow(data, truncated="grey")
    wrong: list[str] = []

    def work(truncated: str) -> None:
        for _ in range(50):
            try:
                got = decode_with_pillow(data, truncated=truncated)
            except OSError:
                got = None
            if (got is None) != (truncated == "fail") or (got is not None and not np.array_equal(got, expected)):
                wrong.append(truncated)

    threads = [threading.Thread(target=work, args=(truncated,)) for truncated in ("fail", "grey") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Source(ImageSource):
    """Six images, of which the third is cut off, and the fifth no image."""

    def __init__(self) -> None:
        self.files = [encode(picture(i, SIZE)) for i in range(6)]
        self.files[2] = self.files[2][: len(self.files[2]) // 2]
        self.files[4] = np.frombuffer(b"nothing", np.uint8)

    def __len__(self) -> int:
        return 6

    def read(self, ids, field="image"):
        return [self.files[int(i)] for i in ids]


@pytest.mark.parametrize("policy", ["raise", "replace", "skip", "resample"])
def test_a_loader_hands_them_out_and_reports_them(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"batch_size": 2, "device": "cpu", "verbose": False, "on_error": policy, "truncated": "grey"}
    images, failed = {}, 0
    with (
        caplog.at_level(logging.WARNING, "slipstream"),
        SlipstreamLoader(SlipstreamDataset(Source()), **options) as loader,
    ):
        for _ in range(2):
            batches = iter(loader)
            for _ in range(3):
                try:
                    batch = next(batches)
                except DecodeError as error:
                    failed += [number for number, _, _ in error.failures] == [4]
                    continue
                assert policy != "replace" or batch["_valid"].tolist() == [n != 4 for n in batch["_indices"].tolist()]
                images |= dict(zip(batch["_indices"].tolist(), batch["image"], strict=True))
        report = loader.report()
    expected = decode_with_pillow(Source().files[2], truncated="grey")
    np.testing.assert_array_equal(images[2].permute(1, 2, 0).numpy(), expected)
    assert failed == (2 if policy == "raise" else 0)
    assert [(number, path) for number, path, _ in report.partial] == [(2, "memory:2")]
    assert "truncated" in report.partial[0][2]
    assert [number for number, _, _ in report.bad] == [4]
    assert report.greyed >= 2  # resampling may come upon it too
    assert "1 samples there in part" in str(report) and "memory:2" in str(report)
    logged = [record.getMessage() for record in caplog.records if "memory:2" in record.getMessage()]
    assert len(logged) == 1 and logged[0].endswith("the rest is grey")


@pytest.mark.parametrize("policy", ["raise", "replace", "skip", "resample"])
def test_what_is_there_in_part_is_counted_once_for_a_batch_that_is_read_again(policy: str) -> None:
    class Failing(ImageSource):
        def __init__(self) -> None:
            self.fields, self.fails = {"image": "image", "label": "int"}, 2

        def __len__(self) -> int:
            return 4

        def read(self, ids, field="image"):
            data = encode(picture(0, (200, 150)))
            return [data[: len(data) // 2] if i == 1 else data for i in ids]

        def values(self, ids, field):
            self.fails -= 1
            if self.fails in (0, 1):
                raise UnavailableError("the table does not answer")
            return [int(i) for i in ids]

    options = {"device": "cpu", "verbose": False, "on_error": policy, "truncated": "grey"}
    with SlipstreamLoader(SlipstreamDataset(Failing()), 4, **options) as loader:
        batches = iter(loader)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                next(batches)
        assert next(batches)["label"].tolist() == [0, 1, 2, 3]
        assert loader.report().greyed == 1
        assert [number for number, _, _ in loader.report().partial] == [1]


def test_other_words_are_refused() -> None:
    match = "truncated must be one of 'fail', 'grey', got 'black'"
    with pytest.raises(ValueError, match=match):
        make_decoder(truncated="black")
    with pytest.raises(ValueError, match=match):
        decode_with_pillow(encode(picture()), truncated="black")
    with pytest.raises(ValueError, match=match):
        SlipstreamLoader(SlipstreamDataset(Source()), 2, device="cpu", verbose=False, truncated="black")
